"""The Trainer's strategy for sharded training: `trainer.strategy: fsdp2`.

Its checkpoints are those of any other run: whole tensors, only what is trained, the optimizer's own
numbering. So a run goes on with another number of processes, or without sharding.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from sso_lightning.checkpoint_files import read_checkpoint, write_shards
from sso_lightning.errors import InputError
from sso_lightning.sharding import full, like


class FSDP2Strategy(ModelParallelStrategy):
    """Weights, gradients and optimizer states are sharded over all processes (see `sharding`)."""

    def __init__(
        self,
        cpu_offload: bool = False,
        reshard_after_forward: bool = True,
        sharded_checkpoints: bool = False,
        timeout_minutes: float = 30.0,
    ) -> None:
        """Set the strategy up.

        Args:
            cpu_offload: Keep shards, gradients and optimizer states in the host's memory.
            reshard_after_forward: Free a layer's weights between its forward and its backward
                pass; False keeps them, which takes memory and saves time.
            sharded_checkpoints: Write a folder with a part per process, instead of one file that
                process 0 writes and whose tensors it gathers one after another.
            timeout_minutes: How long a collective of training waits for the other processes.
        """
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=sharded_checkpoints,
            timeout=timedelta(minutes=timeout_minutes),
        )
        self.cpu_offload = cpu_offload
        self.reshard_after_forward = reshard_after_forward

    @property
    def sharding(self) -> dict[str, Any]:
        """Arguments of `sharding.shard`."""
        mixed = self.precision_plugin.precision == "bf16-mixed"
        return {
            "cpu_offload": self.cpu_offload,
            "reshard_after_forward": self.reshard_after_forward,
            "dtype": torch.bfloat16 if mixed else None,
        }

    def _get_process_group_backend(self) -> str:
        backend = super()._get_process_group_backend()
        # the gradient norm of shards in the host's memory is summed there
        both = self.cpu_offload and backend == "nccl"
        return "cpu:gloo,cuda:nccl" if both else backend

    def setup_environment(self) -> None:
        """Use every process for data."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        """Refuse optimizers whose steps do not know of shards."""
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            if type(optimizer).__module__.startswith("bitsandbytes"):
                raise InputError(
                    f"model.optimizer: {type(optimizer).__name__} of bitsandbytes cannot step "
                    "sharded weights; with fsdp2 use torch.optim.AdamW (its states are sharded "
                    "too), or trainer.strategy: ddp"
                )

    def model_to_device(self) -> None:
        """Move what is not sharded; offloaded shards stay where they are."""
        assert self.model is not None
        if not self.cpu_offload:
            self.model.to(self.root_device)
            return
        for buffer in self.model.buffers():
            buffer.data = buffer.data.to(self.root_device)

    # ------------------------------------------------------------------ checkpoints

    @property
    def lightning_restore_optimizer(self) -> bool:
        """The trainer restores optimizers from what `load_checkpoint` gave, as with one process."""
        return True

    def _out(self, value: Any) -> Any:
        """A value of a checkpoint: sharded, or whole on process 0 and empty elsewhere."""
        if not isinstance(value, DTensor) or self._save_distributed_checkpoint:
            return value
        whole = full(value.detach())
        return whole.cpu() if self.is_global_zero else whole[:0].clone()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The weights that are trained; the rest is in the model's own folder."""
        assert self.lightning_module is not None
        frozen = {n for n, p in self.lightning_module.named_parameters() if not p.requires_grad}
        state = self.lightning_module.state_dict()
        return {name: self._out(value) for name, value in state.items() if name not in frozen}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state dict, in its own format."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer._optimizer
        state = optimizer.state_dict()
        state["state"] = {
            index: {key: self._out(value) for key, value in values.items()}
            for index, values in state["state"].items()
        }
        return state

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        """Write a file from process 0, or a folder from all."""
        path = Path(self.broadcast(filepath))
        if self._save_distributed_checkpoint:
            write_shards(checkpoint, path)
        else:
            super().save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a file (mapped, so that each process reads its part), or its part of a folder."""
        path = Path(self.broadcast(checkpoint_path))
        assert self.lightning_module is not None
        own = {f"state_dict/{n}": p for n, p in self.lightning_module.state_dict().items()}
        for index, optimizer in enumerate(self.optimizers):
            for number, parameter in enumerate(_parameters(optimizer)):
                own[f"optimizer/{index}/{number}"] = parameter
        if path.is_dir():
            return read_checkpoint(path, partial(_place, own))
        io: CheckpointIO = self.checkpoint_io
        content: dict[str, Any] = io.load_checkpoint(path)
        return content

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Copy each process's part."""
        assert self.lightning_module is not None
        stored = checkpoint["state_dict"]
        with torch.no_grad():
            for name, own in self.lightning_module.state_dict().items():
                if name in stored:
                    own.copy_(_part(stored[name], own))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give each optimizer its part."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = _parameters(optimizer)
            state["state"] = {
                index: {key: _part(value, parameters[index]) for key, value in values.items()}
                for index, values in state["state"].items()
            }
            optimizer.load_state_dict(state)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    """Parameters in the order of the optimizer's numbering."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _part(value: Any, own: Tensor) -> Any:
    """This process's part of a value that belongs to a weight, if it is laid out like that one."""
    whole = isinstance(value, Tensor) and not isinstance(value, DTensor)
    return like(value, own) if whole and value.shape == own.shape else value


def _place(own: dict[str, Tensor], name: str, size: torch.Size, dtype: torch.dtype) -> Tensor:
    """Where a stored tensor is read into: sharded as the weight that it belongs to."""
    weight = own.get(name if name.startswith("state_dict/") else name.rpartition("/")[0])
    if weight is None or weight.shape != size:
        return torch.empty(size, dtype=dtype)
    return torch.empty_like(weight, dtype=dtype)


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2 over all processes")
