# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Configurations by name, strict loading, the model card, sharing on the Hub, and the command `mlip`."""
