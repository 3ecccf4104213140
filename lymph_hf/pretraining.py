"""Pretraining of cell encoders: masked autoencoding, or the cells' types where they are known."""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from PIL import Image
from timm.models import save_for_hf
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.utils.data import DataLoader, Subset, default_collate
from transformers.modeling_outputs import ModelOutput

from .augment import Augmentation
from .cell_sources import read_cells
from .cells import CellDataset, Cells, hold_out, join_cells
from .configuration_lymph import LymphMILConfig
from .configuration_mae import LymphMAEConfig
from .encoders import build_encoder, embedding_size, load_encoder_weights
from .files import write_json, writing_folder
from .modeling_mae import LymphMAEForPreTraining
from .options_pretrain import PretrainOptions
from .probing import RECORD, balanced_accuracy_interval, embed_cells, knn_predictor
from .processing_lymph import LymphImageProcessor
from .reporting import gallery, history_figure
from .runs import Run
from .sampling import balanced_weights
from .split_files import PARTS, read_split_lists
from .training import Monitor, TrainingLoop, make_accelerator

logger = logging.getLogger(__name__)

# He et al. 2022, tables 8 (pretraining) and 9 (fine-tuning).
BETAS = {"mae": (0.9, 0.95), "cell-type": (0.9, 0.999)}
BASE_RATES = {"mae": 1.5e-4, "cell-type": 5e-4}  # per 256 cells of a batch
FINE_TUNING_LAYER_DECAY = 0.75
SHOWN_CELLS = 8


class PretrainingError(ValueError):
    """Options and cells do not fit together; the message says what to change."""


def pretrain(options: PretrainOptions) -> Path:
    """Train an encoder on single cells and export it as plain timm weights.

    The run folder holds `encoder/` (for `timm.create_model("local-dir:...", pretrained=True)` and for
    `lymph train --encoder-weights`), for the masked autoencoder `lymph-mae/` (for `from_pretrained`) and
    `reconstructions/`, and what the training loop writes.

    Returns:
        The folder `encoder/`.

    Raises:
        PretrainingError, CohortError, SplitError, RunError, TrainingError, CheckpointError: each with what to do.
    """
    run = Run(Path(options.output))
    accelerator = make_accelerator(options, run.folder)
    settings = asdict(options)
    lock = run.claim(settings, resume=options.resume) if accelerator.is_main_process else None
    with accelerator.main_process_first():
        cells, record = permitted_cells(options)
    train_rows, held_rows = hold_out(cells, options.validation_fraction, options.seed)
    train_cells, held_cells = cells.select(train_rows), cells.select(held_rows)
    record |= {"cells": len(train_cells), "held_out_cells": len(held_cells), "digests": sorted(train_cells.digests)}
    if accelerator.is_main_process:
        _write_record(run.folder / RECORD, record)
        logger.info("%s: %d cells to learn from, %d held out", cells.source, len(train_cells), len(held_cells))
    set_seed(options.seed)
    model, processor = new_model(options, train_cells.type_names)
    if options.encoder_weights is not None:
        logger.info("%s", load_encoder_weights(model.encoder, options.encoder_weights).summary())
    kinds = _dataset_options(model, options)
    train_set = CellDataset(
        train_cells if options.objective == "mae" else train_cells.labelled(),
        processor,
        augmentation=Augmentation() if options.augment else None,
        preload=options.preload,
        **kinds,
    )
    if options.tracker != "none":
        accelerator.init_trackers("lymph-hf", config={k: str(v) for k, v in settings.items()})
    validation = None
    if len(held_cells):
        validation = Validation(train_cells, held_cells, processor, kinds, options, accelerator, run.folder)
    loop = PretrainingLoop(
        accelerator,
        model,
        train_set,
        default_collate,
        options,
        run.folder,
        validate=validation and (lambda model: validation(model, loop.progress.epoch + 1)),
        monitors=_monitors(options.objective),
        sample_weights=balanced_weights(train_set.label_ids) if train_set.label_ids else None,
        optimizer=build_optimizer(model, options),
    )
    progress = loop.run()
    folder = run.folder / "encoder"
    if accelerator.is_main_process:
        record |= {"epochs": progress.epoch, "steps": progress.total_step, "scores": progress.best}
        history_figure(progress.history, run.folder / "history.png", title="Pretraining")
        _export(accelerator.unwrap_model(loop.model), processor, run.folder, record)
        logger.info("Encoder: %s", folder)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if lock is not None:
        lock.release()
    return folder


# Which cells may be seen ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvaluationPatients:
    """Whom pretraining must not see: the validation and test patients of a run or of a split file.

    Attributes:
        patient_ids: their identifiers.
        digests: SHA-256 of their images where a run has recorded them, else empty.
        sha256: of the lists of train, validation and test patients.
    """

    patient_ids: frozenset[str]
    digests: frozenset[str]
    sha256: str

    @classmethod
    def read(cls, source: str | Path) -> "EvaluationPatients":
        """From a run folder (`split.json`, `cohort.json`) or a split file.

        Raises:
            SplitError: the split cannot be read.
        """
        run = Run(Path(source))
        digests: set[str] = set()
        if run.cohort.is_file():
            recorded = json.loads(run.cohort.read_text(encoding="utf-8"))["digests"]
            digests = {digest for part in PARTS[1:] for digest in recorded[part]}
        lists = read_split_lists(run.split if run.folder.is_dir() else run.folder)
        canonical = json.dumps({part: sorted(lists.get(part, ())) for part in PARTS})
        return cls(
            patient_ids=frozenset(patient_id for part in PARTS[1:] for patient_id in lists.get(part, ())),
            digests=frozenset(digests),
            sha256=hashlib.sha256(canonical.encode()).hexdigest(),
        )

    def own(self, cells: Cells) -> np.ndarray:
        """(n,) True for cells of these patients, by identifier or by image."""
        by_name = [patient_id in self.patient_ids for patient_id in cells.patient_ids]
        by_image = [digest in self.digests for digest in cells.digests]
        return np.logical_or(by_name, by_image)


def permitted_cells(options: PretrainOptions) -> tuple[Cells, dict[str, Any]]:
    """The cells of all sources but those of evaluation patients, and the record of what was left out.

    A cell is left out when its patient is an evaluation patient, or when its image equals one of theirs, in
    whatever folder it lies.

    Raises:
        PretrainingError: the cells are of patients and no split was given, or the split cannot be applied to them.
    """
    sources = [read_cells(source, cache_dir=options.cache_dir) for source in options.data]
    of_patients = [cells.source for cells in sources if any(p is not None for p in cells.patient_ids)]
    record: dict[str, Any] = {"data": [cells.source for cells in sources], "split_sha256": None, "left_out_cells": 0}
    if options.split is None and of_patients:
        raise PretrainingError(
            f"{', '.join(of_patients)}: these cells are of patients. Name those who will be evaluated with --split "
            "RUN or --split FILE, so that their cells are left out; --split none if nobody ever will be."
        )
    if options.split not in (None, "none"):
        evaluation = EvaluationPatients.read(options.split)
        if not of_patients and not evaluation.digests:
            raise PretrainingError(
                f"{', '.join(record['data'])}: no cell has a patient, so {options.split} cannot be applied. Give a run "
                "folder, whose patients are known by their images, or cells.csv with a column patient_id."
            )
        theirs = [evaluation.own(cells) for cells in sources]
        images = {d for cells, own in zip(sources, theirs, strict=True) for d in np.array(cells.digests)[own]}
        kept = [[row for row, digest in enumerate(cells.digests) if digest not in images] for cells in sources]
        left_out = sum(map(len, sources)) - sum(map(len, kept))
        record |= {"split_sha256": evaluation.sha256, "left_out_cells": left_out}
        sources = [cells.select(rows) for cells, rows in zip(sources, kept, strict=True)]
        logger.info("%d cells of evaluation patients left out (%s)", left_out, options.split)
    cells = join_cells(sources)
    if not len(cells):
        raise PretrainingError(f"{', '.join(record['data'])}: no cell is left to learn from.")
    if options.objective == "cell-type" and len(cells.type_names) < 2:
        raise PretrainingError(
            f"{cells.source}: {len(cells.type_names)} cell types, --objective cell-type needs at least 2. Types come "
            "from cells.csv or from one sub-folder per type."
        )
    return cells, record | {"fingerprint": cells.fingerprint}


def _write_record(path: Path, record: dict[str, Any]) -> None:
    """Store what the run learns from; on resume, refuse cells that have changed meanwhile."""
    if path.exists() and json.loads(path.read_text(encoding="utf-8"))["fingerprint"] != record["fingerprint"]:
        raise PretrainingError(
            f"The cells or the split have changed since {path.parent} was started. Restore them to resume, or start a "
            "new run in another --output."
        )
    write_json(path, record)


# Models -----------------------------------------------------------------------------------------------------


@dataclass
class CellTypeOutput(ModelOutput):
    """Loss (scalar, when labels were given) and logits (B, types)."""

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None


class CellTypeClassifier(nn.Module):
    """A cell encoder with a linear classifier of the cell's type.

    Args:
        config: names encoder, image size and label smoothing.
        types: number of cell types.
    """

    def __init__(self, config: LymphMILConfig, types: int):
        super().__init__()
        self.config = config
        self.encoder = build_encoder(config)
        self.classifier = nn.Linear(embedding_size(self.encoder), types)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> CellTypeOutput:
        """(B, 3, H, W), (B,) -> loss and logits (B, types)"""
        logits = self.classifier(self.encoder(pixel_values))
        if labels is None:
            return CellTypeOutput(logits=logits)
        smoothing = self.config.label_smoothing
        return CellTypeOutput(F.cross_entropy(logits.float(), labels, label_smoothing=smoothing), logits)


def new_model(
    options: PretrainOptions, type_names: tuple[str, ...]
) -> tuple[LymphMAEForPreTraining | CellTypeClassifier, LymphImageProcessor]:
    """The model of the objective with random weights, and the processor of its images."""
    shared = {"encoder": options.encoder, "image_size": options.image_size}
    if options.objective == "mae":
        own = ("mask_ratio", "decoded_share", "decoder_depth", "decoder_width", "decoder_heads", "norm_pix_loss")
        config = LymphMAEConfig(**shared, **{name: getattr(options, name) for name in own})
        return LymphMAEForPreTraining(config), LymphImageProcessor.from_config(config)
    config = LymphMILConfig(**shared, label_smoothing=options.label_smoothing, id2label=dict(enumerate(type_names)))
    return CellTypeClassifier(config, len(type_names)), LymphImageProcessor.from_config(config)


def _dataset_options(model: LymphMAEForPreTraining | CellTypeClassifier, options: PretrainOptions) -> dict[str, Any]:
    """What the objective's inputs are beside the pixels."""
    if options.objective == "mae":
        return {"patches": model.num_patches, "seed": options.seed}
    return {"label2id": {name: i for i, name in model.config.id2label.items()}, "seed": options.seed}


def build_optimizer(model: nn.Module, options: PretrainOptions) -> torch.optim.Optimizer:
    """AdamW with the betas of the objective and, inside the encoder, rates that fall from block to block.

    Norms, biases, positions and tokens have no weight decay.

    Args:
        model: `model.encoder` is a timm network; what is outside of it learns at the full rate.
    """
    base = BASE_RATES[options.objective] * options.batch_size / 256
    rate = base if options.learning_rate is None else options.learning_rate
    decay = options.layer_decay
    if decay is None:
        fine_tuning = options.objective == "cell-type" and options.encoder_weights is not None
        decay = FINE_TUNING_LAYER_DECAY if fine_tuning else 1.0
    encoder = model.encoder
    no_decay = getattr(encoder, "no_weight_decay", set)()
    groups = [
        {"params": g["params"], "weight_decay": g["weight_decay"], "lr": rate * g["lr_scale"]}
        for g in param_groups_layer_decay(encoder, options.weight_decay, no_decay, layer_decay=decay)
    ]
    inside = {id(parameter) for parameter in encoder.parameters()}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in inside]
    # The mask token counts as a vector though it is stored as (1, 1, W).
    vectors = [p for p in rest if p.ndim == 1 or p.shape[:-1].numel() == 1]
    matrices = [p for p in rest if not any(p is vector for vector in vectors)]
    groups += [
        {"params": matrices, "weight_decay": options.weight_decay, "lr": rate},
        {"params": vectors, "weight_decay": 0.0, "lr": rate},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], betas=BETAS[options.objective])


class PretrainingLoop(TrainingLoop):
    """`TrainingLoop` with a given optimizer."""

    def __init__(self, accelerator, model, dataset, collate, options, folder, *, optimizer, **keywords):
        # The parent builds its own optimizer, so it needs rates; they are replaced below.
        rates = {"learning_rate": 0.0, "encoder_learning_rate": None}
        super().__init__(
            accelerator,
            model,
            dataset,
            collate,
            SimpleNamespace(**(asdict(options) | rates)),
            folder,
            **keywords,
        )
        schedule = self.schedule.lr_lambdas[0]
        groups = optimizer.param_groups
        for group in groups:
            group["initial_lr"], group["lr"] = group["lr"], group["lr"] * schedule(0)
        self.schedule.base_lrs = [group["initial_lr"] for group in groups]
        self.schedule.lr_lambdas = [schedule] * len(groups)
        self.optimizer.optimizer.param_groups = groups


# Validation -------------------------------------------------------------------------------------------------


def _monitors(objective: str) -> tuple[Monitor, ...]:
    loss = Monitor("loss", larger_is_better=False)
    return (loss,) if objective == "mae" else (Monitor("balanced_accuracy"), loss)


class Validation:
    """Scores on held-out cells: the loss, the kNN probe where types are known, and pictures of reconstructions.

    The masks of the held-out cells are the same at each epoch.

    Args:
        train_cells: the bank of the kNN probe is drawn from them.
        held_cells: what is scored.
        processor, kinds: as for the training data, without augmentation.
        folder: of the run; pictures go to `reconstructions/`.
    """

    def __init__(
        self,
        train_cells: Cells,
        held_cells: Cells,
        processor: LymphImageProcessor,
        kinds: dict[str, Any],
        options: PretrainOptions,
        accelerator: Accelerator,
        folder: Path,
    ):
        self.options, self.accelerator, self.processor = options, accelerator, processor
        self.figures = folder / "reconstructions"
        labelled = held_cells.labelled() if options.objective == "cell-type" else held_cells
        if not len(labelled):
            raise PretrainingError("No held-out cell has a type; raise --validation-fraction, or set it to 0.")
        self.held = CellDataset(labelled, processor, preload=options.preload, **kinds)
        self.bank, self.queries = (self._sample(cells, n) for n, cells in enumerate((train_cells, held_cells)))
        self.probes = bool(options.probe_cells) and len(self.bank.type_names) > 1 and len(self.queries) > 0
        if self.probes:
            self.probe_sets = [
                CellDataset(cells, processor, preload=options.preload) for cells in (self.bank, self.queries)
            ]

    def __call__(self, model: nn.Module, epoch: int) -> dict[str, float]:
        """Scores of the model, which is in evaluation mode, after `epoch` epochs."""
        model = self.accelerator.unwrap_model(model)
        scores = self._held_out_scores(model)
        if self.probes:
            scores["knn_balanced_accuracy"] = self._knn(model.encoder)
        every = self.options.figure_every
        due = epoch == self.options.epochs or (every and epoch % every == 0)
        if self.options.objective == "mae" and due and self.accelerator.is_main_process:
            self.figures.mkdir(exist_ok=True)
            self._draw(model, self.figures / f"epoch-{epoch:04d}.png")
        return scores

    def _sample(self, cells: Cells, number: int) -> Cells:
        cells = cells.labelled()
        order = np.random.default_rng([self.options.seed, number]).permutation(len(cells))
        return cells.select(np.sort(order[: self.options.probe_cells]))

    def _held_out_scores(self, model: nn.Module) -> dict[str, float]:
        accelerator = self.accelerator
        mine = range(accelerator.process_index, len(self.held), accelerator.num_processes)
        loader = DataLoader(
            Subset(self.held, mine),
            self.options.micro_batch,
            num_workers=self.options.workers,
            generator=torch.Generator().manual_seed(0),  # the global one belongs to the training
        )
        types = len(self.bank.type_names) if self.held.label_ids else 0
        # Sum of losses, number of cells; then per type how many are right, and how many there are.
        sums = torch.zeros(2 + 2 * types, dtype=torch.float64, device=accelerator.device)
        for batch in loader:
            batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
            with accelerator.autocast():
                output = model(**batch)
            n = len(batch["pixel_values"])
            sums[:2] += torch.tensor([float(output.loss) * n, n], dtype=torch.float64, device=sums.device)
            if types:
                labels = batch["labels"]
                right = labels[output.logits.argmax(dim=1) == labels]
                sums[2 : 2 + types] += right.bincount(minlength=types)
                sums[2 + types :] += labels.bincount(minlength=types)
        sums = accelerator.reduce(sums, "sum").cpu()
        scores = {"loss": float(sums[0] / sums[1])}
        if types:
            right, total = sums[2 : 2 + types], sums[2 + types :]
            scores["balanced_accuracy"] = float((right[total > 0] / total[total > 0]).mean())
        return scores

    def _knn(self, encoder: nn.Module) -> float:
        size, workers = self.options.micro_batch, self.options.workers
        bank, queries = (
            embed_cells(encoder, cells, self.accelerator, batch_size=size, workers=workers)
            for cells in self.probe_sets
        )
        names = self.bank.type_names
        known, true = (
            np.array([names.index(name) if name in names else -1 for name in cells.cell_types])
            for cells in (self.bank, self.queries)
        )
        predicted = knn_predictor()(bank, known, queries)
        return balanced_accuracy_interval(true, predicted, np.arange(len(true)), resamples=1).value

    def _draw(self, model: LymphMAEForPreTraining, path: Path) -> None:
        rows = np.linspace(0, len(self.held) - 1, min(SHOWN_CELLS, len(self.held))).astype(int)
        batch = default_collate([self.held[int(row)] for row in rows])
        batch = {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}
        output = model(**batch)
        original = batch["pixel_values"]
        predicted = model.reconstruct(original, output)
        nothing = replace_prediction(output)
        masked = model.reconstruct(original, nothing)
        note = "predicted\n(patch mean and contrast given)" if model.config.norm_pix_loss else "predicted"
        columns = {"masked": masked, note: predicted, "original": original}
        pictures = {name: _as_pictures(images, self.processor) for name, images in columns.items()}
        images = [pictures[name][row] for row in range(len(rows)) for name in columns]
        gallery(images, list(columns) * len(rows), path, columns=6, title="Held-out cells")


def _as_pictures(images: torch.Tensor, processor: LymphImageProcessor) -> list[Image.Image]:
    """(B, 3, H, W) normalised -> RGB pictures."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (processor.image_mean, processor.image_std))
    pixels = (images.float().cpu() * std + mean).clamp(0, 1) * 255
    return [Image.fromarray(image) for image in pixels.round().byte().permute(0, 2, 3, 1).numpy()]


# Export -----------------------------------------------------------------------------------------------------


def _export(
    model: LymphMAEForPreTraining | CellTypeClassifier,
    processor: LymphImageProcessor,
    folder: Path,
    record: dict[str, Any],
) -> None:
    write_json(folder / RECORD, record)
    summary = {name: value for name, value in record.items() if name != "digests"}
    export_encoder(model.encoder, processor, folder / "encoder", summary)
    write_json(folder / "encoder" / RECORD, record)
    if isinstance(model, LymphMAEForPreTraining):
        model.config.pretraining = summary
        with writing_folder(folder / "lymph-mae") as beside:
            model.save_pretrained(beside)
            processor.save_pretrained(beside)
