"""Write down which records drift: whose answers the policy itself finds ever less likely.

In a YAML:

    trainer:
      callbacks:
        - class_path: callbacks.drift_log.DriftLog
          init_args: {bound: 0.5}
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl

from sso_lightning.callbacks import PairCallback
from sso_lightning.records import RESPONSES, Record


def token_logp(record: Record, response: str) -> float:
    """Mean log-probability per token of a response without principle, in nats."""
    return record.scores[f"policy/query/{response}"] / len(record.response_ids[response])


class DriftLog(PairCallback):
    """Appends to `drift.txt` of the run, per iteration, the records that left the policy most.

    Drift of a query is how far the mean log-probability of its answers, scored without principle,
    fell since the last iteration that used it; at first use, how far it lies below the set's mean.
    """

    def __init__(self, bound: float = 0.5, rows: int = 10) -> None:
        """Set the callback up.

        Args:
            bound: Nats per token from which a drift is written down.
            rows: Most records written per iteration.
        """
        self.bound = bound
        self.rows = rows
        self._seen: dict[tuple[str, str], float] = {}

    def state_dict(self) -> dict[str, object]:
        """What a resumed run compares with."""
        return {"seen": [[*key, value] for key, value in self._seen.items()]}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Take up `state_dict`."""
        rows = state_dict["seen"]
        assert isinstance(rows, list)
        self._seen = {(query, response): value for query, response, value in rows}

    def on_pairs_built(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        records: Sequence[Record],
        report: dict[str, float],
        name: str,
    ) -> None:
        """Compare, and write the largest drifts."""
        if not name.startswith("iteration-") or name.endswith("validation") or not records:
            return
        drifts = []
        for response in RESPONSES:
            values = {record.id: token_logp(record, response) for record in records}
            mean = sum(values.values()) / len(values)
            for query, value in values.items():
                fall = self._seen.get((query, response), mean) - value
                if fall > self.bound:
                    drifts.append((fall, query, response, value))
                self._seen[query, response] = value
        drifts.sort(reverse=True)
        path = Path(trainer.default_root_dir) / "drift.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{name}: {len(drifts)} answers drifted by over {self.bound} nats/token\n")
            for fall, query, response, value in drifts[: self.rows]:
                file.write(f"  {query} {response}: {value:.3f} nats/token, {fall:.3f} lower\n")
