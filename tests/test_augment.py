"""New queries from seeds: what is kept is worked out by hand, what answers is scripted."""

import json
import os
import re
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from sso_lightning.augment import (
    NearDuplicates,
    Sieve,
    Wanted,
    augment,
    augment_file,
    cleaned,
    scripts,
    shingles,
    similarity,
)
from sso_lightning.endpoint import AnswerStore, Reply
from sso_lightning.errors import InputError
from sso_lightning.records import Query, load_queries

pytest.importorskip("datasketch")

SEEDS = ["Name three birds for a poem.", "How do I boil an egg?", "Explain tides to a child."]
NEW = [
    f"{verb} {thing}."
    for verb in ("Describe", "Compare")
    for thing in (
        "a lighthouse keeper's winter",
        "two ways of sharpening knives",
        "the rules of chess boxing",
        "my grandmother's lentil soup",
        "how glaciers carve valleys",
    )
]


def queries(texts=SEEDS):
    return [Query(f"s{i}", [{"role": "user", "content": t}]) for i, t in enumerate(texts)]


class Scripted:
    """Answers the n-th request with the n-th reply, and keeps what it was asked."""

    def __init__(self, *replies):
        self.replies, self.asked = replies, []

    def __call__(self, requests, store):
        for name, messages in requests:
            if name not in store:
                self.asked.append((name, messages[0]["content"]))
                given = self.replies[int(name.rsplit("/", 1)[1]) % len(self.replies)]
                if given is not None:
                    store.add(name, given if isinstance(given, Reply) else Reply(given, "stop"))
        return [store.get(name) for name, _ in requests]


# --------------------------------------------------------------------------------- near duplicates


def test_similarity_is_the_share_of_common_sequences_of_four():
    # abcd bcde cdef defg against abcd bcde cdef defh: 3 of 5
    assert shingles("abcdefg") == {"abcd", "bcde", "cdef", "defg"}
    assert similarity(shingles("abcdefg"), shingles("abcdefh")) == 0.6
    assert similarity(shingles("abcd"), shingles("wxyz")) == 0.0
    # case, punctuation, width and white space do not count
    assert shingles("  Name:\tthree-birds! ") == shingles("name three \uff42irds")
    assert shingles("abc") == {"abc"}
    assert shingles("?!") == {""}


@pytest.mark.parametrize(("threshold", "found"), [(0.5, 0), (0.6, 0), (0.61, None), (1.0, None)])
def test_the_threshold_itself_is_near(threshold, found):
    near = NearDuplicates(threshold)
    near.add("abcdefg")
    near.add("something else altogether")
    assert near.find("abcdefh") == found
    assert near.find("ABCDEFG!") == 0
    assert near.find("something else altogether") == 1


def test_hashing_misses_none_of_many_that_are_clearly_near():
    near = NearDuplicates(0.7)
    texts = [
        f"Write a letter number {i * 7919} to the mayor about topic {i * 104729}"
        for i in range(100)
    ]
    for text in texts:
        near.add(text)
    for text in texts:
        other = f"{text}, please"
        assert similarity(shingles(other), shingles(text)) >= 0.7
        assert near.find(other) is not None


# --------------------------------------------------------------------------------------- cleaning


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("  How do owls hunt?\n", "How do owls hunt?"),
        ("Request 4: How do owls hunt?", "How do owls hunt?"),
        ("**New request:** How do owls hunt?", "How do owls hunt?"),
        ("Request 4:\nHow do owls hunt?\n\nRequest 5:\nWhy?", "How do owls hunt?"),
        ('"How do owls hunt?"', "How do owls hunt?"),
        ("\u201cHow do owls hunt?\u201d", "How do owls hunt?"),
        ('"Owl" and "hawk"', '"Owl" and "hawk"'),
        ("Request a refund: how?", "Request a refund: how?"),
        ("", ""),
        ('""', '""'),
    ],
)
def test_labels_quotation_marks_and_second_requests_are_taken_off(answer, text):
    assert cleaned(answer) == text


def test_scripts_are_counted_by_letter():
    assert scripts("ab \u0431 \u732b 12!") == Counter(LATIN=2, CYRILLIC=1, CJK=1)
    assert scripts("\uff21") == Counter(LATIN=1)  # a wide A


def test_each_reason_drops_its_own():
    sieve = Sieve(Wanted(1, min_chars=8, max_chars=40), SEEDS)
    expected = {
        "": "empty",
        "Half \ud800 a pair": "not_text",
        "Why?": "too_short",
        "x" * 41: "too_long",
        "\u041d\u0430\u0437\u043e\u0432\u0438 \u0442\u0440\u0438": "other_script",
        "name three birds for a POEM": "near_seed",
        "What is 12 x 12 / 3?": "",
        "what is 12 x 12 / 3": "near_new",
        "Say \u0434\u0430 in five other Slavic languages.": "",  # 2 of 33 letters
    }
    assert {text: sieve.drop_reason(text) for text in expected} == expected


def test_scripts_of_the_seeds_are_kept_and_any_may_be_allowed():
    japanese = "\u732b\u306e\u8a69\u3092\u66f8\u3044\u3066\u304f\u3060\u3055\u3044"
    assert Sieve(Wanted(1), [japanese]).drop_reason(japanese[::-1]) == ""
    assert Sieve(Wanted(1), [japanese]).drop_reason(NEW[0]) == "other_script"
    assert Sieve(Wanted(1, any_script=True), [japanese]).drop_reason(NEW[0]) == ""


# -------------------------------------------------------------------------------------- the whole


def test_asked_kept_and_dropped_add_up_and_each_row_names_its_seeds():
    ask = Scripted(NEW[0], None, Reply(NEW[1], "length"), SEEDS[0], NEW[2], NEW[0], "Hm", NEW[3])
    rows, report = augment(queries(), Wanted(3, shots=2), ask, AnswerStore(None), batch=3)
    assert [row["messages"][0]["content"] for row in rows] == [NEW[0], NEW[2], NEW[3]]
    reasons = ("failed", "cut", "near_seed", "near_new", "too_short")
    assert report["dropped"] == dict.fromkeys(reasons, 1)
    assert (report["asked"], report["kept"]) == (8, 3)
    (_, prompt), *_ = ask.asked
    shown = [i for i, seed in enumerate(SEEDS) if seed in prompt]
    assert len(shown) == 2
    assert set(re.findall(r"s\d", rows[0]["source"])) == {f"s{i}" for i in shown}
    assert rows[0]["source"].startswith("augmented from ")


def test_it_gives_up_after_the_most_requests():
    ask = Scripted(SEEDS[1])
    rows, report = augment(queries(), Wanted(5, max_requests=7), ask, AnswerStore(None), batch=4)
    assert rows == []
    assert (report["asked"], report["dropped"]) == (7, {"near_seed": 7})
    assert len(ask.asked) == 7


def test_the_outcome_depends_on_the_seed_but_not_on_the_batch():
    def outcome(seed, batch):
        ask = Scripted(*NEW)
        rows, report = augment(queries(), Wanted(6, 2, seed), ask, AnswerStore(None), batch=batch)
        return rows, report, ask.asked[:6]

    assert outcome(0, 1) == outcome(0, 32)
    assert outcome(0, 1)[2] != outcome(1, 1)[2]


def test_conversations_are_not_shown_but_not_repeated_either():
    turns = [("user", "Hello there, friend."), ("assistant", "Hi."), ("user", NEW[0])]
    long = Query("c", [{"role": r, "content": t} for r, t in turns])
    ask = Scripted(NEW[0], NEW[1])
    rows, report = augment([*queries(), long], Wanted(1), ask, AnswerStore(None))
    assert [row["messages"][0]["content"] for row in rows] == [NEW[1]]
    assert report["dropped"] == {"near_seed": 1}
    assert not any("Hi." in prompt for _, prompt in ask.asked)
    with pytest.raises(InputError, match="every seed has several turns"):
        augment([long], Wanted(1), ask, AnswerStore(None))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 0}, "--count must be at least 1"),
        ({"count": 1, "shots": 0}, "--shots must be"),
        ({"count": 1, "near": 0}, "--near must be above 0"),
        ({"count": 1, "near": 1.1}, "--near must be"),
        ({"count": 1, "max_chars": 3}, "--max-chars must be at least --min-chars"),
        ({"count": 1, "max_requests": 0}, "--max-requests must be"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        Wanted(**settings)


# --------------------------------------------------------------------------------------- files


def seed_file(folder: Path) -> Path:
    path = folder / "seeds.jsonl"
    path.write_text(
        "".join(json.dumps({"id": f"s{i}", "prompt": t}) + "\n" for i, t in enumerate(SEEDS))
    )
    return path


def test_the_file_is_a_query_file_with_a_report_beside_it(tmp_path):
    out = tmp_path / "new.jsonl"
    report = augment_file(str(seed_file(tmp_path)), out, Wanted(4), lambda: Scripted(*NEW))
    loaded = load_queries(out)
    assert [q.messages[0]["content"] for q in loaded] == NEW[:4]
    assert all(re.match(r"new.jsonl, line \d: augmented from s", q.source) for q in loaded)
    assert json.loads((tmp_path / "new.jsonl.report").read_text()) == report
    assert report["settings"]["near"] == 0.7


def test_a_second_run_asks_nothing_and_writes_the_same(tmp_path):
    out, seeds = tmp_path / "new.jsonl", str(seed_file(tmp_path))
    augment_file(seeds, out, Wanted(4), lambda: Scripted(*NEW))
    before = out.read_bytes()
    again = Scripted("never")
    augment_file(seeds, out, Wanted(4), lambda: again)
    assert out.read_bytes() == before
    assert again.asked == []


def test_what_is_there_is_not_overwritten_and_nothing_kept_is_an_error(tmp_path):
    seeds, out = str(seed_file(tmp_path)), tmp_path / "mine.jsonl"
    out.write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        augment_file(seeds, out, Wanted(1), lambda: Scripted(*NEW))
    assert out.read_text() == "mine"
    with pytest.raises(InputError, match=r"written as \.jsonl"):
        augment_file(seeds, tmp_path / "new.csv", Wanted(1), lambda: Scripted(*NEW))
    with pytest.raises(InputError, match=r"none of 4 answers was kept \(near_seed 4\)"):
        augment_file(seeds, tmp_path / "new.jsonl", Wanted(1), lambda: Scripted(*SEEDS))
    assert not (tmp_path / "new.jsonl").exists()


# ----------------------------------------------------------------------------------- command line


def completion(text):
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return {
        "body": json.dumps({"choices": [choice]}),
        "status": 200,
        "headers": {"Content-Type": "application/json"},
    }


def test_a_killed_command_repeats_no_finished_request(chat_server, forks, tmp_path):
    pytest.importorskip("openai")
    enough = threading.Event()

    def script(request, attempt):
        number = len(chat_server.asked)
        if number > 5:
            enough.set()
            time.sleep(0.3)
        return completion(f"{number * 7919} {NEW[number % 10]} {number * 104729}")

    chat_server.script = script
    out = tmp_path / "new.jsonl"
    command = ["-m", "sso_lightning", "augment", seed_file(tmp_path), "--out", out, "--count", 8]
    command += ["--model", "large", "--concurrency", 1, "--base-url", chat_server.url]
    command += ["--max-requests", 8, "--near", 1]
    process = forks.start(*command, cwd=tmp_path)
    try:
        assert enough.wait(60)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait().returncode == -signal.SIGKILL
    time.sleep(0.4)
    kept = (tmp_path / "new.jsonl.answers").read_bytes().count(b"\n")
    assert not out.exists()
    assert 4 <= kept <= 6
    before = len(chat_server.asked)
    done = forks.run(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(chat_server.asked) - before == 8 - kept
    assert done.stdout.startswith("asked    8\nkept     8\n")
    assert len(load_queries(out)) == 8


def test_the_policy_engine_gives_the_same_again(tiny_model, tmp_path, sso):
    seeds, files = seed_file(tmp_path), []
    for name in ("a", "b"):
        out = tmp_path / f"{name}.jsonl"
        status, _, err = sso(
            *("augment", seeds, "--out", out, "--count", 3, "--model", tiny_model, "--seed", 5),
            *("--max-new-tokens", 24, "--max-requests", 40, "--min-chars", 2, "--any-script"),
        )
        # random weights seldom end an answer: what comes is cut, and told
        report = out.with_name(f"{out.name}.report")
        assert status == 0 or "none of 40 answers was kept (cut" in err
        files.append((status, report.exists() and report.read_text()))
        answers = (tmp_path / f"{name}.jsonl.answers").read_bytes()
        files[-1] += (answers, out.exists() and out.read_bytes())
    assert files[0] == files[1]
    assert files[0][2].count(b"\n") >= 32


def test_a_wrong_flag_is_one_line(sso, tmp_path):
    status, _, err = sso("augment", seed_file(tmp_path), "--out", tmp_path / "x.jsonl")
    assert status == 2
    assert err == (
        "error: the following arguments are required: --count, --model; "
        "see sso-lightning augment --help\n"
    )
