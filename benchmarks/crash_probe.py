"""User code of `crash.py`'s runs: tells the watching process what the run is doing, as it does it.

Named by class path in `trainer.callbacks`. Each change of phase is one line into the pipe whose
number is in SSO_CRASH_PIPE; what a killed process had written stays in the pipe, so its last line
is the phase that was hit. The library is not changed but for the marks around its functions.
"""

from __future__ import annotations

import functools
import os
from typing import Any

from lightning.pytorch import Callback, Trainer

from sso_lightning import callbacks, pairs
from sso_lightning.callbacks import RegeneratePairs
from sso_lightning.checkpoints import WholeCheckpoints
from sso_lightning.principles import PolicyPrinciples, PredefinedPrinciples
from sso_lightning.records import PairStore
from sso_lightning.runs import RunLogger, SaveConfig
from sso_lightning.sampling import TransformersSampler

PHASES: dict[str, tuple[tuple[Any, str], ...]] = {
    "start-up": (),
    "config write": ((SaveConfig, "on_fit_start"),),
    "checkpoint read": ((WholeCheckpoints, "load_checkpoint"),),
    "pairs": ((RegeneratePairs, "build"),),
    "principles": ((PredefinedPrinciples, "propose"), (PolicyPrinciples, "propose")),
    "sampling": ((TransformersSampler, "sample"),),
    "scoring": ((pairs, "score"),),
    "shard write": ((PairStore, "write_shard"),),
    "manifest write": ((PairStore, "_save"),),
    "set finish": ((PairStore, "finish"),),
    "metrics write": ((RunLogger, "save"),),
    "training": (),
    "optimizer step": (),
    "checkpoint write": ((Trainer, "save_checkpoint"),),
    "after checkpoint": (),
    "validation": (),
    "export": ((callbacks, "save_policy"),),
    "after export": (),
    "prediction": (),
}
"""Phases and the functions that are one; the others begin and end with a hook, or with another.

`pairs` is what is left of making a set: prompts, cleaning, the report, reading back. `set finish`
is what is left of the last manifest write. `after checkpoint` lasts from the renamed file to the
next mark.
"""


class Probe(Callback):
    """Marks phases."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._pipe = int(os.environ["SSO_CRASH_PIPE"])
        self._outer = ["start-up"]
        for phase, places in PHASES.items():
            for place in places:
                self._wrap(phase, *place)

    def _mark(self, phase: str) -> None:
        if os.getpid() == self._process:  # not in a loader's worker
            os.write(self._pipe, f"{phase}\n".encode())

    def _enter(self, phase: str) -> None:
        self._outer[-1] = phase
        self._mark(phase)

    def _wrap(self, phase: str, owner: Any, name: str) -> None:
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def marked(*args: Any, **kwargs: Any) -> Any:
            self._outer.append(phase)
            self._mark(phase)
            result = inner(*args, **kwargs)  # after an error the phase does not matter
            self._outer.pop()
            if self._outer[-1] == "after checkpoint":
                self._outer[-1] = "training"
            if phase in ("checkpoint write", "export"):
                self._outer[-1] = f"after {phase.split()[0]}"
            self._mark(self._outer[-1])
            return result

        setattr(owner, name, marked)

    def on_train_start(self, *args: Any) -> None:
        """Training begins, or goes on."""
        self._enter("training")

    def on_train_batch_start(self, *args: Any) -> None:
        """So does every batch."""
        self._enter("training")

    def on_before_optimizer_step(self, *args: Any) -> None:
        """Gradients are there."""
        self._enter("optimizer step")

    def on_train_batch_end(self, *args: Any) -> None:
        """The weights have moved; a checkpoint may come."""
        self._enter("training")

    def on_validation_start(self, *args: Any) -> None:
        """Validation begins."""
        self._enter("validation")

    def on_validation_end(self, *args: Any) -> None:
        """Validation is over and logged."""
        self._enter("training")

    def on_predict_start(self, *args: Any) -> None:
        """The set is there, and is gone through."""
        self._enter("prediction")
