"""A JSON Schema of the YAML, so that an editor completes keys and marks what is wrong.

The parser itself says what it takes (jsonargparse), keys, types, defaults and descriptions. Three
things are done to its answer: classes that a recipe never names are left out (tensors, modules and
metrics are arguments of some of Lightning's classes, and two megabytes), short class names are
taken as the command line takes them, and classes of a user's own are let through.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NAMED = (
    "Accelerator",
    "Callback",
    "CheckpointIO",
    "ClusterEnvironment",
    "LayerSync",
    "Logger",
    "Optimizer",
    "Precision",
    "Profiler",
    "Strategy",
)
"""Base classes outside of this library whose subclasses a recipe may name."""


class _Parsed(Exception):
    """Carries the parser out of the command that made it."""


def parser_of(command: str) -> Any:
    """The parser of one command's settings (`fit`, `validate`, `test` or `predict`)."""
    from sso_lightning import cli

    class Parser(cli.SSOCLI):
        def parse_arguments(self, parser: Any, args: Any) -> None:
            raise _Parsed(parser)

    try:
        cli.make(Parser, [command])
    except _Parsed as found:
        (parser,) = found.args
    return parser._subcommands_action._name_parser_map[command]


@contextmanager
def _only_named() -> Iterator[None]:
    """Let the schema's maker look no further than at `NAMED` and our own classes."""
    from importlib import import_module

    maker: Any = import_module("jsonargparse._completions_jsonschema")
    every = maker.get_all_subclass_paths

    def named(kind: Any, *args: Any, **kwargs: Any) -> list[str]:
        ours = getattr(kind, "__module__", "").startswith("sso_lightning.")
        # it stumbles over metaclasses, which are subclasses without being asked for
        known = ours or (getattr(kind, "__name__", "") in NAMED and not issubclass(kind, type))
        paths: list[str] = every(kind, *args, **kwargs) if known else []
        return [path for path in paths if _importable(path)]

    maker.get_all_subclass_paths = named
    try:
        yield
    finally:
        maker.get_all_subclass_paths = every


def _importable(path: str) -> bool:
    """Whether a class is where its path says: some are made while a program runs."""
    module, _, name = path.rpartition(".")
    return hasattr(sys.modules.get(module), name)


def config_schema(command: str = "fit") -> dict[str, Any]:
    """The schema (draft 2020-12) of what a command's `--config` takes."""
    parser = parser_of(command)
    with _only_named():
        schema: dict[str, Any] = json.loads(parser.get_completion_script("jsonschema"))
    schema["title"] = f"sso-lightning {command} --config"
    for definition in schema["$defs"].values():
        if any("init_args" in option.get("properties", {}) for option in _options(definition)):
            _open(definition)
    return schema


def _options(definition: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = definition.get("anyOf", [definition])
    return found


def _open(definition: dict[str, Any]) -> None:
    """Take short names of the classes of a kind, and any class of a user's own."""
    known = []
    for option in _options(definition):
        arguments = option.get("properties", {}).get("init_args", {})
        if arguments.get("properties", {}).pop("params", None):  # the module gives an optimizer its
            arguments["required"] = [k for k in arguments.get("required", []) if k != "params"]
            option["required"] = ["class_path"]
        path = option.get("properties", {}).get("class_path", {})
        if "const" in path:
            names = [path.pop("const")]
            names.append(names[0].rpartition(".")[2])
            path["enum"] = names
            known += names
    own = {
        "type": "object",
        "description": "A class of your own.",
        "properties": {
            "class_path": {"type": "string", "not": {"enum": known}},
            "init_args": {"type": "object"},
        },
        "required": ["class_path"],
    }
    if known:
        definition["anyOf"] = [*_options(dict(definition)), own]
