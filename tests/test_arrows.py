"""Every import points one way, and what must answer at once imports nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sso_lightning

PACKAGE = Path(sso_lightning.__file__).parent

MAY_IMPORT = {
    "errors": set(),
    "version": set(),
    "__init__": {"version"},
    "settings": {"errors"},
    "losses": {"errors"},
    "objectives": {"errors", "losses"},
    "processes": {"errors"},
    "progress": set(),
    "sharding": {"errors"},
    "scoring": {"errors", "sharding"},
    "sources": {"errors"},
    "records": {"errors", "sources"},
    "formats": {"errors", "sources", "records"},
    "prompts": {"errors", "records"},
    "principles": {"errors", "records", "prompts"},
    "endpoint": {"errors", "records", "prompts", "principles"},
    "sampling": {"errors", "records", "prompts", "principles", "processes", "sharding"},
    "checkpoint_files": {"errors", "sources", "records", "processes"},
    "policy": {"errors", "sharding", "checkpoint_files"},
    "strategies": {"errors", "sharding", "checkpoint_files"},
    "runs": {"errors", "records"},
    "evaluation": {"errors", "records", "sources"},
    "iterations": {"errors", "evaluation"},
}
MAY_IMPORT["continuous"] = {"errors", "sampling", "sharding"}
MAY_IMPORT["pairs"] = MAY_IMPORT["sampling"] | {"sampling", "scoring", "policy", "progress"}
MAY_IMPORT["engines"] = MAY_IMPORT["pairs"] | {"endpoint"}
MAY_IMPORT["data"] = MAY_IMPORT["pairs"] - {"policy", "sampling", "principles"}
MAY_IMPORT["data"] |= {"pairs", "objectives", "sources"}
MAY_IMPORT["filters"] = {"errors", "records", "pairs"}
MAY_IMPORT["module"] = {
    *("errors", "losses", "objectives", "scoring", "policy", "prompts", "pairs", "data"),
    *("sharding", "strategies"),
}
MAY_IMPORT["checkpoints"] = {"errors", "records", "runs", "checkpoint_files"}
MAY_IMPORT["callbacks"] = MAY_IMPORT["pairs"] | {"pairs", "data", "module", "checkpoints"}
MAY_IMPORT["reward"] = MAY_IMPORT["module"] | {"module", "formats", "records", "sources"}
MAY_IMPORT["rewardbench"] = {"errors", "sources", "records", "prompts", "policy", "scoring"}
MAY_IMPORT["rewardbench"] |= {"reward", "processes", "sharding", "progress"}
MAY_IMPORT["benchmarks"] = {
    *("errors", "records", "evaluation", "processes", "sharding", "policy", "sampling", "module"),
    "checkpoint_files",
}
MAY_IMPORT["cli"] = MAY_IMPORT["callbacks"] | {"callbacks", "runs", "settings", "strategies"}
MAY_IMPORT["cli"] |= {"checkpoint_files", "terminal", "reward", "benchmarks"}
MAY_IMPORT["terminal"] = {"errors", "progress", "runs"}
MAY_IMPORT["judge"] = {"errors", "sources", "records", "formats", "endpoint", "evaluation"}
MAY_IMPORT["judge"].add("progress")
MAY_IMPORT["augment"] = {"errors", "records", "endpoint", "policy", "prompts", "sampling"}
MAY_IMPORT["generate"] = {"errors", "records", "sources", "prompts", "policy", "sampling"}
MAY_IMPORT["generate"].add("progress")
# commands are imported when they are called
MAY_IMPORT["schema"] = {"cli"}
MAY_IMPORT["__main__"] = {"errors", "version", "cli", "checkpoints", "policy", "formats", "sandbox"}
MAY_IMPORT["__main__"].add("schema")
MAY_IMPORT["__main__"] |= {"rewardbench", "augment", "checkpoint_files", "report", "plan"}
MAY_IMPORT["__main__"] |= {"judge", "iterations", "generate"}
REPORT = {"errors", "version", "records", "principles", "prompts", "sandbox", "report"}
REPORT.add("evaluation")

HEAVY = ("torch", "lightning", "transformers", "peft", "numpy", "pyarrow", "jsonargparse", "openai")
NO_TORCH = (
    "errors",
    "version",
    "sources",
    "records",
    "formats",
    "prompts",
    "principles",
    "endpoint",
    "augment",
    "report.command",
    "plan.command",
    "rewardbench",
    "evaluation",
    "generate",
    "iterations",
    "judge",
    "report.figure",
)
"""Rooms that read files and texts only: importing them must stay cheap."""


def imported_rooms(source: str) -> set[str]:
    """The rooms of the library that a file imports, also inside functions."""
    rooms = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [node.module or ""]
            if node.module == "sso_lightning":
                names = [f"sso_lightning.{alias.name}" for alias in node.names]
        else:
            continue
        rooms |= {n.split(".")[1] for n in names if n.startswith("sso_lightning.")}
    return rooms


def test_imports_are_found_wherever_they_stand():
    source = "import sso_lightning.cli\ndef f():\n    from sso_lightning import data\n"
    source += "    from sso_lightning.sandbox.world import World\nimport torch\n"
    assert imported_rooms(source) == {"cli", "data", "sandbox"}


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_arrows_point_one_way(path):
    assert path.stem in MAY_IMPORT, "a new room: say above what it may import"
    forbidden = imported_rooms(path.read_text()) - MAY_IMPORT[path.stem]
    assert not forbidden, f"{path.stem} must not import {', '.join(sorted(forbidden))}"


def test_the_arrows_themselves_have_no_circle():
    order, left = [], dict(MAY_IMPORT)
    while left:
        side = {"sandbox", "report", "plan"}
        free = [room for room, needs in left.items() if needs - side <= {*order}]
        assert free, f"a circle among {sorted(left)}"
        order += free
        left = {room: needs for room, needs in left.items() if room not in free}


def test_only_the_entry_point_knows_the_sandbox():
    users = {p.stem for p in PACKAGE.glob("*.py") if "sandbox" in imported_rooms(p.read_text())}
    assert users <= {"__main__"}


def test_the_report_is_a_side_room():
    users = {p.stem for p in PACKAGE.glob("*.py") if "report" in imported_rooms(p.read_text())}
    assert users <= {"__main__", "cli"}
    for path in (PACKAGE / "report").glob("*.py"):
        allowed = REPORT | ({"callbacks"} if path.stem == "callback" else set())
        assert imported_rooms(path.read_text()) <= allowed, path.name


def test_the_plan_is_a_side_room():
    users = {p.stem for p in PACKAGE.glob("*.py") if "plan" in imported_rooms(p.read_text())}
    assert users <= {"__main__"}
    for path in (PACKAGE / "plan").glob("*.py"):
        assert not imported_rooms(path.read_text()) & {"__main__", "sandbox", "report"}, path.name


def python(code: str) -> tuple[str, str, float]:
    """What a fresh interpreter prints, and the seconds that the code itself took."""
    timed = "import time, sys\nstart = time.perf_counter()\n" + code
    timed += "\nprint('seconds', time.perf_counter() - start)"
    done = subprocess.run(
        [sys.executable, "-c", timed], capture_output=True, text=True, check=True, timeout=120
    )
    lines, _, seconds = done.stdout.rpartition("seconds")
    return lines, done.stderr, float(seconds)


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--version"], 0, f"sso-lightning {sso_lightning.__version__}"),
        (["--help"], 0, "commands:"),
        ([], 2, "usage: sso-lightning"),
        (["fti"], 2, "error: unknown command 'fti'"),
    ],
)
def test_what_needs_no_weights_answers_at_once(arguments, status, says):
    code = f"from sso_lightning.__main__ import main\nassert main({arguments!r}) == {status}\n"
    code += f"assert not {{*{HEAVY!r}}} & {{*sys.modules}}, sorted(sys.modules)"
    seconds = []
    for _ in range(3):  # another process may have the core: the quickest of three counts
        out, err, took = python(code)
        assert says in out + err
        seconds.append(took)
        if took < 1.0:
            break
    assert min(seconds) < 1.0


def test_module_entry_point_and_console_script_are_the_same():
    script = Path(sys.executable).with_name("sso-lightning")
    for command in ([sys.executable, "-m", "sso_lightning"], [str(script)]):
        if not Path(command[0]).exists():
            pytest.skip("the package is not installed")
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0
        assert done.stdout == f"sso-lightning {sso_lightning.__version__}\n"


@pytest.mark.parametrize("room", NO_TORCH)
def test_rooms_that_only_read_import_no_torch(room):
    python(f"import sso_lightning.{room}\nassert 'torch' not in sys.modules")
