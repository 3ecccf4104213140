"""Pretraining of cell encoders: masked autoencoding, the cells' types where they are known, or the patient's label."""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from timm.models import save_for_hf
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.utils.data import default_convert
from transformers.modeling_outputs import ModelOutput

from .augment import Augmentation
from .cells import CellDataset, hold_out
from .configuration_lymph import LymphMILConfig
from .configuration_mae import LymphMAEConfig
from .encoder_weights import load_first_weights
from .encoders import build_encoder, embedding_size, encoder_data_config, resolve_encoder
from .files import write_json, writing_folder
from .modeling_lymph import LymphMILForBagClassification
from .modeling_mae import LymphMAEForPreTraining
from .options import json_option
from .options_pretrain import PretrainOptions
from .precision import with_settled_precision
from .pretraining_data import PretrainingError, permitted_cells
from .pretraining_scores import PretrainingValidation
from .probing import RECORD
from .processing_lymph import LymphImageProcessor
from .reporting import history_figure
from .runs import Run
from .sampling import balanced_weights
from .training import Monitor, TrainingLoop, make_accelerator

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Objective:
    """What an encoder learns, and at which settings.

    Attributes:
        betas: of AdamW.
        base_rate: per 256 cells of a batch.
        monitors: which scores decide on the best epoch.
        fine_tuning_layer_decay: where the weights are given.
    """

    betas: tuple[float, float]
    base_rate: float
    monitors: tuple[Monitor, ...]
    fine_tuning_layer_decay: float = 1.0


_LOSS = Monitor("loss", larger_is_better=False)
# He et al. 2022, tables 8 (pretraining) and 9 (fine-tuning). Labels say what a good encoder is; without them the
# held-out loss has to.
MASKED = Objective((0.9, 0.95), 1.5e-4, (_LOSS,))
LABELLED = Objective((0.9, 0.999), 1e-3, (Monitor("balanced_accuracy"), _LOSS), fine_tuning_layer_decay=0.75)
OBJECTIVES = {"mae": MASKED, "cell-type": LABELLED, "patient-label": LABELLED}


def pretrain(options: PretrainOptions) -> Path:
    """Train an encoder on single cells and export it as plain timm weights.

    The run folder holds `encoder/` (for `timm.create_model("local-dir:RUN/encoder", pretrained=True)` and for
    `lymph train --encoder-weights RUN/encoder`), for the masked autoencoder `lymph-mae/` (for `from_pretrained`)
    and `reconstructions/`, for labels `classifier/` (for `from_pretrained`, a model of bags), and what the training
    loop writes.

    Returns:
        The folder `encoder/`.

    Raises:
        PretrainingError, CohortError, SplitError, RunError, TrainingError, CheckpointError: each with what to do.
    """
    run = Run(Path(options.output))
    options = with_settled_precision(options)
    accelerator = make_accelerator(options, run.folder)
    settings = asdict(options)
    lock = run.claim(settings, resume=options.resume) if accelerator.is_main_process else None
    with accelerator.main_process_first():
        cells, record = permitted_cells(options)
    by_label = options.objective == "patient-label"
    train_rows, held_rows = hold_out(cells, options.validation_fraction, options.seed, by_type=by_label)
    train_cells, held_cells = cells.select(train_rows), cells.select(held_rows)
    record |= {"cells": len(train_cells), "held_out_cells": len(held_cells), "digests": sorted(train_cells.digests)}
    if accelerator.is_main_process:
        _write_record(run.folder / RECORD, record)
        logger.info("%s: %d cells to learn from, %d held out", cells.source, len(train_cells), len(held_cells))
    set_seed(options.seed)
    model, processor = new_model(options, train_cells.type_names)
    inputs = _inputs(model, options)
    train_set = CellDataset(
        train_cells,
        processor,
        augmentation=Augmentation() if options.augment else None,
        preload=options.preload,
        **inputs,
    )
    validation = None
    if len(held_cells):
        figures = run.folder / "reconstructions"
        validation = PretrainingValidation(train_cells, held_cells, processor, inputs, options, accelerator, figures)
    if options.tracker != "none":
        accelerator.init_trackers("lymph-hf", config={name: str(value) for name, value in settings.items()})
    loop = TrainingLoop(
        accelerator,
        model,
        train_set,
        default_convert,
        options,
        run.folder,
        validate=None if validation is None else lambda model: validation(model, loop.progress.epoch + 1),
        monitors=OBJECTIVES[options.objective].monitors,
        sample_weights=balanced_weights(train_set.label_ids) if train_set.label_ids else None,
        optimizer=build_optimizer(model, options),
    )
    progress = loop.run()
    if accelerator.is_main_process:
        history_figure(progress.history, run.folder / "history.png", title="Pretraining")
        record |= {"epochs": progress.epoch, "steps": progress.total_step, "scores": progress.best}
        export(accelerator.unwrap_model(loop.model), processor, run.folder, record)
        logger.info("Encoder: %s", run.folder / "encoder")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if lock is not None:
        lock.release()
    return run.folder / "encoder"


def _write_record(path: Path, record: dict[str, Any]) -> None:
    """Store what the run learns from; on resume, refuse cells that have changed meanwhile."""
    if path.exists() and json.loads(path.read_text(encoding="utf-8"))["fingerprint"] != record["fingerprint"]:
        raise PretrainingError(
            f"The cells or the split have changed since {path.parent} was started. Restore them to resume, or start a "
            "new run in another --output."
        )
    write_json(path, record)


@dataclass
class CellTypeOutput(ModelOutput):
    """Loss (scalar, when labels were given) and logits (B, types)."""

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None


class CellTypeClassifier(nn.Module):
    """A cell encoder with a linear classifier of the cell's type, or of its patient's label.

    Args:
        config: encoder, image size, labels (the cell types) and label smoothing are used.
    """

    def __init__(self, config: LymphMILConfig):
        super().__init__()
        self.config = config
        self.encoder = build_encoder(config)
        self.classifier = nn.Linear(embedding_size(self.encoder), config.num_labels)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> CellTypeOutput:
        """(B, 3, H, W), (B,) -> loss and logits (B, types)"""
        logits = self.classifier(self.encoder(pixel_values))
        if labels is None:
            return CellTypeOutput(logits=logits)
        smoothing = self.config.label_smoothing
        return CellTypeOutput(F.cross_entropy(logits.float(), labels, label_smoothing=smoothing), logits)

    def as_patient_model(self) -> LymphMILForBagClassification:
        """The same weights as a model of bags, which says of a bag of one cell what this one says of the cell."""
        model = LymphMILForBagClassification(self.config)
        model.model.encoder.load_state_dict(self.encoder.state_dict())
        model.classifier.load_state_dict(self.classifier.state_dict())
        return model.eval()


def new_model(
    options: PretrainOptions, type_names: tuple[str, ...]
) -> tuple[LymphMAEForPreTraining | CellTypeClassifier, LymphImageProcessor]:
    """The model of the objective, its encoder filled with the given weights, and the processor of its images."""
    choice = resolve_encoder(options.encoder)
    shared = {
        "encoder": choice.name,
        "encoder_options": choice.options_with(json_option("encoder_options", options.encoder_options)),
        "image_size": options.image_size,
    }
    if options.objective == "mae":
        own = ("mask_ratio", "decoded_share", "decoder_depth", "decoder_width", "decoder_heads", "norm_pix_loss")
        config = LymphMAEConfig(**shared, **{name: getattr(options, name) for name in own})
        model = LymphMAEForPreTraining(config)
    else:
        numbers = {name: i for i, name in enumerate(type_names)}
        config = LymphMILConfig(
            **shared,
            pooling="mean",
            fusion="none",
            clinical_features=[],
            dropout=0.0,
            label_smoothing=options.label_smoothing,
            id2label=dict(enumerate(type_names)),
            label2id=numbers,
        )
        model = CellTypeClassifier(config)
    load_first_weights(model.encoder, options.encoder_weights, choice.weights)
    return model, LymphImageProcessor.from_config(config)


def _inputs(model: LymphMAEForPreTraining | CellTypeClassifier, options: PretrainOptions) -> dict[str, Any]:
    """What the model takes beside the pixels, as keyword arguments of `CellDataset`."""
    if options.objective == "mae":
        return {"patches": model.num_patches, "seed": options.seed}
    return {"label2id": model.config.label2id, "seed": options.seed}


def build_optimizer(model: nn.Module, options: PretrainOptions) -> torch.optim.Optimizer:
    """AdamW with the betas of the objective and, inside the encoder, rates that fall from block to block.

    Norms, biases, positions and tokens have no weight decay.

    Args:
        model: `model.encoder` is a timm network; what is outside of it learns at the full rate.
    """
    objective = OBJECTIVES[options.objective]
    base = objective.base_rate * options.batch_size / 256
    rate = base if options.learning_rate is None else options.learning_rate
    decay = options.layer_decay
    if decay is None:
        given = options.encoder_weights or resolve_encoder(options.encoder).weights
        decay = objective.fine_tuning_layer_decay if given else 1.0
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
    return torch.optim.AdamW([g for g in groups if g["params"]], betas=objective.betas)


def export(
    model: LymphMAEForPreTraining | CellTypeClassifier,
    processor: LymphImageProcessor,
    folder: Path,
    record: dict[str, Any],
) -> None:
    """Write `encoder/`, beside it `lymph-mae/` (masked autoencoder) or `classifier/`, and the final record.

    Both configurations tell what the weights were trained on; the list of images lies in `encoder/` alone.
    """
    write_json(folder / RECORD, record)
    summary = {name: value for name, value in record.items() if name != "digests"}
    # Cells are resized whole, so nothing is cropped.
    data_config = encoder_data_config(model.config) | {"crop_pct": 1.0}
    with writing_folder(folder / "encoder") as beside:
        save_for_hf(
            model.encoder,
            beside,
            safe_serialization=True,
            data_config=data_config,
            # What timm says of its own weights of this name, their licence included, does not hold for these.
            model_config={"pretraining": summary, "pretrained_cfg": {"tag": "lymph", "license": None}},
        )
        write_json(beside / RECORD, record)
    if isinstance(model, LymphMAEForPreTraining):
        whole, name = model, "lymph-mae"
    else:
        whole, name = model.as_patient_model(), "classifier"
    whole.config.pretraining = summary
    with writing_folder(folder / name) as beside:
        whole.save_pretrained(beside)
        processor.save_pretrained(beside)
