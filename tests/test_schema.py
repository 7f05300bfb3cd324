"""The JSON Schema says of a YAML what the parser says of it."""

import json
from copy import deepcopy
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

ROOT = Path(__file__).resolve().parent.parent
OTHER = ("reward", "benchmarks")  # of another command, and a part of settings
RECIPES = [p for p in sorted((ROOT / "configs").rglob("*.yaml")) if p.stem not in OTHER]


@pytest.fixture(scope="module")
def validator(tmp_path_factory, forks):
    # in a process of its own: other tests import more classes, which the schema would know too
    out = tmp_path_factory.mktemp("schema") / "schema.json"
    done = forks.run("-m", "sso_lightning", "schema", "--out", out, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert out.stat().st_size < 500_000
    return Draft202012Validator(json.loads(out.read_text()))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_recipes_are_valid(recipe, validator):
    assert not [e.message for e in validator.iter_errors(yaml.safe_load(recipe.read_text()))]


CHANGES = {
    "a misspelt key": ({"trainer": {"max_epoch": 3}}, False),
    "a number that is text": ({"data": {"batch_size": "two"}}, False),
    "an unknown quantisation": ({"model": {"policy": {"path": "m", "quantize": "3bit"}}}, False),
    "a loss without its name": ({"model": {"objective": {"init_args": {}}}}, False),
    "a wrong argument of a known class": (
        {"guard": {"max_skiped": 3}},
        False,
    ),
    "a class of one's own": (
        {"model": {"objective": {"class_path": "mine.Own", "init_args": {"any": 1}}}},
        True,
    ),
    "an optimizer by its full name": (
        {"model": {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-5}}}},
        True,
    ),
    "an optimizer's misspelt argument": (
        {"model": {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"rate": 1}}}},
        False,
    ),
    "a logger": (
        {
            "trainer": {
                "logger": {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "x"}}
            }
        },
        True,
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_wrong_is_marked(name, validator):
    change, valid = CHANGES[name]
    settings = deepcopy(yaml.safe_load((ROOT / "configs/sandbox/sso_2024.yaml").read_text()))
    for key, values in change.items():
        settings.setdefault(key, {}).update(values)
    assert validator.is_valid(settings) is valid


def test_keys_are_described(validator):
    policy = validator.schema["properties"]["model"]["properties"]["policy"]["properties"]
    assert "4 bit" in policy["quantize"]["description"]
    assert policy["gradient_checkpointing"]["default"] is False
