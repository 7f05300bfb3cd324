"""The policy: load it, adapt it, quantise it, fingerprint it, save it.

One set of weights serves every role. The reference is never a second resident copy: its
log-probabilities are stored once per iteration by the scoring pass (see `pairs`). Where the
reference is the previous iteration, that pass runs the policy itself before it moves; where it
is the initial policy, LoRA switches the adapter off, and full fine-tuning loads the starting
weights for the length of the pass and frees them.
"""

from __future__ import annotations

import copy
import hashlib
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from sso_lightning.checkpoint_files import is_checkpoint, read_checkpoint
from sso_lightning.errors import InputError
from sso_lightning.sharding import full, full_state, gathered, is_sharded, like

POLICY, GENERATOR = "default", "generator"
"""Names of the adapters: the policy's is the one that PEFT calls so by itself."""


@dataclass
class LoRA:
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) on a frozen base.

    Attributes:
        r: Rank.
        alpha: Scale; the update is multiplied by alpha / r.
        dropout: Dropout on the adapter's input while training.
        target_modules: Module names to adapt, or "all-linear" (every linear layer but the head).
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"


@dataclass
class PolicyConfig:
    """Which model is trained, and how it is held in memory.

    Attributes:
        path: Folder or hub name of a causal language model with a chat template.
        adapter: Folder of a PEFT adapter that is merged into the base before training.
        lora: Train LoRA adapters instead of all weights.
        quantize: Load the frozen base in 4 bit (NF4) or 8 bit with bitsandbytes; needs lora.
        dtype: Type of the weights; "auto" takes what the checkpoint was saved in.
        attention: Attention implementation of transformers; None lets it choose.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Run code that comes with the model. Off by default.
        chat_template: File of a Jinja chat template that replaces the tokenizer's own.
        system_role: How principles enter the prompt: in the system role, folded into the last
            user turn, or "auto" to probe the template.
        template_kwargs: Further variables for the chat template, e.g. {enable_thinking: false}.
    """

    path: str
    adapter: str | None = None
    lora: LoRA | None = None
    quantize: Literal["4bit", "8bit"] | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attention: str | None = None
    gradient_checkpointing: bool = False
    revision: str | None = None
    trust_remote_code: bool = False
    chat_template: str | None = None
    system_role: Literal["auto", "system", "fold"] = "auto"
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raise one InputError that names every setting which contradicts another."""
        problems = []
        if self.quantize and not self.lora:
            problems.append(
                "policy.quantize needs policy.lora (a quantised base cannot be trained)"
            )
        if self.quantize and self.adapter:
            problems.append("policy.adapter cannot be merged into a quantised base; merge it first")
        if self.lora:
            problems += [
                f"policy.lora.{key} must be at least 1, got {value}"
                for key, value in {"r": self.lora.r, "alpha": self.lora.alpha}.items()
                if value < 1
            ]
            if not 0 <= self.lora.dropout < 1:
                problems.append(f"policy.lora.dropout must be in [0, 1), got {self.lora.dropout}")
        if self.chat_template and not Path(self.chat_template).is_file():
            problems.append(f"policy.chat_template: no file {self.chat_template}")
        if _looks_local(self.path) and not Path(self.path).is_dir():
            problems.append(f"policy.path: no folder {self.path}")
        if problems:
            raise InputError("; ".join(problems))


def _looks_local(path: str) -> bool:
    """Whether a path can only mean a folder: hub names are `name` or `owner/name`."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path).exists()


def _from_hub(key: str, what: str, path: str, load: Any) -> Any:
    """Call a transformers loader; a path that cannot be loaded becomes one clear line."""
    try:
        return load()
    except torch.OutOfMemoryError:
        raise
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{key}: cannot load the {what} of {path}: its weights are a damaged pickle or one "
            "that holds code; convert them to safetensors"
        ) from error
    except Exception as error:  # damaged files make the loaders raise anything, a bare one too
        sentence = " ".join(str(error).split()).partition(". ")[0]
        raise InputError(f"{key}: cannot load the {what} of {path}: {sentence[:200]}") from error


def load_tokenizer(config: PolicyConfig) -> Any:
    """The tokenizer of the policy, with the chat template of the settings."""
    from transformers import AutoTokenizer

    config.check()
    tokenizer = _from_hub(
        "policy.path",
        "tokenizer",
        config.path,
        lambda: AutoTokenizer.from_pretrained(
            config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
        ),
    )
    if config.chat_template:
        try:
            tokenizer.chat_template = Path(config.chat_template).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            file = config.chat_template
            raise InputError(f"policy.chat_template: {file} is not UTF-8") from error
        if not tokenizer.chat_template.strip():
            raise InputError(f"policy.chat_template: {config.chat_template} is empty")
    return tokenizer


def vocabulary_size(config: PolicyConfig) -> int | None:
    """Number of tokens that the model has embeddings for, as its config says; None if it does not.

    Read without the weights, so that token ids can be checked before those are loaded.
    """
    size: int | None = getattr(_config(config).get_text_config(), "vocab_size", None)
    return size


def _config(config: PolicyConfig) -> Any:
    from transformers import AutoConfig

    return _from_hub(
        "policy.path",
        "config",
        config.path,
        lambda: AutoConfig.from_pretrained(
            config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
        ),
    )


def _check_reward(config: PolicyConfig) -> None:
    """Refuse what cannot become a reward model, where transformers would speak of its own parts."""
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as KNOWN

    found = _config(config)
    if type(found) not in KNOWN and not config.trust_remote_code:
        raise InputError(
            f"policy.path: transformers has no sequence classifier of {found.model_type!r} models"
        )
    is_classifier = any("SequenceClassification" in name for name in found.architectures or ())
    if is_classifier and found.num_labels != 1:
        raise InputError(
            f"policy.path: {config.path} tells {found.num_labels} labels apart; a reward model has "
            "one (num_labels)"
        )


def load_model(
    config: PolicyConfig, *, trainable: bool = True, kind: Literal["policy", "reward"] = "policy"
) -> Any:
    """The policy's model: base, merged adapter, quantisation and fresh LoRA as configured.

    Args:
        config: What to load.
        trainable: False loads the starting weights only, frozen and without LoRA.
        kind: A causal language model, or a reward model: a sequence classifier with one label.

    Returns:
        A transformers model, PEFT-wrapped if `config.lora` is set.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    loader = AutoModelForCausalLM if kind == "policy" else AutoModelForSequenceClassification
    config.check()
    options: dict[str, Any] = {
        "revision": config.revision,
        "trust_remote_code": config.trust_remote_code,
        "dtype": config.dtype if config.dtype == "auto" else getattr(torch, config.dtype),
    }
    if config.attention:
        options["attn_implementation"] = config.attention
    if config.quantize:
        # a reward model's head is trained
        options["quantization_config"] = _quantization(
            config, ["score"] if kind == "reward" else None
        )
    if kind == "reward":
        _check_reward(config)
        options["num_labels"] = 1
    model = _from_hub(
        "policy.path",
        "model",
        config.path,
        lambda: loader.from_pretrained(config.path, **options),
    )
    for module in model.modules():
        # On CPUs with bfloat16 products bitsandbytes would lay 4-bit weights out anew, in place, at
        # the first call in eval mode: that has no gradient, and fails where a block spans rows.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if config.adapter:
        from peft import PeftConfig, PeftModel

        def merged() -> Any:
            found = PeftConfig.from_pretrained(config.adapter)
            if kind == "reward":  # a policy's adapter fits too, but its wrapper would not
                found.task_type = None
            return PeftModel.from_pretrained(model, config.adapter, config=found)

        model = _from_hub("policy.adapter", "adapter", config.adapter, merged).merge_and_unload()
    if not trainable:
        return model.requires_grad_(False).eval()
    return make_trainable(model, config, "CAUSAL_LM" if kind == "policy" else "SEQ_CLS")


def make_trainable(model: Any, config: PolicyConfig, task: str = "CAUSAL_LM") -> Any:
    """Add LoRA and recomputation as configured to a base model, with or without real weights."""
    if config.lora:
        model = _add_lora(model, config.lora, task)
    if config.gradient_checkpointing:
        # renamed in transformers 5.2x; the old name goes in 6
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
        model.enable_input_require_grads()
    model.config.use_cache = False
    return model


def set_padding(model: Any, tokenizer: Any, pad_id: int) -> None:
    """Tell a reward model and its tokenizer, as they will be saved, what fills short rows."""
    model.config.get_text_config().pad_token_id = pad_id
    model.config.pad_token_id = pad_id
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id)
    tokenizer.padding_side = "right"


def _quantization(config: PolicyConfig, skip: list[str] | None = None) -> Any:
    from transformers import BitsAndBytesConfig

    if config.quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    compute = torch.float32 if config.dtype == "float32" else torch.bfloat16
    return BitsAndBytesConfig(
        load_in_4bit=True,
        llm_int8_skip_modules=skip,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def _add_lora(model: Any, lora: LoRA, task: str) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type=task,
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise InputError(f"policy.lora.target_modules: {' '.join(str(error).split())}") from error


def is_peft(model: nn.Module) -> bool:
    """Whether the model carries PEFT adapters."""
    return hasattr(model, "peft_config")


def add_generator(model: Any) -> None:
    """Give a LoRA policy a second adapter, the data generator's, equal to the policy's own."""
    model.add_adapter(GENERATOR, model.peft_config[POLICY])
    set_adapter_weights(model, GENERATOR, adapter_weights(model, POLICY))
    _keep_trainable(model)


def activate(model: Any, adapter: str) -> None:
    """Let one adapter speak."""
    if model.active_adapter != adapter:
        model.set_adapter(adapter)
        _keep_trainable(model)


def _keep_trainable(model: nn.Module) -> None:
    """PEFT freezes silent adapters; optimizers pass over them anyway, as they get no gradient."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(True)


@contextmanager
def speaking(model: Any, adapter: str) -> Iterator[Any]:
    """The model with one adapter active for the length of the block; alone, it always is."""
    if not is_peft(model) or len(model.peft_config) == 1:
        yield model
        return
    before = model.active_adapter
    activate(model, adapter)
    try:
        yield model
    finally:
        activate(model, before)


def adapter_weights(model: nn.Module, adapter: str) -> dict[str, torch.Tensor]:
    """A whole copy of an adapter's weights, by names that do not hold its own."""
    mark = f".{adapter}."
    return {
        name.replace(mark, ".*."): full(parameter.detach()).clone()
        for name, parameter in model.named_parameters()
        if "lora_" in name and mark in name
    }


def set_adapter_weights(model: nn.Module, adapter: str, weights: dict[str, torch.Tensor]) -> None:
    """Overwrite an adapter with what `adapter_weights` gave."""
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            parameter = own[name.replace(".*.", f".{adapter}.")]
            parameter.copy_(like(value, parameter))


@contextmanager
def initial_policy(model: Any, config: PolicyConfig) -> Iterator[Any]:
    """The policy as it was before any training, for the length of the block.

    With LoRA this is the same object with its adapter off; otherwise the starting weights are
    loaded from `config.path` onto the model's device and freed at the end.
    """
    if is_peft(model):
        with model.disable_adapter():
            yield model
        _keep_trainable(model)
        return
    first = next(model.parameters())
    yield load_model(config, trainable=False).to(device=first.device, dtype=first.dtype)


def fingerprint(model: nn.Module) -> tuple[str, str]:
    """Short hashes of the base's and the active adapter's weights ("" without an adapter).

    Read from every tensor's name, shape and up to 4096 evenly spaced values: a training step
    changes it, moving to another device does not. All processes of a sharded model call this.
    """
    base, adapter = hashlib.sha256(), hashlib.sha256()
    found_adapter = False
    silent = set(getattr(model, "peft_config", ())) - {getattr(model, "active_adapter", "")}
    # asking a sharded model for its state dict would scatter weights that are gathered
    own = dict(model.named_parameters(remove_duplicate=False))
    state = own if is_sharded(model) else model.state_dict()
    for name, value in sorted(state.items()):
        digest = adapter if "lora_" in name else base
        if digest is adapter and any(f".{other}." in name for other in silent):
            continue
        found_adapter |= digest is adapter
        flat = full(value.detach()).reshape(-1)
        # a copy: numpy would pin the storage, which a sharded model frees
        sample = flat[:: max(1, flat.numel() // 4096)].to("cpu", copy=True)
        if sample.is_floating_point():
            sample = sample.float()
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(sample.contiguous().numpy().tobytes())
    return base.hexdigest()[:16], adapter.hexdigest()[:16] if found_adapter else ""


def save_policy(
    model: Any,
    tokenizer: Any,
    out: Path,
    *,
    merge: bool = False,
    writes: bool = True,
    adapter: str = POLICY,
) -> None:
    """Write a Hugging Face folder: weights or adapter, tokenizer and chat template.

    Args:
        model: The policy.
        tokenizer: Its tokenizer, saved with its chat template; None writes weights alone.
        out: Folder to write. It appears whole or not at all.
        merge: Fold the LoRA adapter into the base, so that `AutoModelForCausalLM` alone loads it.
            A quantised base is written as the numbers it stood for while the adapter was trained,
            in the type it computes in. The model in memory is left as it was.
        writes: False only takes part, as all processes of a sharded model must.
        adapter: Which one is meant, of several.
    """
    if merge and is_peft(model):
        with gathered(model, "whole"):
            if writes:
                _save(model, tokenizer, Path(out), merge=True, state={}, adapter=adapter)
        return
    state = full_state(model, keep=writes)
    if writes:
        _save(model, tokenizer, Path(out), merge=False, state=state, adapter=adapter)


def _save(
    model: Any,
    tokenizer: Any,
    out: Path,
    *,
    merge: bool,
    state: dict[str, torch.Tensor],
    adapter: str,
) -> None:
    partial = out.with_name(out.name + ".partial")
    _remove(partial)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror})") from error
    if merge:
        _save_merged(model, partial, adapter)
    elif is_peft(model):
        model.save_pretrained(partial, selected_adapters=[adapter], state_dict=state)
        if adapter != POLICY:  # PEFT gives all but its default adapter a folder of their own
            for path in (partial / adapter).iterdir():
                path.rename(partial / path.name)
            (partial / adapter).rmdir()
    else:
        model.save_pretrained(partial, state_dict=state)
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)
    _remove(out)
    partial.rename(out)


def _save_merged(model: Any, out: Path, adapter: str) -> None:
    """Write the base with an adapter in its weights; merging in place would round them."""
    from peft.tuners.lora import LoraLayer

    base = model.get_base_model()
    own = dict(base.named_parameters(remove_duplicate=False))
    # asking a sharded model for its state dict would scatter weights that are gathered
    found = own if is_sharded(model) else base.state_dict()
    copied = f".modules_to_save.{adapter}."  # a reward model's head, trained beside the adapter
    state = {
        name.replace(".base_layer.", ".").replace(copied, "."): value.detach()
        for name, value in found.items()
        if "lora_" not in name
        and ".weight." not in name
        and ".original_module." not in name
        and not name.endswith(".SCB")
    }
    with torch.no_grad():
        for name, layer in base.named_modules():
            if isinstance(layer, LoraLayer):
                weight = _dense_weight(layer.get_base_layer())
                delta = layer.get_delta_weight(adapter)
                state[f"{name}.weight"] = (weight + delta.to(weight.dtype)).to(base.dtype)
            elif _is_quantised(layer) and not name.endswith(".base_layer"):
                state[f"{name}.weight"] = _dense_weight(layer).to(base.dtype)
    if getattr(base.config, "quantization_config", None) is not None:
        config = copy.deepcopy(base.config)
        del config.quantization_config
        with torch.device("meta"):  # knows how to write itself, and needs no weights for it
            plain = type(base)(config).to(base.dtype)
        if hasattr(base, "generation_config"):  # a reward model has none
            plain.generation_config = base.generation_config
        base = plain
    base.save_pretrained(out, state_dict=state)


def _dense_weight(layer: Any) -> torch.Tensor:
    """A linear layer's weight as plain numbers."""
    from peft.utils.integrations import dequantize_bnb_weight

    if not _is_quantised(layer):
        return cast(torch.Tensor, layer.weight)
    # PEFT's function for modules would replace an 8-bit weight by one that has lost its scales
    dense = dequantize_bnb_weight(layer.weight, state=getattr(layer, "state", None))
    return cast(torch.Tensor, dense)


def _is_quantised(layer: nn.Module) -> bool:
    """Whether a layer's weights are bitsandbytes' own."""
    return type(getattr(layer, "weight", None)).__name__ in ("Params4bit", "Int8Params")


def _remove(folder: Path) -> None:
    import shutil

    if folder.exists():
        shutil.rmtree(folder)


def export_checkpoint(
    checkpoint: Path, out: Path, *, merge: bool = False, generator: bool = False
) -> None:
    """Turn a training checkpoint into a Hugging Face folder.

    Args:
        checkpoint: A `.ckpt` file or folder of a run.
        out: Folder to write; must not exist yet.
        merge: Fold the LoRA adapter into the base.
        generator: Export the data generator of a run that has one, instead of its policy.

    Raises:
        InputError: If the file is missing, is not a checkpoint of this library, has no generator
            but should, or `out` exists.
    """
    if not is_checkpoint(checkpoint):
        raise InputError(f"no checkpoint {checkpoint}")
    if out.exists():
        raise InputError(f"{out} exists already; choose another folder")
    blocking = next((parent for parent in out.parents if parent.is_file()), None)
    if blocking:
        raise InputError(f"{out} cannot be made: {blocking} is a file")
    content = read_checkpoint(checkpoint)
    if "policy" not in content:
        raise InputError(f"{checkpoint} is damaged or not a checkpoint of this library")
    settings, state = content["policy"], content["state_dict"]
    try:
        lora = settings.pop("lora")
        config = PolicyConfig(**settings, lora=LoRA(**lora) if lora else None)
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(
            f"{checkpoint} was written by another version of this library: its settings of the "
            "policy are others"
        ) from error
    kind = content.get("kind", "policy")
    model, tokenizer = load_model(config, kind=kind), load_tokenizer(config)
    if kind == "reward":
        set_padding(model, tokenizer, content["pad_id"])
    own = {name.removeprefix("policy."): value for name, value in state.items()}
    kept, left = (GENERATOR, POLICY) if generator else (POLICY, GENERATOR)
    if generator and not any(f".{GENERATOR}." in name for name in own):
        raise InputError(f"{checkpoint} holds no generator")
    if lora:
        own = {
            name.replace(f".{kept}.", f".{POLICY}."): value
            for name, value in own.items()
            if f".{left}." not in name
        }
    expected = {name for name, p in model.named_parameters() if p.requires_grad}
    _, unexpected = model.load_state_dict(own, strict=False)
    if unexpected or not expected <= own.keys():
        raise InputError(f"{checkpoint} does not fit the model at {config.path}")
    save_policy(model, tokenizer, out, merge=merge)
