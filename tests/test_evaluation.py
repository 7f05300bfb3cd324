"""Scores of iterations: statistics on numbers worked out by hand, the table as a user sees it."""

import itertools
import json
import math
import random
import re

import numpy as np
import pytest

from sso_lightning.errors import InputError
from sso_lightning.evaluation import bootstrap, compare, holm, mean_of, read_scores, write_scores
from sso_lightning.iterations import as_json, as_markdown, table_of

pytest.importorskip("scipy")


def named(values):
    return {f"q{i}": float(value) for i, value in enumerate(values)}


# -------------------------------------------------------------------------------------- statistics


def test_a_comparison_of_three_items_is_that_of_all_27_draws():
    # differences 2, 1, -1: 7 of the 27 draws have a sum of at most 0: -1-1-1, three orders of
    # 1-1-1 and three of 2-1-1
    found = compare(named([0, 5, 9]), named([2, 6, 8]))
    means = sorted(sum(draw) / 3 for draw in itertools.product((2, 1, -1), repeat=3))
    assert sum(mean <= 0 for mean in means) == 7
    assert found.difference.mean == pytest.approx(2 / 3)
    assert found.p == pytest.approx(2 * 7 / 27, abs=0.03)
    assert (found.difference.low, found.difference.high) == (-1, 2)  # 1 of 27 draws each, > 2.5 %
    assert (found.difference.items, found.left_out) == (3, 0)


@pytest.mark.parametrize(
    ("after", "p"),
    [
        ([1, 2, 4, 7], 2 / 10_000),  # better on every item: no draw of 9999 is on the other side
        ([0.5, 1.5, 1, 1], 2 / 10_000),
        ([0, 0, 0, 0], 1.0),  # the same everywhere: all draws are on both sides
    ],
)
def test_the_ends_of_the_p_value(after, p):
    sign = 1 if after[0] > 0.9 else -1
    before = [sign * value for value in (0, 0, 0, 0)]
    assert compare(named(before), named([sign * value for value in after])).p == pytest.approx(p)


def test_rounding_does_not_decide_a_side():
    # .1 + .2 - .3 is 5.6e-17 in floating point
    before, after = named([0.3, 0.3]), named([0.1 + 0.2, 0.1 + 0.2])
    assert after["q0"] - before["q0"] > 0
    assert compare(before, after).p == 1.0


def test_pairing_finds_what_the_spread_of_items_hides():
    rng = random.Random(0)
    before = [rng.uniform(0, 1) for _ in range(100)]
    after = [value + rng.gauss(0.02, 0.03) for value in before]
    found = compare(named(before), named(after))
    # against the normal law of paired differences
    differences = np.subtract(after, before)
    error = differences.std(ddof=1) / 10
    assert found.difference.low == pytest.approx(differences.mean() - 1.96 * error, abs=error / 4)
    assert found.difference.high == pytest.approx(differences.mean() + 1.96 * error, abs=error / 4)
    assert found.p < 0.001
    # the items themselves spread ten times as wide
    spread = mean_of(after)
    assert spread.low == pytest.approx(np.mean(after) - 1.96 * np.std(after) / 10, abs=0.01)
    assert spread.low < mean_of(before).mean < spread.high


def test_chance_alone_is_significant_as_often_as_the_level_says():
    rng = random.Random(1)
    draws = [
        compare(named([0] * 40), named([rng.gauss(0, 1) for _ in range(40)])).p for _ in range(150)
    ]
    # 5 % of 150 is 7.5 +- 2.7; a one-sided or doubled p-value would give 15 or 4
    assert 3 <= sum(p < 0.05 for p in draws) <= 15


def test_items_of_one_side_only_are_left_out_and_counted():
    found = compare({"a": 0.0, "b": 0.0, "x": 9.0}, {"b": 1.0, "a": 3.0, "y": 9.0, "z": 9.0})
    assert found.difference.mean == 2.0
    assert (found.difference.items, found.left_out) == (2, 3)
    assert compare({"a": 1.0}, {"b": 1.0}) is None
    single = compare({"a": 1.0}, {"a": 2.0})
    assert single.difference.mean == 1.0
    assert math.isnan(single.p)
    assert math.isnan(single.difference.low)


def test_columns_are_drawn_together():
    def ratio(a, b, axis):
        return a.sum(axis) / b.sum(axis)

    low, high, drawn = bootstrap(ratio, [1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    assert low == high == 0.5
    assert set(drawn) == {0.5}


def test_holm_by_hand():
    # .005 * 4, .01 * 3, .03 * 2, and .04 * 1 raised to the one before it
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


# ------------------------------------------------------------------------------------------- files


def test_scores_come_back_as_they_were_written(tmp_path):
    scores = {"b/1": 0.25, "ä": 1.0, "a": -3.0}
    path = write_scores(tmp_path, "lm_eval/gsm8k/exact_match,strict".replace(",", "."), 10, scores)
    write_scores(tmp_path, "judge/win_rate", 2, {"a": 0.5})
    write_scores(tmp_path, "judge/win_rate", 0, {"a": 0.0})
    (path.parent / "judge.json").write_text("{}")
    assert read_scores(tmp_path) == {
        "judge/win_rate": {0: {"a": 0.0}, 2: {"a": 0.5}},
        "lm_eval/gsm8k/exact_match.strict": {10: scores},
    }
    assert [*read_scores(tmp_path)["judge/win_rate"]] == [0, 2]
    assert read_scores(path.parent) == {}
    with pytest.raises(InputError, match="no such run folder"):
        read_scores(tmp_path / "none")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": "a", "score": 1}\n{"id": "a", "score": 0}\n', "line 2: 'id': 'a' is there twice"),
        ('{"id": "a", "score": "1"}\n', "line 1: 'score' must be a number, got '1'"),
        ('{"id": 1, "score": 1}\n', "line 1: 'id' must be text, got 1"),
        ('{"id": "a"}\n', "line 1: 'score' must be a number, got None"),
        ('{"id": "a", "sc', "line 1: not valid JSON"),
    ],
)
def test_damaged_scores_are_named(tmp_path, text, message):
    path = write_scores(tmp_path, "m", 1, {"a": 1.0})
    path.write_text(text)
    with pytest.raises(InputError, match=re.escape(message)):
        read_scores(tmp_path)


# ------------------------------------------------------------------------------------------- table


@pytest.fixture
def run(tmp_path):
    """Two metrics: one that rises clearly, one that does not and whose start is not measured."""
    rng = random.Random(4)
    start = {f"q{i}": rng.random() for i in range(30)}
    write_scores(tmp_path, "sandbox/quality", 0, start)
    for iteration, gain in ((1, 0.0), (2, 0.2)):
        moved = {key: value + rng.gauss(gain, 0.1) for key, value in start.items()}
        moved.pop("q3")
        write_scores(tmp_path, "sandbox/quality", iteration, moved)
    write_scores(tmp_path, "judge/signal_accuracy", 1, {"a": 1.0, "b": 0.0})
    write_scores(tmp_path, "lm_eval/t/acc", 0, {"1": 0.0, "2": 1.0})
    write_scores(tmp_path, "lm_eval/t/acc", 2, {"8": 0.0, "9": 1.0})
    return tmp_path


def test_the_table_against_the_statistics_it_is_made_of(run):
    table = table_of(run)
    assert [*table] == ["judge/signal_accuracy", "lm_eval/t/acc", "sandbox/quality"]
    scores = read_scores(run)["sandbox/quality"]
    cells = table["sandbox/quality"]
    changes = [compare(scores[0], scores[i]) for i in (1, 2)]
    assert cells[0].change is None
    assert [cells[i].change for i in (1, 2)] == changes
    assert [cells[i].corrected for i in (1, 2)] == holm([change.p for change in changes])
    assert cells[2].score.mean == pytest.approx(sum(scores[2].values()) / 29)
    assert [cells[i].significant for i in (0, 1, 2)] == [False, False, True]
    assert changes[1].left_out == 1
    assert table["judge/signal_accuracy"][1].change is None
    assert table["lm_eval/t/acc"][2].change is None


def test_the_command_prints_the_table(run, sso):
    status, out, _ = sso("iterations", run)
    assert status == 0
    assert "* marks p below 0.05 after Holm's correction" in out
    assert "judge/signal_accuracy: the start was not measured, so nothing is compared." in out
    assert "lm_eval/t/acc: not compared in iteration 2, which has no item of the start." in out
    assert "iteration 2 and the start have 1 items that the other has not; 29 are compared" in out
    last = table_of(run)["sandbox/quality"][2]
    moved = last.change.difference
    assert f"{last.score.mean:.3f}*" in out
    assert f"{moved.mean:+.3f} [{moved.low:+.3f}, {moved.high:+.3f}]" in out
    status, out, _ = sso("iterations", run, "--markdown", "--metric", "sandbox")
    assert status == 0
    header, _, *rows = out.splitlines()[:5]
    assert header == "| iteration | sandbox/quality |"
    assert [row.split("|")[1].strip() for row in rows] == ["start", "1", "2"]
    assert rows[0].count("(") == 0
    assert f"{last.score.mean:.3f}* ({moved.mean:+.3f} [" in rows[2]
    status, out, _ = sso("iterations", run, "--json", "--metric", "sandbox/quality")
    values = json.loads(out)
    assert values["sandbox/quality"]["2"]["change"]["difference"]["mean"] == moved.mean
    assert values["sandbox/quality"]["2"]["significant"] is True


def test_metrics_are_chosen_by_name_and_kind(run):
    assert [*table_of(run, ["sandbox", "lm_eval/t/acc"])] == [
        "sandbox/quality",
        "lm_eval/t/acc",
    ]
    # fewer comparisons, less correction
    one = table_of(run, ["sandbox/quality"])
    assert one["sandbox/quality"][2].corrected == pytest.approx(2 * 2 / 10_000)
    with pytest.raises(InputError, match=r"--metric sand: .* has judge/signal_accuracy, lm_eval"):
        table_of(run, ["sand"])


def test_a_single_item_has_no_interval_and_json_stays_json(tmp_path):
    write_scores(tmp_path, "m", 0, {"a": 1.0})
    write_scores(tmp_path, "m", 1, {"a": 2.0})
    table = table_of(tmp_path)
    cell = json.loads(as_json(table))["m"]["1"]
    assert cell["change"]["p"] is None
    assert cell["score"]["low"] is None
    assert cell["corrected"] is None
    assert "| 1 | 2.000 (+1.000) |" in as_markdown(table)


def test_a_run_without_scores_is_told_so(tmp_path, sso):
    status, _, err = sso("iterations", tmp_path)
    assert status == 2
    assert err.startswith(f"error: {tmp_path}: has no evaluations/ with scores")


def test_without_scipy_the_extra_is_named(run, sso, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "scipy", None)
    status, _, err = sso("iterations", run)
    assert status == 2
    assert "pip install 'sso-lightning[eval]'" in err
