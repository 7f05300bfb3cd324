"""Other formats: what is read of them, and that what is written for them comes back."""

import json

import pyarrow.parquet as pq
import pytest

from sso_lightning.errors import InputError
from sso_lightning.formats import (
    COMPARED,
    plain_examples,
    preference_examples,
    prompt_of,
)
from sso_lightning.records import PairStore, Record, load_queries, load_records, write_records

ASK = [{"role": "user", "content": "Why?"}]
TALK = [
    {"role": "system", "content": "Be odd."},
    *ASK,
    {"role": "assistant", "content": "Because."},
    {"role": "user", "content": "naïve \u2028 line, tab\t, nul\x00, 你好, \U0001f3f3️‍🌈, \r\n end"},
]
KEPT = ("id", "messages", "good", "bad", "bad_is_instructed", "safety_mode", "content_flags")


def make_record(name="r0", **changes):
    values = {
        "id": name,
        "messages": TALK,
        "good_principle": "Do.",
        "bad_principle": "Do not.",
        "good_system": "Good system.",
        "bad_system": "Bad system.",
        "good": f"A good one of {name}.",
        "bad": f"A bad one of {name}: \u2028",
        "original": "An original.",
        "prompt_ids": {"query": [1, 2], "good": [1, 3, 2], "bad": [3]},
        "response_ids": {"good": [5, 0], "bad": [2], "original": [7]},
        "iteration": 2,
        "safety_mode": "paper",
        "content_flags": [],
        "scores": {"policy/query/good": -12.3456789012345678},
    }
    return Record(**{**values, **changes})


RECORDS = [
    make_record(),
    make_record("r1", messages=ASK, content_flags=["violence"], safety_mode="careless"),
    make_record("r2", messages=ASK, bad_is_instructed=False, safety_mode=""),
]


def kept(records):
    return [[getattr(record, name) for name in KEPT] for record in records]


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "in" / "pairs.jsonl"
    write_records(path, RECORDS)
    return path


# ------------------------------------------------------------------------------------ what is read


def shared(role, text):
    return {"from": role, "value": text}


def said(text):
    return {"role": "assistant", "content": text}


SYSTEM = [{"role": "system", "content": "S"}]
EARLIER = [{"role": "user", "content": "And?"}, said("So.")]
SHARED_ASK = [shared("human", "Why?")]
AUTHORS_2025 = {
    "prompt": "Why?",
    "uuid": "u-1",
    "p_system": "Good.",
    "n_system": "Bad.",
    "system": "",
    "chosen": [*SHARED_ASK, shared("gpt", "c")],
    "rejected": [*SHARED_ASK, shared("gpt", "r")],
    "raw": [*SHARED_ASK, shared("gpt", "o")],
    "history": [],
}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        # LLaMA-Factory's ranking formats: ShareGPT's and alpaca's
        (
            {
                "conversations": SHARED_ASK,
                "chosen": shared("gpt", "c"),
                "rejected": shared("gpt", "r"),
            },
            ASK,
        ),
        (
            {
                "conversations": [shared("human", "And?"), shared("gpt", "So."), *SHARED_ASK],
                "system": "S",
                "chosen": shared("gpt", "c"),
                "rejected": shared("gpt", "r"),
            },
            SYSTEM + EARLIER + ASK,
        ),
        (
            {"conversations": [shared("system", "S"), *SHARED_ASK], "chosen": "c", "rejected": "r"},
            SYSTEM + ASK,
        ),
        ({"instruction": "Why?", "input": "", "chosen": "c", "rejected": "r"}, ASK),
        (
            {
                "instruction": "Look at this:",
                "input": "x = 1",
                "system": "S",
                "history": [["And?", "So."]],
                "chosen": "c",
                "rejected": "r",
            },
            [*SYSTEM, *EARLIER, {"role": "user", "content": "Look at this:\nx = 1"}],
        ),
        # a prompt that is implicit, with a system message
        (
            {"chosen": [*SYSTEM, *ASK, said("c")], "rejected": [*SYSTEM, *ASK, said("r")]},
            SYSTEM + ASK,
        ),
        # a popular set gives the prompt, the answers as whole conversations, and one of them again
        (
            {
                "prompt": "Why?",
                "prompt_id": "p",
                "messages": [*ASK, said("c")],
                "chosen": [*ASK, said("c")],
                "rejected": [*ASK, said("r")],
                "score_chosen": 8.0,
            },
            ASK,
        ),
        # another one has a system column beside the question
        ({"system": "S", "question": "Why?", "chosen": "c", "rejected": "r"}, SYSTEM + ASK),
        ({"system": "S", "prompt": SYSTEM + ASK, "chosen": "c", "rejected": "r"}, SYSTEM + ASK),
        (
            {
                "system": "S",
                "prompt": "Why?",
                "chosen": [*ASK, said("c")],
                "rejected": [*ASK, said("r")],
            },
            SYSTEM + ASK,
        ),
        # the second stage of the authors' 2025 scripts
        (
            {
                "prompt": "Why?",
                "prompt_id": "u-1",
                "chosen": [*SHARED_ASK, shared("gpt", "c")],
                "rejected": [*SHARED_ASK, shared("gpt", "r")],
                "conversations": [*SHARED_ASK, shared("gpt", "c")],
            },
            ASK,
        ),
    ],
)
@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_pairs_of_other_trainers(tmp_path, row, messages, kind):
    path = tmp_path / f"p.{kind}"
    if kind == "json":
        path.write_text(json.dumps([row]))
    else:
        import pyarrow as pa

        pq.write_table(pa.Table.from_pylist([row]), path)
    (record,) = load_records(path)
    assert (record.messages, record.good, record.bad) == (messages, "c", "r")
    assert (record.original, record.good_system, record.principle_source) == ("", "", "")
    assert not record.bad_is_instructed


@pytest.mark.parametrize("with_texts", [False, True])
def test_the_pairs_of_the_2025_scripts(tmp_path, with_texts):
    row = AUTHORS_2025 | {
        "principles": [
            {"good_principle": "Do A.", "bad_principle": "Do B."},
            {"good_principle": "Do C.", "bad_principle": "Do D."},
        ]
    }
    if with_texts:
        row |= {key: row[key][-1]["value"] for key in ("chosen", "rejected", "raw")}
    path = tmp_path / "p.json"
    path.write_text(json.dumps([row]))
    (record,) = load_records(path)
    assert (record.id, record.messages) == ("u-1", ASK)
    assert (record.good, record.bad, record.original) == ("c", "r", "o")
    assert (record.good_system, record.bad_system) == ("Good.", "Bad.")
    assert record.good_principle == "Do A.\n\nDo C."
    assert record.bad_principle == "Do B.\n\nDo D."
    assert record.bad_is_instructed
    assert record.principle_source == "p.json, record 1"


def test_the_queries_of_the_2025_scripts(tmp_path):
    rows = [
        {"prompt": "Why?", "uuid": "a", "principles": [{"good_principle": "", "bad_principle": ""}]}
    ]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    (query,) = load_queries(tmp_path / "q.json")
    assert (query.id, query.messages) == ("a", ASK)


def test_queries_in_sharegpts_spelling(tmp_path):
    (tmp_path / "q.json").write_text(json.dumps([{"conversations": SHARED_ASK, "system": "S"}]))
    (query,) = load_queries(tmp_path / "q.json")
    assert query.messages == SYSTEM + ASK


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            AUTHORS_2025 | {"raw": [shared("human", "Who?"), shared("gpt", "o")]},
            "'chosen' and 'raw'",
        ),
        (AUTHORS_2025 | {"raw": SHARED_ASK}, "'raw' must end with the assistant's answer"),
        (
            AUTHORS_2025 | {"principles": [{"good_principle": 3}]},
            "'principles' must be text, not int",
        ),
        (AUTHORS_2025 | {"rejected": shared("tool", "r")}, "'rejected': message 1 needs a role"),
        (
            AUTHORS_2025 | {"system": "S", "prompt": [{"role": "system", "content": "T"}, *ASK]},
            "'system' and the first message differ; keep one",
        ),
        (AUTHORS_2025 | {"prompt": "Who?"}, "the turns before the answers are not those of the"),
    ],
)
def test_wrong_rows_are_named_in_one_line(tmp_path, row, message):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(AUTHORS_2025) + "\n" + json.dumps(row | {"uuid": "u-2"}))
    with pytest.raises(InputError) as caught:
        load_records(path)
    assert str(caught.value).startswith(f"{path}, line 2: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------- what is written


def test_text_asked_to_be_bad_cannot_reach_plain_examples():
    record = make_record(good="fine")
    (example,) = plain_examples([record])
    assert example == {"messages": [*record.messages, said("fine")]}
    told = json.dumps(example)
    for name in ("bad", "bad_principle", "bad_system", "good_system", "original"):
        assert json.dumps(getattr(record, name))[1:-1] not in told


def test_the_comparisons_are_those_of_the_objective():
    from sso_lightning.losses import IPO
    from sso_lightning.objectives import SelfSteering

    terms = SelfSteering(IPO()).terms
    assert {t.context: (t.chosen, t.rejected) for t in terms} == COMPARED


def test_prompts_join_the_systems_as_the_renderer_does(tiny_model):
    from sso_lightning.policy import PolicyConfig, load_tokenizer
    from sso_lightning.prompts import ChatRenderer

    renderer = ChatRenderer(load_tokenizer(PolicyConfig(str(tiny_model))))
    record = RECORDS[0]
    for context, system in (("query", None), ("good", "Good system."), ("bad", "Bad system.")):
        sampled_from = renderer.render(record.messages, system)
        assert renderer.render(prompt_of(record, context)) == sampled_from


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("to", ["trl", "reward", "llamafactory"])
def test_pairs_come_back_with_their_marks(to, kind, pairs, tmp_path, sso):
    out = tmp_path / f"out.{kind}"
    status, told, err = sso("export-pairs", pairs, "--to", to, "--out", out)
    assert (status, err) == (0, "")
    assert told.splitlines()[:2] == [
        f"wrote 3 rows of 3 records to {out} ({to}, context query)",
        "marked in it: bad_is_instructed 2, safety_mode careless 1, safety_mode paper 1, "
        "safety_mode unknown 1, content_flags violence 1",
    ]
    assert kept(load_records(out)) == kept(RECORDS)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_own_records_come_back_wholly(kind, pairs, tmp_path, sso):
    out = tmp_path / f"out.{kind}"
    status, told, _ = sso("export-pairs", pairs, "--to", "records", "--out", out)
    assert status == 0
    assert "wrote 3 rows of 3 records" in told
    assert load_records(out) == RECORDS


@pytest.mark.parametrize("to", ["trl", "reward", "llamafactory"])
@pytest.mark.parametrize("which", ["good", "bad"])
def test_the_steering_comparisons(to, which, pairs, tmp_path, sso):
    out = tmp_path / "out.jsonl"
    assert sso("export-pairs", pairs, "--to", to, "--out", out, "--which", which)[0] == 0
    for record, back in zip(RECORDS, load_records(out), strict=True):
        assert back.messages == prompt_of(record, which)
        assert back.messages[0]["content"].endswith(f"{which.title()} system.")
        good, bad = (getattr(record, name) for name in COMPARED[which])
        assert (back.good, back.bad) == (good, bad)
        assert back.bad_is_instructed == record.bad_is_instructed
    assert {json.loads(line)["context"] for line in out.read_bytes().splitlines()} == {which}


def test_the_rows_that_trl_asks_for():
    (row,) = preference_examples(RECORDS[:1])
    assert row == {
        "id": "r0",
        "prompt": TALK,
        "chosen": [said(RECORDS[0].good)],
        "rejected": [said(RECORDS[0].bad)],
        "bad_is_instructed": True,
        "safety_mode": "paper",
        "content_flags": [],
        "context": "query",
    }


def test_rewards_are_for_whole_conversations(pairs, tmp_path, sso):
    out = tmp_path / "out.json"
    assert sso("export-pairs", pairs, "--to", "reward", "--out", out)[0] == 0
    row = json.loads(out.read_text())[0]
    assert row["chosen"] == [*TALK, said(RECORDS[0].good)]
    assert row["rejected"] == [*TALK, said(RECORDS[0].bad)]
    assert "prompt" not in row


def test_llamafactory_gets_its_description(pairs, tmp_path, sso):
    info = tmp_path / "dataset_info.json"
    info.write_text('{"theirs": {"file_name": "x.json"}}')
    out = tmp_path / "mine.json"
    status, told, _ = sso("export-pairs", pairs, "--to", "llamafactory", "--out", out)
    assert status == 0
    assert told.endswith(f"described as 'mine' in {info}\n")
    row = json.loads(out.read_text())[0]
    assert row["system"] == "Be odd."
    assert [turn["from"] for turn in row["conversations"]] == ["human", "gpt", "human"]
    assert row["chosen"] == shared("gpt", RECORDS[0].good)
    described = json.loads(info.read_text())
    assert described["theirs"] == {"file_name": "x.json"}
    mine = described["mine"]
    assert (mine["file_name"], mine["formatting"], mine["ranking"]) == (
        "mine.json",
        "sharegpt",
        True,
    )
    assert {*mine["columns"].values()} <= row.keys()
    # an entry of another file under the same name stays
    info.write_text('{"mine": {"file_name": "x.json"}}')
    out.unlink()
    status, _, err = sso("export-pairs", pairs, "--to", "llamafactory", "--out", out)
    assert (status, out.exists()) == (2, False)
    assert "has another entry 'mine'" in err


def test_plain_training_data_has_good_answers_only(pairs, tmp_path, sso):
    out = tmp_path / "out.jsonl"
    status, told, _ = sso("export-pairs", pairs, "--to", "sft", "--out", out)
    assert status == 0
    assert "not in it" in told
    rows = [json.loads(line) for line in out.read_bytes().splitlines()]
    assert rows == [{"messages": [*r.messages, said(r.good)]} for r in RECORDS]


def iterations(root):
    """A run with two iterations over the same queries, and sets that are no iteration's."""
    for name, number in (
        ("iteration-00", 0),
        ("iteration-01", 1),
        ("iteration-01/validation", 1),
        ("iteration-01.replaced-1", 1),
        ("predict", 0),
    ):
        store = PairStore(root / "pairs" / name, {"name": name})
        for index in range(2):
            made = make_record(f"r{index}", iteration=number, bad=f"bad of {name}")
            store.write_shard(index, [made], {})
        store.finish({})
    return root


def test_a_run_gives_the_pairs_of_its_iterations(tmp_path, sso):
    root = iterations(tmp_path / "run")
    out = tmp_path / "all.jsonl"
    status, told, _ = sso("export-pairs", root, "--to", "trl", "--out", out)
    assert status == 0
    assert "wrote 4 rows of 4 records" in told
    found = load_records(out)
    assert [r.bad for r in found] == ["bad of iteration-00"] * 2 + ["bad of iteration-01"] * 2
    assert [r.id for r in found] == [f"r{i}/iteration-{n}" for n in (0, 1) for i in (0, 1)]
    out = tmp_path / "one.jsonl"
    assert sso("export-pairs", root, "--to", "trl", "--out", out, "--iteration", 1)[0] == 0
    assert [(r.id, r.bad) for r in load_records(out)] == [
        ("r0", "bad of iteration-01"),
        ("r1", "bad of iteration-01"),
    ]
    out = tmp_path / "records.parquet"
    assert sso("export-pairs", root, "--to", "records", "--out", out)[0] == 0
    assert [(r.id, r.iteration) for r in load_records(out)] == [
        ("r0", 0),
        ("r1", 0),
        ("r0", 1),
        ("r1", 1),
    ]
    out = tmp_path / "q.jsonl"
    status, told, _ = sso("export-pairs", root, "--to", "queries", "--out", out)
    assert "wrote 2 rows of 4 records" in told  # the same queries return in every iteration
    assert [(q.id, q.messages) for q in load_queries(out)] == [("r0", TALK), ("r1", TALK)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{pairs}", "--to", "trl"], "--out"),
        (["{pairs}", "--to", "other", "--out", "{tmp}/o.jsonl"], "argument --to: invalid choice"),
        (["{pairs}", "--to", "trl", "--out", "{tmp}/o.txt"], "o.txt: unknown file type; give one"),
        (["{pairs}", "--to", "records", "--out", "{tmp}/o.json"], "o.json: unknown file type"),
        (["{pairs}", "--to", "trl", "--out", "{pairs}"], "already exists; remove it or"),
        (["{tmp}/no.jsonl", "--to", "trl", "--out", "{tmp}/o.json"], "no.jsonl: no such file"),
        (
            ["{pairs}", "--to", "sft", "--which", "bad", "--out", "{tmp}/o.jsonl"],
            "--which bad does not go with --to sft",
        ),
        (
            ["{pairs}", "--to", "trl", "--iteration", "7", "--out", "{tmp}/o.jsonl"],
            "no record of iteration 7; has 2",
        ),
        (
            ["{bare}", "--to", "trl", "--which", "good", "--out", "{tmp}/o.jsonl"],
            "record 'r0' has no good_system",
        ),
        (
            ["{bare}", "--to", "trl", "--which", "bad", "--out", "{tmp}/o.jsonl"],
            "record 'r0' has no original, which context bad compares",
        ),
        (
            ["{bare}", "--to", "llamafactory", "--out", "{tmp}/o.jsonl"],
            "record 'r0': user and assistant do not take turns",
        ),
        (["{run}", "--to", "trl", "--out", "{tmp}/o.jsonl"], "give one of pairs/predict"),
    ],
)
def test_what_cannot_be_exported_is_named_and_nothing_written(
    arguments, message, pairs, tmp_path, sso
):
    bare = tmp_path / "bare.jsonl"
    row = make_record(messages=ASK * 2, original="", good_system="", bad_system="")
    write_records(bare, [row])
    (tmp_path / "run" / "pairs" / "predict").mkdir(parents=True)
    places = {
        "{pairs}": pairs,
        "{tmp}": tmp_path,
        "{bare}": bare,
        "{run}": tmp_path / "run",
    }
    for name, place in places.items():
        arguments = [a.replace(name, str(place)) for a in arguments]
    before = sorted(tmp_path.rglob("*"))
    status, out, err = sso("export-pairs", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert sorted(tmp_path.rglob("*")) == before


def test_the_marks_survive_a_chain_of_formats(pairs, tmp_path, sso):
    source = pairs
    for number, to in enumerate(("trl", "llamafactory", "reward", "trl")):
        out = tmp_path / f"{number}.parquet"
        assert sso("export-pairs", source, "--to", to, "--out", out)[0] == 0
        source = out
    assert kept(load_records(source)) == kept(RECORDS)
