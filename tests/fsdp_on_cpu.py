# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""`mlip` as FSDP2 runs it, on CPUs, where accelerate by itself shards nothing: for torchrun, in test_engines.py."""

import os
import sys

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from modeling_mlip.hub.cli import main


def run_on_cpu(arguments: list[str] | None = None) -> int:
    """The exit status of the command."""
    AcceleratorState._reset_state(reset_partial_state=True)  # of the process that this one is a fork of
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    return main(arguments)


if __name__ == "__main__":
    sys.exit(run_on_cpu())
