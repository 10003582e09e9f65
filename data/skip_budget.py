# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Count the rows that cannot be used, and stop a run that skips too many of them."""

from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object


class SkipBudget:
    """Counts skipped rows and raises ValueError if they exceed a fraction `budget` of the data set.

    A row counts once, however many epochs read it. A stream has no length: there a row counts each time it is read, the
    fraction is of the rows read so far, and it is checked after the first `WARM_UP` rows. One row is always allowed,
    unless the budget is 0. Each process counts its own rows; `share` exchanges the counts.

    Args:
        budget: largest fraction of skipped rows.
        num_samples: number of rows of the data set; None for a stream.
    """

    WARM_UP = 1000
    LISTED = 100  # number of rows of a stream whose place and reason are kept

    def __init__(self, budget: float, num_samples: int | None):
        self.budget = budget
        self.num_samples = num_samples
        self.seen = 0
        self._count = 0
        self._rows: dict[str, str] = {}  # place -> "place: reason"
        self._unshared: list[tuple[list[str], int]] = []

    @property
    def num_skipped(self) -> int:
        """Number of rows skipped so far."""
        return self._count if self.num_samples is None else len(self._rows)

    def add(self, skipped: list[str], seen: int) -> None:
        """Count one batch of `seen` rows; `skipped` holds "place: reason" of those that were skipped."""
        self._count_in(skipped, seen)
        self._unshared.append((skipped, seen))
        self._judge()

    def share(self) -> None:
        """Count what the other processes have added since the last call. All processes must call it together."""
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
        """Check a stream that has ended, also if it is shorter than `WARM_UP`."""
        self._judge(warm_up=0)

    def _judge(self, warm_up: int | None = None) -> None:
        total = self.seen if self.num_samples is None else self.num_samples
        if self.num_samples is None and self.seen < (self.WARM_UP if warm_up is None else warm_up):
            return
        allowed = max(int(self.budget * total), 1 if self.budget > 0 else 0)
        if self.num_skipped > allowed:
            raise ValueError(
                f"Skipped {self.num_skipped} of {total} pairs, and the budget of {self.budget:g} allows {allowed}: "
                f"{'; '.join(list(self._rows.values())[:5])}. Repair or remove them, or choose a larger skip_budget."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the counts for a checkpoint."""
        return {"skipped": list(self._rows.values()), "count": self._count, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the counts of `state_dict`."""
        self._rows = {entry.split(": ")[0]: entry for entry in state["skipped"]}
        self._count, self.seen = state["count"], state["seen"]
