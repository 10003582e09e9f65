# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Conversion between CLIP, OpenCLIP and MLIP checkpoints."""

from modeling_mlip.hub.extras import require_modules

require_modules("Conversion", "openclip")  # before the imports that would fail

from .checkpoints import convert_checkpoint  # noqa: E402
from .export import export_checkpoint  # noqa: E402

__all__ = ["convert_checkpoint", "export_checkpoint"]
