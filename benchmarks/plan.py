"""Does `sso-lightning plan` foresee what a run really takes? Measured on real models.

    OMP_NUM_THREADS=1 python benchmarks/plan.py --out benchmarks/results/plan.md
    python benchmarks/plan.py --models qwen2-7b llama31-8b --device cuda --out plan_gpu.md

Every case has a process of its own, which builds a model with random weights and makes what a run
makes, in its order: sample, score, two optimizer steps, and sample and score again beside what the
training left. Each phase's peak is compared with the plan's, which is made from the config alone.

* On a CPU, `allocated` is what torch's allocator handed out (its profiler's memory events, which
  know nothing of the plan's way of counting), and `resident` what the process grew by.
* On a GPU, `allocated` is `torch.cuda.max_memory_allocated`, and `resident` what the allocator
  reserved. The context, which the plan adds, is in neither.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# architecture, vocabulary, width, layers, MLP width, heads, key heads
MODELS = {
    "sandbox": ("qwen2", 512, 64, 2, 128, 4, 2),
    "m1": ("llama", 2048, 128, 6, 344, 4, 2),
    "m13": ("qwen2", 32000, 192, 6, 512, 6, 2),
    "m40": ("llama", 8192, 512, 12, 1408, 8, 4),
    "m100": ("qwen2", 32000, 640, 14, 1760, 10, 2),
    "qwen2-7b": ("qwen2", 152064, 3584, 28, 18944, 28, 4),
    "llama31-8b": ("llama", 128256, 4096, 32, 14336, 32, 8),
}
SMALL = ("sandbox", "m1", "m13", "m40", "m100")
WAYS = ("all", "all, recomputed", "lora", "lora, recomputed")
PHASES = ("sampling", "scoring", "training")
# tokens of x, of x+ and x-, and of an answer; slots
LENGTHS = {"cpu": (40, 160, 48, 12), "cuda": (300, 700, 1024, 32)}


def settings(model: str, way: str, device: str) -> tuple[Any, Any, Any]:
    """The policy's settings, the model's config and the plan's run."""
    import torch
    from transformers import AutoConfig

    from sso_lightning.losses import IPO
    from sso_lightning.objectives import SelfSteering
    from sso_lightning.plan.memory import Lengths, Run, Training
    from sso_lightning.plan.simulate import Precision
    from sso_lightning.policy import LoRA, PolicyConfig

    kind, vocabulary, width, layers, mlp, heads, key_heads = MODELS[model]
    config = AutoConfig.for_model(
        kind,
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        intermediate_size=mlp,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
    )
    lora = way.startswith("lora")
    large = device == "cuda"
    policy = PolicyConfig(
        model,
        lora=LoRA() if lora else None,
        dtype="bfloat16" if large else "float32",
        gradient_checkpointing=way.endswith("recomputed"),
    )
    plain, steered, answer, rows = LENGTHS[device]
    prompts = {"query": plain, "good": steered, "bad": steered}
    answers = dict.fromkeys(("good", "bad", "original"), answer)
    sequences = SelfSteering(IPO(beta=0.2)).sequences
    run = Run(
        policy=policy,
        config=config,
        lengths=Lengths(prompts, prompts, answers, answers),
        trainings={"training": Training(sequences, 1)},
        optimizer=torch.optim.AdamW,
        precision=Precision.of("bf16-mixed" if large and lora else "32"),
        kind="cuda" if large else "cpu",
        rows=rows,
        cache_tokens=rows * (steered + answer),
        shard_size=rows // 3,
        score_tokens=4096,
    )
    return policy, config, run


def phases(run: Any, model: Any, device: str) -> dict[str, Callable[[], None]]:
    """What a run does in each phase."""
    import torch

    from sso_lightning.pairs import SAMPLED_FROM, SCORED
    from sso_lightning.sampling import Request, TransformersSampler
    from sso_lightning.scoring import response_logps

    mixed = run.precision.mixed

    def products() -> Any:
        return torch.autocast(device, mixed) if mixed else contextlib.nullcontext()

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    rows, _ = run.slots()
    sampler = TransformersSampler(
        max_new_tokens=run.lengths.answers["good"], max_rows=rows, max_tokens=run.cache_tokens
    )
    requests = [
        Request(f"{i}/{c}", [3 * i + n] * run.lengths.longest[c], seed=i)
        for i in range(rows // 3)
        for n, c in enumerate(SAMPLED_FROM.values())
    ]
    scored = run.trees(SCORED) * (rows // 3)
    batch = run.trees(run.trainings["training"].sequences)

    def sampling() -> None:
        with products():
            sampler.sample(model, requests, stop_ids=[])

    def scoring() -> None:
        model.eval()
        with torch.no_grad(), products():
            response_logps(model, scored, max_tokens=run.score_tokens)
        model.train()

    def step() -> None:
        with products():
            logps, _ = response_logps(model, batch, max_tokens=run.call_tokens)
        optimizer.zero_grad()  # as the trainer does: after the forward pass
        logps.sum().backward()
        optimizer.step()

    def training() -> None:
        step()
        step()
        model.zero_grad()  # as the run does at the end of an iteration

    return {"sampling": sampling, "scoring": scoring, "training": training}


def resident(field: str) -> int:
    """`VmRSS` or `VmHWM` of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


@contextlib.contextmanager
def watched(found: dict[str, int], device: str) -> Iterator[None]:
    """Note by how much this process has grown at its most."""
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        yield
        found["allocated"] = torch.cuda.max_memory_allocated()
        found["resident"] = torch.cuda.max_memory_reserved()
        return
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    yield
    found["resident"] = resident("VmHWM")


def measure(name: str, way: str, device: str, bare: bool) -> dict[str, dict[str, int]]:
    """Peaks of every phase of a case, in this process; `bare` without the profiler."""
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function
    from transformers import AutoModelForCausalLM

    from sso_lightning.policy import make_trainable

    torch.set_num_threads(1)
    policy, config, run = settings(name, way, device)
    before = resident("VmRSS")
    found: dict[str, dict[str, int]] = {phase: {} for phase in PHASES}
    watch = (
        contextlib.nullcontext()
        if device == "cuda" or bare
        else profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    )
    with watch as profiler:
        with torch.device(device):
            base = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, policy.dtype))
            model = make_trainable(base, policy).train()
        steps = phases(run, model, device)
        for phase in (*PHASES, *PHASES[:2]):  # the first two again, beside what training left
            with record_function(f"phase {phase}"), watched(found[phase], device):
                steps[phase]()
    if profiler is not None:
        events = sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns())
        spans = [
            (e.name().removeprefix("phase "), e.start_ns(), e.start_ns() + e.duration_ns())
            for e in events
            if e.name().startswith("phase ")
        ]
        now = 0
        for event in events:
            if event.name() == "[memory]":
                now += event.nbytes()
                for phase, begin, end in spans:
                    if begin <= event.start_ns() <= end:
                        most = found[phase].get("allocated", 0)
                        found[phase]["allocated"] = max(most, now)
    elif device == "cpu":
        for phase in PHASES:
            found[phase]["resident"] -= before
    return found


def planned(name: str, way: str, device: str) -> dict[str, int]:
    """The plan's peaks; the context, which no allocator counts, left out."""
    from sso_lightning.plan.memory import Planner

    _, _, run = settings(name, way, device)
    found = Planner().phases(run)
    return {p: sum(v for k, v in parts.items() if k != "context") for p, parts in found.items()}


def table(cases: list[dict[str, Any]]) -> str:
    """Markdown of all cases."""
    lines = [
        "| model | trained | phase | plan MB | allocated MB | plan / allocated | resident MB |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for case in cases:
        for phase in PHASES:
            plan, got = case["plan"][phase], case["measured"][phase]
            lines.append(
                f"| {case['model']} | {case['way']} | {phase} | {plan / 1e6:.1f} "
                f"| {got['allocated'] / 1e6:.1f} | {plan / got['allocated']:.3f} "
                f"| {got['resident'] / 1e6:.1f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Measure all cases, or one in this process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(SMALL))
    parser.add_argument("--ways", nargs="+", choices=WAYS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="Markdown file whose table is written anew")
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "WAY"), help=argparse.SUPPRESS)
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(*given.one, given.device, given.bare)))
        return
    ways = given.ways or (WAYS if given.device == "cpu" else ("lora, recomputed",))
    cases = []
    for model in given.models:
        for way in ways:
            command = [sys.executable, __file__, "--one", model, way, "--device", given.device]
            # large blocks go back to the system when they are freed, small heaps are trimmed
            heap = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
            measured: dict[str, dict[str, int]] = {phase: {} for phase in PHASES}
            # the profiler takes memory itself: what the process grows by is measured without it
            for more in ([], ["--bare"]) if given.device == "cpu" else ([],):
                done = subprocess.run(
                    [*command, *more],
                    env=os.environ | heap,
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                )
                for phase, numbers in json.loads(done.stdout.splitlines()[-1]).items():
                    measured[phase] |= numbers
            case = {"model": model, "way": way, "measured": measured}
            cases.append(case | {"plan": planned(model, way, given.device)})
            print(table(cases[-1:]).splitlines()[-3:], flush=True)
    print(table(cases))
    if given.out:
        head, _, _ = (given.out.read_text() if given.out.exists() else "").partition("| model |")
        given.out.write_text(f"{head}{table(cases)}\n")


if __name__ == "__main__":
    main()
