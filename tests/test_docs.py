"""What the pages under docs/ say and a machine can check: examples run, links lead somewhere."""

import csv
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def merged(settings: dict, change: dict) -> dict:
    """Settings with a snippet laid over them, as two --config files are."""
    for key, value in change.items():
        both = isinstance(value, dict) and isinstance(settings.get(key), dict)
        replaces = both and "class_path" in value
        settings[key] = merged(settings[key], value) if both and not replaces else value
    return settings


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        path = target.partition("#")[0]
        assert target.startswith(("https://", "#")) or (page.parent / path).exists(), target


def test_users_own_parts_of_every_kind_train(tiny_model, tmp_path, monkeypatch, sso):
    page = ROOT / "docs/extending.md"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for code in blocks(page, "python"):
        name = re.match(r"# (\w+\.py)\n", code)
        assert name, code
        (tmp_path / name[1]).write_text(code)
    (tmp_path / "q.jsonl").write_text(
        "".join(f'{{"prompt": "Name {i} birds."}}\n' for i in range(4))
    )
    settings = {
        "trainer": {"default_root_dir": "run", "max_epochs": 1, "accelerator": "cpu"},
        "model": {"policy": {"path": str(tiny_model)}},
        "data": {"queries": "q.jsonl", "batch_size": 2},
    }
    for snippet in blocks(page, "yaml"):
        settings = merged(settings, yaml.safe_load(snippet))
    # the loss and the sampler are not in a snippet of the page
    loss = {"class_path": "cautious.CappedDPO", "init_args": {"cap": 2.0}}
    settings["model"]["objective"]["init_args"]["base"] = loss
    sampler = {"class_path": "patient.Patient", "init_args": {"max_new_tokens": 5}}
    settings["pairs"]["sampler"] = sampler
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    status, _, err = sso("fit", "--config", "run.yaml")
    assert status == 0, err
    with (tmp_path / "run/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    seen = {key for row in rows for key, value in row.items() if value}
    assert {"train/loss", "train/loss_good", "pairs/filtered_brief"} <= seen
    assert {"pairs/good_is_longer"} <= seen
    assert "train/loss_bad" not in seen
    written = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    used = yaml.safe_dump(written)
    for part in ("OnlyGoodSteering", "CappedDPO", "Tone", "Patient", "Brief", "LongerGood"):
        assert part in used, part


def test_the_capped_loss_is_flat_beyond_its_cap():
    (code,) = (c for c in blocks(ROOT / "docs/extending.md", "python") if "CappedDPO" in c)
    space: dict = {}
    exec(code, space)
    from sso_lightning.losses import PairLogps

    one = torch.ones(2)
    pairs = PairLogps(torch.tensor([-1.0, 99.0]), torch.tensor([-3.0, -99.0]), one, one)
    even = PairLogps(*torch.zeros(2, 2), one, one)
    losses = space["CappedDPO"](beta=0.5, cap=3.0)(pairs, even)
    # h = 2: log(1 + exp(-1)); h = 198 counts as 3 / 0.5: log(1 + exp(-3))
    torch.testing.assert_close(losses, torch.tensor([0.31326, 0.04859]), rtol=0, atol=1e-5)
