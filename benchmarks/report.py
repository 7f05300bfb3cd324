"""Measure the report of a large run: its size, and the time until a browser has it open.

Makes a run of three iterations with 20,000 synthetic records each (word salad of the lengths of a
7B model's answers, as many token ids, scores), writes its page with the command, and opens that in
headless Chromium. Writes `results/report.md`.

    python benchmarks/report.py --records 60000
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random

from sso_lightning.principles import FEATURE_NAMES, Feature, PredefinedPrinciples, steer
from sso_lightning.records import CONTEXTS, RESPONSES, PairStore, Record

OUT = Path(__file__).resolve().parent / "results" / "report.md"
ITERATIONS, SHARD = 3, 500
SCORED = [("query", r) for r in RESPONSES]
SCORED += [(c, r) for c in ("good", "bad") for r in ("good", "bad")]
FEATURES: dict[str, Feature] = {f.name: f for f in PredefinedPrinciples([*FEATURE_NAMES]).features}


def words(rng: Random, vocabulary: list[str], tokens: int) -> str:
    """About as much text as that many tokens: a sentence mark now and then."""
    chosen = rng.choices(vocabulary, k=int(tokens * 0.75))
    return " ".join(w + "." * (i % 14 == 13) + "\n" * (i % 90 == 89) for i, w in enumerate(chosen))


def record(rng: Random, vocabulary: list[str], name: str, iteration: int) -> Record:
    """A record with everything that a sampled one has."""
    steering = steer([FEATURES[n] for n in rng.sample(sorted(FEATURES), 2)])
    lengths = {r: min(1024, max(8, round(rng.lognormvariate(5.4, 0.6)))) for r in RESPONSES}
    scores = {
        f"policy/{c}/{r}": -lengths[r] * rng.uniform(0.2, 1.2) * (1 + 0.2 * (c != "query"))
        for c, r in SCORED
    }
    return Record(
        id=name,
        messages=[{"role": "user", "content": words(rng, vocabulary, rng.randint(10, 120))}],
        features=list(steering.features),
        good_principle=steering.good_principle,
        bad_principle=steering.bad_principle,
        good_system=steering.good_system,
        bad_system=steering.bad_system,
        **{r: words(rng, vocabulary, lengths[r]) for r in RESPONSES},
        prompt_ids={c: [rng.randrange(150_000)] * 200 for c in CONTEXTS},
        response_ids={r: [rng.randrange(150_000)] * lengths[r] for r in RESPONSES},
        finish={r: "length" if lengths[r] == 1024 else "stop" for r in RESPONSES},
        iteration=iteration,
        scores=scores,
        engine="synthetic",
        principle_source="predefined",
        safety_mode="careless",
    )


def make_run(root: Path, count: int) -> None:
    """A run folder with that many records and a metrics.csv of 3,000 steps."""
    rng = Random(0)
    vocabulary = [
        "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9)))
        for _ in range(20_000)
    ]
    each = count // ITERATIONS
    for iteration in range(ITERATIONS):
        store = PairStore(root / "pairs" / f"iteration-{iteration:02d}", {"iteration": iteration})
        for start in range(0, each, SHARD):
            size = min(SHARD, each - start)
            made = [record(rng, vocabulary, f"q{start + i}", iteration) for i in range(size)]
            info = {"queries": [r.id for r in made], "dropped": {"empty_bad": 1}, "counts": {}}
            store.write_shard(start // SHARD, made, info)
        store.finish({"pairs/kept": each})
    columns = [f"train/column_{i}" for i in range(30)] + ["train/loss"]
    with (root / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *columns])
        for step in range(3000):
            writer.writerow([step, *(rng.random() for _ in columns)])
    (root / "config.yaml").write_text(
        "model:\n  objective:\n    class_path: sso_lightning.objectives.SelfSteering\n"
        "    init_args: {alpha: 0.66, weight: true}\n"
    )


def write_page(root: Path) -> tuple[float, float]:
    """Seconds of the command, and the most memory (MB) it held."""
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "sso_lightning", "report", str(root)], check=True, stdout=2
    )
    seconds = time.perf_counter() - started
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def open_page(page: Path, browser: str, times: int) -> dict[str, list[float]]:
    """Seconds until the page can be used, and of one search."""
    from playwright.sync_api import sync_playwright

    found: dict[str, list[float]] = {"page usable": [], "search": []}
    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        for _ in range(times):
            tab = chromium.new_page()
            started = time.perf_counter()
            tab.goto(page.as_uri())
            tab.wait_for_selector("html[data-ready]", state="attached")
            found["page usable"].append(time.perf_counter() - started)
            started = time.perf_counter()
            tab.fill("#search", "q1")
            tab.locator("#count").filter(has_text="words").wait_for()  # the page allows no eval
            found["search"].append(time.perf_counter() - started)
            tab.close()
        chromium.close()
    return found


def main() -> int:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--records", type=int, default=60_000)
    parser.add_argument("--times", type=int, default=5, help="how often the page is opened")
    parser.add_argument("--keep", type=Path, help="make the run here and keep it")
    given = parser.parse_args()
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        print("no Chromium on this machine", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        root = given.keep or Path(folder) / "run"
        if not (root / "config.yaml").is_file():
            make_run(root, given.records)
        load = os.getloadavg()[0]
        seconds, memory = write_page(root)
        page = root / "report.html"
        opened = open_page(page, browser, given.times)
        stored = sum(f.stat().st_size for f in root.glob("pairs/*/*.parquet")) / 1e6
        shown = re.search(r"<p>([\d,]+) of ([\d,]+) records", page.read_text("utf-8"))
        assert shown
        rows = [
            f"| {what}, seconds | {statistics.median(s):.2f} ({min(s):.2f} to {max(s):.2f}) |"
            for what, s in opened.items()
        ]
        version = subprocess.run([browser, "--version"], capture_output=True, text=True).stdout
        lines = [
            "# The report of a large run",
            "",
            f"`python benchmarks/report.py --records {given.records}`: three iterations of",
            "synthetic records with answers of 220 tokens in the median, "
            f"{stored:.0f} MB in shards. {platform.machine()},",
            f"{os.cpu_count()} cores shared with other work (load {load:.1f} at the start),",
            f"{version.strip()}, headless; median and range of {given.times} openings.",
            "",
            "| | |",
            "|---|---|",
            f"| records in the run | {shown[2]} |",
            f"| records on the page | {shown[1]} |",
            f"| size of the page, MB | {page.stat().st_size / 1e6:.2f} |",
            *rows,
            f"| writing the page, seconds | {seconds:.0f} |",
            f"| memory of the command, MB | {memory:.0f} |",
        ]
        OUT.write_text("\n".join(lines) + "\n")
    print(OUT.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
