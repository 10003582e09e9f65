# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""A Trainer whose runs can be interrupted at any moment and resumed to the same result.

A checkpoint is written to the folder `_unfinished` and renamed once every process has written its part. So a folder
`checkpoint-N` is complete whenever it exists, and an older one is removed only after that. A run that was killed and
resumed ends with the weights of an undisturbed run, bit for bit where the device is deterministic. Streams continue at
the row where they stopped.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, sort_checkpoints

from modeling_mlip.data.items import StreamedPairDataset, set_epoch
from modeling_mlip.data.skip_budget import SkipBudget
from modeling_mlip.hub.atomic_files import flush_entry_to_disk, flush_to_disk

from .objective import Objective
from .step_guard import StepGuard
from .training_log import TrainingLog
from .weight_average import WeightAverage, check_no_average

UNFINISHED = "_unfinished"  # Trainer does not push names that begin with _
DATA_STATE = "data_state_{}.json"  # one file per process
OBJECTIVE_STATE = "objective.pt"
# What a run needs to resume, and the file names it has under Trainer alone, FSDP's shards and DeepSpeed.
NEEDED = {
    "trainer_state.json": ("trainer_state.json",),
    "weights": ("*.safetensors", "pytorch_model*", "global_step*"),
    "optimizer": ("optimizer*", "global_step*"),
    "random states": ("rng_state*",),
}
WRITE_ERRORS = ("PytorchStreamWriter", "iostream error")  # in the RuntimeError that torch raises if a write fails


class ResumeCallback(TrainerCallback):
    """Restores what Trainer does not, and passes the epoch to the data set."""

    def __init__(self, trainer: "InterruptibleTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.restore_state()

    def on_epoch_begin(self, args, state, control, **kwargs):
        # accelerate sets the epoch of the sampler, but not always that of the data set: not with several processes, and
        # not where batches are skipped.
        for dataset in (self.trainer.train_dataset, self.trainer.reference_dataset):
            set_epoch(dataset, int(state.epoch or 0))


class InterruptibleTrainer(Trainer):
    """A Trainer with complete checkpoints, from which streams, counts and the objective's state continue too.

    Raises:
        OSError: if a checkpoint or the model cannot be written, for example to a full disk; the last checkpoint stays.
        ValueError: if `resume_from_checkpoint` is not a complete checkpoint, or a stream is resumed with another number
            of processes or workers or another batch size.
    """

    skip_budget: SkipBudget | None
    guard: StepGuard
    training_log: TrainingLog
    training_objective: Objective
    reference_dataset: Any = None
    objective_optimizer: torch.optim.Optimizer | None
    weight_average: WeightAverage | None = None
    _is_writing_checkpoint = False
    _resumed_from: str | None = None
    _stream: StreamedPairDataset | None = None
    _num_workers = 0
    _positions: dict[int, tuple[int, int]]  # worker -> (pass, rows read) of the batches trained on

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.add_callback(ResumeCallback(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        folder = self.args.output_dir
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(folder) if os.path.isdir(folder) else None
            if resume_from_checkpoint is None:
                raise ValueError(f"resume_from_checkpoint=True: output_dir={folder} holds no checkpoint; leave it out.")
        self._resumed_from = resume_from_checkpoint or None
        if self._resumed_from is not None:
            check_checkpoint(self._resumed_from)
        if self.args.should_save:
            shutil.rmtree(os.path.join(folder, UNFINISHED), ignore_errors=True)
        result = super().train(self._resumed_from, *args, **kwargs)
        last = get_last_checkpoint(folder) if self.args.should_save and os.path.isdir(folder) else None
        if last is not None:  # a run that was killed after its last checkpoint had no time for this
            self._remove_old_checkpoints(folder, last)
        return result

    # Saving

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = self._get_output_dir(trial)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        unfinished, target = os.path.join(run_dir, UNFINISHED), os.path.join(run_dir, name)
        with self.training_log.paused():
            with writing(name, run_dir, self.args.should_save):
                # Step (1): write everything to another folder
                if self.args.should_save:
                    shutil.rmtree(unfinished, ignore_errors=True)
                self.accelerator.wait_for_everyone()
                written = self._write_checkpoint(model, trial, unfinished, name)
                # Step (2): rename it, once every process is done
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    self._publish_checkpoint(written, target, unfinished)
            # Step (3): remove older ones
            if self.args.should_save:
                shutil.rmtree(unfinished, ignore_errors=True)
                self._remove_old_checkpoints(run_dir, target)
            self.accelerator.wait_for_everyone()
            if self.args.push_to_hub:  # the upload runs in the background, so it needs the final folder
                self._push_from_checkpoint(target)

    def _write_checkpoint(self, model: nn.Module, trial: Any, unfinished: str, name: str) -> str:
        """Trainer's checkpoint, and the state that Trainer does not know, below the folder `unfinished`."""
        output_dir, push_to_hub = self.args.output_dir, self.args.push_to_hub
        self._is_writing_checkpoint = True
        self.args.output_dir, self.args.push_to_hub = unfinished, False
        try:
            self._use_averaged_weights()
            super()._save_checkpoint(model, trial)
            folder = os.path.join(self._get_output_dir(trial), name)
            if not self.args.save_only_model:
                self._save_state(folder)
        finally:
            self._is_writing_checkpoint = False
            self.args.output_dir, self.args.push_to_hub = output_dir, push_to_hub
        return folder

    def _publish_checkpoint(self, written: str, target: str, unfinished: str) -> None:
        if self.state.best_model_checkpoint == written:
            self.state.best_model_checkpoint = target
        self.state.save_to_json(os.path.join(written, TRAINER_STATE_NAME))
        flush_to_disk(written)
        if os.path.isdir(target):  # of a run that was resumed from an older checkpoint
            os.replace(target, os.path.join(unfinished, "replaced"))
        os.replace(written, target)
        flush_entry_to_disk(os.path.dirname(target))

    def _remove_old_checkpoints(self, run_dir: str, newest: str) -> None:
        """Removes the oldest checkpoints beyond `save_total_limit`. Each is renamed first, so that an incomplete one is
        never taken for a checkpoint."""
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

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's, but all files or none: they are written to another folder and then moved."""
        if self._is_writing_checkpoint:
            super().save_model(output_dir, _internal_call=True)
            return
        folder = output_dir or self.args.output_dir
        unfinished = Path(folder) / UNFINISHED
        self._use_averaged_weights()
        with writing("The model", folder, self.args.should_save):
            super().save_model(str(unfinished), _internal_call=True)
            if self.args.should_save and unfinished.is_dir():
                flush_to_disk(unfinished)
                # config.json last: a folder that has one then has the weights too.
                for path in sorted(unfinished.iterdir(), key=lambda path: path.name == "config.json"):
                    os.replace(path, Path(folder) / path.name)
                unfinished.rmdir()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _use_averaged_weights(self) -> None:
        """The weights to evaluate and save differ from the trained ones with `ema_decay`, and with some optimizers.
        `training_step` switches back."""
        if self.weight_average is not None:
            self.weight_average.use_average()
        if callable(getattr(self.optimizer, "eval", None)):
            self.optimizer.eval()

    def _save_state(self, folder: str) -> None:
        if self.skip_budget is not None:
            self.skip_budget.share()
        state = {
            "skip_budget": self.skip_budget and self.skip_budget.state_dict(),
            "guard": self.guard.state_dict(),
            "num_truncated": self.training_log.num_truncated,
            "stream": self._stream and {**self._shape_of_stream(), "positions": self._positions},
        }
        if self.weight_average is not None and self.args.should_save:
            self.weight_average.save(folder)
        path = os.path.join(folder, DATA_STATE.format(self.args.process_index))
        Path(path).write_text(json.dumps(state, indent=2), encoding="utf-8")
        if self.args.should_save and self.training_objective.state_dict():
            optimizer = self.objective_optimizer and self.objective_optimizer.state_dict()
            content = {"objective": self.training_objective.state_dict(), "optimizer": optimizer}
            torch.save(content, os.path.join(folder, OBJECTIVE_STATE))

    # Resuming

    def restore_state(self) -> None:
        """Restores what `_save_state` saved; called when training begins, after Trainer has restored its own state."""
        self._positions = {}
        checkpoint = self._resumed_from
        if self.weight_average is not None:
            self.weight_average.begin(self.model, checkpoint, self.args.device)
        if checkpoint is None:
            return
        if self.weight_average is None:
            check_no_average(checkpoint)
        path = Path(checkpoint) / DATA_STATE.format(self.args.process_index)
        state = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if state:
            if self.skip_budget is not None and state["skip_budget"] is not None:
                self.skip_budget.load_state_dict(state["skip_budget"])
            self.guard.load_state_dict(state["guard"])
            self.training_log.num_truncated = state["num_truncated"]
        self._restore_objective(checkpoint)
        if self._stream is not None and not self.args.ignore_data_skip:
            self._restore_stream(checkpoint, state.get("stream") or {})

    def _restore_objective(self, checkpoint: str) -> None:
        if not self.training_objective.state_dict():
            return
        path = Path(checkpoint) / OBJECTIVE_STATE
        if not path.is_file():
            raise ValueError(
                f"{checkpoint} has no {OBJECTIVE_STATE}, and the objective of this run has a state "
                f"({', '.join(list(self.training_objective.state_dict())[:3])} ...): use the objective of that run."
            )
        state = torch.load(path, map_location=self.args.device, weights_only=True)
        self.training_objective.load_state_dict(state["objective"])
        if self.objective_optimizer is not None:
            self.objective_optimizer.load_state_dict(state["optimizer"])

    def _restore_stream(self, checkpoint: str, saved: dict[str, Any]) -> None:
        shape = self._shape_of_stream()
        different = [f"{name}: {saved.get(name)}, now {now}" for name, now in shape.items() if saved.get(name) != now]
        if different:
            raise ValueError(
                f"{checkpoint} is a position in a stream that was read differently ({'; '.join(different)}): resume "
                "with the same values, or read the stream from its beginning with ignore_data_skip "
                "(--ignore_data_skip)."
            )
        self._positions = {int(worker): tuple(position) for worker, position in saved["positions"].items()}
        batches = self.state.global_step * self.args.gradient_accumulation_steps
        self._stream.resume(self._positions, batches, self._train_batch_size)  # type: ignore[union-attr]

    # Data

    def get_train_dataloader(self) -> DataLoader:
        """Trainer's. A stream is distributed here: accelerate would send rows from one process to all others."""
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
        # Trainer compares the steps with their maximum after each step. A run that is resumed from its last step would
        # take another one.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
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
    """Raises ValueError if a folder is not a complete checkpoint, naming what is missing and the last checkpoint."""
    path = Path(folder)
    missing = [what for what, names in NEEDED.items() if not any(next(path.glob(name), None) for name in names)]
    if missing:
        last = get_last_checkpoint(str(path.parent)) if path.parent.is_dir() else None
        hint = f"The last one there is {last}." if last and Path(last) != path else "Give a folder checkpoint-N."
        if path.name.startswith(PREFIX_CHECKPOINT_DIR) and missing == ["optimizer", "random states"]:
            hint = "It was saved with save_only_model; start a new run from its weights. " + hint
        raise ValueError(f"{folder} is no checkpoint to resume from: it has no {' and no '.join(missing)}. {hint}")


@contextmanager
def writing(what: str, folder: str, clean: bool) -> Iterator[None]:
    """Turns the errors of a full or lost disk into an OSError with the next step, and removes incomplete files."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in WRITE_ERRORS):
            raise
        if clean:
            shutil.rmtree(os.path.join(folder, UNFINISHED), ignore_errors=True)
        last = get_last_checkpoint(folder) if os.path.isdir(folder) else None
        resume = f"resume with --resume_from_checkpoint {last}" if last else "start again"
        free = f"; {shutil.disk_usage(folder).free / 2**20:.0f} MiB are free" if os.path.isdir(folder) else ""
        raise OSError(
            f"{what} could not be written to {folder} ({' '.join(str(error).split())}{free}). Free some space, or keep "
            f"fewer checkpoints with --save_total_limit, and {resume}."
        ) from error
