"""Entry point of `sso-lightning` and `python -m sso_lightning`.

Importing torch, lightning and transformers takes many seconds, so nothing heavy is imported until
a command needs it: `--version`, `--help` and a misspelt command answer at once.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence

from sso_lightning.errors import InputError, OneLineParser, Stopped, hide_keys, mistake_behind
from sso_lightning.version import __version__

USAGE = """\
usage: sso-lightning COMMAND [options]

Align a chat model by Self-Steering Optimization: it writes good, bad and plain answers to your
queries under opposed principles and learns from the pairs they form, iteration after iteration.

commands:
  fit       train:                 sso-lightning fit --config configs/sandbox/sso_2024.yaml
  validate  measure on held-out pairs, also of a checkpoint (--ckpt_path FILE)
  test      the same under test/
  predict   sample pairs for any query file (--data.predict_queries FILE)
  reward    train a reward model:  sso-lightning reward fit --config configs/sandbox/reward.yaml
  rewardbench  score one, or a policy, on RewardBench: sso-lightning rewardbench MODEL --data FILE
  export    checkpoint to a Hugging Face folder: sso-lightning export CKPT OUT [--merge]
  export-pairs  pairs for TRL, LLaMA-Factory, SFT or a reward model:
                sso-lightning export-pairs RUN --to trl --out FILE
  report    one HTML page of runs, with alarms: sso-lightning report RUN [RUN ...] [--check]
  plan      memory, hours and a dry run, before a weight is loaded:
            sso-lightning plan --config configs/qwen2_7b/sso_2024.yaml --devices 8
  judge     another model compares answers: sso-lightning judge RUN --base-url URL --model M
  iterations  what each iteration changed, with intervals: sso-lightning iterations RUN
  figure    signal accuracy and on-policyness of runs: sso-lightning figure RUN [RUN ...] --out FILE
  augment   new queries from seeds: sso-lightning augment SEEDS --model M --count N --out FILE
  generate  answers for AlpacaEval or MT-Bench:
            sso-lightning generate MODEL --to mt_bench --questions FILE --out FILE
  schema    JSON Schema of the YAML, for editors: sso-lightning schema --out schema.json
  sandbox   make the demo's tiny model and queries: sso-lightning sandbox --out DIR

options:
  --help     this text; `sso-lightning COMMAND --help` lists every setting of a command
  --version  print the version

exit status: 0 done, 1 an error inside, 2 wrong input or settings, or a plan that does not fit,
130 Ctrl-C, 143 SIGTERM, 138 SIGUSR1 (a fit that is stopped saves its state first: --ckpt_path
last), 3 an alarm of `report --check`.
SSO_DEBUG=1 shows tracebacks.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The command line without the program's name; `sys.argv[1:]` if not given.

    Returns:
        The exit status.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(USAGE)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        sys.stdout.write(f"sso-lightning {__version__}\n")
        return 0
    commands: dict[str, Callable[[list[str]], int]] = {
        **dict.fromkeys(("fit", "validate", "test", "predict"), lambda _: _train(arguments)),
        "reward": _reward,
        "rewardbench": _rewardbench,
        "export": _export,
        "export-pairs": _export_pairs,
        "report": _report,
        "plan": _plan,
        "judge": _judge,
        "iterations": _iterations,
        "figure": _figure,
        "augment": _augment,
        "generate": _generate,
        "schema": _schema,
        "sandbox": _sandbox,
    }
    command = commands.get(arguments[0])
    if command is None:
        sys.stderr.write(f"error: unknown command {arguments[0]!r}; see sso-lightning --help\n")
        return 2
    # importing bitsandbytes advises to fetch a kernel from a hub
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
        lambda record: "kernels-community" not in record.getMessage()
    )
    try:
        return command(arguments[1:])
    except KeyboardInterrupt as interrupt:
        return _interrupted(interrupt)
    except SystemExit as end:
        # the trainer turns Ctrl-C into exit(1) after it has shut down
        if isinstance(end.__context__, KeyboardInterrupt):
            return _interrupted(end.__context__)
        raise
    except Exception as error:
        if os.environ.get("SSO_DEBUG") == "1":
            raise
        mistake = mistake_behind(error)
        status = 2 if mistake else 1
        name = "" if mistake else f"{type(error).__name__}: "
        line = hide_keys(" ".join(str(mistake or error).split()))
        hint = "" if status == 2 else " (SSO_DEBUG=1 shows where)"
        sys.stderr.write(f"error: {name}{line}{hint}\n")
        return status


def _interrupted(interrupt: KeyboardInterrupt) -> int:
    if not isinstance(interrupt, Stopped):
        sys.stderr.write("interrupted\n")
        return 130
    sys.stderr.write(f"{interrupt}; continue with --ckpt_path last\n")
    return interrupt.status


def _train(arguments: list[str]) -> int:
    from sso_lightning.cli import run

    run(arguments)
    return 0


def _reward(arguments: list[str]) -> int:
    commands = ("fit", "validate", "test")
    if not arguments or arguments[0] not in commands:
        given = f", not {arguments[0]!r}" if arguments else ""
        raise InputError(f"reward takes one of {', '.join(commands)}{given}; see --help of each")
    from sso_lightning.cli import RewardCLI, run

    run(arguments, RewardCLI)
    return 0


def _rewardbench(arguments: list[str]) -> int:
    from sso_lightning.rewardbench import run

    return run(arguments)


def _schema(arguments: list[str]) -> int:
    import json
    from pathlib import Path

    parser = OneLineParser(
        prog="sso-lightning schema",
        description="Print the JSON Schema of what --config takes, for editors.",
    )
    kinds = ("fit", "validate", "test", "predict")
    parser.add_argument("--command", choices=kinds, default="fit", help="whose settings")
    parser.add_argument("--out", type=Path, help="file to write; standard output if not given")
    given = parser.parse_args(arguments)
    from sso_lightning.schema import config_schema

    text = json.dumps(config_schema(given.command), indent=1) + "\n"
    if given.out:
        given.out.write_text(text)
    else:
        sys.stdout.write(text)
    return 0


def _sandbox(arguments: list[str]) -> int:
    from sso_lightning.sandbox.command import run

    return run(arguments)


def _report(arguments: list[str]) -> int:
    from sso_lightning.report.command import run

    return run(arguments)


def _plan(arguments: list[str]) -> int:
    from sso_lightning.plan.command import run

    return run(arguments)


def _judge(arguments: list[str]) -> int:
    from sso_lightning.judge import run

    return run(arguments)


def _iterations(arguments: list[str]) -> int:
    from sso_lightning.iterations import run

    return run(arguments)


def _figure(arguments: list[str]) -> int:
    from sso_lightning.report.figure import run

    return run(arguments)


def _augment(arguments: list[str]) -> int:
    from sso_lightning.augment import run

    sys.stdout.write(run(arguments))
    return 0


def _generate(arguments: list[str]) -> int:
    from sso_lightning.generate import run

    sys.stdout.write(run(arguments))
    return 0


def _export(arguments: list[str]) -> int:
    from pathlib import Path

    parser = OneLineParser(
        prog="sso-lightning export",
        description="Turn a checkpoint into a folder that transformers and PEFT load.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", type=Path, help="a .ckpt file of a run")
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    parser.add_argument("--merge", action="store_true", help="fold LoRA adapters into the base")
    parser.add_argument(
        "--generator", action="store_true", help="the data generator of a two-phase run"
    )
    given = parser.parse_args(arguments)
    from transformers.utils import logging

    from sso_lightning.checkpoint_files import check_checkpoint
    from sso_lightning.policy import export_checkpoint

    logging.disable_progress_bar()
    check_checkpoint(given.checkpoint)
    export_checkpoint(given.checkpoint, given.out, merge=given.merge, generator=given.generator)
    sys.stdout.write(f"exported to {given.out}\n")
    return 0


def _export_pairs(arguments: list[str]) -> int:
    from pathlib import Path

    from sso_lightning.formats import COMPARED, FORMATS, export_pairs

    parser = OneLineParser(
        prog="sso-lightning export-pairs",
        description="Write pairs as a file for another trainer, with the marks of texts that were "
        "asked to be bad. --to: records (all there is, for this library), trl (DPOTrainer), reward "
        "(RewardTrainer), llamafactory (ranking, with dataset_info.json), sft (good answers only), "
        "queries.",
        allow_abbrev=False,
    )
    parser.add_argument("source", help="a run folder, or any file, folder or hf:NAME of pairs")
    parser.add_argument("--to", required=True, choices=FORMATS, help="the format")
    parser.add_argument(
        "--out", required=True, type=Path, help=".jsonl, .json or .parquet file; must not exist"
    )
    parser.add_argument(
        "--which",
        default="query",
        choices=COMPARED,
        help="compare y+ and y- under the query (the default) or the good prompt, or the plain "
        "answer and y+ under the bad one",
    )
    parser.add_argument("--iteration", type=int, help="only the pairs of this iteration")
    given = parser.parse_args(arguments)
    sys.stdout.write(
        export_pairs(
            given.source, given.out, given.to, which=given.which, iteration=given.iteration
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
