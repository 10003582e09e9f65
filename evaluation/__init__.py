# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Evaluation: `evaluate` and its tasks, which `mlip evaluate` and `mlip benchmark` run too."""

from .runner import evaluate
from .tasks import TASKS, FewShots, LinearProbe, Reranking, Retrieval, Task, ZeroShot

__all__ = ["TASKS", "FewShots", "LinearProbe", "Reranking", "Retrieval", "Task", "ZeroShot", "evaluate"]
