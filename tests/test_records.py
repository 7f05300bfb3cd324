import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sso_lightning.errors import InputError
from sso_lightning.records import (
    SCHEMA_VERSION,
    PairStore,
    Query,
    Record,
    load_queries,
    load_records,
    stream_seed,
    write_records,
)

ASK = [{"role": "user", "content": "Why?"}]
ODD = "naïve \u2028 line, tab\t, nul\x00, 你好, \U0001f3f3️‍🌈, e\u0301, \r\n end"


def make_record(name="r0", **changes):
    return replace(
        Record(
            id=name,
            messages=[{"role": "system", "content": "Be odd."}, {"role": "user", "content": ODD}],
            features=["Accuracy", "Brevity"],
            good_principle="Do.\nAlso do.",
            bad_principle="Do not.",
            good_system="Good system.",
            bad_system="Bad system.",
            good="A good one.",
            bad=f"A bad one: {ODD}",
            original="An original.",
            prompt_ids={"query": [1, 2], "good": [1, 3, 2], "bad": []},
            response_ids={"good": [5, 0], "bad": [2**31 - 1], "original": []},
            finish={"good": "stop", "bad": "length", "original": ""},
            iteration=2,
            seed=2**63 - 1,
            sampler={"temperature": 0.7, "stop": [ODD, None], "nested": {"top_k": 0}},
            engine="transformers",
            policy="p",
            adapter="a",
            template="t",
            query_source="queries.jsonl, line 1",
            principle_source="predefined",
            safety_mode="careless",
            bad_is_instructed=True,
            content_flags=[],
            scores={"policy/query/good": -12.3456789012345678, "reference/bad/bad": -1e300},
        ),
        **changes,
    )


def write_lines(path, *rows):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return path


# -------------------------------------------------------------------------------- seeds, import


def test_stream_seeds_are_fixed_and_keys_do_not_run_together():
    # sha256(b'["1", "2", "q", "good"]')[:8], big-endian, halved
    assert stream_seed(1, 2, "q", "good") == 0x09FB5020071E901C
    seeds = [
        stream_seed(1, 2, "q"),
        stream_seed(1, "2q"),
        stream_seed(12, "q"),
        stream_seed(1, 2, "q", ""),
        stream_seed(1, '2", "q'),
    ]
    assert len(set(seeds)) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_importing_records_is_light():
    code = "import sys, sso_lightning.records; print(sorted({'torch', 'pyarrow'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -------------------------------------------------------------------------------------- queries


def test_queries_in_every_spelling(tmp_path):
    talk = [{"role": "system", "content": "S"}, *ASK, {"role": "assistant", "content": "A"}, *ASK]
    path = write_lines(
        tmp_path / "q.jsonl",
        {"messages": talk, "id": 7},
        {"prompt": "Why?", "id": "x"},
        "",
        {"instruction": "Why?", "input": "Because."},
        {"query": "Why?"},
        {"question": ASK, "id": None},
        {"instruction": "And?", "system": "S", "history": [["Why?", "A"]], "idx": "ab"},
    )
    queries = load_queries(path)
    assert queries[0] == Query("7", talk, "q.jsonl, line 1")
    assert queries[1] == Query("x", ASK, "q.jsonl, line 2")
    assert queries[2].messages == [{"role": "user", "content": "Why?\nBecause."}]
    assert queries[2].source == "q.jsonl, line 4"
    assert queries[4].messages == ASK
    assert queries[4].id == f"{queries[3].id}-2"
    assert queries[5].messages == [*talk[:-1], {"role": "user", "content": "And?"}]
    assert queries[5].id == "ab"


def test_json_json_lines_and_parquet_give_the_same_queries(tmp_path):
    rows = [{"prompt": "Why?"}, {"prompt": ODD}]
    write_lines(tmp_path / "a.jsonl", *rows)
    write_lines(tmp_path / "b.json", json.dumps(rows, indent=2))
    write_lines(tmp_path / "c.json", *rows)  # JSON lines under a common misnomer
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    (tmp_path / "e.jsonl").write_bytes(
        b"\xef\xbb\xbf" + "\r\n".join(json.dumps(r, ensure_ascii=False) for r in rows).encode()
    )
    loaded = [load_queries(p) for p in sorted(tmp_path.iterdir())]
    plain = [[(q.id, q.messages) for q in queries] for queries in loaded]
    assert all(one == plain[0] for one in plain)
    assert [queries[1].source for queries in loaded] == [
        "a.jsonl, line 2",
        "b.json, record 2",
        "c.json, line 2",
        "d.parquet, row 2",
        "e.jsonl, line 2",
    ]


def test_derived_ids_stay_when_the_file_grows_or_moves(tmp_path):
    (first,) = load_queries(write_lines(tmp_path / "a.jsonl", {"prompt": "Why?"}))
    more = load_queries(write_lines(tmp_path / "b.jsonl", {"prompt": "Who?"}, {"prompt": "Why?"}))
    assert more[1].id == first.id
    assert more[0].id != first.id


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{", '{"prompt": "x"}'], "q.jsonl, line 1: not valid JSON"),
        ([{"prompt": "x"}, "", "{bad}"], "q.jsonl, line 3: not valid JSON"),
        (["[" * 100_000], "q.jsonl, line 1: not valid JSON"),
        (["[1]"], "line 1: must be an object"),
        ([], "the file is empty"),
        (["", "  "], "the file is empty"),
        ([{"text": "x"}], "line 1: no query; give one of messages, prompt"),
        ([{"prompt": "x"}, {"prompt": " \n"}], "line 2: 'prompt' is empty"),
        ([{"prompt": 5}], "line 1: 'prompt' must be text or a list"),
        ([{"messages": []}], "at least one"),
        ([{"messages": ["x"]}], "message 1 needs a role"),
        ([{"messages": [{"from": "tool", "value": "x"}]}], "message 1 needs a role"),
        ([{"messages": [{"from": ["human"], "value": "x"}]}], "message 1 needs a role"),
        ([{"messages": [{"from": "human", "value": 3}]}], "content must be text"),
        ([{"messages": [{"from": "human", "value": "x", "w": 1}]}], "'w', which is not rendered"),
        ([{"messages": [{"role": "tool", "content": "x"}]}], "message 1 needs a role"),
        ([{"messages": [{"role": "user", "content": None}]}], "content must be text, not NoneType"),
        ([{"messages": [{"role": "user", "content": ""}]}], "message 1: content is empty"),
        ([{"messages": [{**ASK[0], "tool_calls": [1]}]}], "'tool_calls', which is not rendered"),
        ([{"messages": [*ASK, {"role": "system", "content": "x"}]}], "message 2 is a system"),
        ([{"messages": [*ASK, {"role": "assistant", "content": "x"}]}], "end with a user's turn"),
        (['{"prompt": "\\ud800"}'], "half of a surrogate pair"),
        ([{"prompt": "x", "id": "a"}, {"prompt": "y", "id": "a"}], "line 2: .*'a'.*line 1"),
        ([{"prompt": "x", "id": 1}, {"prompt": "y", "id": "1"}], "line 2: .*'1'.*line 1"),
        ([{"prompt": "x", "id": ""}], "'id' is empty"),
        ([{"prompt": "x", "id": True}], "'id' must be text"),
        ([{"instruction": "x", "history": [["a"]]}], r"'history' must be a list of \[query"),
        ([{"instruction": "x", "history": 3}], r"'history' must be a list of \[query"),
        ([{"instruction": "x", "system": 3}], "'system' must be text"),
        ([{"system": "x", "messages": [{"role": "system", "content": "y"}, *ASK]}], "differ; keep"),
    ],
)
def test_wrong_queries_are_named_in_one_line(tmp_path, rows, message):
    path = write_lines(tmp_path / "q.jsonl", *rows)
    with pytest.raises(InputError, match=message) as caught:
        load_queries(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_files_are_named(tmp_path):
    for load in (load_queries, load_records):
        with pytest.raises(InputError, match=r"none\.jsonl: no such file"):
            load(tmp_path / "none.jsonl")
        with pytest.raises(InputError, match=r"q\.txt: unknown file type"):
            load(tmp_path / "q.txt")
        (tmp_path / "p.parquet").write_bytes(b"PAR1 not at all")
        with pytest.raises(InputError, match=r"p\.parquet: not a readable Parquet") as caught:
            load(tmp_path / "p.parquet")
        assert "\n" not in str(caught.value)
        write_lines(tmp_path / "q.json", "[", '{"prompt": "x"},', '{"prompt" "y"}]')
        with pytest.raises(InputError, match=r"q\.json, line 3: not valid JSON"):
            load(tmp_path / "q.json")
        (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "na\xefve"}')
        with pytest.raises(InputError, match=r"latin\.jsonl, line 1: not valid JSON"):
            load(tmp_path / "latin.jsonl")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
TURNS = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["user", "assistant", "system", "tool"]),
            "from": st.sampled_from(["human", "gpt", "system", "tool"]) | st.lists(st.none()),
            "value": st.text(max_size=4) | st.none(),
            "content": st.text(max_size=4) | st.none(),
            "x": st.none() | st.integers(),
        },
    ),
    max_size=3,
)
KEYS = [
    *vars(make_record()),
    *("prompt", "instruction", "query", "question", "input", "system", "history", "idx"),
    *("chosen", "rejected", "p_system", "n_system", "raw", "conversations", "uuid", "principles"),
]
ROWS = st.dictionaries(st.sampled_from(KEYS), JSON_VALUES | TURNS | st.just("text"), max_size=6)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(ROWS | JSON_VALUES, max_size=3), st.sampled_from(["jsonl", "json"]))
def test_no_json_makes_a_reader_raise_anything_else(tmp_path, rows, kind):
    path = tmp_path / f"f.{kind}"
    path.write_text(
        "\n".join(map(json.dumps, rows)) if kind == "jsonl" else json.dumps(rows, indent=1)
    )
    for load in (load_queries, load_records):
        message, found = "", rows
        try:
            found = load(path)
        except InputError as exc:
            message = str(exc)
        assert "\n" not in message
        assert len(found) == len(rows)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.binary(max_size=60), st.sampled_from(["jsonl", "json", "parquet"]))
def test_no_bytes_make_a_reader_raise_anything_else(tmp_path, data, kind):
    path = tmp_path / f"f.{kind}"
    path.write_bytes(data)
    for load in (load_queries, load_records):
        with pytest.raises(InputError):
            load(path)


# -------------------------------------------------------------------------------------- records


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_records_come_back_exactly(tmp_path, kind):
    bare = Record(id="bare", messages=ASK, good="g", bad="b")
    records = [make_record("a"), bare, make_record("b", features=[], finish={"good": "stop"})]
    write_records(tmp_path / f"r.{kind}", records)
    assert load_records(tmp_path / f"r.{kind}") == records
    assert [p.name for p in tmp_path.iterdir()] == [f"r.{kind}"]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "r.jsonl"
    write_records(path, [make_record()])

    def refuse(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(InputError, match=r"r\.jsonl: cannot be written"):
        write_records(path, [make_record("other")])
    assert load_records(path) == [make_record()]
    assert list(tmp_path.iterdir()) == [path]


def test_the_parquet_columns_are_the_fields_with_fixed_types(tmp_path):
    write_records(tmp_path / "r.parquet", [])
    schema = pq.read_schema(tmp_path / "r.parquet")
    assert schema.names == list(vars(make_record()))
    ids = pa.list_(pa.int32())
    assert schema.field("prompt_ids").type == pa.struct(
        [("query", ids), ("good", ids), ("bad", ids)]
    )
    assert schema.field("scores").type == pa.map_(pa.string(), pa.float64())
    assert schema.field("sampler").type == pa.string()
    assert schema.field("seed").type == pa.int64()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": SCHEMA_VERSION + 1}, "written with schema version 3, .* upgrade"),
        ({"good": None}, "'good' is missing"),
        ({"messages": None}, "'messages' is missing"),
        ({"good_sytem": "x"}, "unknown key 'good_sytem'"),
        ({"seed": 2**63}, "'seed' must be a 64-bit integer"),
        ({"seed": True}, "'seed' must be"),
        ({"bad_is_instructed": 1}, "'bad_is_instructed' must be true or false"),
        ({"features": "x"}, "'features' must be a list"),
        ({"features": [1]}, "'features' must be text"),
        ({"prompt_ids": {"x": [1]}}, "'prompt_ids' has the unknown key 'x'"),
        ({"prompt_ids": {"good": [-1]}}, "'prompt_ids': good must be a list of token ids"),
        ({"response_ids": {"good": [1.5]}}, "'response_ids': good must be a list of token ids"),
        ({"finish": {"good": "eos"}}, "'finish': good must be"),
        ({"scores": {"a": "b"}}, "'scores': a must be a number"),
        ({"scores": {"a": 10**400}}, "'scores': a must be a number"),
        ({"sampler": "{"}, "'sampler': not valid JSON"),
        ({"sampler": {"stop": "\ud800"}}, "'sampler' holds half of a surrogate pair"),
        ({"sampler": "[]"}, "'sampler' must be a mapping"),
    ],
)
def test_wrong_records_are_named(tmp_path, changes, message):
    whole = vars(Record(id="r", messages=ASK, good="g", bad="b"))
    path = write_lines(tmp_path / "r.jsonl", {**whole, "id": "first"}, {**whole, **changes})
    with pytest.raises(InputError, match=f"r.jsonl, line 2: {message}"):
        load_records(path)


def test_a_record_that_could_not_be_read_back_is_not_written(tmp_path):
    with pytest.raises(InputError, match="record 'r0': 'prompt_ids' has the unknown key 'x'"):
        write_records(tmp_path / "r.parquet", [make_record(prompt_ids={"x": [1]})])
    with pytest.raises(InputError, match="surrogate"):
        write_records(tmp_path / "r.parquet", [make_record(good="\udc00")])
    with pytest.raises(InputError, match=r"r\.csv: records are written as"):
        write_records(tmp_path / "r.csv", [])
    assert list(tmp_path.iterdir()) == []


def test_the_same_id_may_return_in_another_iteration_only(tmp_path):
    write_records(tmp_path / "a.jsonl", [make_record(iteration=0)])
    write_records(tmp_path / "b.parquet", [make_record(iteration=1)])
    assert [r.iteration for r in load_records(tmp_path)] == [0, 1]
    write_records(tmp_path / "c.jsonl", [make_record(iteration=1)])
    with pytest.raises(
        InputError, match=r"c\.jsonl, line 1: .* already used in .*b\.parquet, row 1"
    ):
        load_records(tmp_path)


RELEASED = {
    "instruction": "Why?",
    "p_system": "Be good.",
    "n_system": "Be bad.",
    "chosen": "G",
    "rejected": "B",
    "raw": "O",
}


@pytest.mark.parametrize("kind", ["list", "lines", "single"])
def test_the_released_format(tmp_path, kind):
    path = tmp_path / ("r.jsonl" if kind == "lines" else "r.json")
    rows = [RELEASED] if kind == "list" else RELEASED  # the release's sample is a single object
    path.write_text(json.dumps(rows, indent=None if kind == "lines" else 4))
    (record,) = load_records(path)
    assert record.messages == ASK
    assert (record.good, record.bad, record.original) == ("G", "B", "O")
    assert (record.good_system, record.bad_system) == ("Be good.", "Be bad.")
    assert record.bad_is_instructed
    assert record.content_flags == ["unscreened"]
    place = "r.jsonl, line 1" if kind == "lines" else "r.json, record 1"
    assert record.query_source == record.principle_source == place
    assert record.prompt_ids == record.response_ids == record.scores == {}


def test_the_released_format_with_missing_fields(tmp_path):
    row = {key: RELEASED[key] for key in ("instruction", "chosen", "rejected")}
    (record,) = load_records(write_lines(tmp_path / "r.jsonl", row))
    assert (record.good_system, record.bad_system, record.original) == ("", "", "")
    assert record.principle_source == ""
    assert record.bad_is_instructed


SAID = {side: [{"role": "assistant", "content": side[0]}] for side in ("chosen", "rejected")}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Why?", "chosen": "c", "rejected": "r"},
        {"prompt": ASK, "chosen": "c", "rejected": "r", "score_chosen": 9.0},
        {"prompt": ASK, **SAID},
        {"prompt": "Why?", **SAID},
        {"prompt": ASK, "chosen": ASK + SAID["chosen"], "rejected": ASK + SAID["rejected"]},
        {"prompt": "Why?", "chosen": ASK + SAID["chosen"], "rejected": ASK + SAID["rejected"]},
        {"chosen": ASK + SAID["chosen"], "rejected": ASK + SAID["rejected"]},
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_preference_data_in_every_spelling(tmp_path, row, kind):
    path = tmp_path / f"p.{kind}"
    if kind == "jsonl":
        write_lines(path, row)
    else:
        pq.write_table(pa.Table.from_pylist([row]), path)
    (record,) = load_records(path)
    assert (record.messages, record.good, record.bad, record.original) == (ASK, "c", "r", "")
    assert not record.bad_is_instructed


def test_repeated_turns_that_prompt_leaves_out_are_kept(tmp_path):
    talk = [{"role": "system", "content": "S"}, *ASK]
    row = {"prompt": "Why?", **{side: talk + said for side, said in SAID.items()}}
    (record,) = load_records(write_lines(tmp_path / "p.jsonl", row))
    assert record.messages == talk


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "x", "chosen": "c"}, "'rejected' is missing"),
        ({"prompt": "x", "chosen": "c", "rejected": " "}, "'rejected' is empty"),
        ({"prompt": "x", "chosen": "c", "rejected": ASK}, "'rejected' must end with the assist"),
        ({"chosen": "c", "rejected": "r"}, "no query"),
        ({"prompt": "x"}, "no pair; give good and bad, or chosen and rejected"),
        (
            {"prompt": "Who?", **{side: ASK + said for side, said in SAID.items()}},
            "not those of the query",
        ),
        ({**SAID, "chosen": ASK + SAID["chosen"]}, "before 'chosen' and 'rejected' differ"),
        ({**RELEASED, "raw": 3}, "'raw' must be text or a list of messages"),
    ],
)
def test_wrong_preference_data_is_named(tmp_path, row, message):
    path = write_lines(tmp_path / "p.jsonl", {"prompt": "x", "chosen": "c", "rejected": "r"}, row)
    with pytest.raises(InputError, match=f"line 2: .*{message}"):
        load_records(path)


@pytest.mark.parametrize("load", [load_queries, load_records])
def test_an_empty_folder_is_named(tmp_path, load):
    with pytest.raises(InputError, match="holds no record file"):
        load(tmp_path)


# ---------------------------------------------------------------------------------------- store

IDENTITY = {"seed": 1, "iteration": 0, "sampler": {"stop": (1, 2)}}


def filled_store(folder, shards=2):
    store = PairStore(folder, IDENTITY)
    for index in range(shards):
        records = [make_record(f"r{index}-{i}") for i in range(index)]  # the first one is empty
        store.write_shard(index, records, {"queries": [index], "dropped": {"empty": 2 - index}})
    return store


def test_a_store_continues_where_it_was(tmp_path):
    folder = tmp_path / "pairs" / "iteration-00"
    filled_store(folder)
    store = PairStore(folder, IDENTITY)
    assert list(store.shards()) == [0, 1]
    assert store.shards()[1].records == 1
    assert store.shards()[1].info == {"queries": [1], "dropped": {"empty": 1}}
    assert (store.complete, store.report) == (False, {})
    store.write_shard(2, [make_record("late")], {})
    store.finish({"pairs/kept": 2})
    again = PairStore(folder)
    assert (again.complete, again.report) == (True, {"pairs/kept": 2})
    assert [r.id for r in again.read()] == ["r1-0", "late"]
    assert again.read() == load_records(folder)
    assert again.identity == json.loads(json.dumps(IDENTITY))


def test_shards_are_read_in_the_order_of_their_index(tmp_path):
    store = PairStore(tmp_path)
    for index in (10, 2):
        store.write_shard(index, [make_record(f"r{index}")], {})
    store.finish({})
    assert [r.id for r in store.read()] == [r.id for r in load_records(tmp_path)] == ["r2", "r10"]


def test_another_identity_is_refused(tmp_path):
    filled_store(tmp_path)
    with pytest.raises(InputError, match="begun with seed = 1, now seed is 2"):
        PairStore(tmp_path, {**IDENTITY, "seed": 2})
    with pytest.raises(InputError, match="now policy is 'p'"):
        PairStore(tmp_path, {**IDENTITY, "policy": "p"})
    with pytest.raises(InputError, match="begun with sampler"):
        PairStore(tmp_path, {"seed": 1, "iteration": 0})


@pytest.mark.parametrize("harm", ["truncate", "delete"])
def test_a_damaged_shard_is_set_aside_and_counts_as_not_written(tmp_path, harm):
    store = filled_store(tmp_path, 3)
    store.finish({"done": 1})
    path = tmp_path / store.shards()[1].file
    data = path.read_bytes()
    path.unlink()
    if harm == "truncate":
        path.write_bytes(data[:-1])
    with pytest.raises(InputError, match=f"{path.name}: does not match its checksum"):
        load_records(tmp_path)
    with pytest.warns(UserWarning, match=path.name):
        store = PairStore(tmp_path, IDENTITY)
    assert list(store.shards()) == [0, 2]
    assert (store.complete, store.report) == (False, {})
    assert not path.exists()
    assert path.with_name(path.name + ".bad").exists() == (harm == "truncate")
    store.write_shard(1, [make_record("r1-0")], {})
    assert path.read_bytes() == data
    assert len(PairStore(tmp_path, IDENTITY).read()) == 3


def test_leftovers_of_a_crash_are_not_taken_for_shards(tmp_path):
    store = filled_store(tmp_path)
    (tmp_path / ".shard-00007.parquet.tmp").write_bytes(b"half")
    # killed between writing the shard and listing it
    write_records(tmp_path / "shard-00002.parquet", [make_record("unlisted")])
    assert [r.id for r in PairStore(tmp_path, IDENTITY).read()] == ["r1-0"]
    with pytest.warns(UserWarning, match="not complete"):
        assert [r.id for r in load_records(tmp_path)] == ["r1-0"]
    assert not list(tmp_path.glob(".*"))
    store.write_shard(2, [make_record("again")], {})
    assert [r.id for r in store.read()] == ["r1-0", "again"]


@pytest.mark.parametrize("failing", ["shard-00002.parquet", "manifest.json"])
def test_a_full_disk_leaves_what_was_written(tmp_path, monkeypatch, failing):
    store = filled_store(tmp_path)
    real = os.fsync

    def full(descriptor):
        if failing in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=f"{failing}: cannot be written .No space left"):
        store.write_shard(2, [make_record("late")], {})
    monkeypatch.undo()
    assert list(store.shards()) == list(PairStore(tmp_path, IDENTITY).shards()) == [0, 1]
    assert not list(tmp_path.glob(".*"))
    store.write_shard(2, [make_record("late")], {})
    assert [r.id for r in PairStore(tmp_path, IDENTITY).read()] == ["r1-0", "late"]


def test_every_moment_of_a_kill_leaves_whole_shards(tmp_path, monkeypatch):
    """Stop at each rename and each fsync in turn: a reopened store is always readable."""

    class KilledError(BaseException):
        pass

    finished = False
    for moment in range(40):
        folder = tmp_path / str(moment)
        left = [moment]

        def tick(real, left=left):
            def step(*args):
                if left[0] == 0:
                    raise KilledError
                left[0] -= 1
                return real(*args)

            return step

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", tick(os.fsync))
            patch.setattr(Path, "replace", tick(Path.replace))
            try:
                filled_store(folder, 3).finish({})
                finished = True
            except KilledError:
                pass
        store = PairStore(folder, IDENTITY)
        assert len(store.read()) == sum(s.records for s in store.shards().values())
        assert store.complete <= (len(store.shards()) == 3)
        if finished:
            assert store.complete
            break
    assert moment == 24  # 3 steps for each of 8 files: 3 shards, 5 times the manifest


def test_folders_that_are_not_a_set_are_refused(tmp_path):
    write_records(tmp_path / "r.parquet", [])
    with pytest.raises(InputError, match=r"r\.parquet: a shard without manifest\.json"):
        PairStore(tmp_path)
    for text in (
        "{",
        "[]",
        "{}",
        '{"identity": {}, "complete": true, "report": {}, "shards": [1]}',
    ):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(InputError, match=r"manifest\.json: not"):
            PairStore(tmp_path)
        with pytest.raises(InputError, match=r"manifest\.json: not"):
            load_records(tmp_path)


def test_writing_twice_or_after_the_end_is_a_bug_in_the_caller(tmp_path):
    store = filled_store(tmp_path)
    with pytest.raises(AssertionError):
        store.write_shard(1, [], {})
    store.finish({})
    with pytest.raises(AssertionError):
        store.write_shard(2, [], {})
