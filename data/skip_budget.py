# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""TODO docstring."""

from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object


class SkipBudget:
    """Counts the rows of no use and stops the run when they are more than a share `budget` of the data set.

    A row counts once, in however many epochs it comes. A stream has no length: there the share is of the rows seen,
    judged once `WARM_UP` were, and a row counts each time it comes. One row is always forgiven, unless the budget is 0.
    Each process judges what it knows; `share` makes all of them know what all have counted.
    """

    WARM_UP = 1000
    LISTED = 100  # rows of a stream that are remembered

    def __init__(self, budget: float, num_samples: int | None):
        self.budget = budget
        self.num_samples = num_samples
        self.seen = 0
        self._count = 0
        self._rows: dict[str, str] = {}  # where -> "where: why"
        self._unshared: list[tuple[list[str], int]] = []

    @property
    def num_skipped(self) -> int:
        return self._count if self.num_samples is None else len(self._rows)

    def add(self, skipped: list[str], seen: int) -> None:
        """Count what one batch skipped of the `seen` rows that it was made from."""
        self._count_in(skipped, seen)
        self._unshared.append((skipped, seen))
        self._judge()

    def share(self) -> None:
        """Count what the other processes have added since the last time; to be called by all of them."""
        here, self._unshared = self._unshared, []
        mine = PartialState().process_index
        for process, added in enumerate(gather_object([here])):
            if process != mine:
                for skipped, seen in added:
                    self._count_in(skipped, seen)
        self._judge()

    def _count_in(self, skipped: list[str], seen: int) -> None:
        self.seen += seen
        self._count += len(skipped)
        if self.num_samples is None:
            skipped = skipped[: self.LISTED - len(self._rows)]
        self._rows |= {entry.split(": ")[0]: entry for entry in skipped}

    def judge_whole(self) -> None:
        """Judge a stream that has come to its end, however short it was."""
        self._judge(warm_up=0)

    def _judge(self, warm_up: int | None = None) -> None:
        total = self.seen if self.num_samples is None else self.num_samples
        if self.num_samples is None and self.seen < (self.WARM_UP if warm_up is None else warm_up):
            return
        allowed = max(int(self.budget * total), 1 if self.budget > 0 else 0)
        if self.num_skipped > allowed:
            raise ValueError(
                f"Skipped {self.num_skipped} of {total} pairs, and the budget of {self.budget:g} allows {allowed}: "
                f"{'; '.join(list(self._rows.values())[:5])}. Repair or remove them, or raise --skip_budget."
            )

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": list(self._rows.values()), "count": self._count, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rows = {entry.split(": ")[0]: entry for entry in state["skipped"]}
        self._count, self.seen = state["count"], state["seen"]
