"""The alarms of the report: each fires at its bound, on numbers worked out by hand."""

import importlib.util
from pathlib import Path

import pytest

from sso_lightning.errors import InputError
from sso_lightning.principles import FEATURE_NAMES, PredefinedPrinciples, steer
from sso_lightning.report import Bounds, alarms, read_runs, readings
from sso_lightning.report.facts import leak_of, lore_of
from sso_lightning.report.health import RULES

_spec = importlib.util.spec_from_file_location(
    "report_runs", Path(__file__).with_name("report_runs.py")
)
runs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(runs)
record, write_run = runs.record, runs.write_run

FEATURE = {f.name: f for f in PredefinedPrinciples([*FEATURE_NAMES]).features}


def plain(count=10):
    return [record(f"q{i}") for i in range(count)]


def fired(root, bounds=None):
    (run,) = read_runs([root])
    return run, {(a.set_name, a.rule.name): a for a in alarms(run, bounds or Bounds())}


def second(leak=False, **changes):
    """Ten records of which the first four are changed."""
    records = plain()
    for i in range(4):
        if leak:
            changes["good"] = f"Well, {i}: state only what is correct and use them."
        records[i] = record(f"q{i}", **changes)
    return records


# rule, second set, number and bound by hand, and what is counted
CASES = [
    # gap .5 in the first set, and .6 * .5 + .4 * (-.5 - -.4) = .26 in the second; .5 * .7 = .35
    ("gap", second(means={("query", "bad"): -0.4}), 0.26, 0.35),
    # exp(-1) and .6 exp(-1) + .4 exp(-5); .75 exp(-1)
    ("off_policy", second(means={("query", "bad"): -5.0}), 0.2234228, 0.2759096),
    # .6 * 10 + .4 * 30 = 18 tokens, against 15
    ("length", second(lengths={"original": 30}), 18.0, 15.0),
    ("truncated", second(finish={"good": "stop", "bad": "length", "original": "stop"}), 0.4, 0.2),
    ("leak", second(leak=True), 0.4, 0.05),
    ("duplicates", second(good="The  same\nANSWER."), 0.3, 0.2),  # four alike, three repeat
    # gap is .5 too: avg(y+|x) falls by .4 * 2 = .8 together with avg(y-|x)
    (
        "chosen",
        second(means={("query", "good"): -2.5, ("query", "bad"): -3.0}),
        -1.3,
        -0.75,
    ),
]


@pytest.mark.parametrize(("rule", "records", "value", "limit"), CASES, ids=lambda x: str(x)[:12])
def test_a_rule_fires_on_its_number_and_names_three_records_that_show_it(
    tmp_path, rule, records, value, limit
):
    root = write_run(tmp_path, {"iteration-00": plain(), "iteration-01": records})
    # a lower y- is off-policy as well: only the rule at hand counts here
    others = {"off_policy": 0.0} if rule == "chosen" else {}
    _, found = fired(root, Bounds(**others))
    assert {name for _, name in found} == {rule}
    alarm = found["iteration-01", rule]
    assert alarm.value == pytest.approx(value, abs=1e-6)
    assert alarm.limit == pytest.approx(limit, abs=1e-6)
    ids = [example.record.id for example in alarm.examples]
    assert len(ids) == 3
    assert {*ids} <= {"q0", "q1", "q2", "q3"}
    for part in ("iteration-01", alarm.rule.title, *ids):
        assert part in alarm.line


def test_a_healthy_run_has_no_alarm_and_says_what_it_cannot_know(tmp_path):
    root = write_run(tmp_path, {"iteration-00": plain(), "iteration-01": plain()})
    run, found = fired(root)
    assert not found
    values = {reading.rule.name: reading.value for reading in readings(run, Bounds())[1]}
    assert [name for name, value in values.items() if value is None] == ["signal", "fallback"]


def test_bounds_decide(tmp_path):
    root = write_run(tmp_path, {"iteration-00": plain(), "iteration-01": CASES[0][1]})
    assert not fired(root, Bounds(gap=0.51))[1]  # .255
    assert fired(root, Bounds(gap=0.53))[1]  # .265


def test_bounds_from_the_command_line():
    assert Bounds.parse(["gap=0.5", "leak=0"]) == Bounds(gap=0.5, leak=0.0)
    for given, says in {
        "gpa=1": "--bound: unknown rule 'gpa'",
        "gap=x": "--bound gap: 'x' is not a number",
        "gap": "--bound gap: '' is not a number",
        "gap=-1": "report bound gap must be 0 or more",
        "gap=nan": "report bound gap must be 0 or more",
    }.items():
        with pytest.raises(InputError, match=says):
            Bounds.parse([given])


def test_a_change_that_chance_alone_would_make_is_no_alarm(tmp_path):
    # means .5 and .3, under the bound of .35, but one record in ten makes all of it
    one = [record(f"q{i}", means={("query", "bad"): -1.0 if i else 1.0}) for i in range(10)]
    root = write_run(tmp_path, {"iteration-00": plain(), "iteration-01": one})
    run, found = fired(root)
    assert readings(run, Bounds())[1][1].value == pytest.approx(0.3)
    assert not found


def test_a_gap_that_begins_closed_cannot_close(tmp_path):
    closed = [record(f"q{i}", means={("query", "bad"): -0.4}) for i in range(10)]
    wider = [record(f"q{i}", means={("query", "bad"): -0.1}) for i in range(10)]
    root = write_run(tmp_path, {"iteration-00": closed, "iteration-01": wider})
    assert not fired(root)[1]


def test_sets_of_generator_and_policy_are_compared_with_their_own_first(tmp_path):
    short = [record(f"q{i}", lengths={"good": 4}) for i in range(4)]
    long = [record(f"q{i}", lengths={"good": 9}) for i in range(4)]
    sets = {"generator-00": short, "iteration-00": long, "generator-01": short}
    run, found = fired(write_run(tmp_path, {**sets, "iteration-01": long}))
    assert [pairs.name for pairs in run.sets] == [
        *("generator-00", "iteration-00", "generator-01", "iteration-01")
    ]
    assert not found


def test_without_scores_nothing_is_known_and_nothing_fires(tmp_path):
    bare = [record(f"q{i}", scores={}, response_ids={}, finish={}) for i in range(4)]
    run, found = fired(write_run(tmp_path, {"iteration-00": bare, "iteration-01": bare}))
    assert not found
    known = {r.rule.name for row in readings(run, Bounds()) for r in row if r.value is not None}
    assert known == {"leak", "duplicates"}


def test_signal_is_exact_on_sandbox_queries(tmp_path):
    query = [{"role": "user", "content": "Name three birds for a quiz."}]
    best = "Try these: finch, heron and lark. You can find them in an old hedge."
    worse = "Try these: button and kettle."
    right = [record(f"q{i}", messages=query, good=best, bad=worse) for i in range(2)]
    tie = [record("t", messages=query, good=worse, bad=f"{worse} ")]
    wrong = [record(f"w{i}", messages=query, good=worse, bad=best) for i in range(2)]
    _, found = fired(write_run(tmp_path, {"iteration-00": [*right, *tie, *wrong]}))
    alarm = found["iteration-00", "signal"]
    assert alarm.value == pytest.approx((2 + 0.5) / 5)
    assert [e.record.id for e in alarm.examples][2] == "t"
    assert {e.record.id for e in alarm.examples} == {"w0", "w1", "t"}


def test_fallback_rate_is_the_runs_own_and_records_show_predefined_text(tmp_path):
    steering = steer([FEATURE["Accuracy"]])
    fallen = {"good_principle": steering.good_principle, "bad_principle": steering.bad_principle}
    records = [record(f"q{i}", principle_source="policy") for i in range(4)]
    records += [record(f"f{i}", principle_source="policy", **fallen) for i in range(4)]
    info = {"counts": {"principles_requested": 8, "principles_fallback": 4}}
    _, found = fired(write_run(tmp_path, {"iteration-00": records}, info=info))
    alarm = found["iteration-00", "fallback"]
    assert alarm.value == 0.5
    assert {e.record.id for e in alarm.examples} < {f"f{i}" for i in range(4)}
    assert len(alarm.examples) == 3


LEAKS = {
    "Please state only what is correct and use care.": "state only what is correct and",
    "As instructed to do, here it is.": "As instructed to",
    "My guidelines say that I must be short.": "My guidelines say",
    "This is an inaccurate answer, I fear.": "inaccurate answer",
    "It is short.\n**Good answer:** Seven.": "**Good answer:**",
    "State only what is true.": "",
    "The principle of least action is a principle.": "",
    "A good answer would be seven, and the response of the plant is known.": "",
    "Response: 404": "",
}


@pytest.mark.parametrize("text", LEAKS)
def test_leaks(text):
    lore = lore_of({}, None)
    assert leak_of(record("q", good=text), "good", lore) == LEAKS[text]


def test_words_that_the_query_has_are_no_leak():
    lore = lore_of({}, None)
    for text, found in LEAKS.items():
        asked = [{"role": "user", "content": f"Translate: {text}"}]
        assert leak_of(record("q", good=text, messages=asked), "good", lore) == "", found


def test_leaks_of_a_users_own_feature():
    own = {"name": "Warmth", "good_adjective": "warm", "bad_adjective": "cold"}
    lore = lore_of({"features": [{**own, "good": "Be kind.", "bad": "Be distant."}]}, None)
    told = record("q", features=["Warmth"], bad="Here you have a cold answer.")
    assert leak_of(told, "bad", lore) == "cold answer"
    assert leak_of(record("q", bad="Here you have a cold answer."), "bad", lore) == ""


def test_every_rule_has_a_bound_and_words():
    for rule in RULES:
        assert getattr(Bounds(), rule.name) >= 0
        assert rule.meaning.endswith(".")
