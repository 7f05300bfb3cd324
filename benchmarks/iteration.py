"""A whole iteration on random weights: seconds, memory, tokens/s and utilisation of each phase.

    python benchmarks/iteration.py --model qwen2-7b --queries 64 --json iteration.json
    python benchmarks/iteration.py --model tiny --device cpu --queries 8     # tries the program

Makes a model folder of the architecture's real sizes with random weights and a tokenizer of
bytes, then runs `sso-lightning fit` on it, in a process of its own for each way, as a user would:
the 2024 objective, predefined principles, one iteration. A callback of this file notes when the
phases begin and end and how much memory each held.

| way | weights | trained |
|---|---|---|
| `lora` | bfloat16, frozen | float32 adapters of rank 16, AdamW |
| `qlora` | NF4, frozen | float32 adapters of rank 16, paged 8-bit AdamW |
| `full` | bfloat16 | all of them, 8-bit AdamW (their cost; small steps are rounded away) |

Random weights never end an answer, so each has `--new-tokens` tokens. Utilisation (MFU) counts the
products that cannot be left out (no recomputation) against the matmul rate measured on the spot:
prompts once, the head where a token is scored, a backward pass of twice the forward one, or once
under frozen weights. Sampling is bound by reads, so its share of the peak is small by nature.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from step import MODELS as STEP_MODELS
from step import Settings, make_config, matmul_rate

from sso_lightning import pairs
from sso_lightning.callbacks import PairCallback, RegeneratePairs
from sso_lightning.records import CONTEXTS, RESPONSES, Record

MODELS = {
    # vocabulary, width, layers, MLP width, heads, key heads
    "tiny": (2000, 64, 2, 128, 4, 2),
    **{name: sizes for name, sizes in STEP_MODELS.items() if name.startswith("qwen2")},
    "llama31-8b": (128256, 4096, 32, 14336, 32, 8),
}
WAYS = {
    "lora": ("bf16-mixed", None, True, "torch.optim.AdamW"),
    "qlora": ("bf16-mixed", "4bit", True, "bitsandbytes.optim.PagedAdamW8bit"),
    "full": ("bf16-true", None, False, "bitsandbytes.optim.AdamW8bit"),
}
TEMPLATE = (
    "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)


def make_model(folder: Path, name: str, device: str) -> None:
    """Write random weights in bfloat16 and a tokenizer that has a text for every id."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    vocabulary, config = MODELS[name][0], make_config(MODELS[name], max_position_embeddings=32768)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    # bytes for the text that is read, made-up words for the other ids that may be sampled
    words = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"w{i}" for i in range(len(words), vocabulary)]
    inner = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def settings(given: argparse.Namespace, model: Path, root: Path, way: str) -> dict[str, Any]:
    """The YAML of a way."""
    precision, quantize, lora, optimizer = WAYS[way]
    return {
        "trainer": {
            "default_root_dir": str(root),
            "max_epochs": 1,
            "accelerator": "gpu" if given.device == "cuda" else "cpu",
            "devices": 1,
            "precision": precision,
            "accumulate_grad_batches": given.accumulate,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [{"class_path": "iteration.Clock"}],
        },
        "model": {
            "policy": {
                "path": str(model),
                "dtype": "bfloat16",
                "quantize": quantize,
                "gradient_checkpointing": True,
                **({"lora": {"r": 16, "alpha": 32}} if lora else {}),
            },
            "objective": {
                "class_path": "SelfSteering",
                "init_args": {"base": {"class_path": "IPO", "init_args": {"beta": 0.2}}},
            },
            "optimizer": {"class_path": optimizer, "init_args": {"lr": 1e-6}},
            "max_tokens": given.max_tokens,
        },
        "data": {"queries": str(model / "queries.jsonl"), "batch_size": given.batch_size},
        "pairs": {
            "sampler": {
                "class_path": given.sampler,
                "init_args": {"max_new_tokens": given.new_tokens, "max_rows": given.rows},
            },
            "principles": {"class_path": "PredefinedPrinciples", "init_args": {"pick": "random"}},
            "shard_size": given.queries,
        },
        "guard": {"max_truncated": 1.0, "max_repeating": 1.0},
        "checkpoint": {"keep": 0},
    }


# ------------------------------------------------------------------------------- in the run itself


class Clock(PairCallback):
    """Notes seconds and memory of sampling, scoring and training in `clock.json` of the run."""

    def __init__(self) -> None:
        self.phases: dict[str, dict[str, float]] = {}
        self._ends: Callable[[], None] = lambda: None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Measure what the run is about to call."""
        (maker,) = (c for c in trainer.callbacks if isinstance(c, RegeneratePairs))
        sampler = maker.sampler
        sampler.sample = self._timed("sample", sampler.sample)
        pairs.score = self._timed("score", pairs.score)

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            end = self._begin(name)
            result = call(*args, **kwargs)
            end()
            return result

        return timed

    def _begin(self, name: str) -> Callable[[], None]:
        gpu = torch.cuda.is_available()
        if gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()

        def end() -> None:
            if gpu:
                torch.cuda.synchronize()
            phase = self.phases.setdefault(name, {"seconds": 0.0, "peak_mib": 0.0})
            phase["seconds"] += time.perf_counter() - started
            if gpu:
                peak = torch.cuda.max_memory_allocated() / 2**20
                phase["peak_mib"] = max(phase["peak_mib"], peak)

        return end

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Training begins: the pairs are there."""
        self._ends = self._begin("train")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write what was noted."""
        self._ends()
        device = pl_module.device.type
        rate = matmul_rate(
            Settings(device, "bfloat16" if device == "cuda" else "float32", False, 1)
        )
        found = {"phases": self.phases, "matmul": rate, "device": device}
        path = Path(trainer.default_root_dir) / "clock.json"
        path.write_text(json.dumps(found))


# ------------------------------------------------------------------------------- what it amounts to


def work(model: str, records: list[Record], frozen: bool) -> dict[str, dict[str, float]]:
    """Tokens and FLOPs of each phase, by closed form."""
    vocabulary, width, layers, mlp, heads, key_heads = MODELS[model]
    head_width = width // heads
    body = 2 * layers * width * (2 * width + 2 * key_heads * head_width + 3 * mlp)
    head = 2 * width * vocabulary

    def attention(seen: float) -> float:
        return 4 * layers * width * seen

    sample: dict[str, float] = {"tokens": 0, "flops": 0}
    score: dict[str, float] = {"tokens": 0, "flops": 0}
    wanted = {"query": RESPONSES, "good": ("good", "bad"), "bad": RESPONSES}  # as pairs.SCORED
    trained = {"query": ("good", "bad"), "good": ("good", "bad"), "bad": ("original", "good")}
    train: dict[str, float] = {"tokens": 0, "flops": 0}
    for record in records:
        prompts = {c: len(record.prompt_ids[c]) for c in CONTEXTS}
        answers = {r: len(record.response_ids[r]) for r in RESPONSES}
        for response, context in pairs.SAMPLED_FROM.items():
            p, n = prompts[context], answers[response]
            sample["tokens"] += n
            sample["flops"] += body * (p + n - 1) + head * n
            sample["flops"] += attention((p + n) * (p + n - 1) / 2)
        # the weights' gradients are a third of a full step and hardly anything under LoRA
        for phase, named, passes in ((score, wanted, 1), (train, trained, 2 if frozen else 3)):
            for context, names in named.items():
                p = prompts[context]
                lengths = [answers[r] for r in names]
                tokens = p + sum(n - 1 for n in lengths)
                seen = p * (p + 1) / 2 + sum((n - 1) * p + (n - 1) * n / 2 for n in lengths)
                flops = body * tokens + attention(seen) + head * sum(lengths)
                phase["tokens"] += tokens
                phase["flops"] += passes * flops
    return {"sample": sample, "score": score, "train": train}


def measure(given: argparse.Namespace, model: Path, way: str) -> list[dict[str, Any]]:
    """Run a way; one row per phase."""
    from sso_lightning.records import load_records

    root = Path(given.folder or model.parent) / f"run-{way}"
    path = model.parent / f"{way}.yaml"
    path.write_text(yaml.safe_dump(settings(given, model, root, way)))
    command = [sys.executable, "-m", "sso_lightning", "fit", "--config", str(path)]
    started = time.perf_counter()
    done = subprocess.run(
        [*command, "--overwrite", "true"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    if done.returncode:
        return [{"model": given.model, "way": way, "error": done.stderr.strip()[-300:]}]
    found = json.loads((root / "clock.json").read_text())
    records = load_records(root / "pairs" / "iteration-00")
    amount = work(given.model, records, frozen=way != "full")
    rows = []
    for name, phase in found["phases"].items():
        seconds, own = phase["seconds"], amount[name]
        rows.append(
            {
                "model": given.model,
                "way": way,
                "phase": name,
                "seconds": round(seconds, 3),
                "tokens_per_second": round(own["tokens"] / seconds, 1),
                "mfu": round(own["flops"] / seconds / found["matmul"], 4),
                "peak_mib": round(phase["peak_mib"], 1),
                "records": len(records),
                "matmul_tflops": round(found["matmul"] / 1e12, 3),
                "whole_run_seconds": round(time.perf_counter() - started, 1),
            }
        )
    return rows


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="qwen2-7b", choices=MODELS)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--queries", type=int, default=64)
    parser.add_argument("--query-tokens", type=int, default=100)
    parser.add_argument("--new-tokens", type=int, default=400)
    parser.add_argument("--rows", type=int, default=96, help="answers that grow together")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--accumulate", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=16384, help="of one forward pass")
    parser.add_argument("--sampler", default="TransformersSampler", help="class path")
    parser.add_argument(
        "--folder", type=Path, help="where runs go; a temporary folder if not given"
    )
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        model = Path(name) / "model"
        make_model(model, given.model, given.device)
        rng = random.Random(0)
        queries = [
            "".join(rng.choices("abcdefghij ", k=given.query_tokens)) for _ in range(given.queries)
        ]
        lines = [json.dumps({"id": f"q{i}", "prompt": q}) + "\n" for i, q in enumerate(queries)]
        (model / "queries.jsonl").write_text("".join(lines))
        rows = []
        print("| model | way | phase | seconds | tokens/s | MFU | peak MiB |\n|" + "---|" * 7)
        for way in given.ways:
            new = measure(given, model, way)
            rows += new
            for row in new:
                if "error" in row:
                    print(f"| {row['model']} | {way} | failed: {row['error']} |||||", flush=True)
                    continue
                cells = ("seconds", "tokens_per_second", "mfu", "peak_mib")
                shown = " | ".join(str(row[cell]) for cell in cells)
                print(f"| {row['model']} | {way} | {row['phase']} | {shown} |", flush=True)
            if given.json:
                given.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
