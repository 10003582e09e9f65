# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
