"""The command `sso-lightning sandbox`."""

import sys
from pathlib import Path

from sso_lightning.errors import OneLineParser


def run(argv: list[str]) -> int:
    """Build a sandbox.

    Args:
        argv: What follows `sso-lightning sandbox` on the command line.

    Returns:
        The exit status, 0.

    Raises:
        InputError: A flag is wrong, or the folder cannot be used.
    """
    parser = OneLineParser(
        prog="sso-lightning sandbox",
        description="Build a tiny chat model and its queries, with exact ground truth for the "
        "quality of answers. Takes one CPU core and at most a few minutes.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of model and data (default: 0)")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: chosen for quality)")
    given = parser.parse_args(argv)

    # torch and transformers take seconds to import; --help and wrong flags answer before that
    from sso_lightning.sandbox.build import STEPS, make_sandbox

    steps = STEPS if given.steps is None else given.steps
    make_sandbox(given.out, seed=given.seed, steps=steps)
    sys.stdout.write(f"sandbox written to {given.out}\n")
    return 0
