"""How a model is spread over processes (FSDP2), and how it is used whole for a while.

The Trainer and Fabric shard alike: every decoder layer, then the root (embeddings, last norm,
head). Training gathers a layer at a time. Sampling would gather every layer for every token, so
`gathered` gathers all of them once, for the length of a pass, where a device has room for them;
where it has not, `uneven_calls` lets the processes go on in step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from sso_lightning.errors import InputError

ROOM = 0.8
"""Share of a device's free memory that gathered weights may take; keys and values need some too."""


def causal_lm(model: nn.Module) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was applied."""
    return isinstance(causal_lm(model), FSDPModule)


def shard(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    reshard_after_forward: bool = True,
    cpu_offload: bool = False,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Shard a policy in place with FSDP2: decoder layers, then the root. Twice is once.

    Adapters lie in the layers and are sharded with them. The sampling policy and the reference are
    the same weights, so there is nothing else to shard.

    Args:
        model: A transformers causal language model, wrapped by PEFT or not.
        mesh: One-dimensional mesh of the processes.
        reshard_after_forward: Free a layer's weights between its forward and its backward pass
            (ZeRO-3); False keeps them (ZeRO-2), which saves a gathering per step.
        cpu_offload: Keep shards, gradients and optimizer states in the host's memory.
        dtype: Type to compute in, where it is not that of the weights; gradients are summed in
            float32.

    Returns:
        The model.

    Raises:
        InputError: The weights are quantised.
    """
    root = causal_lm(model)
    if isinstance(root, FSDPModule):
        return model
    if any(not p.is_floating_point() for p in root.parameters()):
        raise InputError(
            "policy.quantize cannot be sharded: bitsandbytes keeps its weights in blocks that "
            "FSDP2 would cut; use trainer.strategy: ddp, or fsdp2 without policy.quantize"
        )
    mixed = MixedPrecisionPolicy(dtype, torch.float32) if dtype else MixedPrecisionPolicy()
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": mixed,
        "offload_policy": CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
        if cpu_offload
        else OffloadPolicy(),
    }
    for layer in root.get_decoder().layers:
        fully_shard(layer, reshard_after_forward=reshard_after_forward, **options)
    fully_shard(root, reshard_after_forward=False, **options)
    root.sso_reshard = reshard_after_forward
    return model


def full(value: Any) -> Any:
    """A tensor with all its shards; what is not sharded as it is. All processes call this."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def like(value: Tensor, own: Tensor) -> Tensor:
    """This process's shard of a whole tensor, laid out as `own` is; nothing is sent."""
    if not isinstance(own, DTensor):
        return value
    value = value.to(own.device, own.dtype)
    return distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)


def full_state(model: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """The state dict with whole tensors on the CPU. All processes of a sharded model call this.

    Args:
        model: Any model.
        keep: False takes part in the gathering and returns nothing, which saves the memory.
    """
    state: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}  # tied weights stay one tensor
    for name, value in model.state_dict().items():
        if isinstance(value, DTensor):
            if id(value) not in seen:
                whole = full(value.detach())
                seen[id(value)] = whole.cpu() if keep else whole[:0]
            value = seen[id(value)]
        state[name] = value
    return state if keep else {}


@contextmanager
def gathered(model: nn.Module, how: Literal["auto", "whole", "sharded"] = "auto") -> Iterator[None]:
    """Hold whole weights on every process for the length of the block, if there is room.

    The rule: weights in the type they are computed in, against `ROOM` of the memory that is free
    on the fullest device. A CPU always has room. Without gradient only.

    Args:
        model: Sharded or not; a model that is not is left alone.
        how: "whole" and "sharded" decide instead of the rule.
    """
    root: Any = causal_lm(model)
    if not isinstance(root, FSDPModule) or how == "sharded" or (how == "auto" and not _fits(root)):
        yield
        return
    parts = [part for part in cast(nn.Module, root).modules() if isinstance(part, FSDPModule)]
    reshards: bool = cast(Any, root).sso_reshard
    root.set_reshard_after_forward(False)
    for part in parts:
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
        root.set_reshard_after_forward(reshards)
        root.set_reshard_after_forward(False, recurse=False)


def _fits(root: FSDPModule) -> bool:
    """Whether every process has room for the whole weights."""
    parameters = list(cast(nn.Module, root).parameters())
    mesh = next(p.device_mesh for p in parameters if isinstance(p, DTensor))
    if mesh.device_type != "cuda":
        return True
    policy = cast(Any, root)._get_fsdp_state()._mp_policy
    size = sum(p.numel() * (policy.param_dtype or p.dtype).itemsize for p in parameters)
    free, _ = torch.cuda.mem_get_info()
    free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    fits = torch.tensor(int(size <= ROOM * free), device="cuda")
    dist.all_reduce(fits, dist.ReduceOp.MIN, group=mesh.get_group())
    return bool(fits)


@contextmanager
def uneven_calls(model: nn.Module) -> Iterator[None]:
    """Let every process call the model as often as it likes, without gradient.

    Weights that stay sharded are gathered in each call by all processes, so one that has no call
    to make takes part with an empty one until nobody has. Nothing else in the block may wait for
    another process. Without sharded weights this does nothing.
    """
    root = causal_lm(model)
    found = [p for p in root.parameters() if isinstance(p, DTensor)]
    if not isinstance(root, FSDPModule) or not found:
        yield
        return
    mesh, device = found[0].device_mesh, found[0].device_mesh.device_type

    def calling(active: bool) -> bool:
        count = torch.tensor(int(active), device=device)
        dist.all_reduce(count, group=mesh.get_group())
        return bool(count)

    module: Any = root
    # before FSDP2's own hook, which gathers the root's weights in the first call: a process that
    # makes no call would be asked whether it is done at the same time
    hook = module.register_forward_pre_hook(
        lambda *_: cast(None, calling(True) and None), prepend=True
    )
    try:
        yield
    finally:
        hook.remove()
        token = torch.zeros(1, 1, dtype=torch.int64, device=device)
        with torch.no_grad():
            while calling(False):
                module(input_ids=token, use_cache=False)
