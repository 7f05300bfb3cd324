"""Every mistake ends with one clear line on stderr, status 2, and nothing lost.

The mistakes are data: any YAML file in `bad_inputs/` is a list of cases, each of which spoils a run
that would work. `{tmp}` and `{model}` in them stand for paths, `{template}` for the hash of the
tiny model's chat template.

    name: what is wrong
    set, unset: settings of the run by dotted key; to set, to leave out
    files: files in {tmp} (see `content`); "q.jsonl" are the queries
    model: files of a copy of the tiny model at {tmp}/model (. with `vocabulary`: its new size)
    command: the command line; `fit --config {tmp}/config.yaml --overwrite true` if not given
    args: more of it
    read: "queries" or "pairs": the file of that setting is at fault, and reading it finds that
    slow: true where a case of the same kind is checked in every run (see the marker `exhaustive`)
    message: the one line that a user gets, to the letter
"""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import yaml

FOLDER = Path(__file__).parent / "bad_inputs"
KEYS = {"name", "set", "unset", "files", "model", "command", "args", "read", "slow", "message"}


def settings(model: Path, folder: Path) -> dict:
    """A run that would work."""
    return {
        "trainer": {
            "default_root_dir": str(folder / "run"),
            "max_epochs": 1,
            "accelerator": "cpu",
            "devices": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "model": {
            "policy": {"path": str(model)},
            "objective": {
                "class_path": "Contrastive",
                "init_args": {"base": {"class_path": "IPO"}},
            },
        },
        "data": {"queries": str(folder / "q.jsonl"), "batch_size": 2},
        "pairs": {
            "sampler": {
                "class_path": "TransformersSampler",
                "init_args": {"max_new_tokens": 4},
            },
            "principles": {
                "class_path": "PredefinedPrinciples",
                "init_args": {"pick": "random"},
            },
        },
    }


def put(tree: dict, key: str, value: object) -> None:
    """Set the value of a dotted key."""
    *way, last = key.split(".")
    for part in way:
        tree = tree.setdefault(part, {})
    tree[last] = value


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def __reduce__(self):
        return (Path.touch, (self.path,))


def checkpoint(tree: object) -> object:
    """A tree with `{zeros: shape}` as tensors and `{trap: file}` as code."""
    import torch

    if not isinstance(tree, dict):
        return tree
    if "zeros" in tree:
        return torch.zeros(tree["zeros"])
    if "trap" in tree:
        return Trap(tree["trap"])
    return {key: checkpoint(value) for key, value in tree.items()}


def content(path: Path, given: object) -> None:
    """Write what a case gives for a file.

    Text is text; a list is JSON lines (text in it is a raw line); null removes the file. Else one
    of hex (bytes), text (with `times`), yaml, parquet (rows), zip (a checkpoint), folder (file
    names) and cut (leave so many bytes of what is there), or more of them in this order.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if given is None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif isinstance(given, str):
        path.write_text(given)
    elif isinstance(given, list):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in given]
        path.write_text("\n".join(lines) + "\n")
    else:
        write = {
            "hex": lambda value: path.write_bytes(bytes.fromhex(value)),
            "text": lambda value: path.write_text(value * given.get("times", 1)),
            "parquet": lambda rows: write_parquet(path, rows),
            "checkpoint": lambda tree: write_checkpoint(path, tree),
            "pickle": lambda tree: path.write_bytes(pickle.dumps(checkpoint(tree))),
            "json": lambda some: change_json(path, some),
            "folder": lambda names: make_folder(path, names),
            "file": lambda text: (shutil.rmtree(path), path.write_text(text)),
            "vocabulary": lambda size: shrink_vocabulary(path, size),
            "cut": lambda size: path.write_bytes(path.read_bytes()[:size]),
        }
        assert given.keys() <= write.keys() | {"times"}, given
        for kind in write:
            if kind in given:
                write[kind](given[kind])


def make_folder(path: Path, names: list[str]) -> None:
    path.mkdir()
    for name in names:
        (path / name).write_text("mine")


def change_json(path: Path, some: dict) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | some))


def shrink_vocabulary(folder: Path, size: int) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(size)
    model.save_pretrained(folder)


def write_parquet(path: Path, rows: list) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)


def write_checkpoint(path: Path, tree: object) -> None:
    import torch

    torch.save(checkpoint(tree), path)


def filled(tree: object, places: dict[str, str]) -> object:
    """The tree with placeholders replaced."""
    if isinstance(tree, dict):
        return {filled(key, places): filled(value, places) for key, value in tree.items()}
    if isinstance(tree, list):
        return [filled(value, places) for value in tree]
    if isinstance(tree, str):
        for name, value in places.items():
            tree = tree.replace(f"{{{name}}}", value)
    return tree


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """What is in a folder; None for folders."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


@pytest.fixture(scope="module")
def template(tiny_model):
    from sso_lightning.policy import PolicyConfig, load_tokenizer
    from sso_lightning.prompts import ChatRenderer

    return ChatRenderer(load_tokenizer(PolicyConfig(str(tiny_model)))).template_hash


class Spoilt:
    """A run in a folder of its own, spoilt as a case says, and its command line."""

    def __init__(self, case: dict, folder: Path, model: Path, template: str) -> None:
        self.folder = folder
        self.places = {"tmp": str(folder), "model": str(model), "template": template}
        case = filled(case, self.places)
        tree = settings(model, folder)
        content(folder / "q.jsonl", [{"id": x, "prompt": f"Name a {x}."} for x in ("bird", "fish")])
        # an earlier run, which a start that fails must not touch
        for name in ("config.yaml", "metrics.csv", "pairs/old.txt", "export/old.txt"):
            content(folder / "run" / name, "old")
        if "model" in case:
            shutil.copytree(model, folder / "model")
            tree["model"]["policy"]["path"] = str(folder / "model")
        for name, given in case.get("model", {}).items():
            content(folder / "model" / name, given)
        if case.get("read") == "pairs":
            del tree["data"]["queries"]
        for key, value in case.get("set", {}).items():
            put(tree, key, value)
        for key in case.get("unset", []):
            *way, last = key.split(".")
            at = tree
            for part in way:
                at = at[part]
            del at[last]
        content(folder / "config.yaml", yaml.safe_dump(tree))
        for name, given in case.get("files", {}).items():
            content(folder / name, given)
        fit = ["fit", "--config", str(folder / "config.yaml"), "--overwrite", "true"]
        self.command = case.get("command", fit) + case.get("args", [])
        self.message = case["message"]
        self.file = tree["data"].get(case.get("read"))


def cases(*, read: bool | None = None) -> list:
    """All cases; those of the readers, or the others. What is slow is marked so."""
    found = []
    for file in sorted(FOLDER.glob("*.yaml")):
        for case in yaml.safe_load(file.read_text()):
            assert case.keys() <= KEYS, f"{file.name}: {case['name']}: {case.keys() - KEYS}"
            if read is None or read == ("read" in case):
                marks = [pytest.mark.exhaustive] if case.get("slow") else []
                found.append(pytest.param(case, id=f"{file.stem}: {case['name']}", marks=marks))
    return found


@pytest.fixture
def spoil(tmp_path, tiny_model, template):
    return lambda case: Spoilt(case, tmp_path, tiny_model, template)


def assert_told(result, message: str) -> None:
    """One line, and it is the last one; status 2."""
    status, _, err = result
    assert "Traceback" not in err
    assert [line for line in err.splitlines() if line.startswith("error:")] == [f"error: {message}"]
    assert err.endswith(f"error: {message}\n")
    assert status == 2


def assert_nothing_lost(sso, spoilt: Spoilt) -> None:
    before = snapshot(spoilt.folder)
    assert_told(sso(*spoilt.command), spoilt.message)
    assert snapshot(spoilt.folder) == before


@pytest.mark.parametrize("case", cases(read=False))
def test_a_mistake_is_one_line_and_loses_nothing(case, sso, spoil):
    assert_nothing_lost(sso, spoil(case))


@pytest.mark.parametrize("case", cases(read=True))
def test_a_file_is_refused_in_one_line(case, sso, spoil, monkeypatch):
    """The command line around the reader alone: a start of the trainer takes half a second."""
    from sso_lightning import __main__, records

    spoilt = spoil(case)
    load = {"queries": records.load_queries, "pairs": records.load_records}[case["read"]]
    monkeypatch.setattr(__main__, "_train", lambda _: load(spoilt.file))
    assert_nothing_lost(sso, spoilt)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", cases(read=True))
def test_a_file_is_refused_by_the_whole_command(case, sso, spoil):
    assert_nothing_lost(sso, spoil(case))


def test_there_are_cases_of_every_kind():
    names = [case.id for case in cases()]
    assert len(names) == len({*names})
    kinds = {name.partition(":")[0] for name in names}
    assert kinds >= {
        "checkpoints",
        "configs",
        "files",
        "flags",
        "models",
        "principles",
        "records",
        "rewards",
    }
    assert len(names) >= 65


# ------------------------------------------------------------------------- what needs code


def test_no_record_left_after_cleaning(sso, spoil):
    # one likeliest token each: the three answers are equal, or nothing
    key = "pairs.sampler.init_args"
    one = {"max_new_tokens": 1, "temperature": 0}
    status, _, err = sso(*spoil({"name": "", "set": {key: one}, "message": ""}).command)
    assert status == 2
    assert "no record is left of 2 queries" in err.splitlines()[-1]
    assert any(reason in err for reason in ("equals", "empty"))


def test_a_good_start_with_overwrite_removes_the_earlier_run(sso, spoil):
    spoilt = spoil({"name": "", "message": ""})
    run = spoilt.folder / "run"
    (run / "notes.txt").write_text("mine")
    status, _, err = sso(*spoilt.command)
    assert status == 0, err
    assert "old" not in (run / "metrics.csv").read_text()
    assert "old" not in (run / "config.yaml").read_text()
    assert not (run / "pairs" / "old.txt").exists()
    assert (run / "notes.txt").read_text() == "mine"  # not ours to remove


def test_debug_shows_the_traceback(sso, spoil, monkeypatch):
    from sso_lightning.errors import InputError

    monkeypatch.setenv("SSO_DEBUG", "1")
    spoilt = spoil({"name": "", "files": {"q.jsonl": None}, "message": ""})
    with pytest.raises(InputError, match=r"data\.queries"):
        sso(*spoilt.command)
