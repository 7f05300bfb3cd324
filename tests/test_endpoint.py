"""Principles from another model, against a real HTTP server on loopback that misbehaves on cue."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

from sso_lightning.endpoint import AnswerStore, Endpoint, EndpointPrinciples, Reply
from sso_lightning.errors import InputError
from sso_lightning.principles import Draw, PrincipleSource, principle_rates
from sso_lightning.records import Query, load_records

pytest.importorskip("openai")

ROOT = Path(__file__).resolve().parent.parent
KEY = "sk-loopback-0123456789abcdef"


def completion(text, finish="stop"):
    choice = {"index": 0, "message": {"role": "assistant", "content": text}}
    return json.dumps(
        {"object": "chat.completion", "choices": [{**choice, "finish_reason": finish}]}
    )


def guidelines(request):
    return f"## Bad guideline\nworse {request}\n\n## Good guideline\nbetter {request}"


def reply(body, status=200, kind="application/json", **headers):
    return {"body": body, "status": status, "headers": {"Content-Type": kind, **headers}}


def good(request, attempt):
    return reply(completion(guidelines(request)))


@pytest.fixture
def server(chat_server):
    """Every query gets its own guidelines unless a test says otherwise."""
    chat_server.script = good
    return chat_server


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)


def endpoint(server, **settings):
    url = server if isinstance(server, str) else server.url
    defaults = {"cache": None, "timeout": 5.0, "max_retries": 2, "max_failed": 0.5}
    return Endpoint(**{"base_url": url, "model": "large", **defaults, **settings})


def queries(count):
    return [Query(f"q{i}", [{"role": "user", "content": f"Request {i}?"}]) for i in range(count)]


def propose(source, count):
    """The good side of every steering, and the counts."""
    draw = Draw(0, 0, never)
    return source.propose(queries(count), draw), draw.counts


def never(*_):
    raise AssertionError("the policy was asked")


def written(number):
    return f"better Request {number}?"


# --------------------------------------------------------------------------------------- answers


def test_guidelines_steer_both_sides_and_the_careless_bound_holds(server):
    source = EndpointPrinciples(endpoint(server))
    (steering,), counts = propose(source, 1)
    assert source.name == "endpoint large"
    assert source.safety_mode == "careless"
    assert (steering.features, steering.adjectives) == ((), ())
    assert steering.good_principle == written(0)
    assert steering.bad_principle.split("\n") == [
        "worse Request 0?",
        "Even so, write nothing harmful, graphic or illegal.",
    ]
    assert f"\n- {written(0)}\n" in steering.good_system
    assert "worse" not in steering.good_system
    assert "harmful" not in steering.good_system
    assert "\n- worse Request 0?\n- Even so, write nothing harmful" in steering.bad_system
    assert "better" not in steering.bad_system
    assert counts == Counter(principles_requested=1, principles_sent=1)
    (body,) = server.bodies
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("large", 0.7, 1024)
    assert "Neither may ask for anything harmful" in body["messages"][0]["content"]


def test_paper_mode_needs_permission_and_never_asks_another_model_for_harm(server):
    with pytest.raises(InputError, match="allow_harmful_negatives: true"):
        EndpointPrinciples(endpoint(server), safety="paper")
    with pytest.warns(UserWarning, match="may be harmful"):
        source = EndpointPrinciples(endpoint(server), safety="paper", allow_harmful_negatives=True)
    (steering,), _ = propose(source, 1)
    assert source.safety_mode == "paper"
    assert steering.bad_principle == "worse Request 0?"
    assert "Neither may ask for anything harmful" in server.bodies[0]["messages"][0]["content"]


def test_features_format_shares_the_policys_parser_and_keeps_safety_predefined(server):
    def script(request, attempt):
        name = "Accuracy" if "Mix up facts" in server.bodies[-1]["messages"][0]["content"] else ""
        return reply(completion(json.dumps({"good": "G", "bad": "B"}) if name else "no JSON"))

    server.script = script
    source = EndpointPrinciples(
        endpoint(server, concurrency=1),
        format="features",
        features=["Safety", "Accuracy", "Engagement"],
        count=3,
        pick="random",
        concision=0,
    )
    (steering,), counts = propose(source, 1)
    sides = dict(zip(steering.features, steering.bad_principle.split("\n"), strict=True))
    predefined = {feature.name: feature.bad for feature in source.features}
    assert sides == {**predefined, "Accuracy": "B"}
    assert len(server.asked) == 2
    assert principle_rates(counts) == {
        "pairs/principle_fallback_rate": 0.5,
        "pairs/principle_failed_rate": 0.0,
    }


UNUSABLE = {
    "cut off": (guidelines("it"), "length"),
    "filtered": (guidelines("it"), "content_filter"),
    "no heading": ("Be good.", "stop"),
    "one heading": ("## Bad guideline\nBe bad.", "stop"),
    "headings the other way round": ("## Good guideline\nA\n## Bad guideline\nB", "stop"),
    "a heading twice": (guidelines("it") + "\n## Good guideline\nC", "stop"),
    "equal texts": ("## Bad guideline\nA\n## Good guideline\nA", "stop"),
    "an empty text": ("## Bad guideline\n\n## Good guideline\nA", "stop"),
    "too long": ("## Bad guideline\nB\n## Good guideline\n" + "a" * 601, "stop"),
    "half a surrogate pair": (guidelines("\ud800"), "stop"),
    "nothing": ("", "stop"),
    "reasoning only": (None, "length"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_answers_that_cannot_be_used_fall_back_counted_and_are_not_asked_again(server, kind):
    def script(request, attempt):
        return reply(completion(*UNUSABLE[kind])) if "1" in request else good(request, attempt)

    server.script = script
    source = EndpointPrinciples(endpoint(server), concision=0)
    steerings, counts = propose(source, 3)
    assert [s.good_principle for s in (steerings[0], steerings[2])] == [written(0), written(2)]
    assert len(steerings[1].features) == 2
    assert counts["principles_fallback"] == 1
    assert counts["principles_failed"] == 0
    assert sorted(server.asked) == [f"Request {i}?" for i in range(3)]
    again, _ = propose(EndpointPrinciples(endpoint(server), concision=0), 3)
    assert again == steerings  # what is drawn depends on seed and query only


# --------------------------------------------------------------------------------------- retries


def late(request, attempt):
    time.sleep(1.0)
    return good(request, attempt)


TROUBLE = {
    "time-out": late,
    "rate limit": lambda *_: reply("{}", 429, **{"Retry-After": "0.05"}),
    "server error": lambda *_: reply("oops", 500, "text/plain"),
    "overloaded": lambda *_: reply("{}", 503),
    "dropped": lambda *_: None,
    "dropped half way": lambda *_: {**reply('{"choices": ['), "length": 1000},
    "malformed JSON": lambda *_: reply('{"choices": [{"mess'),
    "JSON of another shape": lambda *_: reply('["choices"]'),
    "no choices": lambda *_: reply('{"choices": []}'),
    "choices that are null": lambda *_: reply('{"choices": null}'),
    "no message": lambda *_: reply('{"choices": [{"index": 0}]}'),
    "content in parts": lambda *_: reply(completion([{"type": "text", "text": "A"}])),
    "a web page": lambda *_: reply("<html>Welcome</html>", 200, "text/html"),
    "nothing at all": lambda *_: reply(""),
    "bytes that are no text": lambda *_: reply("\x00\x01\x02", 200, "application/octet-stream"),
}


@pytest.mark.parametrize("kind", TROUBLE)
def test_a_request_that_fails_once_is_sent_again_and_nothing_else_is(server, kind):
    def script(request, attempt):
        return (TROUBLE[kind] if attempt == 0 and "1" in request else good)(request, attempt)

    server.script = script
    steerings, counts = propose(EndpointPrinciples(endpoint(server, timeout=0.3)), 4)
    assert [s.good_principle for s in steerings] == [written(i) for i in range(4)]
    assert counts == Counter(principles_requested=4, principles_sent=4)
    assert Counter(server.asked) == Counter({f"Request {i}?": 1 + (i == 1) for i in range(4)})


@pytest.mark.parametrize("kind", TROUBLE)
def test_a_request_that_keeps_failing_falls_back_and_loses_nothing_else(server, kind):
    def script(request, attempt):
        return (TROUBLE[kind] if "2" in request else good)(request, attempt)

    server.script = script
    source = EndpointPrinciples(endpoint(server, timeout=0.3, max_retries=1), concision=0)
    steerings, counts = propose(source, 4)
    assert [bool(s.features) for s in steerings] == [False, False, True, False]
    assert counts == Counter(principles_requested=4, principles_sent=4, principles_failed=1)
    assert principle_rates(counts) == {
        "pairs/principle_fallback_rate": 0.0,
        "pairs/principle_failed_rate": 0.25,
    }
    assert server.asked.count("Request 2?") == 2


def test_all_kinds_of_failure_share_one_number_of_retries(server):
    kinds = ["server error", "no choices", "server error", "malformed JSON", "no choices"]
    server.script = lambda request, attempt: TROUBLE[kinds[attempt]](request, attempt)
    (steering,), counts = propose(EndpointPrinciples(endpoint(server, max_retries=3)), 1)
    assert steering.features
    assert counts["principles_failed"] == 1
    assert len(server.asked) == 4


def test_the_server_says_how_long_to_wait(server):
    came = []

    def script(request, attempt):
        came.append(time.monotonic())
        if attempt == 0:
            return reply("{}", 429, **{"Retry-After": "0.4"})
        return good(request, attempt)

    server.script = script
    propose(EndpointPrinciples(endpoint(server)), 1)
    assert 0.4 <= came[1] - came[0] < 2


def test_the_limit_of_parallel_requests_is_kept_and_order_does_not_depend_on_time(server):
    def script(request, attempt):
        time.sleep(0.02 * (7 * int(re.search(r"\d+", request)[0]) % 5) + 0.02)
        return good(request, attempt)

    server.script = script
    steerings, _ = propose(EndpointPrinciples(endpoint(server, concurrency=3)), 16)
    assert server.most == 3
    assert [s.good_principle for s in steerings] == [written(i) for i in range(16)]


def test_equal_queries_are_asked_once(server):
    same = [Query(f"q{i}", [{"role": "user", "content": "Request 0?"}]) for i in range(3)]
    source = EndpointPrinciples(endpoint(server))
    steerings = source.propose(same, Draw(0, 0, never))
    assert {s.good_principle for s in steerings} == {written(0)}
    assert len(server.asked) == 1


def test_a_notebook_whose_loop_runs_can_ask_too(server):
    async def cell():
        return propose(EndpointPrinciples(endpoint(server)), 1)

    assert asyncio.run(cell())[0][0].good_principle == written(0)


def test_an_interrupt_does_not_wait_for_requests_in_flight(server):
    release = threading.Event()

    def script(request, attempt):
        release.wait(20)
        return good(request, attempt)

    server.script = script
    source = EndpointPrinciples(endpoint(server, timeout=20))
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    # a process that was started in the background ignores Ctrl-C
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        timer.start()
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            propose(source, 2)
    finally:
        release.set()
        timer.join()
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - started < 5


# ------------------------------------------------------------------------------------ giving up


@pytest.mark.parametrize(
    ("status", "says"), [(401, "No such key."), (403, ""), (404, "No such model."), (405, "")]
)
def test_a_server_that_refuses_the_first_request_ends_the_run(server, status, says):
    server.script = lambda *_: reply(json.dumps({"error": {"message": says}}), status)
    source = EndpointPrinciples(endpoint(server))
    with pytest.raises(InputError, match="refuses the first request") as caught:
        propose(source, 5)
    line = str(caught.value)
    assert line.startswith(server.url)
    assert str(status) in line
    assert says in line
    assert "check that the server runs" in line
    assert "\n" not in line
    assert len(server.asked) == 1


def test_no_server_ends_the_run():
    with socket.socket() as held:  # bound, but not listening
        held.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{held.getsockname()[1]}/v1"
        with pytest.raises(InputError, match=f"{url} refuses the first request: .*check that"):
            propose(EndpointPrinciples(endpoint(url, max_retries=1)), 5)


def test_a_key_that_is_refused_later_is_a_failure_like_others(server):
    server.script = lambda request, attempt: (
        reply("{}", 401) if "3" in request else good(request, attempt)
    )
    _, counts = propose(EndpointPrinciples(endpoint(server)), 4)
    assert counts["principles_failed"] == 1


def test_too_many_failures_end_the_run_and_keep_what_is_finished(server, tmp_path):
    broken = True

    def script(request, attempt):
        bad = broken and int(re.search(r"\d+", request)[0]) >= 6
        return TROUBLE["server error"](request, attempt) if bad else good(request, attempt)

    server.script = script
    settings = {"max_retries": 0, "max_failed": 0.2, "concurrency": 1, "cache": str(tmp_path)}
    with pytest.raises(InputError) as caught:
        propose(EndpointPrinciples(endpoint(server, **settings)), 10)
    assert str(caught.value) == (
        f"3 of 10 requests to {server.url} failed (endpoint.max_failed: 0.2), the last one with: "
        "status 500 oops; mend that and start again, finished answers are kept"
    )
    assert len(server.asked) == 9
    broken = False
    server.asked.clear()
    steerings, _ = propose(EndpointPrinciples(endpoint(server, **settings)), 10)
    assert [s.good_principle for s in steerings] == [written(i) for i in range(10)]
    assert sorted(server.asked) == [f"Request {i}?" for i in range(6, 10)]


@pytest.mark.parametrize(("max_failed", "ends"), [(0.1, False), (0.0, True)])
def test_one_failure_is_forgiven_in_a_small_shard_unless_none_is_allowed(server, max_failed, ends):
    server.script = lambda request, attempt: (
        reply("", 500) if "1" in request else good(request, attempt)
    )
    source = EndpointPrinciples(endpoint(server, max_retries=0, max_failed=max_failed))
    if ends:
        with pytest.raises(InputError, match="1 of 3 requests"):
            propose(source, 3)
    else:
        assert propose(source, 3)[1]["principles_failed"] == 1


# ---------------------------------------------------------------------------------------- cache


def test_finished_answers_are_not_asked_again_but_other_settings_are(server, tmp_path):
    settings = {"cache": str(tmp_path / "deep" / "cache")}
    first, _ = propose(EndpointPrinciples(endpoint(server, **settings)), 3)
    source = EndpointPrinciples(endpoint("http://127.0.0.1:1/v1", **settings))
    assert propose(source, 3)[0] == first  # the address may change, and no server is needed
    assert len(server.asked) == 3
    for change in ({"temperature": 0.1}, {"model": "larger"}, {"extra_body": {"top_p": 0.8}}):
        server.asked.clear()
        propose(EndpointPrinciples(endpoint(server, **settings, **change)), 3)
        assert len(server.asked) == 3
    assert server.bodies[-1]["top_p"] == 0.8


def test_failures_are_asked_again(server, tmp_path):
    server.script = lambda request, attempt: (
        reply("", 500) if "1" in request and attempt == 0 else good(request, attempt)
    )
    settings = {"cache": str(tmp_path), "max_retries": 0}
    assert propose(EndpointPrinciples(endpoint(server, **settings)), 3)[1]["principles_failed"] == 1
    assert propose(EndpointPrinciples(endpoint(server, **settings)), 3)[1]["principles_failed"] == 0
    assert Counter(server.asked)["Request 1?"] == 2
    assert len(server.asked) == 4


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[:-1],
        lambda data: data[:-20],
        lambda data: data + b'{"key": "x", "te',
        lambda data: data + b"\x00" * 512,
        lambda data: data + b'{"key": 1, "text": "a", "finish": ""}\n[1]\n"x"\n\xff\xfe\n',
    ],
    ids=["line feed lost", "line cut", "line torn", "zeros of a power cut", "other lines"],
)
def test_what_a_crash_leaves_of_the_last_line_is_ignored(tmp_path, spoil):
    path = tmp_path / "answers.jsonl"
    store = AnswerStore(path)
    replies = {f"k{i}": Reply(f"text {i}\n\u2028\ud800", "stop") for i in range(3)}
    for key, value in replies.items():
        store.add(key, value)
    path.write_bytes(spoil(path.read_bytes()))
    again = AnswerStore(path)
    assert [again.get(key) for key in ("k0", "k1")] == [replies["k0"], replies["k1"]]
    assert again.get("k2") in (replies["k2"], None)
    again.add("k3", Reply("after", ""))
    last = AnswerStore(path)
    assert last.get("k0") == replies["k0"]
    assert last.get("k2") == again.get("k2")
    assert last.get("k3") == Reply("after", "")


def test_threads_and_stores_of_one_file_lose_nothing(tmp_path):
    stores = [AnswerStore(tmp_path / "answers.jsonl") for _ in range(2)]

    def fill(thread):
        for i in range(20):
            stores[thread % 2].add(f"{thread}/{i}", Reply("x" * 5000, "stop"))

    threads = [threading.Thread(target=fill, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    final = AnswerStore(tmp_path / "answers.jsonl")
    assert all(f"{thread}/{i}" in final for thread in range(4) for i in range(20))


def test_a_cache_that_cannot_be_written_is_named(server, tmp_path):
    (tmp_path / "file").write_text("")
    source = EndpointPrinciples(endpoint(server, cache=str(tmp_path / "file")))
    with pytest.raises(InputError, match=r"file/answers.jsonl: cannot be written"):
        propose(source, 2)


KILLED = """
import sys
from sso_lightning.endpoint import Endpoint, EndpointPrinciples
from sso_lightning.principles import Draw
from sso_lightning.records import Query, load_records
queries = [Query(str(i), [{"role": "user", "content": f"Request {i}?"}]) for i in range(20)]
endpoint = Endpoint(sys.argv[1], "large", cache=sys.argv[2], concurrency=2)
EndpointPrinciples(endpoint).propose(queries, Draw(0, 0, None))
"""


def test_a_killed_run_repeats_no_finished_request(server, forks, tmp_path):
    enough = threading.Event()

    def script(request, attempt):
        if len(server.asked) > 9:
            enough.set()
            time.sleep(0.3)
        return good(request, attempt)

    server.script = script
    command = ["-c", KILLED, server.url, tmp_path]
    process = forks.start(*command, cwd=tmp_path)
    try:
        assert enough.wait(60)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait().returncode == -signal.SIGKILL
    time.sleep(0.4)  # answers on their way to nobody
    kept = (tmp_path / "answers.jsonl").read_bytes().count(b"\n")
    assert 7 <= kept <= 9
    server.asked.clear()
    assert forks.run(*command, cwd=tmp_path).returncode == 0
    assert len(server.asked) == 20 - kept
    server.asked.clear()
    assert forks.run(*command, cwd=tmp_path).returncode == 0
    assert server.asked == []


# ------------------------------------------------------------------------------------------ key


def test_the_key_is_sent_in_one_header_and_written_nowhere(
    server, tiny_model, tmp_path, sso, monkeypatch
):
    monkeypatch.setenv("LOOPBACK_KEY", KEY)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.jsonl").write_text('{"prompt": "Request 0?"}\n{"prompt": "Request 1?"}\n')
    settings = {
        "trainer": {"default_root_dir": "run", "max_epochs": 1, "accelerator": "cpu"},
        "model": {
            "policy": {"path": str(tiny_model)},
            "objective": {"class_path": "Contrastive", "init_args": {"base": "IPO"}},
        },
        "data": {"queries": "q.jsonl", "batch_size": 2},
        "pairs": {
            "sampler": {"class_path": "TransformersSampler", "init_args": {"max_new_tokens": 4}},
            "principles": {
                "class_path": "sso_lightning.endpoint.EndpointPrinciples",
                "init_args": {
                    "endpoint": {
                        "base_url": server.url,
                        "model": "large",
                        "key_variable": "LOOPBACK_KEY",
                    }
                },
            },
        },
    }
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(settings))
    status, out, err = sso("fit", "--config", "fit.yaml")
    assert status == 0, err
    assert {h["authorization"] for h in server.headers} == {f"Bearer {KEY}"}
    everything = [out, err, json.dumps(server.bodies), json.dumps(server.asked)]
    for headers in server.headers:
        everything += [f"{k}: {v}" for k, v in headers.items() if k != "authorization"]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"config.yaml", "manifest.json", "last.ckpt", "answers.jsonl"} <= names
    assert not any(KEY in text for text in everything)
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
    assert "LOOPBACK_KEY" in (tmp_path / "run" / "config.yaml").read_text()


def test_without_a_named_variable_no_key_is_sent(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    propose(EndpointPrinciples(endpoint(server)), 1)
    assert "authorization" not in server.headers[0]
    assert KEY not in json.dumps(server.headers)


def test_a_server_that_repeats_the_key_does_not_get_it_printed(server, monkeypatch, caplog):
    monkeypatch.setenv("LOOPBACK_KEY", KEY)
    server.script = lambda *_: reply(json.dumps({"error": {"message": f"bad key {KEY}"}}), 401)
    with pytest.raises(InputError, match=r"bad key \*\*\*") as caught:
        propose(EndpointPrinciples(endpoint(server, key_variable="LOOPBACK_KEY")), 1)
    assert KEY not in str(caught.value)
    assert caught.value.__cause__ is None
    server.script = lambda *_: reply(KEY)
    propose(EndpointPrinciples(endpoint(server, key_variable="LOOPBACK_KEY", max_retries=0)), 1)
    assert "no chat completion: '***'" in caplog.text
    assert KEY not in caplog.text


@pytest.mark.parametrize(
    "literal",
    [
        KEY,
        "sk-short",
        "hf_abcdefghijklmnopqrstuv",
        "two words",
        "",
        "1abc",
        "A-B",
        "gsk_" + "x" * 40,
    ],
)
def test_a_key_in_place_of_a_variables_name_is_refused_and_not_repeated(literal):
    with pytest.raises(
        InputError, match="name of an environment variable, never the key"
    ) as caught:
        endpoint("http://localhost/v1", key_variable=literal)
    assert not literal or literal not in str(caught.value)


def test_a_key_that_the_parser_refuses_is_not_repeated(sso, tmp_path):
    init_args = {"endpoint": {"base_url": "http://localhost/v1", "model": "a", "api_key": KEY}}
    source = {"class_path": "sso_lightning.endpoint.EndpointPrinciples", "init_args": init_args}
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump({"pairs": {"principles": source}}))
    status, out, err = sso("fit", "--config", tmp_path / "fit.yaml")
    assert status == 2
    assert "api_key" in err
    assert KEY not in out + err


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("NO_SUCH_VARIABLE", None, "variable NO_SUCH_VARIABLE is not set; export it"),
        ("HF_TOKEN", "  ", "variable HF_TOKEN is not set"),
        ("HF_TOKEN", "two\nlines", "variable HF_TOKEN holds characters that no key has"),
        ("abcdef0123456789", None, "key_variable: this variable is not set"),
    ],
)
def test_a_missing_key_is_told_at_the_start(monkeypatch, name, value, message):
    monkeypatch.delenv(name, raising=False)
    if value is not None:
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        EndpointPrinciples(endpoint("http://localhost/v1", key_variable=name))


# -------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_url": "localhost:8000"}, "'localhost:8000' is no address such as http"),
        ({"base_url": "ftp://host/v1"}, "is no address"),
        ({"base_url": "http://"}, "is no address"),
        ({"base_url": "http://host:port/v1"}, "is no address"),
        ({"base_url": f"http://me:{KEY}@host/v1"}, "must hold no user, key or query"),
        ({"base_url": f"http://host/v1?key={KEY}"}, "must hold no user, key or query"),
        ({"base_url": f"http://host/{KEY}/v1"}, "must hold no user, key or query"),
        ({"model": " "}, "endpoint.model is empty"),
        ({"concurrency": 0}, "endpoint.concurrency must be between 1 and 1000, got 0"),
        ({"timeout": 0}, "endpoint.timeout must be above 0"),
        ({"timeout": float("nan")}, "endpoint.timeout must be above 0"),
        ({"max_retries": -1}, "endpoint.max_retries must be 0 or more"),
        ({"temperature": -0.1}, "endpoint.temperature must be 0 or more"),
        ({"max_new_tokens": 0}, "endpoint.max_new_tokens must be at least 1"),
        ({"max_failed": 1.1}, "endpoint.max_failed must be in"),
        ({"extra_body": {"a": [{"api_key": "x"}]}}, "extra_body.a.api_key: keys go into"),
        ({"extra_body": {"a": KEY}}, "extra_body.a looks like a key"),
        ({"model": "", "timeout": -1}, "timeout must be above 0, got -1; endpoint.model is empty"),
    ],
)
def test_wrong_settings_are_named_in_one_line_without_a_key(settings, message):
    with pytest.raises(InputError, match=message) as caught:
        endpoint(settings.pop("base_url", "http://localhost/v1"), **settings)
    assert "\n" not in str(caught.value)
    assert KEY not in str(caught.value)


def test_settings_decide_the_set_and_hold_neither_key_nor_address(monkeypatch):
    monkeypatch.setenv("LOOPBACK_KEY", KEY)
    source = EndpointPrinciples(endpoint("http://host-a/v1", key_variable="LOOPBACK_KEY"))
    text = json.dumps(source.settings())
    for hidden in (KEY, "LOOPBACK_KEY", "host-a"):
        assert hidden not in text
    for shown in ("large", "guidelines", "careless"):
        assert shown in text


def test_settings_come_from_yaml_by_class_path():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(PrincipleSource, "principles")
    text = """
    principles:
      class_path: sso_lightning.endpoint.EndpointPrinciples
      init_args:
        endpoint: {base_url: http://localhost:8000/v1, model: large, extra_body: {top_p: 0.8}}
        format: features
        count: 1
        safety: off
    """
    source = parser.instantiate(parser.parse_string(text)).principles
    assert (source.format, source.count, source.safety_mode) == ("features", 1, "off")
    assert source.endpoint.extra_body == {"top_p": 0.8}


def test_the_client_is_named_when_it_is_not_installed(monkeypatch):
    monkeypatch.setattr("sso_lightning.endpoint.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'sso-lightning\[endpoint\]'"):
        EndpointPrinciples(endpoint("http://localhost/v1"))


# ------------------------------------------------------------------------------- a real server


@pytest.fixture
def real_server(tiny_model, tmp_path):
    """`transformers serve` with the tiny model; its address."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(tiny_model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        )
        try:
            yield wait_until_ready(process, f"http://127.0.0.1:{port}", tmp_path / "server.log")
        finally:
            process.terminate()
            process.wait(30)


def wait_until_ready(process, url, log):
    end = time.monotonic() + 180
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return f"{url}/v1"
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"no server: {log.read_text()[-2000:]}")


@pytest.mark.slow
def test_the_block_in_the_recipe_trains_on_what_the_server_writes(
    server, tiny_model, tmp_path, sso, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    recipe = (ROOT / "configs" / "qwen2_7b" / "sso_2025.yaml").read_text()
    block = re.search(r"^  # principles:\n(  #   .*\n)+", recipe, re.MULTILINE)
    assert block
    settings = yaml.safe_load(recipe)
    settings["pairs"] |= yaml.safe_load(block[0].replace("  # ", "", 1).replace("\n  # ", "\n"))
    settings["pairs"]["principles"]["init_args"]["endpoint"]["base_url"] = server.url
    settings["pairs"]["sampler"]["init_args"]["max_new_tokens"] = 6
    settings["model"]["policy"]["path"] = str(tiny_model)
    settings["trainer"] |= {"default_root_dir": "run", "accelerator": "cpu"}
    settings["data"] |= {"batch_size": 1, "generator": {"queries_per_iteration": 4}}
    lines = [json.dumps({"prompt": f"Request {i}?"}) + "\n" for i in range(4)]
    (tmp_path / "queries.jsonl").write_text("".join(lines))
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(settings))
    status, _, err = sso("fit", "--config", "fit.yaml")
    assert status == 0, err
    records = [r for f in sorted(Path("run").rglob("*.parquet")) for r in load_records(f)]
    assert {r.good_principle for r in records} <= {written(i) for i in range(4)}
    assert {r.principle_source for r in records} == {"endpoint Qwen/Qwen2-72B-Instruct"}
    assert len(server.asked) == 4  # the policy's phase takes the generator's from the cache
    assert {body["top_p"] for body in server.bodies} == {0.8}


@pytest.mark.slow
def test_transformers_serve_answers_and_random_weights_fall_back(real_server, tiny_model, tmp_path):
    settings = {"model": str(tiny_model), "max_new_tokens": 8, "timeout": 120, "concurrency": 2}
    asked = endpoint(real_server, **settings, cache=str(tmp_path / "cache"))
    replies = asked.ask([("", [{"role": "user", "content": f"Name bird {i}."}]) for i in range(3)])
    assert all(reply is not None for reply in replies)
    assert {reply.finish for reply in replies} <= {"stop", "length"}
    steerings, counts = propose(EndpointPrinciples(asked, concision=0), 3)
    assert all(steering.features for steering in steerings)  # random weights write no headings
    assert counts["principles_fallback"] == 3
    assert counts["principles_failed"] == 0
