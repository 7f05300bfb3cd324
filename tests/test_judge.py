"""The judge: exact where the sandbox's truth judges, counted where a judge misbehaves."""

import importlib.util
import json
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest

from sso_lightning.endpoint import Endpoint, Reply
from sso_lightning.errors import InputError
from sso_lightning.evaluation import read_scores
from sso_lightning.judge import (
    PRIOR_SD,
    Contest,
    Outcome,
    contests_between,
    judge,
    length_controlled,
    prompt_for,
    result_of,
    verdict_of,
)
from sso_lightning.records import load_records
from sso_lightning.sandbox import world
from sso_lightning.sandbox.callbacks import records_quality

pytest.importorskip("openai")
pytest.importorskip("scipy")

_spec = importlib.util.spec_from_file_location(
    "report_runs", Path(__file__).with_name("report_runs.py")
)
runs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(runs)

PARTS = re.compile(
    r"<conversation>\n(.*?)\n</conversation>.*<answer_a>\n(.*?)\n</answer_a>.*"
    r"<answer_b>\n(.*?)\n</answer_b>",
    re.DOTALL,
)


def said(text, finish="stop", status=200):
    choice = {"index": 0, "message": {"role": "assistant", "content": text}}
    body = json.dumps({"choices": [{**choice, "finish_reason": finish}]})
    return {"body": body, "status": status, "headers": {"Content-Type": "application/json"}}


def truth(request, attempt):
    """The sandbox's ground truth as a judge."""
    query, a, b = PARTS.search(request).groups()
    one, other = world.quality(query, a), world.quality(query, b)
    verdict = "tie" if one == other else "A" if one > other else "B"
    return said(f"Their qualities are {one} and {other}.\nVerdict: {verdict}")


def contests(count=4):
    return [
        Contest(f"q{i}", [{"role": "user", "content": f"What of {i}?"}], f"one {i}", f"two {i}")
        for i in range(count)
    ]


def sandbox_records(seed, count=24):
    """Records of the sandbox's queries, good answers mostly better, some equal."""
    rng = random.Random(seed)
    found = []
    for number, query in enumerate(rng.sample(world.queries(), count)):
        ask = world.ask_of(query.text)
        texts = {
            name: world.render(world.plan_answer(ask, {}, rng, shift=shift))
            for name, shift in (("good", 0.2), ("bad", -0.1), ("original", 0.0))
        }
        if number % 8 == 0:
            texts["bad"] = texts["good"] + " "
        messages = [{"role": "user", "content": query.text}]
        found.append(runs.record(f"q{number}", messages=messages, **texts))
    return found


@pytest.fixture
def ask(tmp_path, chat_server, monkeypatch):
    """An endpoint on the server, with a cache of its own."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)

    def make(script, **settings):
        chat_server.script = script
        return Endpoint(
            chat_server.url,
            "judge",
            temperature=0.0,
            max_retries=0,
            **{"cache": None, "concurrency": 1, **settings},
        )

    return make


# ---------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("Verdict: A", "a"),
        ("B is vague.\n\n**Verdict: B.**\n", "b"),
        ("verdict: TIE", "tie"),
        ("Verdict: A\nVerdict: B", "b"),
        ("Verdict: A, I think", "unparsed"),
        ("Verdict: C", "unparsed"),
        ("A", "unparsed"),
        ("Verdict: A\nI hope this helps.", "unparsed"),
        ("", "unparsed"),
    ],
)
def test_only_a_last_line_with_nothing_else_is_a_verdict(text, verdict):
    assert verdict_of(Reply(text, "stop")) == verdict
    assert verdict_of(Reply(text, "length")) == "unparsed"
    assert verdict_of(None) == "failed"


@pytest.mark.parametrize(
    ("verdicts", "score"),
    [
        (("a", "b"), 1.0),
        (("a", "tie"), 1.0),
        (("tie", "b"), 1.0),
        (("b", "a"), 0.0),
        (("b", "tie"), 0.0),
        (("tie", "a"), 0.0),
        (("a", "a"), 0.5),
        (("b", "b"), 0.5),
        (("tie", "tie"), 0.5),
        (("a", "unparsed"), None),
        (("failed", "b"), None),
    ],
)
def test_scores_of_two_rounds(verdicts, score):
    assert Outcome(verdicts).score == score


def test_the_judge_sees_the_conversation_and_both_answers():
    turns = [("system", "Be {brief}."), ("user", "Hi"), ("assistant", "Yes?"), ("user", "Why?")]
    messages = [{"role": role, "content": text} for role, text in turns]
    parts = PARTS.search(prompt_for(messages, "one {a}", "two")).groups()
    assert parts[0] == "[system]\nBe {brief}.\n\n[user]\nHi\n\n[assistant]\nYes?\n\n[user]\nWhy?"
    assert parts[1:] == ("one {a}", "two")
    assert PARTS.search(prompt_for(messages[1:2], "one", "two"))[1] == "Hi"


# ---------------------------------------------------------------------------------- the code path


def test_the_sandboxs_truth_as_a_judge_is_the_exact_signal_accuracy(
    tmp_path, chat_server, sso, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    sets = {f"iteration-{i:02d}": sandbox_records(i) for i in range(2)}
    for number, records in enumerate(sets.values()):
        for each in records:
            each.iteration = number
    run = runs.write_run(tmp_path / "run", sets)
    chat_server.script = truth
    command = ("judge", run, "--base-url", chat_server.url, "--model", "truth")
    status, out, err = sso(*command, "--json", "--verdicts", "verdicts.jsonl")
    assert status == 0, err
    report = json.loads(out)["iterations"]
    kept = read_scores(run)["judge/signal_accuracy"]
    for number in range(2):
        records = load_records(run / "pairs" / f"iteration-{number:02d}")
        exact = records_quality(records)["sandbox/signal_accuracy"]
        found = report[str(number)]
        assert found["rate"]["mean"] == exact
        assert found["tied"] >= 3
        assert found["contradicted"] == found["unparsed"] == found["failed"] == 0
        assert found["first_place"] == 0.5
        assert found["rate"]["low"] < exact < found["rate"]["high"]
        assert sum(kept[number].values()) / len(records) == exact
    # each pair twice, with its answers in both orders; no principle is shown
    assert len(chat_server.asked) == 2 * 2 * 24
    places = {PARTS.search(request).groups() for request in chat_server.asked}
    assert {(q, b, a) for q, a, b in places} == places
    shown = "".join(chat_server.asked)
    assert not any(text in shown for text in (records[0].good_system, records[0].bad_principle))
    assert {body["temperature"] for body in chat_server.bodies} == {0.0}
    rows = [json.loads(line) for line in Path("verdicts.jsonl").read_text().splitlines()]
    assert {row["id"]: row["score"] for row in rows if row["iteration"] == 1} == kept[1]
    # finished verdicts are not asked for again; a part of the pairs, a table
    status, out, _ = sso(*command, "--iteration", "1", "--limit", "5", "--name", "other")
    assert status == 0
    assert len(chat_server.asked) == 96
    assert "signal accuracy" in out
    part = read_scores(run)["other/signal_accuracy"]
    first = sorted(kept[1])[:5]
    assert part == {1: {key: kept[1][key] for key in first}}
    beside = run / "evaluations/other/signal_accuracy/iteration-01.judge.json"
    judged = json.loads(beside.read_text())
    assert judged["judge"]["model"] == "truth"
    assert judged["rate"]["items"] == 5
    # two judges under one name would be compared with each other
    other = [*command[:-1], "another", "--name", "other", "--iteration", "0"]
    status, _, err = sso(*other)
    assert status == 2
    assert f"{beside}: the scores beside it are of another judge" in err
    assert len(chat_server.asked) == 96


def test_a_judge_that_likes_the_first_place_contradicts_itself(ask):
    pairs = contests()
    found = result_of(pairs, judge(pairs, ask(lambda *_: said("Verdict: A"))))
    assert (found.won, found.tied, found.lost, found.contradicted) == (0, 4, 0, 4)
    assert (found.rate.mean, found.first_place) == (0.5, 1.0)
    likes_second = result_of(pairs, judge(pairs, ask(lambda *_: said("Verdict: B"))))
    assert (likes_second.rate.mean, likes_second.first_place) == (0.5, 0.0)


def test_what_does_not_parse_or_fails_is_counted_and_has_no_score(ask):
    def script(request, attempt):
        _, a, _ = PARTS.search(request).groups()
        if a == "one 0":
            return said("Both have their merits.")
        if a == "two 1":
            return said("no", status=400)
        if a == "one 2":
            return said("Verdict: A", finish="length")
        return said("Verdict: A" if a.startswith("one") else "Verdict: B")

    pairs = contests(5)
    found = result_of(pairs, judge(pairs, ask(script, max_failed=0.5)))
    assert (found.pairs, found.won, found.tied, found.lost) == (5, 2, 0, 0)
    assert (found.unparsed, found.failed) == (2, 1)
    assert (found.rate.mean, found.rate.items) == (1.0, 2)
    nothing = result_of(pairs, judge(pairs, ask(lambda *_: said("Hm."))))
    assert (nothing.unparsed, nothing.rate, nothing.first_place) == (5, None, None)
    with pytest.raises(InputError, match=r"3 of 10 requests to .* failed"):
        judge(pairs, ask(lambda *_: said("no", status=400), max_failed=0.2))


# --------------------------------------------------------------------------------- length control


def lengths_and_scores(rng, count, theta, phi, extra=0.0):
    """Pairs drawn from the model itself."""
    longer = [rng.gauss(extra, 100) for _ in range(count)]
    scale = np.std(longer, ddof=1)
    odds = [theta + phi * math.tanh(each / scale) for each in longer]
    return [float(rng.random() < 1 / (1 + math.exp(-each))) for each in odds], longer


def test_a_judge_that_only_likes_length_is_even_at_equal_length():
    scores, longer = lengths_and_scores(random.Random(0), 1500, theta=0.0, phi=3.0, extra=120)
    assert sum(scores) / 1500 > 0.75
    found = length_controlled(scores, longer)
    assert found.low < 0.5 < found.high
    assert found.mean == pytest.approx(0.5, abs=0.06)
    # one that likes the answers themselves stays where it is
    scores, longer = lengths_and_scores(random.Random(1), 1500, theta=1.0, phi=0.0, extra=120)
    assert length_controlled(scores, longer).mean == pytest.approx(0.731, abs=0.06)


@pytest.mark.parametrize("kind", ["drawn", "ties", "separated", "all won"])
def test_the_fit_is_that_of_a_general_optimizer(kind):
    from scipy.optimize import minimize

    rng = random.Random(2)
    scores, longer = lengths_and_scores(rng, 60, theta=0.4, phi=1.5)
    if kind == "ties":
        scores = [rng.choice((score, 0.5)) for score in scores]
    elif kind == "separated":
        scores = [float(each > 0) for each in longer]
    elif kind == "all won":
        scores = [1.0] * 60
    y, terms = np.array(scores), np.tanh(np.array(longer) / np.std(longer, ddof=1))

    def loss(x):
        odds = x[0] + x[1] * terms
        # -log-likelihood of a share y, and the normal prior
        return (np.logaddexp(0, odds) - y * odds).sum() + (x**2).sum() / (2 * PRIOR_SD**2)

    best = minimize(
        loss, np.zeros(2), method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-10}
    )
    found = length_controlled(scores, longer)
    assert found.mean == pytest.approx(1 / (1 + math.exp(-best.x[0])), abs=1e-5)
    assert 0 <= found.low <= found.mean + 1e-12
    assert found.mean - 1e-12 <= found.high <= 1


def test_equal_lengths_leave_the_win_rate_as_it_is():
    found = length_controlled([1.0] * 30 + [0.0] * 10, [0.0] * 40)
    assert found.mean == pytest.approx(0.75, abs=1e-3)
    assert math.isnan(length_controlled([1.0], [5.0]).low)


# --------------------------------------------------------------------------------- sets of answers


def outputs(path, answers):
    rows = [
        {"instruction": f"What of {key}?", "output": text, "generator": path.stem}
        for key, text in answers.items()
    ]
    path.write_text(json.dumps(rows))
    return path


def test_win_rates_of_alpacaeval_outputs(tmp_path, chat_server, sso, monkeypatch):
    monkeypatch.chdir(tmp_path)
    new = outputs(tmp_path / "new.json", {1: "long answer", 2: "longer answer", 3: "x", 4: "y"})
    old = outputs(tmp_path / "old.json", {4: "y", 3: "xx", 2: "short", 1: "brief", 5: "extra"})
    (tmp_path / "run").mkdir()

    def prefers_longer(request, attempt):
        _, a, b = PARTS.search(request).groups()
        verdict = "tie" if len(a) == len(b) else "A" if len(a) > len(b) else "B"
        return said(f"Verdict: {verdict}")

    chat_server.script = prefers_longer
    command = ("judge", new, "--against", old, "--base-url", chat_server.url, "--model", "m")
    status, out, err = sso(*command, "--json", "--keep", "run", "3")
    assert status == 0, err
    report = json.loads(out)
    found = report["iterations"]["3"]
    assert (found["won"], found["tied"], found["lost"]) == (2, 1, 1)
    assert found["rate"]["mean"] == 2.5 / 4
    assert found["longer"] == (6 + 8 - 1 + 0) / 4
    assert report["unmatched"] == 1
    kept = read_scores(Path("run"))["judge/win_rate"]
    assert kept == {3: {"What of 1?": 1.0, "What of 2?": 1.0, "What of 3?": 0.0, "What of 4?": 0.5}}
    # the next iteration against the same answers goes beside it, against others it does not
    assert sso(*command, "--keep", "run", "4")[0] == 0
    assert [*read_scores(Path("run"))["judge/win_rate"]] == [3, 4]
    command = (*command[:3], new, *command[4:])
    assert "against other answers" in sso(*command, "--keep", "run", "5")[2]
    command = (*command[:3], old, *command[4:])
    status, out, _ = sso(*command)
    assert "1 queries are answered by one of the two only and left out" in out
    assert "0.625 (" in out


def test_plain_answers_of_two_sets_meet_by_query(tmp_path):
    sets = {
        "iteration-00": [runs.record(name, original=f"old {name}") for name in "abc"],
        "iteration-01": [runs.record(name, original=f"new {name}") for name in "bcd"],
    }
    run = runs.write_run(tmp_path / "run", sets)
    old, new = (str(run / "pairs" / name) for name in sets)
    found, unmatched = contests_between(new, old)
    assert [(c.id, c.first, c.second) for c in found] == [
        ("b", "new b", "old b"),
        ("c", "new c", "old c"),
    ]
    assert unmatched == 2
    with pytest.raises(InputError, match=r"record 'b': answers 'b' a second time; give one set"):
        contests_between(str(run), old)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({9: "z"}, "have no query in common"),
        ({1: None}, "record 1: instruction and output must be texts"),
    ],
)
def test_sets_that_do_not_meet_are_refused(tmp_path, answers, message):
    first = outputs(tmp_path / "a.json", {1: "x"})
    second = outputs(tmp_path / "b.json", answers)
    with pytest.raises(InputError, match=message):
        contests_between(str(first), str(second))


def test_one_id_of_two_queries_is_refused(tmp_path):
    one, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for path, query in ((one, "Why?"), (other, "How?")):
        row = {"id": "q", "prompt": query, "good": "g", "bad": "b", "original": "o"}
        row |= {"messages": [{"role": "user", "content": query}]}
        del row["prompt"]
        path.write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match="the query 'q' is another one in"):
        contests_between(str(one), str(other))
    one.write_text(one.read_text().replace('"o"', '""'))
    with pytest.raises(InputError, match="record 'q' has no plain answer"):
        contests_between(str(one), str(one))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep", "run", "1"], "--keep goes with --against"),
        (["--against", "x.json", "--iteration", "1"], "--iteration does not go with --against"),
        (["--against", "x.json", "--keep", "none", "1"], "none: no such run folder"),
        (["--against", "x.json", "--keep", ".", "last"], "must be a number, got 'last'"),
        (["--name", "../up"], "'../up' is no name of a metric"),
        (["--limit", "0"], "--limit must be at least 1, got 0"),
    ],
)
def test_wrong_flags_are_named(sso, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    command = ("judge", "pairs.jsonl", "--base-url", "http://localhost:1/v1", "--model", "m")
    status, _, err = sso(*command, *options)
    assert status == 2
    assert err.startswith("error: ")
    assert message in err


def test_answers_asked_to_be_harmful_are_announced(tmp_path, chat_server, sso, monkeypatch):
    monkeypatch.chdir(tmp_path)
    marked = {"features": ["Safety"], "safety_mode": "paper"}
    sets = {"iteration-00": [runs.record("a", **marked), runs.record("b", features=["Safety"])]}
    run = runs.write_run(tmp_path / "run", sets)
    chat_server.script = lambda *_: said("Verdict: tie")
    status, _, err = sso("judge", run, "--base-url", chat_server.url, "--model", "m")
    assert status == 0
    assert f"1 answers that were asked to be harmful go to {chat_server.url}" in err
