# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Conversion between CLIP, OpenCLIP and MLIP checkpoints."""

from .checkpoints import convert_checkpoint
from .export import export_checkpoint

__all__ = ["convert_checkpoint", "export_checkpoint"]
