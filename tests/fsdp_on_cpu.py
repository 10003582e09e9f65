# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""`mlip` as FSDP2 runs it, on CPUs, where accelerate by itself shards nothing: for torchrun, in test_engines.py."""

import os
import sys

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from modeling_mlip.hub.cli import main

if __name__ == "__main__":
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    sys.exit(main())
