"""Show a few pairs of every iteration in the terminal, and keep them as text.

In a YAML:

    trainer:
      callbacks:
        - class_path: callbacks.sample_table.SampleTable
          init_args: {rows: 3}
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sso_lightning.callbacks import PairCallback
from sso_lightning.records import Record


class SampleTable(PairCallback):
    """Prints the first pairs of each set and appends them to `samples.txt` of the run.

    The answer to the bad principle was asked to be bad, so it is folded to its length unless
    `show_bad` is set; answers under the Safety feature always are.
    """

    def __init__(self, rows: int = 3, width: int = 160, show_bad: bool = False) -> None:
        """Set the callback up.

        Args:
            rows: Pairs shown per set.
            width: Characters shown of each text.
            show_bad: Show answers that were asked to be bad.
        """
        self.rows = rows
        self.width = width
        self.show_bad = show_bad

    def on_pairs_built(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        records: Sequence[Record],
        report: dict[str, float],
        name: str,
    ) -> None:
        """Print and keep the table."""
        table = Table(title=f"{name}: {len(records)} pairs", show_lines=True)
        for column in ("query", "features", "good", "bad", "plain"):
            table.add_column(column, overflow="fold")
        for record in records[: self.rows]:
            fold = record.bad_is_instructed and (not self.show_bad or "Safety" in record.features)
            bad = f"({len(record.bad)} characters, folded)" if fold else record.bad
            texts = (record.messages[-1]["content"], ", ".join(record.features), record.good, bad)
            cells = (self._short(text) for text in (*texts, record.original))
            table.add_row(*cells)
        Console().print(table)
        path = Path(trainer.default_root_dir) / "samples.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            Console(file=file, width=160).print(table)

    def _short(self, text: str) -> str:
        return escape(text if len(text) <= self.width else text[: self.width] + "...")
