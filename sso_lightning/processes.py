"""The processes of a run, and what they tell each other outside of training.

Messages go over a gloo group of their own: one process may sample for an hour longer than another,
and a collective of the training's group would give up waiting.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from sso_lightning.errors import InputError

T = TypeVar("T")
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Processes:
    """All processes that torch.distributed joined, whoever started them; or this one alone.

    Attributes:
        rank: Number of this process.
        size: How many there are.
        group: Their group for messages; None if there is one process.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    @staticmethod
    def current() -> Processes:
        """The processes as they are now; the first call is a collective."""
        global _current
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return Processes()
        world = dist.group.WORLD
        if _current is None or _current[0] is not world:
            group = dist.new_group(backend="gloo", timeout=_PATIENCE)
            _current = world, Processes(dist.get_rank(), dist.get_world_size(), group)
        return _current[1]

    @property
    def first(self) -> bool:
        """Whether this is process 0."""
        return self.rank == 0

    def share(self, items: list[T]) -> list[T]:
        """The part of a list that is this process's to do."""
        return items[self.rank :: self.size]

    def gather(self, value: T) -> list[T]:
        """What each process gives, by rank; all of them call this."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """Leave the block together: what one process raises is raised on all.

        Nothing in the block may wait for another process after one of them could have failed.

        Raises:
            InputError: Another process raised one.
            RuntimeError: Another process raised something else.
        """
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            own = error
        mistake = isinstance(own, InputError)
        text = str(own) if mistake else f"{type(own).__name__}: {own}"
        found = self.gather((mistake, text) if own else None)
        if own:
            raise own
        for rank, other in enumerate(found):
            if other:
                mistake, text = other
                raise InputError(text) if mistake else RuntimeError(f"process {rank}: {text}")


_current: tuple[Any, Processes] | None = None
