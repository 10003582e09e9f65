# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Runs that may end at any moment: checkpoints that are whole or not there, and streams that go on where they stood.

`InterruptibleTrainer` is transformers' Trainer but for this. A checkpoint is written into `_unfinished` and renamed
once every process has written its part, so `checkpoint-N` is whole whenever it exists, and an older one goes only after
it. A run that was killed and resumed ends with the weights of one that was not, to the bit where the device computes
reproducibly.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.data_loader import prepare_data_loader
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, sort_checkpoints

from modeling_mlip.data.items import StreamedPairDataset
from modeling_mlip.data.skip_budget import SkipBudget

from .step_guard import StepGuard

UNFINISHED = "_unfinished"  # names that begin with _ are not pushed
DATA_STATE = "data_state_{}.json"  # of each process
# What a run needs to go on -> the names under which Trainer alone, FSDP's shards and DeepSpeed have it.
NEEDED = {
    "trainer_state.json": ("trainer_state.json",),
    "weights": ("*.safetensors", "pytorch_model*", "global_step*"),
    "random states": ("rng_state*",),
}
WRITE_ERRORS = ("PytorchStreamWriter", "iostream error")  # what torch says in a RuntimeError when a write fails


class InterruptibleTrainer(Trainer):
    """A Trainer whose checkpoints are whole, and from which streams and counts of what was skipped go on.

    Raises:
        OSError: where a checkpoint or the model cannot be written, say to a full disk; the last checkpoint stays.
        ValueError: to resume from a folder that is no whole checkpoint, or a stream with another number of processes or
            workers or another batch size.
    """

    skip_budget: SkipBudget | None
    guard: StepGuard
    num_truncated: int
    _aside: str | None = None  # the folder that a checkpoint is being written into
    _stream: StreamedPairDataset | None = None
    _num_workers = 0
    _positions: dict[int, tuple[int, int]]  # worker -> (pass, rows read), of the batches trained on

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(resume_from_checkpoint, str):
            check_checkpoint(resume_from_checkpoint)
        folder = self.args.output_dir
        if self.args.should_save:
            shutil.rmtree(os.path.join(folder, UNFINISHED), ignore_errors=True)
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        last = get_last_checkpoint(folder) if self.args.should_save and os.path.isdir(folder) else None
        if last is not None:  # killed after its last checkpoint, a run had no time for this
            self._rotate(folder, last)
        return result

    # Saving

    def _get_output_dir(self, trial: Any) -> str:
        return self._aside or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = self._get_output_dir(trial)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        aside, target = os.path.join(run_dir, UNFINISHED), os.path.join(run_dir, name)
        with writing(name, run_dir, self.args.should_save):
            # Step (1): all of it, in another folder
            if self.args.should_save:
                shutil.rmtree(aside, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            self._aside = aside
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._aside = None
            if self.state.best_model_checkpoint == os.path.join(aside, name):
                self.state.best_model_checkpoint = target
            # Step (2): under its name, once every process is done
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(os.path.join(aside, name, TRAINER_STATE_NAME))
                _flush(os.path.join(aside, name))
                if os.path.isdir(target):  # of a run that went further before it was resumed from an older one
                    os.replace(target, os.path.join(aside, "replaced"))
                os.replace(os.path.join(aside, name), target)
                _flush_entry(run_dir)
        # Step (3): older ones go
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
            self._rotate(run_dir, target)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(target)

    def _rotate(self, run_dir: str, newest: str) -> None:
        """Deletes the oldest beyond `save_total_limit`, each out of the way first: half of one is no checkpoint."""
        limit = self.args.save_total_limit
        if limit is None or limit <= 0:
            return
        kept = {os.path.basename(newest), os.path.basename(self.state.best_model_checkpoint or "")}
        checkpoints = sort_checkpoints(run_dir)
        old = [path for path in checkpoints if os.path.basename(path) not in kept]
        for path in old[: max(0, len(checkpoints) - max(limit, len(checkpoints) - len(old)))]:
            os.makedirs(os.path.join(run_dir, UNFINISHED), exist_ok=True)
            os.replace(path, os.path.join(run_dir, UNFINISHED, os.path.basename(path)))
        shutil.rmtree(os.path.join(run_dir, UNFINISHED), ignore_errors=True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._aside is None:  # an upload goes on while the run does, so it takes the folder that stays
            super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self._aside is not None:
            super()._save(output_dir, state_dict)
            return
        folder = output_dir or self.args.output_dir
        aside = Path(folder) / UNFINISHED
        with writing("The model", folder, self.args.should_save):
            super()._save(str(aside), state_dict)
            if self.args.should_save:
                _flush(str(aside))
                # config.json last: a folder that has one has the weights too.
                for path in sorted(aside.iterdir(), key=lambda path: path.name == "config.json"):
                    os.replace(path, Path(folder) / path.name)
                aside.rmdir()

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.skip_budget.share()
        state = {
            "skip_budget": self.skip_budget.state_dict(),
            "guard": self.guard.state_dict(),
            "num_truncated": self.num_truncated,
            "stream": self._stream and {**self._shape_of_stream(), "positions": self._positions},
        }
        path = os.path.join(output_dir, DATA_STATE.format(self.args.process_index))
        Path(path).write_text(json.dumps(state, indent=2), encoding="utf-8")

    # Resuming

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        epochs, batches = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        self._positions = {}
        if resume_from_checkpoint is not None:
            self._load_data_state(resume_from_checkpoint, batches)
        return epochs, batches

    def _load_data_state(self, checkpoint: str, batches: int) -> None:
        path = Path(checkpoint) / DATA_STATE.format(self.args.process_index)
        state = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if state:
            self.skip_budget.load_state_dict(state["skip_budget"])
            self.guard.load_state_dict(state["guard"])
            self.num_truncated = state["num_truncated"]
        if self._stream is None or self.args.ignore_data_skip:
            return
        saved, shape = state.get("stream") or {}, self._shape_of_stream()
        different = [f"{name}: {saved.get(name)}, now {now}" for name, now in shape.items() if saved.get(name) != now]
        if different:
            raise ValueError(
                f"{checkpoint} stands within a stream that was read otherwise ({'; '.join(different)}): resume with "
                "the same, or begin the stream anew with --ignore_data_skip."
            )
        self._positions = {int(worker): tuple(position) for worker, position in saved["positions"].items()}
        self._stream.resume(self._positions, batches, self._train_batch_size)

    def _run_epoch(self, **kwargs: Any) -> None:
        # Trainer looks at the number of steps after each: resumed from the last one it would take another.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        # accelerate tells the sampler, but not the data set where several processes share it or batches are skipped.
        if hasattr(self.train_dataset, "set_epoch"):
            self.train_dataset.set_epoch(kwargs["epoch"])
        super()._run_epoch(**kwargs)

    # Streams

    def get_train_dataloader(self) -> DataLoader:
        """Trainer's; a stream is dealt out here, as accelerate would send rows from one process to all others."""
        self._stream, self._positions = None, {}
        if not isinstance(self.train_dataset, StreamedPairDataset):
            return super().get_train_dataloader()
        args = self.args
        self._stream = self.train_dataset.for_process(args.process_index, args.world_size)
        self._num_workers = min(args.dataloader_num_workers, self._stream.num_shards)
        has_workers = self._num_workers > 0
        dataloader: DataLoader = DataLoader(
            self._stream,
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
            num_workers=self._num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers and has_workers,
            prefetch_factor=args.dataloader_prefetch_factor if has_workers else None,
            multiprocessing_context=args.dataloader_multiprocessing_context if has_workers else None,
        )
        return prepare_data_loader(
            dataloader,
            device=self.accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=self.accelerator.device_placement,
            dispatch_batches=False,
        )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], Any]:
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        for batch in batches:
            self._positions |= batch.pop("position", {})
        return batches, num_items

    def _shape_of_stream(self) -> dict[str, int]:
        return {
            "processes": self.args.world_size,
            "workers": self._num_workers,
            "batch size": self._train_batch_size,
        }


def check_checkpoint(folder: str) -> None:
    """Refuses to resume from what is no whole checkpoint.

    Raises:
        ValueError: naming what is missing, and the last checkpoint beside it.
    """
    path = Path(folder)
    missing = [what for what, names in NEEDED.items() if not any(next(path.glob(name), None) for name in names)]
    if missing:
        last = get_last_checkpoint(str(path.parent)) if path.parent.is_dir() else None
        hint = f"The last one there is {last}." if last and Path(last) != path else "Give a folder checkpoint-N."
        raise ValueError(f"{folder} is no checkpoint to resume from: it has no {' and no '.join(missing)}. {hint}")


@contextmanager
def writing(what: str, folder: str, clean: bool) -> Iterator[None]:
    """Turns what a full disk or a lost one raises into an OSError with the next step, and removes what was begun."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in WRITE_ERRORS):
            raise
        if clean:
            shutil.rmtree(os.path.join(folder, UNFINISHED), ignore_errors=True)
        last = get_last_checkpoint(folder) if os.path.isdir(folder) else None
        resume = f"go on with --resume_from_checkpoint {last}" if last else "start again"
        free = f"; {shutil.disk_usage(folder).free / 2**20:.0f} MiB are free" if os.path.isdir(folder) else ""
        raise OSError(
            f"{what} could not be written to {folder} ({' '.join(str(error).split())}{free}). Make room, or keep fewer "
            f"checkpoints with --save_total_limit, and {resume}."
        ) from error


def _flush(folder: str) -> None:
    """Waits until the files of a folder are on the disk: a rename may get there before what it renames."""
    for path, _, files in os.walk(folder):
        for file in files:
            _flush_entry(os.path.join(path, file))
        _flush_entry(path)


def _flush_entry(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
