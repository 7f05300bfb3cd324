"""Rows from tables, folders and the datasets library, and columns with other names."""

import csv
import json
import subprocess
import sys

import pytest

from sso_lightning.errors import InputError
from sso_lightning.records import Record, load_queries, load_records, write_records
from sso_lightning.sources import rows_of

ASK = [{"role": "user", "content": "Why?"}]
TURNS = [{"role": "system", "content": "S"}, *ASK, {"role": "assistant", "content": "A"}, *ASK]


def pair(record):
    return record.messages, record.good, record.bad


# --------------------------------------------------------------------------------------- tables


def test_a_table_keeps_line_feeds_commas_and_quotes(tmp_path):
    path = tmp_path / "p.csv"
    text = 'id,prompt,chosen,rejected\r\na,"Why, ""you""?","one\r\ntwo, three",no\r\n'
    text += "\r\nb,Who?,x,y\r\n"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())  # as a spreadsheet saves it
    first, second = load_records(path)
    assert pair(first) == (
        [{"role": "user", "content": 'Why, "you"?'}],
        "one\r\ntwo, three",
        "no",
    )
    assert (first.id, second.id) == ("a", "b")
    # the line where a row begins: the header is line 1, and the first row takes two lines
    assert [r.query_source for r in (first, second)] == ["p.csv, line 2", "p.csv, line 5"]


def test_tabs_and_long_cells(tmp_path):
    long = "word " * 50_000
    (tmp_path / "p.tsv").write_text(f"prompt\tchosen\trejected\nWhy?\t{long}\tNo, never\n")
    (record,) = load_records(tmp_path / "p.tsv")
    assert (record.good, record.bad) == (long, "No, never")


def test_cells_of_messages_are_json(tmp_path):
    said = [{"role": "assistant", "content": "c"}]
    rows = [
        ["messages", "chosen", "rejected", "bad_is_instructed", "content_flags"],
        [json.dumps(TURNS), json.dumps(said), "r", "TRUE", '["x"]'],
        [json.dumps(ASK), "{curly}", "[1]", "", ""],
    ]
    with (tmp_path / "p.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    first, second = load_records(tmp_path / "p.csv")
    assert pair(first) == (TURNS, "c", "r")
    assert (first.bad_is_instructed, first.content_flags) == (True, ["x"])
    assert pair(second) == (ASK, "{curly}", "[1]")  # text that only looks like JSON stays text
    assert (second.bad_is_instructed, second.content_flags) == (False, ["unscreened"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"prompt,chosen,rejected\na,b\n", "line 2: 2 cells, but the first line names 3"),
        (b"prompt,chosen,rejected\na,b,c\n\na,b,c,d\n", "line 4: 4 cells"),
        (b"prompt,chosen,prompt\na,b,c\n", "line 1: two columns are named 'prompt'"),
        (b"prompt;chosen;rejected\na;b;c\n", "line 1: the columns are not separated by ','"),
        (b'prompt,chosen,rejected\n"a"b,c,d\n', "line 2: not readable as a table"),
        (b'prompt,chosen,rejected\na,b,c\n"a,b,c\n', "line 3: not readable as a table"),
        (b"prompt,chosen,rejected\nna\xefve,b,c\n", "not UTF-8 text"),
        (b"prompt,chosen,rejected\n", "the file is empty"),
        (b"", "the file is empty"),
        (b"prompt,chosen,rejected\n,b,c\n", "line 2: 'prompt' is empty"),
        (b"prompt,chosen,rejected\na,b,\n", "line 2: 'rejected' is empty"),
        (b"messages,chosen,rejected\nWhy?,b,c\n", "line 2: 'messages': not valid JSON"),
        (b"prompt,chosen,rejected\na,\"[{'role': 'user'}]\",c\n", "line 2: 'chosen' looks like"),
        (b"prompt,chosen,rejected,bad_is_instructed\na,b,c,maybe\n", "line 2: 'bad_is_instructed'"),
    ],
)
def test_wrong_tables_are_named_in_one_line(tmp_path, text, message):
    path = tmp_path / "p.csv"
    path.write_bytes(text)
    with pytest.raises(InputError) as caught:
        load_records(path)
    assert str(caught.value).startswith(f"{path}")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_own_records_come_back_from_a_table(tmp_path):
    record = Record(
        id="7", messages=TURNS, good="g", bad="b", features=["x"], iteration=3, seed=2**62
    )
    record.scores["policy/query/good"] = -1.5
    record.prompt_ids["query"] = [1, 2]
    values = vars(record)
    with (tmp_path / "r.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, values)
        writer.writeheader()
        writer.writerow({k: v if isinstance(v, str) else json.dumps(v) for k, v in values.items()})
    assert load_records(tmp_path / "r.csv") == [record]


# -------------------------------------------------------------------------------------- columns


def test_columns_have_other_names(tmp_path):
    row = {"key": 5, "question": "Why?", "messages": "not these", "best": "c", "worst": "r"}
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(row | {"by": "me", "goodness": 4}))
    columns = {"prompt": "question", "chosen": "best", "rejected": "worst", "id": "key"}
    (record,) = load_records(path, columns)
    assert (record.id, *pair(record)) == ("5", ASK, "c", "r")
    # the fields by our names for them, and a query file that has no answers to name
    ours = {"query": "question", "good": "best", "bad": "worst", "original": "by"}
    (record,) = load_records(path, ours)
    assert (*pair(record), record.original) == (ASK, "c", "r", "me")
    (query,) = load_queries(path, columns)
    assert (query.id, query.messages) == ("5", ASK)
    (query,) = load_queries(path, {"prompt": "best"})
    assert query.messages == [{"role": "user", "content": "c"}]


def test_a_mapping_keeps_marks_and_swaps_columns(tmp_path):
    row = {"prompt": "Why?", "chosen": "worse", "rejected": "better", "safety_mode": "paper"}
    path = tmp_path / "p.json"
    path.write_text(json.dumps([row | {"bad_is_instructed": True}]))
    (record,) = load_records(path, {"chosen": "rejected", "rejected": "chosen"})
    assert pair(record) == (ASK, "better", "worse")
    assert (record.safety_mode, record.bad_is_instructed) == ("paper", True)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"chosn": "best"}, "data.columns: unknown field 'chosn'; give some of messages"),
        (
            {"chosen": "beste"},
            "p.jsonl: no column 'beste' for chosen (data.columns); has question, best, worst, odd",
        ),
        (
            {"prompt": "question", "chosen": "best", "rejected": "worst"},
            "line 2: 'worst' (rejected) is missing",
        ),
        (
            {"prompt": "question", "chosen": "odd", "rejected": "best"},
            "line 1: 'odd' (chosen) is missing",
        ),
        (
            {"prompt": "odd", "chosen": "best", "rejected": "best"},
            "line 1: 'odd' (prompt) is missing",
        ),
        ({"prompt": "question"}, "line 1: 'chosen' is missing"),
    ],
)
def test_wrong_columns_are_named_in_one_line(tmp_path, columns, message):
    path = tmp_path / "p.jsonl"
    rows = [{"question": "a", "best": "b", "worst": "c"}, {"question": "a", "best": "b"}]
    rows[1]["odd"] = 3
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError) as caught:
        load_records(path, columns)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------- folders


def test_a_folder_of_query_files(tmp_path):
    (tmp_path / "b.csv").write_text("prompt\nWho?\n")
    (tmp_path / "a.jsonl").write_text('{"prompt": "Why?"}')
    (tmp_path / "notes.txt").write_text("not read")
    found = load_queries(tmp_path)
    assert [q.messages[0]["content"] for q in found] == ["Why?", "Who?"]
    assert [q.source for q in found] == ["a.jsonl, line 1", "b.csv, line 2"]


def test_the_queries_of_records(tmp_path):
    write_records(tmp_path / "r.parquet", [Record(id="a", messages=TURNS, good="g", bad="b")])
    (query,) = load_queries(tmp_path / "r.parquet")
    assert (query.id, query.messages) == ("a", TURNS)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A `datasets` table of two preference rows, and a cache of its own."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [
        {"prompt": ASK, "chosen": [{"role": "assistant", "content": f"c{i}"}], "rejected": []}
        for i in range(2)
    ]
    for row in rows:
        row["rejected"] = [{"role": "assistant", "content": "r"}]
    return datasets.Dataset.from_list(rows)


def test_folders_of_save_to_disk(tmp_path, table):
    import datasets

    one, several, odd = tmp_path / "one", tmp_path / "several", tmp_path / "odd"
    table.save_to_disk(one)
    both = {"train": table, "test": table.select([1])}
    datasets.DatasetDict(both).save_to_disk(several)
    datasets.DatasetDict({"a": table, "b": table}).save_to_disk(odd)
    assert [pair(r) for r in load_records(one)] == [(ASK, "c0", "r"), (ASK, "c1", "r")]
    assert load_records(one)[1].query_source == "one, row 2"
    assert [r.good for r in load_records(several)] == ["c0", "c1"]  # the split named train
    assert [r.good for r in load_records(several / "test")] == ["c1"]
    with pytest.raises(InputError, match="odd: has the splits a, b; give the folder of one"):
        load_records(odd)
    with pytest.raises(InputError, match=r"one: no column 'x' for prompt .*; has prompt, chosen"):
        load_records(one, {"prompt": "x"})
    next(one.glob("*.arrow")).write_bytes(b"damaged")
    with pytest.raises(InputError, match="one: not a folder of save_to_disk") as caught:
        load_records(one)
    assert "\n" not in str(caught.value)


def test_a_data_folder_goes_through_the_hub_syntax(tmp_path, table):
    folder = tmp_path / "repository"
    (folder / "data").mkdir(parents=True)
    table.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    table.select([1]).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    assert [r.good for r in load_records(f"hf:{folder}")] == ["c0", "c1"]
    (record,) = load_records(f"hf:{folder}:default/test")
    assert record.good == "c1"
    assert record.query_source == f"hf:{folder}:default/test, row 1"
    assert [q.messages for q in load_queries(f"hf:{folder}:/train[:1]")] == [ASK]
    with pytest.raises(InputError, match=r"folder holds no record file .* given as hf:"):
        load_records(folder)
    for wrong in ("default/nothing", "nothing"):
        with pytest.raises(InputError, match=f"repository:{wrong}: cannot be loaded") as caught:
            load_records(f"hf:{folder}:{wrong}")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("hf:own/set", ("own/set", None, None, None)),
        ("hf:set", ("set", None, None, None)),
        ("hf:own/set:conf", ("own/set", "conf", None, None)),
        ("hf:own/set:conf/test", ("own/set", "conf", "test", None)),
        ("hf:own/set:/test[10:20]", ("own/set", None, "test[10:20]", None)),
        ("hf:own/set@v1.0:conf/train", ("own/set", "conf", "train", "v1.0")),
    ],
)
def test_the_parts_of_a_hub_name(source, asked, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(name, config, *, split, revision):
        assert (name, config, split, revision) == asked
        return {"train": [{"prompt": "Why?"}], "test": [{"prompt": "Who?"}]}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (row,) = rows_of(source)
    assert row.values == {"prompt": "Why?"}
    assert row.where == f"{source}, row 1"


def test_a_hub_that_is_out_of_reach_or_a_name_that_is_none():
    with pytest.raises(InputError, match=r"hf:own/set: cannot be loaded .*reach") as caught:
        load_records("hf:own/set")  # the tests are offline
    assert "\n" not in str(caught.value)
    for wrong in ("hf:", "hf::a", "hf:own/set@:a"):
        with pytest.raises(InputError, match="not a name of a data set; write hf:OWNER/NAME"):
            load_queries(wrong)


def test_datasets_is_imported_only_when_used():
    code = "import sys, sso_lightning.formats; print('datasets' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
