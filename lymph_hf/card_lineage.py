"""What a card says of the weights that an encoder started from."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm

from .options_publish import CardOptions
from .probing import RECORD
from .runs import Run

OBJECTIVES = {
    "mae": "a masked autoencoder ([He et al. 2022](https://arxiv.org/abs/2111.06377)): most patches of a cell are "
    "hidden, and a decoder predicts them; no label is used",
    "cell-type": "classification of cells by their type",
    "patient-label": "classification of single cells by the label of their patient",
}


def encoder_source(settings: Mapping[str, Any]) -> str | None:
    """Hub id of the weights that the encoder started from, where the run tells it."""
    source = settings["encoder_weights"] or ""
    if source == "timm":
        return timm.get_pretrained_cfg(settings["encoder"]).hf_hub_id
    return source.removeprefix("hf-hub:") if source.startswith("hf-hub:") else None


def has_own_weights(settings: Mapping[str, Any]) -> bool:
    """Whether the encoder started from weights that only the publisher knows."""
    return settings["encoder_weights"] is not None and encoder_source(settings) is None


def encoder_start(settings: Mapping[str, Any]) -> str:
    """Where the encoder began, and whether it was trained on, in words."""
    adapted = settings.get("adapter")
    if settings["encoder_weights"] is None:
        return "random weights" if adapted else "trained from random weights"
    start = f"started from {encoder_source(settings) or 'weights of the publisher (Training data)'}"
    return f"{start} and kept frozen" if settings.get("freeze_encoder") and not adapted else start


def encoder_lineage(run: Run, settings: Mapping[str, Any], facts: CardOptions) -> str | None:
    """What the publisher's own first weights had learnt, and whether from patients that this run was scored on."""
    if not has_own_weights(settings):
        return None
    text = f"The encoder's first weights: {facts.encoder_data}"
    source = Path(settings["encoder_weights"])
    path = next((folder / RECORD for folder in (source, source.parent) if (folder / RECORD).is_file()), None)
    if path is None:
        return f"{text} No record of their training is at hand that would tell whether it held these patients."
    record = json.loads(path.read_text(encoding="utf-8"))
    known = len(_scored_images(run) & set(record["digests"]))
    seen = f"{known:,} images" if known else "No image"
    return (
        f"{text} They were trained as {OBJECTIVES[record['objective']]}; {record['cells']:,} cells, {record['epochs']} "
        f"epochs. {seen} of the patients that the run was scored on {'were' if known else 'was'} among them."
    )


def _scored_images(run: Run) -> set[str]:
    """Digests of the run's own evaluation patients: of a cross-validation, all of them."""
    digests = json.loads(run.cohort.read_text(encoding="utf-8"))["digests"]
    parts = ("train",) if (run.folder / "out-of-fold.csv").exists() else ("validation", "test")
    return {digest for part in parts for digest in digests[part]}
