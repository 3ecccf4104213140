"""Checkpoints of a training run: complete or absent, the last two kept."""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .files import put_in_place, remove_folder, write_json

_NAME = re.compile(r"step-(\d+)")
_BEST = "best.safetensors"
_PROGRESS = "progress.json"


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        epoch, step: the next optimizer step is step `step` of epoch `epoch`, both from 0.
        total_step: optimizer steps taken.
        epoch_loss: sum of the steps' losses in the epoch so far.
        best: scores at the best epoch so far, `None` before the first validation.
        stale_epochs: epochs since then.
        history: one row of numbers per finished epoch.
        finished: no step is left.
    """

    epoch: int = 0
    step: int = 0
    total_step: int = 0
    epoch_loss: float = 0.0
    best: dict[str, float] | None = None
    stale_epochs: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    finished: bool = False


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says which one is still good."""


class CheckpointFolder:
    """The `checkpoints/` folder of a run.

    Each checkpoint is a folder `step-N` that holds all there is to know: model, optimizer, schedule, random
    states, progress and the best weights so far. It is written under another name and renamed when complete, so
    a `step-N` folder is always whole. The last `keep` stay.
    """

    def __init__(self, folder: Path, keep: int = 2):
        self.folder = folder
        self.keep = keep

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        return next(iter(self._complete()), None)

    def save(
        self,
        progress: Progress,
        best_weights: dict[str, torch.Tensor] | None,
        save_state: Callable[[Path], Any],
        accelerator,
    ) -> Path:
        """Write a checkpoint; every process calls this, the main one renames and tidies.

        Args:
            progress: stored as JSON.
            best_weights: new best weights; `None` keeps those of the checkpoint before, at no cost.
            save_state: writes the rest into the folder it is given (`Accelerator.save_state`).
            accelerator: tells the processes apart and lets them wait for each other.

        Raises:
            CheckpointError: the disk is full, say. The checkpoint before stays as it was.
        """
        beside = self.folder / ".writing"
        place = self.folder / f"step-{progress.total_step:08d}"
        try:
            if accelerator.is_main_process:
                remove_folder(beside)
                beside.mkdir(parents=True)
            accelerator.wait_for_everyone()
            save_state(beside)
            if accelerator.is_main_process:
                self._write_best(beside, best_weights)
                write_json(beside / _PROGRESS, asdict(progress))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                put_in_place(beside, place)
                for old in self._complete()[self.keep :]:
                    remove_folder(old)
        except Exception as error:
            remove_folder(beside)
            latest = self.latest()
            good = "No checkpoint was written before." if latest is None else f"{latest} is still good."
            raise CheckpointError(
                f"Checkpoint {place.name} could not be written: {error}. {good} "
                "Free some space, then run the same command with --resume."
            ) from error
        accelerator.wait_for_everyone()
        return place

    def _write_best(self, folder: Path, best_weights: dict[str, torch.Tensor] | None) -> None:
        previous = self.latest()
        if best_weights is not None:
            save_file(best_weights, folder / _BEST)
        elif previous is not None and (previous / _BEST).exists():
            _link_or_copy(previous / _BEST, folder / _BEST)

    def _complete(self) -> list[Path]:
        found = [path for path in self.folder.glob("step-*") if _NAME.fullmatch(path.name)]
        return sorted(found, key=lambda path: int(_NAME.fullmatch(path.name)[1]), reverse=True)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def read_progress(checkpoint: Path) -> Progress:
    """The progress stored in a checkpoint."""
    return Progress(**json.loads((checkpoint / _PROGRESS).read_text()))


def read_best(checkpoint: Path) -> dict[str, torch.Tensor] | None:
    """The best weights stored in a checkpoint, `None` when no validation has been made."""
    path = checkpoint / _BEST
    return load_file(path) if path.exists() else None
