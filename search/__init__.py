# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Embed a collection of images or captions, search it, and show a model on a local page."""
