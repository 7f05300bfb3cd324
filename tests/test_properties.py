"""Whatever a reader is given, it reads all of it or says in one line what is wrong."""

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sso_lightning.errors import InputError
from sso_lightning.principles import (
    Draw,
    PolicyPrinciples,
    parse_features,
    parse_principles,
)
from sso_lightning.records import (
    Query,
    Record,
    load_queries,
    load_records,
    write_records,
)

CHECKED = settings(
    derandomize=True,
    deadline=None,
    max_examples=120,
    # the folder is the same for all examples, and every example writes its file anew
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
FEW = settings(CHECKED, max_examples=25)


def assert_one_line(error: BaseException, *named: str) -> None:
    message = str(error)
    assert all(name in message for name in named)
    assert message.strip()
    assert "\n" not in message
    assert len(message) < 2000


# ---------------------------------------------------------------------------------------- reader

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
TURN = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "system", "tool"]) | JSON,
        "content": st.text(max_size=4) | JSON,
    },
)
TALK = st.lists(TURN, max_size=3)
KEYS = (
    *("id", "messages", "prompt", "instruction", "query", "question", "conversations", "system"),
    *("history", "input", "chosen", "rejected", "good", "bad", "original", "prompt_ids", "scores"),
    *("response_ids", "finish", "features", "schema_version", "sampler", "iteration", "template"),
)
ROW = st.dictionaries(st.sampled_from(KEYS), st.just("text") | TALK | JSON, max_size=5)
TEXT = st.text(min_size=1, max_size=12).filter(str.strip)
ASK = st.builds(lambda text: [{"role": "user", "content": text}], TEXT)
GOOD_ROW = st.fixed_dictionaries(
    {"messages": ASK, "good": st.builds("+{}".format, TEXT), "bad": st.builds("-{}".format, TEXT)}
)
LINE = st.builds(json.dumps, ROW | GOOD_ROW | JSON) | st.text(max_size=12) | st.just("")
LOADERS = pytest.mark.parametrize("load", [load_queries, load_records])


def read(load, path: Path, lines: int) -> None:
    """Read a file: as many entries come back as it has lines that are not empty, or one error."""
    try:
        found = load(path)
    except InputError as error:
        assert_one_line(error, path.name)
    else:
        assert len(found) == lines
        if load is load_queries:
            assert len({query.id for query in found}) == lines


@LOADERS
@CHECKED
@given(lines=st.lists(LINE, max_size=4))
def test_every_line_is_read_or_named(tmp_path, load, lines):
    path = tmp_path / "x.jsonl"
    data = "\n".join(line.replace("\n", " ") for line in lines).encode("utf-8", "surrogatepass")
    path.write_bytes(data)
    read(load, path, sum(bool(line.strip()) for line in data.split(b"\n")))


@LOADERS
@CHECKED
@given(rows=st.lists(ROW | GOOD_ROW | JSON, max_size=3) | ROW | JSON)
def test_every_record_of_a_list_is_read_or_named(tmp_path, load, rows):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(rows))
    read(load, path, len(rows) if isinstance(rows, list) else 1)


@LOADERS
@CHECKED
@given(data=st.binary(max_size=60), suffix=st.sampled_from([".jsonl", ".json", ".parquet", ".csv"]))
def test_bytes_are_read_or_refused(tmp_path, load, data, suffix):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(data)
    try:
        load(path)
    except InputError as error:
        assert_one_line(error)


@CHECKED
@given(cut=st.integers(0, 400), flip=st.integers(0, 400), to=st.integers(0, 255))
def test_a_damaged_parquet_file_is_read_or_refused(tmp_path, cut, flip, to):
    whole, path = tmp_path / "whole.parquet", tmp_path / "x.parquet"
    if not whole.exists():
        write_records(whole, [Record(id="a", messages=[{"role": "user", "content": "?"}], **PAIR)])
    data = bytearray(whole.read_bytes())
    data[-1 - flip] = to
    path.write_bytes(data[: len(data) - cut])
    try:
        assert len(load_records(path)) == 1
    except InputError as error:
        assert_one_line(error)


PAIR = {"good": "yes", "bad": "no"}
IDS = st.lists(st.integers(0, 2**31 - 1), max_size=4)
RECORD = st.builds(
    Record,
    id=TEXT,
    messages=ASK,
    features=st.lists(st.text(max_size=5), max_size=2),
    good=st.builds("+{}".format, TEXT),
    bad=st.builds("-{}".format, TEXT),
    original=st.text(max_size=8),
    good_system=st.text(max_size=8),
    prompt_ids=st.dictionaries(st.sampled_from(["query", "good", "bad"]), IDS),
    response_ids=st.dictionaries(st.sampled_from(["good", "bad", "original"]), IDS),
    finish=st.dictionaries(
        st.sampled_from(["good", "bad", "original"]), st.sampled_from(["stop", "length", ""])
    ),
    iteration=st.integers(0, 9),
    seed=st.integers(-(2**63), 2**63 - 1),
    sampler=st.dictionaries(st.text(max_size=4), st.floats(allow_nan=False) | st.text(max_size=4)),
    bad_is_instructed=st.booleans(),
    scores=st.dictionaries(st.text(max_size=8), st.floats(allow_nan=False, allow_infinity=False)),
)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@settings(CHECKED, max_examples=50)
@given(records=st.lists(RECORD, min_size=1, max_size=3, unique_by=lambda r: (r.id, r.iteration)))
def test_records_come_back_as_they_were_written(tmp_path, suffix, records):
    path = tmp_path / f"r{suffix}"
    write_records(path, records)
    assert load_records(path) == records


# ------------------------------------------------------------------------------------ principles

ANSWER = (
    st.text(max_size=80)
    | st.builds(json.dumps, JSON)
    | st.builds(
        lambda before, good, bad, after: before + json.dumps({"good": good, "bad": bad}) + after,
        st.text(max_size=5),
        JSON,
        JSON,
        st.text(max_size=5),
    )
    | st.builds(lambda part, times: part * times, st.sampled_from(list('{}["\\:')), st.just(5000))
    | st.just('{"good": ' * 500)
    | st.just("Accuracy, " * 500)
)


@CHECKED
@given(answer=ANSWER)
def test_any_answer_gives_two_principles_or_none(answer):
    found = parse_principles(answer)
    if found is not None:
        good, bad = found
        assert good != bad
        assert all(0 < len(text) <= 600 and text == " ".join(text.split()) for text in found)
    names = parse_features(answer, ["Accuracy", "Wit"], 1)
    assert len(names) <= 1
    assert set(names) <= {"Accuracy", "Wit"}


@FEW
@given(answers=st.lists(ANSWER, min_size=1, max_size=6))
def test_any_answers_give_steerings_and_every_fallback_is_counted(answers):
    given_out = []

    def ask(keyed, max_new_tokens):
        texts = [answers[i % len(answers)] for i in range(len(keyed))]
        given_out.extend(zip((key for key, _ in keyed), texts, strict=True))
        return texts

    queries = [Query(f"q{i}", [{"role": "user", "content": "Why?"}]) for i in range(3)]
    source = PolicyPrinciples()
    draw = Draw(seed=1, iteration=0, ask=ask, counts=Counter())
    steerings = source.propose(queries, draw)
    assert len(steerings) == 3
    for steering in steerings:
        assert steering.good_principle.strip()
        assert steering.bad_principle.strip()
        assert steering.good_principle != steering.bad_principle
    written = [text for key, text in given_out if "/principle/" in key]
    lost = sum(parse_principles(text) is None for text in written)
    assert draw.counts["principles_requested"] == len(written)
    assert draw.counts["principles_fallback"] == lost
    assert draw.counts["features_requested"] == 6


# --------------------------------------------------------------------------------------- configs

CONFIG = {
    "seed_everything": 1,
    "trainer": {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "gradient_clip_val": 1.0},
    "model": {
        "policy": {"path": "./model", "dtype": "float32", "lora": {"r": 4}},
        "objective": {
            "class_path": "SelfSteering",
            "init_args": {"alpha": 0.5, "base": {"class_path": "IPO", "init_args": {"beta": 0.1}}},
        },
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1.0e-4}},
        "schedule": {"kind": "linear", "warmup": 0.1},
    },
    "data": {"queries": "q.jsonl", "batch_size": 2, "passes": 1},
    "pairs": {
        "sampler": {"class_path": "TransformersSampler", "init_args": {"top_p": 0.9}},
        "principles": {"class_path": "PredefinedPrinciples", "init_args": {"count": 2}},
    },
    "guard": {"max_empty": 0.5},
}


def paths(tree: object, at: tuple = ()) -> list[tuple]:
    """All places of a tree."""
    if not isinstance(tree, dict):
        return [at]
    return [at, *(path for key in tree for path in paths(tree[key], (*at, key)))]


PLACES = [path for path in paths(CONFIG) if path]
VALUE = st.sampled_from(
    [
        *(None, True, 0, -1, 3, 0.5, float("nan"), float("inf"), "", "text", "1e-4", "os.system"),
        *([], [1], ["a", None], {}, {"class_path": "os.system"}, {"init_args": {"x": 1}}, {"a": 1}),
    ]
)
CHANGE = st.tuples(
    st.sampled_from(["delete", "set", "add", "swap"]),
    st.sampled_from(PLACES),
    st.sampled_from(PLACES),
    VALUE,
)


def change(tree: dict, how: str, place: tuple, other: tuple, value: object) -> None:
    """Spoil one place of a config; nothing if an earlier change took it away."""

    def holder(path: tuple) -> dict:
        at = tree
        for key in path[:-1]:
            at = at.get(key) if isinstance(at, dict) else None
        return at if isinstance(at, dict) and path[-1] in at else {}

    at, there = holder(place), holder(other)
    if not at:
        return
    if how == "delete":
        del at[place[-1]]
    elif how == "set":
        at[place[-1]] = value
    elif how == "add":
        at["unheard_of"] = value
    elif there:
        value = at[place[-1]]
        at[place[-1]] = there[other[-1]]
        there[other[-1]] = value


@pytest.fixture
def parse(monkeypatch, tmp_path):
    """Read the settings of a `fit`, and stop before anything is made of them."""
    from sso_lightning import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.SSOCLI, "instantiate_classes", lambda self: None)
    monkeypatch.setattr(cli.SSOCLI, "_run_subcommand", lambda self, command: None)
    return lambda path: cli.run(["fit", "--config", str(path)])


def test_the_config_that_is_spoilt_is_right(tmp_path, parse):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    parse(path)


@FEW
@given(changes=st.lists(CHANGE, min_size=1, max_size=3))
def test_any_config_is_parsed_or_named(tmp_path, parse, changes):
    tree = json.loads(json.dumps(CONFIG))
    for each in changes:
        change(tree, *each)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    try:
        parse(path)
    except InputError as error:
        assert_one_line(error)
