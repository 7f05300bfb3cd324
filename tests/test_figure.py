"""The figure: its numbers by hand, and what is drawn of them."""

import importlib.util
import math
from pathlib import Path

import pytest

from sso_lightning.errors import InputError
from sso_lightning.evaluation import write_scores
from sso_lightning.report.figure import read_lines

pytest.importorskip("scipy")

_spec = importlib.util.spec_from_file_location(
    "report_runs", Path(__file__).with_name("report_runs.py")
)
runs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(runs)

QUERY = [{"role": "user", "content": "Name three birds for a quiz."}]
# 7 of 8 features, 4 of 8
BETTER = "My picks: finch, owl and wren. Look in an old hedge. They shine like lamps in fog."
WORSE = "My picks: wren and finch. They shine like lamps in fog."


def exact(name, good, bad, **changes):
    return runs.record(name, messages=QUERY, good=good, bad=bad, **changes)


@pytest.fixture
def sandbox_run(tmp_path):
    """Two iterations: 3.5 of 4 pairs right and then 1 of 4."""
    sets = {
        "iteration-00": [
            *(exact(f"q{i}", BETTER, WORSE) for i in range(3)),
            exact("q3", BETTER, f"{BETTER} "),
        ],
        "iteration-01": [
            exact("q0", BETTER, WORSE, means={("query", "good"): -2.0}),
            *(exact(f"q{i}", WORSE, BETTER) for i in range(1, 4)),
        ],
        "generator-00": [exact("q0", WORSE, BETTER)],
    }
    return runs.write_run(tmp_path / "exact", sets)


@pytest.fixture
def judged_run(tmp_path):
    """Queries of no sandbox, judged in the first of two iterations."""
    sets = {f"iteration-0{i}": [runs.record(name) for name in "abcd"] for i in range(2)}
    run = runs.write_run(tmp_path / "judged", sets)
    write_scores(run, "judge/signal_accuracy", 0, {"a": 1.0, "b": 1.0, "c": 0.5, "d": 0.0})
    write_scores(run, "judge/signal_accuracy", 7, {"z": 0.0})  # a set that is gone
    return run


def test_numbers_by_hand(sandbox_run):
    (line,), metric = read_lines([sandbox_run])
    assert (line.name, metric) == ("exact", "exact")
    assert {i: m.mean for i, m in line.signal.items()} == {0: 3.5 / 4, 1: 1 / 4}
    assert line.signal[1].items == 4
    assert line.signal[1].low == 0.0  # 32 % of the draws miss the one right pair
    good, bad = line.on_policy["good"], line.on_policy["bad"]
    assert good[0].mean == pytest.approx(math.exp(-0.5))
    assert good[1].mean == pytest.approx((math.exp(-2.0) + 3 * math.exp(-0.5)) / 4)
    assert bad[0].mean == pytest.approx(math.exp(-1.0))
    assert line.both[0].mean == pytest.approx((math.exp(-0.5) + math.exp(-1.0)) / 2)
    assert good[0].low == pytest.approx(good[0].high)  # all records alike


def test_a_judge_is_asked_where_the_truth_is_not_known(sandbox_run, judged_run):
    (line,), metric = read_lines([judged_run])
    assert metric == "judge/signal_accuracy"
    assert {i: m.mean for i, m in line.signal.items()} == {0: 2.5 / 4}
    # one measure for all runs, so that they can be compared
    lines, metric = read_lines([sandbox_run, judged_run])
    assert metric == "judge/signal_accuracy"
    assert [sorted(line.signal) for line in lines] == [[], [0]]
    write_scores(sandbox_run, "other/signal_accuracy", 1, {"q0": 1.0})
    (line,), _ = read_lines([sandbox_run], "other/signal_accuracy")
    assert [*line.signal] == [1]
    with pytest.raises(InputError, match=r"--metric other/signal_accuracy: .*judged has no such"):
        read_lines([judged_run], "other/signal_accuracy")


def test_runs_of_one_name_are_told_apart(tmp_path):
    roots = [
        runs.write_run(tmp_path / parent / "sso", {"iteration-00": [runs.record("a")]})
        for parent in "xy"
    ]
    lines, _ = read_lines(roots)
    assert [line.name for line in lines] == ["x/sso", "y/sso"]


def test_sets_that_nothing_was_learned_from_are_not_drawn(tmp_path):
    sets = {
        "iteration-02": [runs.record("a")],
        "iteration-02.replaced-1": [runs.record("b", means={("query", "good"): -9.0})],
        "predict": [runs.record("c")],
        "offline": [runs.record("d")],
    }
    run = runs.write_run(tmp_path / "run", sets)
    (line,), _ = read_lines([run])
    assert {i: m.mean for i, m in line.on_policy["good"].items()} == {
        2: pytest.approx(0.6065, 1e-3)
    }
    (line,), _ = read_lines([runs.write_run(tmp_path / "pairs", {"offline": [runs.record("d")]})])
    assert [*line.on_policy["good"]] == [0]
    with pytest.raises(InputError, match="has no pairs of an iteration"):
        read_lines([runs.write_run(tmp_path / "none", {"predict": [runs.record("d")]})])


def test_the_command_draws(tmp_path, sandbox_run, judged_run, sso):
    out = tmp_path / "figure.svg"
    assert sso("figure", sandbox_run, "--out", out)[:2] == (0, f"wrote {out}\n")
    text = out.read_text()
    for label in ("Signal accuracy, exact", "On-policyness", "y+", "y-", "last iteration"):
        assert label in text
    assert "not known" not in text
    sso("figure", sandbox_run, "--out", out)
    assert out.read_text() == text, "the same runs give the same file"
    sso("figure", sandbox_run, judged_run, "--out", out)
    assert "Signal accuracy, judge" in out.read_text()
    # scores of no judge at all: the rest is drawn
    sso("figure", sandbox_run, "--metric", "judge/signal_accuracy", "--out", out)
    assert "ask sso-lightning judge" in out.read_text()
    png = tmp_path / "new" / "figure.png"
    assert sso("figure", judged_run, "--out", png)[0] == 0
    assert png.read_bytes().startswith(b"\x89PNG")


def test_records_without_log_probabilities_are_no_zeros(tmp_path):
    bare = runs.record("a", response_ids={}, scores={})
    run = runs.write_run(tmp_path / "run", {"iteration-00": [bare, runs.record("b")]})
    (line,), _ = read_lines([run])
    assert line.on_policy["good"][0].items == 1
    assert line.on_policy["good"][0].mean == pytest.approx(math.exp(-0.5))
