"""The near-on-policy filter's rules on numbers worked by hand, and filters in a run."""

import csv
import json

import pytest
import yaml

from sso_lightning.errors import InputError
from sso_lightning.filters import ClearContrast, ContextOrder, LikelyAnswers
from sso_lightning.pairs import PairFilter, apply_filters
from sso_lightning.records import Record, load_records

USER_CODE = """
from sso_lightning.pairs import PairFilter


class EveryOther(PairFilter):
    name = "every_other"

    def __init__(self, first: int = 0):
        self.first = first

    def keep(self, records):
        return [i % 2 == self.first for i in range(len(records))]
"""


def record(name, good=(-1.0, -2.0, -3.0), bad=(-3.0, -2.0, -1.0), tokens=2):
    """A record with avg(y|x+), avg(y|x), avg(y|x-) of both answers, each `tokens` long."""
    scores = {
        f"policy/{context}/{response}": value * tokens
        for response, values in (("good", good), ("bad", bad))
        for context, value in zip(("good", "query", "bad"), values, strict=True)
    }
    ids = {"good": [1] * tokens, "bad": [2] * tokens}
    ask = [{"role": "user", "content": "Why?"}]
    return Record(id=name, messages=ask, good="a", bad="b", response_ids=ids, scores=scores)


def test_context_order():
    records = [
        record("in order"),
        record("good likelier without its principle", good=(-2.0, -1.0, -3.0)),
        record("good likelier under the bad one", good=(-1.0, -3.0, -2.0)),
        record("bad the wrong way round", bad=(-1.0, -2.0, -3.0)),
        record("equal", good=(-1.0, -1.0, -3.0)),
        record("by little", good=(-1.9, -2.0, -3.0)),
    ]
    assert ContextOrder().keep(records) == [True, False, False, False, False, True]
    assert ContextOrder(margin=0.5).keep(records) == [True] + [False] * 5
    assert ContextOrder(margin=-0.01).keep(records)[4]


def test_context_order_is_of_means_not_of_sums():
    """Lengths differ by response only, so the order is that of sums; margins are not."""
    long = record("long", good=(-1.0, -1.3, -2.0), tokens=10)
    assert ContextOrder(margin=0.5).keep([long]) == [False]


def test_likely_answers():
    """Means of avg(y+|x): -2, of avg(y-|x): -3; at least, so the mean itself passes."""
    records = [
        record("both", good=(0, -1.0, 0), bad=(0, -2.0, 0)),
        record("the means themselves", good=(0, -2.0, 0), bad=(0, -3.0, 0)),
        record("unlikely good", good=(0, -3.0, 0), bad=(0, -3.0, 0)),
        record("unlikely bad", good=(0, -2.0, 0), bad=(0, -4.0, 0)),
    ]
    assert LikelyAnswers().keep(records) == [True, True, False, False]
    assert LikelyAnswers(offset=-1.0).keep(records) == [True] * 4
    assert LikelyAnswers(centre="median").keep(records) == [True, True, False, False]
    assert LikelyAnswers().keep([]) == []


def test_clear_contrast():
    """Gaps of y+: 2, 4, 6 (mean 4) and of y-: 3, 5, 7 (mean 5); above, so the mean fails."""
    records = [
        record(str(i), good=(0.0, -1.0, -g), bad=(-b, -1.0, 0.0))
        for i, (g, b) in enumerate([(2, 3), (4, 5), (6, 7)])
    ]
    assert ClearContrast().keep(records) == [False, False, True]
    assert ClearContrast(offset=-0.5).keep(records) == [False, True, True]


def test_each_rule_judges_what_is_left():
    """Without the outlier the mean of avg(y+|x) is -2; with it all others would be above."""
    outlier = record("outlier", good=(-1.0, -20.0, -3.0))
    records = [outlier, *(record(str(v), good=(0.0, v, -9.0)) for v in (-1.0, -3.0))]
    kept, counts = apply_filters([ContextOrder(), LikelyAnswers()], records, "set")
    assert [r.id for r in kept] == ["-1.0"]
    assert counts == {
        "pairs/filtered_context_order": 1,
        "pairs/filtered_likely_answers": 1,
        "pairs/filtered": 2,
        "pairs/trained": 1,
    }
    kept, _ = apply_filters([LikelyAnswers()], records, "set")
    assert [r.id for r in kept] == ["-1.0", "-3.0"]


def test_nothing_left_and_no_scores_are_one_line():
    class Nothing(PairFilter):
        name = "nothing"

        def keep(self, records):
            return [False] * len(records)

    with pytest.raises(InputError, match=r"set: the filters left none of 1 records \(nothing 1\)"):
        apply_filters([Nothing()], [record("a")], "set")
    bare = record("a")
    bare.scores = {}
    with pytest.raises(InputError, match="context_order needs the score 'policy/good/good'"):
        apply_filters([ContextOrder()], [bare], "set")
    assert apply_filters([], [bare], "set") == ([bare], {})


@pytest.mark.parametrize("make", [lambda: ContextOrder(float("nan")), lambda: LikelyAnswers("top")])
def test_wrong_settings(make):
    with pytest.raises(InputError, match=r"pairs\.filters"):
        make()


def test_a_run_trains_on_what_passes_and_keeps_everything(tiny_model, tmp_path, sso, monkeypatch):
    (tmp_path / "own_filter.py").write_text(USER_CODE)
    monkeypatch.syspath_prepend(tmp_path)
    rows = [{"id": f"q{i}", "prompt": f"Name {i} birds."} for i in range(9)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    filters = [
        {"class_path": "sso_lightning.filters.ClearContrast", "init_args": {"offset": -100.0}},
        {"class_path": "own_filter.EveryOther", "init_args": {"first": 0}},
    ]
    sampler = {"class_path": "TransformersSampler", "init_args": {"max_new_tokens": 6}}
    principles = {"class_path": "PredefinedPrinciples", "init_args": {"pick": "random"}}
    dpo = {"class_path": "DPO"}
    settings = {
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "devices": 1},
        "model": {
            "policy": {"path": str(tiny_model)},
            "objective": {"class_path": "Contrastive", "init_args": {"base": dpo}},
        },
        "data": {
            "queries": str(tmp_path / "q.jsonl"),
            "val_queries": str(tmp_path / "q.jsonl"),
            "batch_size": 1,
        },
        "pairs": {"sampler": sampler, "principles": principles, "filters": filters},
    }
    settings["trainer"]["default_root_dir"] = str(tmp_path / "run")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    status, _, err = sso("fit", "--config", tmp_path / "c.yaml")
    assert status == 0, err
    whole = load_records(tmp_path / "run" / "pairs" / "iteration-00")
    with (tmp_path / "run" / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    numbers = {k: float(v) for row in table for k, v in row.items() if v}
    assert numbers["pairs/kept"] == len(whole)
    assert numbers["pairs/filtered_clear_contrast"] == 0
    assert numbers["pairs/filtered_every_other"] == len(whole) // 2
    steps = [row for row in table if row.get("train/loss")]
    assert len(steps) == numbers["pairs/trained"] == len(whole) - len(whole) // 2
    assert "val_pairs/trained" not in numbers

    # a file of pairs is filtered by the same rules
    settings["data"] = {"pairs": str(tmp_path / "run" / "pairs" / "iteration-00"), "batch_size": 1}
    settings["trainer"]["default_root_dir"] = str(tmp_path / "offline")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    status, _, err = sso("fit", "--config", tmp_path / "c.yaml")
    assert status == 0, err
    with (tmp_path / "offline" / "metrics.csv").open() as file:
        steps = [row for row in csv.DictReader(file) if row.get("train/loss")]
    assert len(steps) == numbers["pairs/trained"]
