"""The demo: SSO and its baseline side by side on the sandbox, from nothing to an exported model.

`make demo` runs this. It uses nothing a user has not got: the `sandbox` command, two `fit` runs of
shipped recipes, and the folder that the SSO run exports.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

RUNS = {"SSO": "sso_2024", "PBAA": "pbaa"}
"""Label to recipe."""

CONFIGS, SANDBOX = Path("configs/sandbox"), Path("sandbox")

MEASURES = ("sandbox/signal_accuracy", "sandbox/quality")
QUESTION = "Name four birds for a poem."


def read_curve(folder: Path) -> list[dict[str, float]]:
    """The ground-truth rows of a run's metrics.csv: before training, then after each iteration."""
    path = folder / "metrics.csv"
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get(MEASURES[0])]
    return [{k: float(v) for k, v in row.items() if k.startswith("sandbox/") and v} for row in rows]


def start(recipe: Path, folder: Path, options: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start one run on one thread; its terminal output goes to `<folder>.log`."""
    command = [sys.executable, "-m", "sso_lightning", "fit", "--config", str(recipe)]
    command += ["--trainer.default_root_dir", str(folder), "--overwrite", "true", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    log = folder.with_name(folder.name + ".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)


def watch(runs: dict[str, Path], processes: dict[str, subprocess.Popen[bytes]]) -> None:
    """Print a line for every finished iteration until all runs have ended.

    Raises:
        RuntimeError: If a run failed; the others are ended.
    """
    shown = dict.fromkeys(runs, 0)
    while True:
        running = {name for name, process in processes.items() if process.poll() is None}
        for name, folder in runs.items():
            curve = read_curve(folder)
            for i in range(shown[name], len(curve)):
                stage = f"iteration {i}" if i else "start      "
                values = ", ".join(
                    f"{m.removeprefix('sandbox/')} {curve[i][m]:.3f}" for m in MEASURES
                )
                sys.stdout.write(f"  {name:5s} {stage}  {values}\n")
                sys.stdout.flush()
            shown[name] = len(curve)
        failed = [name for name, p in processes.items() if p.poll() not in (None, 0)]
        if failed:
            for process in processes.values():
                process.terminate()
            log = runs[failed[0]].with_name(runs[failed[0]].name + ".log")
            raise RuntimeError(f"the {failed[0]} run failed; see {log}")
        if not running:
            return
        time.sleep(0.5)


def show_table(curves: dict[str, list[dict[str, float]]]) -> None:
    """Print both runs by iteration."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Measured on held-out queries with exact ground truth")
    table.add_column("iteration", justify="right")
    for measure in MEASURES:
        for name in curves:
            label = measure.removeprefix("sandbox/").replace("_", " ")
            table.add_column(f"{label}\n{name}", justify="right")
    for i in range(max(map(len, curves.values()))):
        cells = [
            f"{curve[i][measure]:.3f}" if i < len(curve) else ""
            for measure in MEASURES
            for curve in curves.values()
        ]
        table.add_row("start" if i == 0 else str(i), *cells)
    Console().print(table)


def draw(curves: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Draw signal accuracy and policy quality by iteration."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    titles = {
        "sandbox/signal_accuracy": "Signal accuracy\nshare of pairs whose good answer is better",
        "sandbox/quality": "Policy quality\nof plain answers, no principle",
    }
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, measure in zip(figure.subplots(1, 2), MEASURES, strict=True):
        for (name, curve), style in zip(curves.items(), ("o-", "s--"), strict=False):
            axis.plot([row[measure] for row in curve], style, label=name)
        axis.set_title(titles[measure], fontsize=10)
        axis.set_xlabel("iterations trained")
        axis.set_ylim(0, 1)
        axis.grid(alpha=0.3)
        axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def answer(folder: Path, question: str) -> str:
    """The exported model's likeliest answer, through transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(**prompt, max_new_tokens=64, do_sample=False)
    text: str = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo.

    Args:
        argv: Options; `sys.argv[1:]` if not given.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(
        description="SSO and its baseline side by side; further options go to both `fit` runs.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="runs and picture")
    given, options = parser.parse_known_args(argv)
    began = time.monotonic()

    from sso_lightning.sandbox.build import is_sandbox, make_sandbox

    if not is_sandbox(SANDBOX):
        sys.stdout.write(f"1. A tiny chat model that obeys principles, in {SANDBOX}/\n")
        make_sandbox(SANDBOX)
    sys.stdout.write("2. Two runs from that model, five iterations each, with no labels\n")
    runs = {name: given.out / recipe for name, recipe in RUNS.items()}
    processes = {
        name: start(CONFIGS / f"{recipe}.yaml", runs[name], options)
        for name, recipe in RUNS.items()
    }
    try:
        watch(runs, processes)
    except KeyboardInterrupt:
        for process in processes.values():
            process.terminate()
        sys.stderr.write("interrupted\n")
        return 130
    except RuntimeError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    curves = {name: read_curve(folder) for name, folder in runs.items()}
    show_table(curves)
    picture = given.out / "demo.png"
    draw(curves, picture)
    export = runs["SSO"] / "export"
    sys.stdout.write(f"picture: {picture}\nexported model: {export}\n")
    sys.stdout.write(
        f"  it is asked:    {QUESTION}\n  it answers:     {answer(export, QUESTION)}\n"
    )
    sys.stdout.write(f"done in {time.monotonic() - began:.0f} s\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
