"""The training loop, for any model whose output has `.loss`."""

import csv
import io
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from .checkpoints import CheckpointFolder, Progress, read_best, read_progress
from .files import write_text
from .options import TrainingOptions
from .precision import precision_of
from .sampling import EpochPlan, MicroBatch

logger = logging.getLogger(__name__)

Scores = dict[str, float]


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to do."""


@dataclass(frozen=True)
class Monitor:
    """A validation score that decides which epoch is best.

    Attributes:
        name: key of the scores.
        larger_is_better: False for losses.
    """

    name: str
    larger_is_better: bool = True

    def value(self, scores: Scores) -> float:
        """Comparable, larger is better; an undefined score is the worst."""
        value = scores.get(self.name, math.nan)
        if math.isnan(value):
            return -math.inf
        return value if self.larger_is_better else -value


def make_accelerator(options, folder: Path | None = None) -> Accelerator:
    """An `Accelerator` for `mixed_precision` and `cpu` of the options, with the tracker if they name one.

    Raises:
        TrainingError: the tracker is not installed; the message holds the command that installs it.
    """
    tracker = getattr(options, "tracker", "none")
    if tracker != "none" and find_spec(tracker) is None:
        raise TrainingError(f"{tracker} is not installed: pip install {tracker}, or choose --tracker none.")
    # Accelerate keeps precision and device of a process's first Accelerator; each run chooses its own.
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    return Accelerator(
        cpu=options.cpu,
        mixed_precision=precision_of(options),
        log_with=None if tracker == "none" else tracker,
        project_dir=None if folder is None else str(folder / "logs"),
    )


class TrainingLoop:
    """AdamW with warm-up and cosine decay, gradient accumulation, validation, early stopping, exact resume.

    The result depends on the options and the seed, not on the number of processes or on interruptions: the order
    of the examples and their random views are functions of the seed (`EpochPlan`, the data set), each example has
    the same weight in its optimizer step, and a checkpoint holds everything else.

    Args:
        accelerator: from `make_accelerator`.
        model: its output has `.loss`, the mean over the examples of a batch.
        dataset: its items are read by `(epoch, index)`.
        collate: items -> keyword arguments of the model.
        options: batch size, rates, epochs and so on.
        folder: of the run; holds `checkpoints/` and `history.csv`.
        validate: the model in evaluation mode -> scores; called after each epoch in every process. `None`
            keeps the last epoch.
        monitors: which scores decide, in this order; the later ones break ties.
        sample_weights: chance of each example to be drawn; `None` sees each once per epoch.
        encoder: the part of the model that learns at `encoder_learning_rate`; `None` = no part does.
        optimizer: in place of AdamW with the rates and the weight decay of the options.
        fixed: modules that stay in evaluation mode though their parameters may learn.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        dataset: Dataset,
        collate: Callable[[list], dict[str, torch.Tensor]],
        options: TrainingOptions,
        folder: Path,
        *,
        validate: Callable[[nn.Module], Scores] | None = None,
        monitors: Sequence[Monitor] = (Monitor("auroc"), Monitor("loss", larger_is_better=False)),
        sample_weights: Sequence[float] | None = None,
        encoder: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        fixed: Sequence[nn.Module] = (),
    ):
        self.accelerator = accelerator
        self.dataset = dataset
        self.collate = collate
        self.options = options
        self.folder = folder
        self.validate = validate
        self.monitors = monitors
        self.fixed = fixed
        self.plan = EpochPlan(
            examples=len(dataset),
            batch_size=options.batch_size,
            micro_batch=options.micro_batch,
            seed=options.seed,
            weights=sample_weights,
            processes=accelerator.num_processes,
            process=accelerator.process_index,
        )
        self.total_steps = options.epochs * self.plan.steps
        optimizer = optimizer or torch.optim.AdamW(parameter_groups(model, options, encoder))
        warmup_steps = round(options.warmup * self.total_steps)
        self.schedule = get_cosine_schedule_with_warmup(optimizer, warmup_steps, self.total_steps)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        accelerator.register_for_checkpointing(self.schedule)
        self.checkpoints = CheckpointFolder(folder / "checkpoints")
        self.progress = Progress()

    def run(self) -> Progress:
        """Train to the end; afterwards the model holds the best weights.

        With `options.resume` it continues from the last checkpoint, if there is one.

        Raises:
            TrainingError: the loss is not a finite number.
            CheckpointError: a checkpoint could not be written; the one before is still good.
        """
        # Each process draws its own dropout masks.
        set_seed(self.options.seed + self.accelerator.process_index)
        checkpoint = self.checkpoints.latest() if self.options.resume else None
        if checkpoint is not None:
            self._load(checkpoint)
        with tqdm(
            total=self.total_steps,
            initial=self.progress.total_step,
            desc="training",
            unit="step",
            disable=None if self.accelerator.is_local_main_process else True,  # None: shown on a terminal
        ) as bar:
            while not self.progress.finished:
                self._epoch(bar)
        self._load_best()
        return self.progress

    def _epoch(self, bar: tqdm) -> None:
        set_training_mode(self.model, self.fixed)
        progress = self.progress
        step_loss = 0.0
        for micro_batch, batch in self._batches(progress.epoch, progress.step):
            step_loss += self._forward_backward(micro_batch, batch)
            if not micro_batch.last:
                continue
            loss = self._optimizer_step(step_loss)
            step_loss = 0.0
            progress.epoch_loss += loss
            progress.step += 1
            progress.total_step += 1
            bar.update()
            bar.set_postfix(epoch=progress.epoch + 1, loss=f"{loss:.4f}")
            every = self.options.checkpoint_every
            if every and progress.total_step % every == 0 and progress.step < self.plan.steps:
                self._save(None)
        self._finish_epoch()

    def _batches(self, epoch: int, first_step: int) -> Iterable[tuple[MicroBatch, dict[str, torch.Tensor]]]:
        micro_batches = list(self.plan.batches(epoch, first_step))
        loader = DataLoader(
            self.dataset,
            batch_sampler=[micro_batch.keys for micro_batch in micro_batches],
            collate_fn=self.collate,
            num_workers=self.options.workers,
            pin_memory=self.accelerator.device.type == "cuda",
            # Its own generator: a loader would otherwise draw from the global one, which dropout uses.
            generator=torch.Generator().manual_seed(self.options.seed),
        )
        return zip(micro_batches, loader, strict=True)

    def _forward_backward(self, micro_batch: MicroBatch, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Add one micro-batch to the gradient; returns its part of the step's loss."""
        batch = {name: tensor.to(self.accelerator.device, non_blocking=True) for name, tensor in batch.items()}
        synchronise = micro_batch.last or self.accelerator.num_processes == 1
        with torch.enable_grad() if synchronise else self.accelerator.no_sync(self.model):
            with self.accelerator.autocast():
                loss = self.model(**batch).loss * micro_batch.share
            # Processes average their gradients; the step's gradient is their sum.
            self.accelerator.backward(loss * self.accelerator.num_processes)
        return loss.detach().double()

    def _optimizer_step(self, loss: torch.Tensor) -> float:
        """Step; returns the loss over all processes."""
        loss = float(self.accelerator.reduce(loss, "sum"))
        if not math.isfinite(loss):
            raise TrainingError(
                f"The loss is {loss} at step {self.progress.total_step + 1} (epoch {self.progress.epoch + 1}). "
                "Lower --learning-rate, or use --mixed-precision no; --resume goes on from the last checkpoint."
            )
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.options.clip)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.accelerator.log({"loss": loss, "learning_rate": self.schedule.get_last_lr()[-1]}, self.progress.total_step)
        return loss

    def _finish_epoch(self) -> None:
        """Validate, note the scores, keep the best weights, decide whether to stop, and write a checkpoint."""
        progress = self.progress
        scores = self._validation_scores()
        row = {
            "epoch": progress.epoch + 1,
            "step": progress.total_step,
            "loss": progress.epoch_loss / self.plan.steps,
        }
        row |= {f"validation_{name}": value for name, value in scores.items()}
        progress.history.append(row)
        improved = self.validate is None or progress.best is None or self._key(scores) > self._key(progress.best)
        if improved:
            progress.best = scores
        progress.stale_epochs = 0 if improved else progress.stale_epochs + 1
        progress.epoch, progress.step, progress.epoch_loss = progress.epoch + 1, 0, 0.0
        out_of_patience = 0 < self.options.patience <= progress.stale_epochs
        progress.finished = out_of_patience or progress.epoch >= self.options.epochs
        self._report(row, improved, out_of_patience)
        self._save(self._weights() if improved else None)

    def _validation_scores(self) -> Scores:
        if self.validate is None:
            return {}
        self.model.eval()
        with torch.no_grad():
            scores = self.validate(self.model)
        self.accelerator.log({f"validation_{k}": v for k, v in scores.items()}, self.progress.total_step)
        return scores

    def _key(self, scores: Scores) -> tuple[float, ...]:
        return tuple(monitor.value(scores) for monitor in self.monitors)

    def _report(self, row: Scores, improved: bool, out_of_patience: bool) -> None:
        if not self.accelerator.is_main_process:
            return
        values = ", ".join(f"{name} {value:.4f}" for name, value in row.items() if name not in ("epoch", "step"))
        logger.info(
            "epoch %d/%d: %s%s",
            row["epoch"],
            self.options.epochs,
            values,
            " (best so far)" if improved else "",
        )
        if out_of_patience:
            logger.info("Stopped early: %d epochs without a better validation.", self.progress.stale_epochs)
        write_text(self.folder / "history.csv", _as_csv(self.progress.history))

    def _weights(self) -> dict[str, torch.Tensor]:
        """What training changes: parameters that learn, and buffers."""
        model = self.accelerator.unwrap_model(self.model)
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        return {n: t.detach().cpu().contiguous() for n, t in model.state_dict().items() if n not in frozen}

    def _save(self, best_weights: dict[str, torch.Tensor] | None) -> None:
        self.checkpoints.save(
            replace(self.progress),
            best_weights,
            lambda folder: self.accelerator.save_state(str(folder)),
            self.accelerator,
        )

    def _load(self, checkpoint: Path) -> None:
        self.accelerator.load_state(str(checkpoint))
        self.progress = read_progress(checkpoint)
        logger.info("Resumed from %s (step %d of %d).", checkpoint, self.progress.total_step, self.total_steps)

    def _load_best(self) -> None:
        best = read_best(self.checkpoints.latest())
        if best is not None:
            loaded = self.accelerator.unwrap_model(self.model).load_state_dict(best, strict=False)
            if loaded.unexpected_keys:
                raise TrainingError(f"The checkpoint does not fit the model: it also holds {loaded.unexpected_keys}.")
        self.model.eval()


def set_training_mode(model: nn.Module, fixed: Sequence[nn.Module] = ()) -> None:
    """Training mode for what learns; frozen and `fixed` parts stay in evaluation mode, without dropout."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()
    for module in fixed:
        module.eval()


def pretrained_batch_norms(encoder: nn.Module) -> list[nn.Module]:
    """The batch norms of a trained encoder that came with statistics; where others did not, a warning says so.

    A bag model keeps them fixed: a forward pass sees few patients, often one, whose stain is not that of all. Fixed
    statistics also keep the result independent of micro-batches and chunks.
    """
    trained = any(parameter.requires_grad for parameter in encoder.parameters())
    norms = [module for module in encoder.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    learnt = [norm for norm in norms if bool(norm.running_mean.any())]
    if trained and len(norms) > len(learnt):
        logger.warning(
            "The encoder has batch normalisation and random weights. It sees few patients at once in training and all "
            "of them in validation, so the result depends on --micro-batch and --chunk-size and is often poor: "
            "pretrain it on cells first (lymph pretrain), or take one with layer normalisation (vit_*, convnext_*)."
        )
    return learnt


def parameter_groups(model: nn.Module, options: TrainingOptions, encoder: nn.Module | None = None) -> list[dict]:
    """AdamW groups: the encoder at its own rate, and no weight decay on norms, biases and other vectors.

    Args:
        model: frozen parameters are left out.
        options: for `learning_rate`, `encoder_learning_rate` and `weight_decay`.
        encoder: a part of `model`.

    Raises:
        TrainingError: nothing is trainable.
    """
    rate = options.learning_rate
    encoder_rate = rate / 10 if options.encoder_learning_rate is None else options.encoder_learning_rate
    slow = set() if encoder is None else {id(parameter) for parameter in encoder.parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decay = options.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((encoder_rate if id(parameter) in slow else rate, decay), []).append(parameter)
    if not groups:
        raise TrainingError("No parameter is trainable: every part of the model is frozen.")
    return [{"params": parameters, "lr": lr, "weight_decay": decay} for (lr, decay), parameters in groups.items()]


def _as_csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
