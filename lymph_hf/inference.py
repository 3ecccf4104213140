"""A trained model over patients: probabilities, and the table they are written to."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from transformers.modeling_outputs import ModelOutput

from .bags import BagDataset, collate_bags
from .files import write_text
from .metrics import decide


@dataclass(frozen=True)
class Inference:
    """What a model says of the patients of a data set, in its order.

    Attributes:
        probabilities: (n, C), rows sum to 1.
        loss: mean over the patients, NaN without labels.
        attentions: for each patient the weights of its cells, (N,).
    """

    probabilities: np.ndarray
    loss: float
    attentions: tuple[np.ndarray, ...] = ()


def infer(
    model: nn.Module,
    dataset: BagDataset,
    accelerator: Accelerator,
    *,
    workers: int = 0,
    progress: bool = True,
) -> Inference:
    """Run a model in evaluation mode over every patient with all cells, shared among the processes.

    Args:
        model: of patients; its mode is not touched here.
        dataset: without `max_cells` and augmentation.
        accelerator: device, precision and processes.
        workers: processes that decode images.
        progress: show a bar.
    """
    rows = []
    for index, output in outputs(model, dataset, accelerator, workers=workers, progress=progress):
        probabilities = output.logits.double().softmax(dim=-1)[0].cpu().numpy()
        loss = float("nan") if output.loss is None else float(output.loss)
        rows.append((index, probabilities, loss, output.attentions[0].float().cpu().numpy()))
    rows = sorted(gather_object(rows), key=lambda row: row[0])
    _, probabilities, losses, attentions = zip(*rows, strict=True)
    return Inference(np.stack(probabilities), float(np.mean(losses)), attentions)


def outputs(
    model: nn.Module,
    dataset: BagDataset,
    accelerator: Accelerator,
    *,
    workers: int = 0,
    progress: bool = True,
    collate: Callable[[list], dict[str, torch.Tensor]] = collate_bags,
) -> Iterator[tuple[int, ModelOutput]]:
    """Row of the data set and output of the model for each patient of this process, one at a time, without gradients.

    Args:
        collate: a list of one item -> inputs of the model.
    """
    mine = range(accelerator.process_index, len(dataset), accelerator.num_processes)
    # Its own generator: a loader would otherwise draw from the global one, which training resumes from.
    loader = DataLoader(Subset(dataset, mine), collate_fn=collate, num_workers=workers, generator=torch.Generator())
    model = accelerator.unwrap_model(model)
    bar = tqdm(loader, desc="patients", leave=False, disable=None if progress else True)
    for index, batch in zip(mine, bar, strict=True):
        batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
        with torch.no_grad(), accelerator.autocast():
            output = model(**batch)
        yield index, output


def prediction_table(
    patient_ids: Sequence[str],
    probabilities: np.ndarray,
    cells: Sequence[int],
    *,
    label_names: Sequence[str],
    threshold: float,
    labels: Sequence[str | None] | None = None,
    decisions: Sequence[str] | None = None,
) -> pd.DataFrame:
    """One row per patient: `patient_id`, [`label`], `probability`, `predicted_label`, [`decision`], `cells`.

    `decision` is what the prediction sets say: a label, or that the patient is to be referred.

    Two labels have one column `probability`, of the second label; more have `probability_<label>` each.
    """
    table = pd.DataFrame({"patient_id": list(patient_ids)})
    if labels is not None:
        table["label"] = list(labels)
    if len(label_names) == 2:
        table["probability"] = probabilities[:, 1]
    else:
        for column, name in enumerate(label_names):
            table[f"probability_{name}"] = probabilities[:, column]
    decided = decide(probabilities, threshold=threshold)
    table["predicted_label"] = [label_names[index] for index in decided]
    if decisions is not None:
        table["decision"] = list(decisions)
    table["cells"] = list(cells)
    return table


def write_table(table: pd.DataFrame, path: str | Path) -> None:
    """Write a CSV in one step."""
    write_text(path, table.to_csv(index=False))
