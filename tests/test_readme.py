"""The README's claims that a machine can check: file tree, commands, files, example."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
EXTENDING = (ROOT / "docs/extending.md").read_text()
DATA = (ROOT / "docs/data.md").read_text()


def test_file_tree_matches_the_disk():
    block = next(b for b in README.split("```") if b.startswith("\nsso_lightning/")).strip()
    named, folder = set(), ""
    for line in block.splitlines():
        name = line.split()[0]
        folder = name if not line.startswith(" ") else folder
        named.add(name if not line.startswith(" ") else folder + name)
    for name in named:
        assert (ROOT / name).exists(), name
    library = {f"sso_lightning/{p.name}" for p in (ROOT / "sso_lightning").glob("*.py")}
    small = {"__init__", "__main__", "version", "errors"}
    unnamed = {p for p in library - named if Path(p).stem not in small}
    assert not unnamed


def test_linked_and_named_files_exist():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
    pages = (ROOT / "docs").glob("*.md")
    text = README + "".join(page.read_text() for page in pages)
    for recipe in set(re.findall(r"configs/[\w/]+\.yaml", text)):
        assert (ROOT / recipe).exists(), recipe


def test_commands_name_known_subcommands_and_flags():
    from sso_lightning.__main__ import USAGE

    pages = [README, *(page.read_text() for page in (ROOT / "docs").glob("*.md"))]
    blocks = [
        block for page in pages for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    ]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    used = [c for c in commands if c and c[0] == "sso-lightning"]
    assert len(used) >= 6
    for command in used:
        assert re.search(rf"^  {command[1]} ", USAGE, re.MULTILINE), command[1]
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in commands:
        if command and command[0] == "make":
            assert command[1] in targets


def test_example_objective_trains_the_term_it_names():
    code = re.search(r"```python\n# mine\.py\n(.*?)```", EXTENDING, re.DOTALL)
    assert code
    space: dict = {}
    exec(code[1], space)
    from sso_lightning.losses import Hinge
    from sso_lightning.objectives import ContrastLogps

    objective = space["OnlyGoodSteering"](Hinge(0.1), steering=0.5)
    values = {("query", "good"): -4.0, ("query", "bad"): -4.0}
    values |= {("good", "good"): -2.0, ("good", "bad"): -8.0}
    logps = {k: torch.tensor([v]) for k, v in values.items()}
    zeros = {k: torch.zeros(1) for k in values}
    lengths = {"good": torch.tensor([2]), "bad": torch.tensor([4])}
    assert set(objective.sequences) == set(values)
    loss, _ = objective(ContrastLogps(logps, lengths), ContrastLogps(zeros, lengths))
    # hinge of margin 0 is 1; of margin 6 at beta 0.1 it is 0.4, times 0.5
    assert loss.item() == pytest.approx(1.2)


def test_data_in_and_out_is_what_the_library_takes(tmp_path):
    from sso_lightning.formats import FORMATS
    from sso_lightning.records import load_records
    from sso_lightning.sources import SUFFIXES

    assert {*FORMATS, *SUFFIXES} <= {*re.findall(r"`([^`\s]+)`", DATA)}
    mapping = re.search(r"--data\.columns '(.*?)'", DATA)
    assert mapping
    path = tmp_path / "pairs.csv"
    path.write_text("question,best,worst\nWhy?,c,r\n")
    (record,) = load_records(path, yaml.safe_load(mapping[1]))
    assert (record.messages[0]["content"], record.good, record.bad) == ("Why?", "c", "r")
