"""How well a cell encoder does during pretraining: held-out loss, kNN probe, pictures of reconstructions."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Subset, default_convert

from .cells import CellDataset, Cells
from .modeling_mae import LymphMAEForPreTraining
from .options_pretrain import PretrainOptions
from .probing import balanced_accuracy, embed_cells, knn_predictor
from .processing_lymph import LymphImageProcessor
from .reporting import gallery

SHOWN_CELLS = 8


class HeldOutScores:
    """Loss on held-out cells and, of a model with logits, balanced accuracy.

    The masks of a masked autoencoder are the same at each call.

    Args:
        held: the held-out cells as the objective sees them, without augmentation.
        batch_size: cells per forward pass.
    """

    def __init__(self, held: CellDataset, accelerator: Accelerator, *, batch_size: int, workers: int = 0):
        self.accelerator = accelerator
        self.mine = range(accelerator.process_index, len(held), accelerator.num_processes)
        self.loader = DataLoader(
            Subset(held, self.mine),
            batch_size,
            collate_fn=default_convert,
            num_workers=workers,
            generator=torch.Generator().manual_seed(0),  # the global one belongs to the training
        )

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """`loss`, and `balanced_accuracy` where the model has logits."""
        losses, pairs = [], []
        for batch in self.loader:
            batch = {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}
            with torch.no_grad(), self.accelerator.autocast():
                output = model(**batch)
            losses.append((float(output.loss), len(batch["pixel_values"])))
            if output.get("logits") is not None:
                pairs += zip(batch["labels"].tolist(), output.logits.argmax(dim=1).tolist(), strict=True)
        loss, cells = np.array(gather_object(losses)).T
        scores = {"loss": float(np.average(loss, weights=cells))}
        if pairs := gather_object(pairs):
            scores["balanced_accuracy"] = balanced_accuracy(*np.array(pairs).T)
        return scores


class KnnProbe:
    """Balanced accuracy of the kNN probe, with training cells as the bank and held-out cells as the queries.

    Args:
        bank, queries: with types; the queries' types are among the bank's.
        batch_size, workers, preload: how the cells are read.
    """

    def __init__(
        self,
        bank: Cells,
        queries: Cells,
        processor: LymphImageProcessor,
        accelerator: Accelerator,
        *,
        batch_size: int,
        workers: int = 0,
        preload: bool = False,
    ):
        label2id = {name: i for i, name in enumerate(bank.type_names)}
        self.sides = [CellDataset(c, processor, label2id=label2id, preload=preload) for c in (bank, queries)]
        self.labels = [np.array(side.label_ids) for side in self.sides]
        self.accelerator = accelerator
        self.reading = {"batch_size": batch_size, "workers": workers}
        self.predict = knn_predictor()

    def __call__(self, encoder: nn.Module) -> float:
        """In [0, 1]; 1 / types by chance."""
        bank, queries = (embed_cells(encoder, side, self.accelerator, **self.reading) for side in self.sides)
        known, true = self.labels
        return balanced_accuracy(true, self.predict(bank, known, queries))


class PretrainingValidation:
    """Everything that is scored and drawn after an epoch.

    Args:
        train_cells: the bank of the kNN probe is drawn from them.
        held_cells: what is scored.
        inputs: how the objective reads cells; keyword arguments of `CellDataset`.
        folder: for the pictures.
    """

    def __init__(
        self,
        train_cells: Cells,
        held_cells: Cells,
        processor: LymphImageProcessor,
        inputs: dict[str, Any],
        options: PretrainOptions,
        accelerator: Accelerator,
        folder: Path,
    ):
        self.options, self.accelerator, self.processor, self.folder = options, accelerator, processor, folder
        reading = {"batch_size": options.micro_batch, "workers": options.workers}
        # A type that training never shows cannot be scored.
        types = set(train_cells.type_names)
        known = held_cells.select(row for row, name in enumerate(held_cells.cell_types) if name in types)
        scored = held_cells if options.objective == "mae" else known
        self.held = CellDataset(scored, processor, preload=options.preload, **inputs)
        self.held_out_scores = HeldOutScores(self.held, accelerator, **reading)
        bank, queries = _sample(train_cells.labelled(), options, 0), _sample(known, options, 1)
        queries = queries.select(row for row, name in enumerate(queries.cell_types) if name in set(bank.type_names))
        self.probe = None
        if len(bank.type_names) > 1 and len(queries):
            self.probe = KnnProbe(bank, queries, processor, accelerator, preload=options.preload, **reading)

    def __call__(self, model: nn.Module, epoch: int) -> dict[str, float]:
        """Scores of the model, which is in evaluation mode, after `epoch` epochs."""
        model = self.accelerator.unwrap_model(model)
        scores = self.held_out_scores(model)
        if self.probe is not None:
            scores["knn_balanced_accuracy"] = self.probe(model.encoder)
        every = self.options.figure_every
        due = epoch == self.options.epochs or (every > 0 and epoch % every == 0)
        if due and self.accelerator.is_main_process and isinstance(model, LymphMAEForPreTraining):
            self.folder.mkdir(parents=True, exist_ok=True)
            reconstruction_figure(model, self.held, self.processor, self.folder / f"epoch-{epoch:04d}.png")
        return scores


def reconstruction_figure(
    model: LymphMAEForPreTraining, cells: CellDataset, processor: LymphImageProcessor, path: Path
) -> None:
    """A few cells as the encoder sees them, as the decoder completes them, and as they are.

    Args:
        model: in evaluation mode.
        cells: with `noise`, which decides the masks.
    """
    rows = np.linspace(0, len(cells) - 1, min(SHOWN_CELLS, len(cells))).astype(int).tolist()
    batch = cells.__getitems__(rows)
    batch = {name: tensor.to(next(model.parameters()).device) for name, tensor in batch.items()}
    with torch.no_grad():
        output = model(**batch)
    original = batch["pixel_values"]
    # Patches are predicted up to their mean and contrast, unless the model predicts plain pixels.
    note = "predicted, patch mean and contrast given" if model.config.norm_pix_loss else "predicted"
    columns = {
        "masked": model.visible(original, output),
        note: model.reconstruct(original, output),
        "original": original,
    }
    pictures = [as_pictures(images, processor) for images in columns.values()]
    images = [column[row] for row in range(len(rows)) for column in pictures]
    gallery(images, list(columns) * len(rows), path, columns=6, title="Pictures of held-out cells")


def as_pictures(images: torch.Tensor, processor: LymphImageProcessor) -> list[Image.Image]:
    """(B, 3, H, W), normalised -> RGB pictures."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (processor.image_mean, processor.image_std))
    pixels = ((images.float().cpu() * std + mean).clamp(0, 1) * 255).round().byte()
    return [Image.fromarray(picture) for picture in pixels.permute(0, 2, 3, 1).numpy()]


def _sample(cells: Cells, options: PretrainOptions, number: int) -> Cells:
    """At most `probe_cells` of them; the same in every process and after a resume."""
    order = np.random.default_rng([options.seed, number]).permutation(len(cells))
    return cells.select(np.sort(order[: options.probe_cells]))
