# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The evaluation tasks by name, one file each. A new task is a file and an entry in `TASKS`."""

from .few_shots import FewShots
from .linear_probe import LinearProbe
from .reranking import Reranking
from .retrieval import Retrieval
from .task import Encodings, Task
from .zero_shot import ZeroShot

# In the order in which their results are reported.
TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        Retrieval,
        ZeroShot,
        Reranking,
        LinearProbe,
        FewShots,
    )
}

__all__ = ["TASKS", "Encodings", "FewShots", "LinearProbe", "Reranking", "Retrieval", "Task", "ZeroShot"]
