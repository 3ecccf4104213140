"""Golden answers: what a published model says of pictures that code paints, so that a silent drift shows.

They are made when a folder is published and lie in it as `golden.json`. A later version of this package, or of a
library below it, has to give the same answers.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from transformers import AutoImageProcessor, AutoModel, PreTrainedModel

from .files import write_json
from .processing_lymph import LymphImageProcessor

GOLDEN = "golden.json"
TOLERANCE = 1e-4
CELLS = 5
SIDE = 48  # pixels
CLINICAL = {"age": 71.0, "sex": "F", "lymphocyte_count": 14.2}
_SHOWN = 8  # values of each embedding


def golden_cells() -> list[Image.Image]:
    """The pictures: squares of colours that follow from a hash, the same on every machine and in every version."""
    return [_painted(f"lymph-hf golden cell {i}") for i in range(CELLS)]


def golden_answers(model: PreTrainedModel, processor: LymphImageProcessor) -> dict[str, Any]:
    """Probability of each label and weight of each cell, for one patient with the golden cells."""
    clinical = {name: CLINICAL[name] for name in model.config.clinical_features if name in CLINICAL}
    model.eval()
    with torch.no_grad():
        output = model(**processor(golden_cells(), clinical))
    probabilities = output.logits[0].double().softmax(-1).tolist()
    named = {model.config.id2label[i]: probability for i, probability in enumerate(probabilities)}
    return {"probabilities": named, "attentions": output.attentions[0].tolist()}


def golden_embeddings(folder: str | Path) -> dict[str, Any]:
    """The beginning of each golden cell's embedding, and its length, by a timm encoder in a folder."""
    encoder = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    transform = create_transform(**resolve_data_config(model=encoder), is_training=False)
    with torch.no_grad():
        embeddings = encoder(torch.stack([transform(cell) for cell in golden_cells()]))  # (cells, D)
    return {"embeddings": embeddings[:, :_SHOWN].tolist(), "lengths": embeddings.norm(dim=1).tolist()}


def write_golden(folder: Path, answers: dict[str, Any]) -> None:
    """Write `golden.json` of a folder: the answers, and the SHA-256 of the weights that gave them."""
    write_json(folder / GOLDEN, {"weights": _digests(folder), **answers})


def golden_problems(folder: str | Path) -> list[str]:
    """Where a published folder no longer answers as it did when it was published; empty when it does.

    Args:
        folder: with its base in it or within reach.
    """
    folder = Path(folder)
    stored = json.loads((folder / GOLDEN).read_text(encoding="utf-8"))
    problems = [
        f"{name} is not the file that was published"
        for name, digest in _digests(folder).items()
        if stored["weights"].get(name) != digest
    ]
    if "embeddings" in stored:
        answers = golden_embeddings(folder)
    else:
        answers = golden_answers(AutoModel.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder))
    return problems + answer_problems(stored, answers)


def answer_problems(stored: dict[str, Any], answers: dict[str, Any]) -> list[str]:
    """Answers that differ from the stored ones by more than `TOLERANCE`."""
    problems = []
    for name, answer in answers.items():
        pair = [list(values.values()) if isinstance(values, dict) else values for values in (stored[name], answer)]
        difference = float(np.abs(np.subtract(*pair)).max())
        if not difference <= TOLERANCE:
            problems.append(f"its {name} differ by {difference:.2g} from those it was published with")
    return problems


def _digests(folder: Path) -> dict[str, str]:
    paths = sorted(folder.glob("*.safetensors"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def _painted(name: str) -> Image.Image:
    squares = np.frombuffer(hashlib.shake_256(name.encode()).digest(6 * 6 * 3), np.uint8).reshape(6, 6, 3)
    return Image.fromarray(squares.repeat(SIDE // 6, axis=0).repeat(SIDE // 6, axis=1))
