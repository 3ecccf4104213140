"""What an encoder knows of cells without being trained further: kNN and linear probes of the cell type."""

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from torch import nn
from torch.utils.data import DataLoader, Subset, default_convert
from tqdm.auto import tqdm

from .cell_sources import read_cells
from .cells import CellDataset, Cells
from .configuration_lymph import LymphMILConfig
from .encoder_weights import load_first_weights
from .encoders import build_encoder, resolve_encoder
from .files import write_json
from .images import open_cell_image
from .metrics import Interval, bootstrap_weights
from .options import json_option
from .options_pretrain import ProbeOptions
from .processing_lymph import LymphImageProcessor
from .reporting import gallery, scores_table
from .training import make_accelerator

logger = logging.getLogger(__name__)

Predictor = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]

# The record of pretraining that lies beside exported weights.
RECORD = "pretraining.json"


class ProbeError(ValueError):
    """These cells cannot be probed; the message says why and what to do."""


@dataclass(frozen=True)
class Fold:
    """Rows that the probe learns from, and rows that it is scored on."""

    bank: np.ndarray
    queries: np.ndarray


def probe(options: ProbeOptions) -> dict[str, Any]:
    """Balanced accuracy of a kNN and of a linear probe on frozen embeddings, with bootstrap intervals.

    Writes `probe.json` and `neighbours.png` into the output folder.

    Returns:
        The content of `probe.json`.

    Raises:
        ProbeError: fewer than two cell types, or `held_out` names weights without a record.
        CohortError: the cells cannot be read.
    """
    accelerator = make_accelerator(options)
    with accelerator.main_process_first():
        cells = _labelled_cells(options)
    folds, how = _folds(cells, options)
    set_seed(options.seed)  # of random weights
    choice = resolve_encoder(options.encoder)
    config = LymphMILConfig(
        encoder=choice.name,
        encoder_options=choice.options_with(json_option("encoder_options", options.encoder_options)),
        image_size=options.image_size,
    )
    encoder = build_encoder(config)
    load_first_weights(encoder, options.encoder_weights, choice.weights)
    dataset = CellDataset(cells, LymphImageProcessor.from_config(config))
    encoder = encoder.to(accelerator.device).eval()
    embeddings = embed_cells(encoder, dataset, accelerator, batch_size=options.batch_size, workers=options.workers)
    names = cells.type_names
    labels = np.array([names.index(name) for name in cells.cell_types])
    predictors = {"knn": knn_predictor(options.neighbours), "linear": predict_linear}
    scores, recalls = {}, {}
    for name, predict in predictors.items():
        rows, predicted = predict_folds(embeddings, labels, folds, predict)
        scores[name] = balanced_accuracy_interval(
            labels[rows], predicted, cells.groups[rows], resamples=options.resamples, seed=options.seed
        )
        recalls[name] = {names[c]: float(np.mean(predicted[labels[rows] == c] == c)) for c in np.unique(labels[rows])}
    report = {
        "encoder": options.encoder,
        "encoder_weights": options.encoder_weights,
        "data": cells.source,
        "cells": sum(len(fold.queries) for fold in folds),
        "how": how,
        "balanced_accuracy": {name: interval.as_dict() for name, interval in scores.items()},
        "recall": recalls,
    }
    if accelerator.is_main_process:
        folder = Path(options.output)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "probe.json", report)
        neighbours_figure(cells, embeddings, folds[0], folder / "neighbours.png")
        logger.info("%s: %d cells of %d types, %s", cells.source, report["cells"], len(names), how)
        logger.info("%s", scores_table({f"{name} balanced accuracy": value for name, value in scores.items()}))
    return report


def embed_cells(
    encoder: nn.Module,
    dataset: CellDataset | Subset,
    accelerator: Accelerator,
    *,
    batch_size: int = 64,
    workers: int = 0,
) -> np.ndarray:
    """(n, D) float32: what the encoder gives for each cell, in the order of the data set.

    The processes share the work; each returns all of it.

    Args:
        encoder: on the accelerator's device and in evaluation mode.
        dataset: without augmentation.
    """
    mine = range(accelerator.process_index, len(dataset), accelerator.num_processes)
    # Its own generator: a loader would otherwise draw from the global one, which training resumes from.
    loader = DataLoader(
        Subset(dataset, mine),
        batch_size,
        collate_fn=default_convert,
        num_workers=workers,
        generator=torch.Generator().manual_seed(0),
    )
    rows: list[np.ndarray] = []
    for batch in tqdm(loader, desc="embedding cells", leave=False, disable=None):
        with torch.no_grad(), accelerator.autocast():
            rows += list(encoder(batch["pixel_values"].to(accelerator.device)).float().cpu().numpy())
    gathered = sorted(gather_object(list(zip(mine, rows, strict=True))), key=lambda row: row[0])
    return np.stack([row for _, row in gathered])


def standardise(bank: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both by the mean and deviation of the bank; a constant dimension becomes 0."""
    mean, std = bank.mean(axis=0), bank.std(axis=0)
    std = np.where(std > 1e-6, std, np.inf)
    return (bank - mean) / std, (queries - mean) / std


def nearest(bank: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k rows of the bank most like each query, best first, and their cosine similarities: (q, k) twice.

    Embeddings are standardised on the bank first: what all cells have in common would otherwise drown the rest.
    """
    bank, queries = standardise(bank, queries)
    bank, queries = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (bank, queries))
    k = min(k, len(bank))
    rows, likeness = [], []
    for start in range(0, len(queries), 1024):  # bounds the memory of the similarities
        similarities = queries[start : start + 1024] @ bank.T
        order = np.argsort(-similarities, axis=1, kind="stable")[:, :k]
        rows.append(order)
        likeness.append(np.take_along_axis(similarities, order, axis=1))
    return np.concatenate(rows), np.concatenate(likeness)


def knn_predictor(k: int = 20, temperature: float = 0.07) -> Predictor:
    """Vote of the k nearest cells, each with weight exp(cosine / temperature) (Wu et al., CVPR 2018).

    Ties go to the type of lower number.
    """

    def predict(bank: np.ndarray, labels: np.ndarray, queries: np.ndarray) -> np.ndarray:
        rows, similarities = nearest(bank, queries, k)
        votes = np.zeros((len(queries), int(labels.max()) + 1))
        weights = np.exp((similarities - 1) / temperature)
        np.add.at(votes, (np.arange(len(queries))[:, None], labels[rows]), weights)
        return votes.argmax(axis=1)

    return predict


def predict_linear(bank: np.ndarray, labels: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Logistic regression on standardised embeddings, classes weighted alike."""
    bank, queries = standardise(bank, queries)
    model = LogisticRegression(C=0.1, class_weight="balanced", max_iter=2000, tol=1e-3)
    return model.fit(bank, labels).predict(queries)


def predict_folds(
    embeddings: np.ndarray, labels: np.ndarray, folds: Iterable[Fold], predict: Predictor
) -> tuple[np.ndarray, np.ndarray]:
    """The rows that are queries of some fold, and what is predicted for each."""
    rows, predicted = [], []
    for fold in folds:
        rows.append(fold.queries)
        predicted.append(predict(embeddings[fold.bank], labels[fold.bank], embeddings[fold.queries]))
    return np.concatenate(rows), np.concatenate(predicted)


def balanced_accuracy(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Mean recall over the types that occur in `labels`."""
    return float(np.mean([np.mean(predicted[labels == c] == c) for c in np.unique(labels)]))


def balanced_accuracy_interval(
    labels: np.ndarray,
    predicted: np.ndarray,
    groups: np.ndarray,
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Mean recall over the types, with a percentile bootstrap that resamples whole groups.

    Args:
        labels, predicted: (n,) integers.
        groups: (n,), cells with the same number stay together: those of one patient are no independent evidence.
        resamples, level, seed: as in `metrics.bootstrap_intervals`.
    """
    _, of_type = np.unique(labels, return_inverse=True)
    _, of_group = np.unique(groups, return_inverse=True)
    shape = (of_group.max() + 1, of_type.max() + 1)
    total, right = np.zeros(shape), np.zeros(shape)
    np.add.at(total, (of_group, of_type), 1.0)
    np.add.at(right, (of_group, of_type), (labels == predicted).astype(float))
    draws = np.concatenate([_mean_recall(w @ right, w @ total) for w in bootstrap_weights(shape[0], resamples, seed)])
    defined = draws[~np.isnan(draws)]  # a resample without a cell of some type says nothing
    value = balanced_accuracy(labels, predicted)
    if not len(defined):
        return Interval(value, np.nan, np.nan, level, 1.0)
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), level, 1 - len(defined) / len(draws))


def neighbours_figure(cells: Cells, embeddings: np.ndarray, fold: Fold, path: Path, *, k: int = 5) -> None:
    """One query of each type and the k cells most like it.

    Args:
        cells: with types; the rows of `embeddings`.
        fold: neighbours come from the bank.
    """
    types = np.array(cells.cell_types)
    queries = [fold.queries[types[fold.queries] == name][0] for name in np.unique(types[fold.queries])]
    found, likeness = nearest(embeddings[fold.bank], embeddings[queries], k)
    images, captions = [], []
    for query, rows, similarities in zip(queries, fold.bank[found], likeness, strict=True):
        images += [open_cell_image(cells.read(row)).image for row in (query, *rows)]
        captions.append(f"query: {types[query]}")
        captions += [f"{types[row]}\n{cosine:.2f}" for row, cosine in zip(rows, similarities, strict=True)]
    gallery(images, captions, path, columns=1 + found.shape[1], title="Nearest neighbours, cosine")


def seen_digests(weights: str | Path) -> frozenset[str]:
    """Digests of the cells that exported weights were trained on.

    Raises:
        ProbeError: no record lies beside the weights.
    """
    record = Path(weights) / RECORD
    if not record.is_file():
        raise ProbeError(
            f"{weights}: no {RECORD} there, so what the weights have seen is not known; give the folder that "
            "lymph pretrain exported, RUN/encoder"
        )
    return frozenset(json.loads(record.read_text(encoding="utf-8"))["digests"])


def _mean_recall(right: np.ndarray, total: np.ndarray) -> np.ndarray:
    """(..., types) -> (...), NaN where a type is absent."""
    recall = np.divide(right, total, out=np.full(np.shape(total), np.nan), where=total > 0)
    return recall.mean(axis=-1)


def _labelled_cells(options: ProbeOptions) -> Cells:
    cells = read_cells(options.data, cache_dir=options.cache_dir).labelled()
    if options.max_cells is not None and options.max_cells < len(cells):
        rows = np.random.default_rng(options.seed).permutation(len(cells))[: options.max_cells]
        cells = cells.select(np.sort(rows))
    counts = {name: cells.cell_types.count(name) for name in cells.type_names}
    rare = sorted(name for name, count in counts.items() if count < 2 * options.folds)
    if rare:
        logger.warning("%s: types with fewer than %d cells left out: %s", cells.source, 2 * options.folds, rare)
        cells = cells.select(row for row, name in enumerate(cells.cell_types) if name not in rare)
    if len(cells.type_names) < 2:
        raise ProbeError(
            f"{options.data}: {len(cells.type_names)} cell types with at least {2 * options.folds} cells "
            f"({counts or 'no cell has a type'}); a probe needs two. Types come from cells.csv or sub-folders."
        )
    return cells


def _folds(cells: Cells, options: ProbeOptions) -> tuple[Sequence[Fold], str]:
    if options.held_out is not None:
        seen = seen_digests(options.held_out)
        known = np.array([digest in seen for digest in cells.digests])
        fold = Fold(bank=np.flatnonzero(known), queries=np.flatnonzero(~known))
        if not len(fold.bank) or not len(fold.queries):
            raise ProbeError(
                f"{options.data}: {len(fold.bank)} cells were seen by {options.held_out} and {len(fold.queries)} were "
                "not; --held-out needs both, leave it out for cross-validation"
            )
        return [fold], f"cells that {options.held_out} has not seen, against the {len(fold.bank)} it has"
    groups = cells.groups
    by_patient = len(np.unique(groups)) < len(cells)
    splitter = StratifiedGroupKFold(options.folds, shuffle=True, random_state=options.seed)
    folds = [Fold(bank, queries) for bank, queries in splitter.split(groups, cells.cell_types, groups)]
    return folds, f"{options.folds}-fold cross-validation over {'patients' if by_patient else 'cells'}"
