"""What 4-bit and 8-bit bases and 8-bit moments save, and how far they are from the whole model.

    python benchmarks/quantisation.py --sandbox sandbox/model

Two parts. Memory: a Qwen2 architecture with random weights takes a step under every
combination of weights and optimizer that the library offers; bytes are counted from the tensors
that are there. Times are left out: a CPU without bfloat16 arithmetic says nothing about a GPU's.
Fidelity: the sandbox's trained
model and its quantised forms read the same texts; the divergence KL(whole || quantised) is the
mean over all tokens, in nats. No training follows the quantisation there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from sso_lightning.policy import LoRA, PolicyConfig, load_model
from sso_lightning.scoring import Tree, response_logps

SHAPE = {
    "vocab_size": 8000,
    "hidden_size": 256,
    "intermediate_size": 1344,  # as wide against the rest as in Qwen2-7B
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
WAYS = {
    # name: lora, quantize, type of the frozen or trained weights, optimizer
    "all weights, AdamW": (False, None, "float32", "torch.optim.AdamW"),
    "all weights, AdamW8bit": (False, None, "float32", "bitsandbytes.optim.AdamW8bit"),
    "LoRA on float32": (True, None, "float32", "torch.optim.AdamW"),
    "LoRA on bfloat16": (True, None, "bfloat16", "torch.optim.AdamW"),
    "LoRA on 8 bit": (True, "8bit", "bfloat16", "torch.optim.AdamW"),
    "LoRA on 4 bit": (True, "4bit", "bfloat16", "torch.optim.AdamW"),
    "LoRA on 4 bit, AdamW8bit": (True, "4bit", "bfloat16", "bitsandbytes.optim.AdamW8bit"),
}


def tensors_in(value: Any) -> list[torch.Tensor]:
    """All tensors in nested dicts, and in bitsandbytes' states of quantised weights."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in tensors_in(item)]
    return []


def size(tensors: list[torch.Tensor]) -> int:
    """Bytes of different storages."""
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )


def weight_bytes(model: torch.nn.Module) -> int:
    """Weights with the scales of quantised ones."""
    found = [*model.parameters(), *model.buffers()]
    for weight in model.parameters():
        state = getattr(weight, "quant_state", None)
        found += tensors_in(state.as_dict()) if state is not None else []
        found += [scales] if (scales := getattr(weight, "SCB", None)) is not None else []
    return size(found)


class Way:
    """A model that takes steps in one of the ways."""

    def __init__(self, folder: Path, lora: bool, quantize: str | None, dtype: str, optimizer: str):
        torch.manual_seed(0)
        made = PolicyConfig(
            str(folder), lora=LoRA() if lora else None, quantize=quantize, dtype=dtype
        )
        self.model = load_model(made).train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        module, _, name = optimizer.rpartition(".")
        self.optimizer = getattr(__import__(module, fromlist=[name]), name)(self.trained, lr=1e-5)

    def step(self, trees: list[Tree]) -> None:
        """Forward, backward and the optimizer's step."""
        with torch.autocast("cpu", torch.bfloat16):
            logps, _ = response_logps(self.model, trees)
        (-logps.mean()).backward()
        self.gradients = size([p.grad for p in self.trained if p.grad is not None])
        self.optimizer.step()
        self.optimizer.zero_grad()

    def row(self) -> dict[str, int]:
        """Bytes."""
        return {
            "weights": weight_bytes(self.model),
            "gradients": self.gradients,
            "moments": size(tensors_in(self.optimizer.state_dict()["state"])),
        }


def memory() -> dict[str, dict[str, int]]:
    """Every way's bytes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    draw = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(0, SHAPE["vocab_size"], (count,), generator=draw).tolist()

    trees = [Tree(tokens(60), [tokens(40), tokens(40)]) for _ in range(3)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **SHAPE)).save_pretrained(
            folder
        )
        rows = {}
        for name, settings in WAYS.items():
            way = Way(folder, *settings)
            way.step(trees)
            rows[name] = way.row()
    return rows


def fidelity(model: Path) -> dict[str, float]:
    """Mean divergence of each quantised form from the whole model, in nats per token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = (model.parent / "validation.jsonl").read_text().splitlines()[:64]
    texts = [json.loads(row)["messages"] for row in rows]
    ids = [
        tokenizer.apply_chat_template(t, add_generation_prompt=True, return_dict=True)
        for t in texts
    ]

    def read(quantize: str | None, dtype: str) -> torch.Tensor:
        lora = LoRA(r=1) if quantize else None  # which starts as nothing
        loaded = load_model(
            PolicyConfig(str(model), lora=lora, quantize=quantize, dtype=dtype)
        ).eval()
        with torch.no_grad():
            parts = [loaded(torch.tensor([i["input_ids"]])).logits[0] for i in ids]
        return torch.cat(parts).double().log_softmax(-1)

    whole = read(None, "float32")
    forms = {
        "bfloat16": (None, "bfloat16"),
        "8 bit": ("8bit", "float32"),
        "4 bit": ("4bit", "float32"),
    }
    return {
        name: float((whole.exp() * (whole - read(*form))).sum(-1).mean())
        for name, form in forms.items()
    }


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description="Measures what quantisation saves and costs.")
    parser.add_argument("--sandbox", type=Path, help="the sandbox's model, for the second part")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = memory()
    first = next(iter(rows.values()))
    print("| way | weights MiB | gradients | moments | together | of the first |")
    print("|---|---|---|---|---|---|")
    for name, row in rows.items():
        parts = [row[key] / 2**20 for key in ("weights", "gradients", "moments")]
        whole = sum(first[key] for key in ("weights", "gradients", "moments")) / 2**20
        cells = [
            *(f"{part:.1f}" for part in parts),
            f"{sum(parts):.1f}",
            f"{sum(parts) / whole:.2f}",
        ]
        print("|", " | ".join([name, *cells]), "|")
    divergence = fidelity(given.sandbox) if given.sandbox else {}
    for name, value in divergence.items():
        print(f"{name}: KL {value:.2e} nats per token")
    if given.json:
        given.json.write_text(
            json.dumps({"memory": rows, "divergence": divergence}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
