"""What one training step costs: this library, plain padded rows, and TRL's DPOTrainer.

    taskset -c 1 python benchmarks/step.py --json step.json        # m32k, mbody, m152k
    taskset -c 1 python benchmarks/step.py --quick                 # two rounds of m32k
    taskset -c 1 python benchmarks/step.py --growth                # cost against each length
    python benchmarks/step.py --models qwen2-1.5b --device cuda --dtype bfloat16 --checkpointing

Every variant lives in a process of its own and the rounds are interleaved, so that a slow moment
of the machine falls on all of them. A step is forward, loss and backward (no optimizer), under the
2024 objective with IPO; TRL gets the same three pairs of every record under its own IPO loss.

| variant | what it does |
|---|---|
| `ours` | `response_logps` on the records' trees, record by record (`--micro 0`: all at once), as
with `data.max_tokens` or a batch size of 1 and accumulation; reference in the step or given |
| `plain` | the authors' 2024 way: three padded forwards (one per context), rows as wide as the
batch's longest, float32 logits of every position, the reference in the step |
| `trl` | `DPOTrainer.compute_loss` on the collated pairs, reference in the step (extra `bench`) |

`floor_fraction` is the share of a step's time that its unavoidable matrix products would take at
the matmul rate measured in the same round: prompts once, the head only where a token is scored,
backward twice the forward, and one forward more where the reference is in the step. On a GPU that
is the model FLOPs utilisation against the measured peak.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing as mp
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# vocabulary, width, layers, MLP width, heads, key heads
MODELS = {
    "m32k": (32000, 256, 6, 1024, 4, 2),
    "mbody": (8192, 384, 8, 1536, 6, 2),
    "m152k": (151936, 128, 4, 512, 2, 1),
    "qwen2-0.5b": (151936, 896, 24, 4864, 14, 2),
    "qwen2-1.5b": (151936, 1536, 28, 8960, 12, 2),
    "qwen2-7b": (152064, 3584, 28, 18944, 28, 4),
}
PAIRS = (("query", "good", "bad"), ("good", "good", "bad"), ("bad", "original", "good"))


@dataclass(frozen=True)
class Case:
    """One measured situation."""

    model: str
    batch: int
    prompt_scale: float = 1.0
    response_scale: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Settings:
    """How to run, the same for all cases."""

    device: str
    dtype: str
    checkpointing: bool
    threads: int
    micro: int = 1


def make_records(case: Case) -> list[dict[str, dict[str, list[int]]]]:
    """Random records at the length distribution of the study.

    Query 20-120 tokens, principle 100-220, response 60-300, all uniform.
    """
    rng = random.Random(f"lengths-{case.seed}")
    vocabulary = MODELS[case.model][0]

    def tokens(low: int, high: int, scale: float) -> list[int]:
        length = round(rng.randint(low, high) * scale)
        return [rng.randrange(3, vocabulary) for _ in range(length)]

    records = []
    for _ in range(case.batch):
        query = tokens(20, 120, case.prompt_scale)
        good, bad = (tokens(100, 220, case.prompt_scale) for _ in range(2))
        records.append(
            {
                "prompts": {"query": query, "good": good + query, "bad": bad + query},
                "responses": {
                    name: tokens(60, 300, case.response_scale)
                    for name in ("good", "bad", "original")
                },
            }
        )
    return records


def make_config(sizes: tuple[int, ...], **more: Any) -> Any:
    """The config of a Qwen2 of a row of `MODELS`."""
    from transformers import Qwen2Config

    vocabulary, width, layers, mlp, heads, key_heads = sizes
    return Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        intermediate_size=mlp,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **more,
    )


def make_model(case: Case, settings: Settings) -> Any:
    """A Qwen2 of the case's size with random weights, the same for every variant."""
    import torch
    from transformers import Qwen2ForCausalLM

    torch.manual_seed(0)
    config = make_config(MODELS[case.model])
    model = Qwen2ForCausalLM(config).to(settings.device, getattr(torch, settings.dtype)).train()
    if settings.checkpointing:
        model.gradient_checkpointing_enable()
    return model


def work(case: Case) -> dict[str, int]:
    """Tokens and matmul FLOPs of one forward of the trees, by closed form.

    Returns:
        `real` tokens of six sequences per record, `padded` as plain rows have them, `tree` tokens
        computed once, `scored` positions, and `forward` FLOPs.
    """
    vocabulary, width, layers, mlp, heads, key_heads = MODELS[case.model]
    head_width = width // heads
    per_token = 2 * width * (2 * width + 2 * key_heads * head_width + 3 * mlp)
    real = longest = tree = scored = flops = 0
    for record in make_records(case):
        for context, *names in PAIRS:
            prompt = len(record["prompts"][context])
            lengths = [len(record["responses"][name]) for name in names]
            real += sum(prompt + length for length in lengths)
            longest = max(longest, prompt + max(lengths))
            tokens = prompt + sum(length - 1 for length in lengths)
            seen = prompt * (prompt + 1) // 2 + sum(
                (length - 1) * prompt + (length - 1) * length // 2 for length in lengths
            )
            tree += tokens
            scored += sum(lengths)
            # the last layer's MLP runs on scored positions only
            flops += per_token * tokens * layers - 6 * width * mlp * (tokens - sum(lengths))
            flops += 4 * width * seen * layers + 2 * width * vocabulary * sum(lengths)
    padded = longest * 6 * case.batch
    return {"real": real, "padded": padded, "tree": tree, "scored": scored, "forward": flops}


# ------------------------------------------------------------------------------------ variants


def ours(case: Case, settings: Settings, reference: str) -> Callable[[], Any]:
    """A step of this library."""
    import torch

    from sso_lightning.losses import IPO
    from sso_lightning.objectives import ContrastLogps, SelfSteering
    from sso_lightning.scoring import Tree, response_logps

    model, objective = make_model(case, settings), SelfSteering(IPO(beta=0.2))
    records = make_records(case)
    size = settings.micro or case.batch
    parts = [
        [
            Tree(record["prompts"][context], [record["responses"][name] for name in names])
            for record in records[start : start + size]
            for context, *names in PAIRS
        ]
        for start in range(0, case.batch, size)
    ]
    at = {(c, n): i for i, (c, n) in enumerate((c, n) for c, *ns in PAIRS for n in ns)}

    def contrast(scorer: Any, trees: list[Tree]) -> ContrastLogps:
        logps, lengths = (values.view(-1, len(at)) for values in response_logps(scorer, trees))
        return ContrastLogps(
            {key: logps[:, i] for key, i in at.items()},
            {name: lengths[:, i] for (_, name), i in at.items()},
        )

    frozen = make_model(case, settings).requires_grad_(False)
    with torch.no_grad():
        given = [contrast(frozen, trees) for trees in parts]
    if reference == "given":
        del frozen

    def step() -> Any:
        for trees, scores in zip(parts, given, strict=True):
            if reference == "step":
                with torch.no_grad():
                    scores = contrast(frozen, trees)
            loss, _ = objective(contrast(model, trees), scores)
            (loss * (len(trees) / len(PAIRS) / case.batch)).backward()
        return model

    return step


def plain(case: Case, settings: Settings, reference: str) -> Callable[[], Any]:
    """A step as the authors' 2024 trainer makes it."""
    import torch

    from sso_lightning.losses import IPO
    from sso_lightning.objectives import ContrastLogps, SelfSteering

    assert reference == "step"
    model, objective = make_model(case, settings), SelfSteering(IPO(beta=0.2))
    frozen = make_model(case, settings).requires_grad_(False)
    records = make_records(case)
    width = max(
        len(r["prompts"][c]) + len(r["responses"][n])
        for r in records
        for c, *ns in PAIRS
        for n in ns
    )
    batches = []
    for context, *names in PAIRS:
        ids = torch.zeros(2 * case.batch, width, dtype=torch.int64)
        mask, scored = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, (name, record) in enumerate((n, r) for n in names for r in records):
            prompt, response = record["prompts"][context], record["responses"][name]
            total = len(prompt) + len(response)
            ids[row, :total] = torch.tensor(prompt + response)
            mask[row, :total] = 1
            scored[row, len(prompt) : total] = 1
        batches.append([t.to(settings.device) for t in (ids, mask, scored)])

    def contrast(scorer: Any, kept: list[Any]) -> ContrastLogps:
        logps, lengths = {}, {}
        for (context, *names), (ids, mask, scored) in zip(PAIRS, batches, strict=True):
            logits = scorer(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
            kept.append(logits)
            taken = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
            sums = (taken * scored[:, 1:]).sum(-1)
            for name, part, count in zip(
                names, sums.split(case.batch), scored.sum(-1).split(case.batch), strict=True
            ):
                logps[context, name], lengths[name] = part, count
        return ContrastLogps(logps, lengths)

    def step() -> Any:
        with torch.no_grad():
            scores = contrast(frozen, [])
        kept: list[Any] = []  # for their logged means, until the loss is there
        loss, _ = objective(contrast(model, kept), scores)
        del kept
        loss.backward()
        return model

    return step


def trl(case: Case, settings: Settings, reference: str) -> Callable[[], Any]:
    """A step of TRL's DPOTrainer on the same pairs."""
    import tempfile

    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    assert reference == "step"
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "a": 3}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    model, frozen = make_model(case, settings), make_model(case, settings)
    trainer = DPOTrainer(
        model,
        frozen,
        args=DPOConfig(
            tempfile.mkdtemp(),
            loss_type="ipo",
            beta=0.2,
            max_length=None,
            use_cpu=settings.device == "cpu",
            bf16=settings.dtype == "bfloat16",
            gradient_checkpointing=settings.checkpointing,
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "a", "rejected": "a a"}]),
        processing_class=tokenizer,
    )
    examples = [
        {
            "prompt_ids": record["prompts"][context],
            "chosen_ids": record["responses"][chosen],
            "rejected_ids": record["responses"][rejected],
        }
        for record in make_records(case)
        for context, chosen, rejected in PAIRS
    ]
    inputs = trainer._prepare_inputs(trainer.data_collator(examples))
    model.train()

    def step() -> Any:
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        return trainer.model

    return step


VARIANTS: dict[tuple[str, str], Callable[[Case, Settings, str], Callable[[], Any]]] = {
    ("ours", "step"): ours,
    ("ours", "given"): ours,
    ("plain", "step"): plain,
    ("trl", "step"): trl,
}


# ------------------------------------------------------------------------------------ measuring


def clock(settings: Settings) -> float:
    """CPU seconds of this process, or seconds on the wall once a GPU has finished."""
    if settings.device == "cpu":
        return time.process_time()
    import torch

    torch.cuda.synchronize()
    return time.perf_counter()


def resident(field: str) -> float:
    """`VmRSS` or `VmHWM` of this process in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def extra_memory(step: Callable[[], Any], settings: Settings) -> float:
    """Most MiB that a step holds beyond what was held before it, its gradients included."""
    gc.collect()
    if settings.device != "cpu":
        import torch

        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def matmul_rate(settings: Settings) -> float:
    """Best measured FLOP/s of a square product in the model's dtype."""
    import torch

    size = 1536 if settings.device == "cpu" else 8192
    a, b = torch.randn(2, size, size, dtype=getattr(torch, settings.dtype), device=settings.device)
    rates = []
    for _ in range(3):
        begin = clock(settings)
        torch.mm(a, b)
        rates.append(2 * size**3 / (clock(settings) - begin))
    return max(rates)


def serve(
    pipe: Connection, case: Case, settings: Settings, variant: tuple[str, str]
) -> None:  # runs in the variant's own process
    """Answer `time`, `memory` and `rate` until told to stop."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch

    torch.set_num_threads(settings.threads)
    step = VARIANTS[variant](case, settings, variant[1])

    def clean() -> None:
        model = step()
        model.zero_grad(set_to_none=True)

    clean()
    pipe.send("ready")
    while (order := pipe.recv()) != "stop":
        if order == "rate":
            pipe.send(matmul_rate(settings))
            continue
        if order == "memory":
            model = None

            def once() -> None:
                nonlocal model
                model = step()

            pipe.send(extra_memory(once, settings))
            model.zero_grad(set_to_none=True)  # type: ignore[attr-defined]
            continue
        begin = clock(settings)
        model = step()
        pipe.send(clock(settings) - begin)
        model.zero_grad(set_to_none=True)


def measure(
    case: Case, settings: Settings, rounds: int, variants: list[tuple[str, str]]
) -> list[dict[str, Any]]:
    """Interleaved rounds of all variants of a case; one row per variant."""
    context = mp.get_context("spawn")
    pipes, processes = {}, []
    for variant in variants:
        pipe, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, case, settings, variant))
        process.start()
        theirs.close()
        try:
            pipe.recv()
        except EOFError:
            sys.exit(f"the process of {variant} ended early; see above")
        pipes[variant] = pipe
        processes.append(process)

    def ask(variant: tuple[str, str], order: str) -> float:
        pipes[variant].send(order)
        return float(pipes[variant].recv())

    seconds: dict[tuple[str, str], list[float]] = {variant: [] for variant in variants}
    rates = []
    for turn in range(rounds):
        rates.append(ask(variants[0], "rate"))
        order = variants if turn % 2 == 0 else variants[::-1]
        for variant in order:
            seconds[variant].append(ask(variant, "time"))
    memory = {variant: ask(variant, "memory") for variant in variants}
    for pipe in pipes.values():
        pipe.send("stop")
    for process in processes:
        process.join()

    amount = work(case)
    rate = statistics.median(rates)
    base = seconds.get(("plain", "step"))
    rows = []
    for variant in variants:
        took = seconds[variant]
        middle = statistics.median(took)
        forwards = 4 if variant[1] == "step" else 3
        ratios = [p / t for p, t in zip(base, took, strict=True)] if base else []
        rows.append(
            {
                "model": case.model,
                "batch": case.batch,
                "variant": variant[0],
                "reference": variant[1],
                "seconds": round(middle, 4),
                "extra_mib": round(memory[variant], 1),
                "floor_fraction": round(amount["forward"] * forwards / rate / middle, 4),
                "ratio_to_plain": round(statistics.median(ratios), 3) if ratios else None,
                "ratio_low": round(min(ratios), 3) if ratios else None,
                "ratio_high": round(max(ratios), 3) if ratios else None,
                "seconds_low": round(min(took), 4),
                "seconds_high": round(max(took), 4),
                "tokens_per_second": round(amount["real"] / middle, 1),
                "matmul_gflops": round(rate / 1e9, 2),
                "rounds": rounds,
                "case": asdict(case),
                "tokens": {k: v for k, v in amount.items() if k != "forward"},
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print rows as a table."""
    for row in rows:
        case = row["case"]
        ratio = ""
        if row["ratio_to_plain"]:
            ratio = (
                f"{row['ratio_to_plain']:5.2f}x [{row['ratio_low']:.2f} {row['ratio_high']:.2f}]"
            )
        print(
            f"| {row['model']} | {row['batch']} | {case['prompt_scale']:g} | "
            f"{case['response_scale']:g} | {row['variant']}, {row['reference']} | "
            f"{row['seconds']:.2f} [{row['seconds_low']:.2f} {row['seconds_high']:.2f}] | "
            f"{row['extra_mib']:.0f} | {row['tokens_per_second']:.0f} | "
            f"{row['floor_fraction']:.2f} | {ratio} |",
            flush=True,
        )


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["m32k", "mbody", "m152k"], choices=MODELS)
    parser.add_argument("--batch", nargs="+", type=int, help="default: 2, and 1 for m152k")
    parser.add_argument("--prompt-scale", nargs="+", type=float, default=[1.0])
    parser.add_argument("--response-scale", nargs="+", type=float, default=[1.0])
    parser.add_argument("--variants", nargs="+", default=["ours", "plain", "trl"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="seed of the lengths")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--micro", type=int, default=1, help="records per backward pass of ours")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--quick", action="store_true", help="two rounds of m32k, batch 2")
    parser.add_argument("--growth", action="store_true", help="vary one quantity at a time")
    args = parser.parse_args()

    settings = Settings(args.device, args.dtype, args.checkpointing, args.threads, args.micro)
    if args.quick:
        cases, args.rounds = [Case("m32k", 2, seed=args.seed)], 2
    elif args.growth:
        start = {"model": "m32k", "batch": 1, "seed": args.seed}
        changes: list[dict[str, Any]] = [
            {},
            {"batch": 2},
            {"batch": 4},
            {"prompt_scale": 2.0},
            {"response_scale": 2.0},
            {"model": "mbody"},
            {"model": "m152k"},
        ]
        cases = [Case(**{**start, **change}) for change in changes]
    else:
        cases = [
            Case(model, batch, prompt, response, args.seed)
            for model in args.models
            for batch in args.batch or [1 if model == "m152k" else 2]
            for prompt in args.prompt_scale
            for response in args.response_scale
        ]
    variants = [variant for variant in VARIANTS if variant[0] in args.variants]
    print(
        "| model | batch | prompt x | response x | variant, reference | seconds [spread] |", end=""
    )
    print(" extra MiB | tokens/s | of floor | plain / this [spread] |")
    print("|" + "---|" * 10, flush=True)
    rows: list[dict[str, Any]] = []
    for case in cases:
        new = measure(case, settings, args.rounds, variants)
        rows += new
        show(new)
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
