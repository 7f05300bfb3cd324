"""The command `sso-lightning plan`."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sso_lightning.errors import InputError, OneLineParser

if TYPE_CHECKING:
    from sso_lightning.plan.make import Plan

_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def bytes_of(text: str) -> int:
    """A size such as 80GB or 79.6GiB.

    Raises:
        InputError: It is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([MGT]i?B)", text.strip())
    if not found or not float(found[1]):
        raise InputError(f"--memory: {text!r} is no size such as 80GB or 24GiB")
    return int(float(found[1]) * _UNITS[found[2]])


def run(argv: list[str]) -> int:
    """Plan a run.

    Args:
        argv: What follows `sso-lightning plan` on the command line.

    Returns:
        The exit status: 0 if it fits and nothing is wrong, else 2.

    Raises:
        InputError: A flag or a setting is wrong in itself.
    """
    parser = OneLineParser(
        prog="sso-lightning plan",
        description="Memory per device, hours per iteration and a dry run of one record, before a "
        "weight is loaded. Everything else on the command line is for `fit`: --config and "
        "overrides. Exit status 2: something is wrong, or it does not fit.",
        allow_abbrev=False,
    )
    parser.add_argument("--devices", type=int, help="how many (default: as the YAML says)")
    parser.add_argument(
        "--memory",
        help="of a device, such as 80GB or 24GiB (default: 80GB; on "
        "accelerator: cpu this machine's)",
    )
    parser.add_argument(
        "--mfu",
        type=float,
        default=0.4,
        help="share of --tflops that scoring and training reach (default: 0.4)",
    )
    parser.add_argument(
        "--tflops",
        type=float,
        help="peak of a device in the type of the products "
        "(default: 989, an H100's in bfloat16; none for a CPU)",
    )
    parser.add_argument(
        "--bandwidth",
        type=float,
        default=3350,
        help="GB a second that a device reads (default: 3350, an H100's)",
    )
    parser.add_argument(
        "--answer-tokens",
        type=float,
        help="expected of an answer (default: max_new_tokens, or the mean of data.pairs)",
    )
    parser.add_argument(
        "--model-config", type=Path, help="config.json of a model that cannot be reached from here"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    given, rest = parser.parse_known_args(argv)
    wrong = [
        f"--{name.replace('_', '-')} must be above 0, got {value:g}"
        for name in ("devices", "mfu", "tflops", "bandwidth", "answer_tokens")
        if (value := getattr(given, name)) is not None and not value > 0
    ]
    if given.mfu > 1:
        wrong.append(f"--mfu must be at most 1, got {given.mfu:g}")
    if given.model_config and not given.model_config.is_file():
        wrong.append(f"--model-config: no file {given.model_config}")
    if wrong:
        raise InputError("; ".join(wrong))
    memory = bytes_of(given.memory) if given.memory else None
    if given.model_config:  # the rest of the model is then looked for on this disk alone
        os.environ["HF_HUB_OFFLINE"] = "1"

    # torch and transformers take seconds to import; --help and wrong flags answer before that
    from sso_lightning.plan.make import make_plan
    from sso_lightning.plan.show import show

    made = make_plan(
        rest,
        devices=given.devices,
        memory=memory,
        mfu=given.mfu,
        tflops=given.tflops,
        bandwidth=given.bandwidth * 1e9,
        answer_tokens=given.answer_tokens,
        model_config=given.model_config,
    )
    if given.json:
        sys.stdout.write(json.dumps(as_json(made), indent=1) + "\n")
    else:
        show(made)
    return 0 if made.fine else 2


def as_json(made: Plan) -> dict[str, Any]:
    """A plan as JSON values."""
    from dataclasses import asdict

    found = asdict(made)
    found["fits"], found["peak"] = made.fits, made.peak
    return found
