# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""`mlip visualize`: pictures of what a saved model computes from an image."""
