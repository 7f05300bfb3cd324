"""What is wrong with a configuration, in one line that names the key.

YAML itself lets a key be there twice and keeps the last one, and the parser of the command line
tells of a wrong value in many lines about the types it tried. Both are put right here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from sso_lightning.errors import InputError

_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list",
    "dict": "a mapping",
}


def check_file(path: Path) -> None:
    """Read a configuration file for what the parser would pass over or tell without its name.

    Raises:
        InputError: There is no such file, it is not YAML with settings, or a key is there twice.
    """
    if not path.is_file():
        what = f"{path} is a folder" if path.is_dir() else f"no file {path}"
        raise InputError(f"--config: {what}")
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        yaml.safe_load(text)  # what a tag asks for is made, or refused, only here
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except yaml.MarkedYAMLError as error:
        at = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{path}{at}: not valid YAML ({error.problem})") from error
    except RecursionError as error:
        raise InputError(f"{path}: not valid YAML (nested too deeply)") from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not valid YAML ({reason})") from error
    if not isinstance(tree, yaml.MappingNode):
        raise InputError(f"{path}: no settings; it must be a mapping such as 'data: ...'")
    for node, place in _walk(tree, set()):
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                line = key.start_mark.line + 1
                name = ".".join([*place, str(key.value)])
                raise InputError(f"{path}, line {line}: {name} is there twice; keep one")
            seen.add(str(key.value))


def _walk(
    node: Any, passed: set[int], place: tuple[str, ...] = ()
) -> Iterable[tuple[yaml.MappingNode, tuple[str, ...]]]:
    """All mappings of a YAML tree and their keys; anchors may lead back to where they stand."""
    if id(node) in passed or not isinstance(node, yaml.CollectionNode):
        return
    passed.add(id(node))
    if isinstance(node, yaml.MappingNode):
        yield node, place
        for key, value in node.value:
            yield from _walk(value, passed, (*place, str(key.value)))
    else:
        for value in node.value:
            yield from _walk(value, passed, place)


def one_line(message: str, command: str) -> str:
    """The parser's account of a mistake as: key, what it must be, what it is.

    Args:
        message: With its line breaks; the last key it names is the innermost one.
        command: The subcommand, which the parser takes for a part of a key.
    """
    message = message.replace(f": {command}.", ": ").replace(f", {command}.", ", ")
    option = re.search(r"does not accept option '([^']+)'", message)
    if option and "Problem with" not in message:
        return f"{option[1]}: there is no such setting"
    keys = []
    while match := re.search(r"Parser key \"([^\"]+)\":\s*", message):
        keys.append(match[1])
        message = message[match.end() :]
    reason = _reason([line.strip().removeprefix("- ") for line in message.splitlines()])
    between = " " if reason.startswith("must be ") else ": "
    return ".".join(keys) + between + reason if keys else reason


def _reason(lines: list[str]) -> str:
    """What is wrong, from the lines about one value and the types it was tried as."""
    text = "\n".join(lines)
    given = re.search(r"(?:Got value|Given value): (.*)", text)
    value = given[1].partition(". Got value:")[0] if given else ""
    if match := re.search(r"Problem with given class_path '([^']+)':\s*(.*)", text):
        name, problem = match[1].rpartition(".")[2], match[2]
        if option := re.search(r"Option '([^']+)' is not accepted", problem):
            return f"{name} has no argument {option[1]!r}"
        return f"{match[1]}: {_plain(problem)}"
    if match := re.search(r"Import path (\S+) does not correspond to a subclass of (\S+)", text):
        return f"{match[1]} is no {match[2].rpartition('.')[2]} class"
    choices = re.findall(r"Literal\[(.*?)\]", text)
    tried = [c for choice in choices for c in re.split(r",\s*", choice.replace("'", ""))]
    names = dict.fromkeys(re.findall(r"Expected an? <class '([\w.]+)'>", text))
    wanted = [_KINDS[name] for name in names if name in _KINDS]
    if tried:
        wanted.append(f"one of {', '.join(dict.fromkeys(tried))}")
    if wanted and given:
        return f"must be {' or '.join(wanted)}, not {value}"
    if match := re.search(r"Expected a dot import path string: (.*)", text):
        return f"there is no class {match[1]!r}; give one of this library's or a path to yours"
    return _plain(" ".join(lines))


def _plain(text: str) -> str:
    return re.sub(r"<class '(?:[\w]+\.)*(\w+)'>", r"\1", text)
