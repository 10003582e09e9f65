# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Evaluation: `evaluate` and its tasks, which `mlip evaluate` and `mlip benchmark` run too."""

from modeling_mlip.hub.extras import require_modules

require_modules("Evaluation", "evaluate")  # before the imports that would fail

from .runner import evaluate  # noqa: E402
from .tasks import TASKS, FewShots, LinearProbe, Reranking, Retrieval, Task, ZeroShot  # noqa: E402

__all__ = ["TASKS", "FewShots", "LinearProbe", "Reranking", "Retrieval", "Task", "ZeroShot", "evaluate"]
