"""A published model -> answers for one patient, with what they rest on."""

import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel
from transformers.utils import cached_file

import lymph_hf  # noqa: F401  registers the models
from lymph_hf.explain import Explanation, explain_bag
from lymph_hf.explain_maps import cell_maps

logger = logging.getLogger(__name__)

REFER = "refer to flow cytometry"
DEFAULT_MODEL = "org/lymph-mil"
_PUBLISHED = Path(__file__).parents[1] / "model_cards" / "lymph-mil"
_SHOWN_PER_GROUP = 4
_CELLS_AT_ONCE = 128  # bounds the memory; smaller chunks only cost time

Progress = Callable[[float, str], Any]


@dataclass(frozen=True)
class Performance:
    """What the model reached on patients it had not seen, at its frozen threshold."""

    sensitivity: float
    specificity: float
    patients: int
    positives: int

    def predictive_values(self, prevalence: float) -> tuple[float | None, float | None]:
        """PPV and NPV where a share `prevalence` is positive, by Bayes' rule; `None` where nobody gets that answer."""
        sick, healthy = prevalence, 1 - prevalence
        called_positive = self.sensitivity * sick + (1 - self.specificity) * healthy
        called_negative = self.specificity * healthy + (1 - self.sensitivity) * sick
        ppv = self.sensitivity * sick / called_positive if called_positive else None
        npv = self.specificity * healthy / called_negative if called_negative else None
        return ppv, npv


@dataclass(frozen=True, eq=False)
class Answer:
    """What the model says of one patient of N cells, and why.

    Attributes:
        labels: names of the model's C labels.
        probabilities: (C,), calibrated.
        prediction_set: labels that cannot be ruled out; `None` where the model has no prediction sets.
        coverage: probability that the set holds the true label.
        threshold: probability of label 1 from which on it is decided, for models of two labels.
        images: the N cells.
        explanation: effects and weights of cells and clinical values; see `lymph_hf.explain`.
        clinical: what was given.
        maps: cell -> (H, W) in -1..1, above 0 where the evidence is for the explained label.
        warnings: what speaks against trusting the answer.
        notes: what was done with the upload, without names of files.
        left_out: (name, reason) of files that were not used.
        overviews: smear fields with frames around the cells found.
    """

    labels: tuple[str, ...]
    probabilities: np.ndarray
    prediction_set: tuple[str, ...] | None
    coverage: float | None
    threshold: float | None
    images: Sequence[Image.Image]
    explanation: Explanation
    clinical: Mapping[str, Any]
    maps: Mapping[int, np.ndarray] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    notes: Sequence[str] = ()
    left_out: Sequence[tuple[str, str]] = ()
    overviews: Sequence[Image.Image] = ()

    @property
    def target(self) -> str:
        """The label whose probability is explained."""
        return self.labels[self.explanation.target]

    @property
    def probability(self) -> float:
        """Of the explained label."""
        return float(self.probabilities[self.explanation.target])

    @property
    def called(self) -> str:
        """The label that threshold (two labels) or highest probability alone would decide."""
        if self.threshold is None:
            return self.labels[int(np.argmax(self.probabilities))]
        return self.labels[int(self.probabilities[1] >= self.threshold)]

    @property
    def decision(self) -> str:
        """One label, or `REFER` where the prediction set holds several."""
        if self.prediction_set is None:
            return self.called
        return self.prediction_set[0] if len(self.prediction_set) == 1 else REFER

    def groups(self) -> dict[str, list[int]]:
        """Cells to show: `for` and `against` the explained label, strongest first, and `neutral`, weakest first."""
        effects, order = self.explanation.effects, self.explanation.ranking(by="effect")
        if len(order) == 1:
            return {"for": [], "against": [], "neutral": [0]}
        speaking = [int(i) for i in order if effects[i] > 0][:_SHOWN_PER_GROUP]
        against = [int(i) for i in order[::-1] if effects[i] < 0][:_SHOWN_PER_GROUP]
        rest = [int(i) for i in np.argsort(np.abs(effects), kind="stable") if i not in {*speaking, *against}]
        return {"for": speaking, "against": against, "neutral": rest[:_SHOWN_PER_GROUP]}

    def to_json(self) -> dict[str, Any]:
        """Plain numbers for programs; cells are counted from 1, in the order of their names."""
        explanation = self.explanation
        attentions = explanation.attentions
        return {
            "decision": self.decision,
            "probabilities": {
                name: round(float(p), 4) for name, p in zip(self.labels, self.probabilities, strict=True)
            },
            "prediction_set": None if self.prediction_set is None else list(self.prediction_set),
            "coverage": self.coverage,
            "threshold": self.threshold,
            "called_by_threshold": self.called,
            "cells": len(self.images),
            "explained_label": self.target,
            "cell_effects": [None if np.isnan(e) else round(float(e), 5) for e in explanation.effects],
            "cell_weights": None if attentions is None else [round(float(a), 5) for a in attentions],
            "clinical_effects": {name: round(effect, 5) for name, effect in explanation.clinical_effects.items()},
            "warnings": list(self.warnings),
            "notes": list(self.notes),
            "use": "research only, not a medical device",
        }


def default_model() -> str:
    """`LYMPH_MODEL` (a Hub id or a folder); else the published folder beside the Space; else the Hub's."""
    return os.environ.get("LYMPH_MODEL") or (str(_PUBLISHED) if _PUBLISHED.is_dir() else DEFAULT_MODEL)


class Predictor:
    """A model with its image processor and its published figures.

    Args:
        source: Hub id or folder of a patient classifier.

    Raises:
        OSError: no such model.
        ValueError: a model with a single output.
    """

    def __init__(self, source: str):
        self.name = Path(source).name if Path(source).is_dir() else source
        self.model = AutoModel.from_pretrained(source).eval()
        self.processor = AutoImageProcessor.from_pretrained(source)
        config = self.model.config
        if config.num_labels < 2:
            raise ValueError(f"{self.name}: a model with a single output (regression); expected a classifier.")
        config.chunk_size = _CELLS_AT_ONCE
        self.labels = tuple(config.id2label[i] for i in range(config.num_labels))
        self.threshold = config.decision_threshold if config.num_labels == 2 else None
        self.clinical_features = tuple(self.processor.standardizer.features)
        self.performance = _performance(source, self.labels)
        self._turn = threading.Lock()  # one patient at a time has all cores; a long batch lets others in between
        encoder = getattr(self.model.base_model, "encoder", None)  # an ensemble has several, and stays as it is
        if encoder is not None and has_bfloat16():
            # The encoder alone: the head decides on differences of a thousandth, which bfloat16 would round away.
            encoder.forward = torch.autocast("cpu", torch.bfloat16)(encoder.forward)

    def answers(
        self,
        images: Sequence[Image.Image],
        clinical: Mapping[str, Any],
        *,
        maps: bool = True,
        progress: Progress = lambda share, text: None,
        **about: Any,
    ) -> Iterator[Answer]:
        """Ask the model about one patient: the answer, then the same with maps of the cells that are shown.

        Args:
            images: N RGB cells.
            clinical: any of age, sex, lymphocyte_count; `None` = missing.
            maps: whether to look inside cells, which takes longer than the answer.
            progress: is told the share done and what is going on.
            about: `warnings`, `notes`, `left_out` and `overviews` of the answer.

        Raises:
            ValueError: a clinical value out of range.
        """
        progress(0.3, f"Looking at {len(images)} cells")
        inputs = self.processor(list(images), dict(clinical))
        with self._turn:
            explanation = explain_bag(self.model, inputs)
        conformal = self.model.config.conformal
        in_set = self.model.config.prediction_set(explanation.probabilities.tolist())
        answer = Answer(
            labels=self.labels,
            probabilities=explanation.probabilities,
            prediction_set=None if in_set is None else tuple(in_set),
            coverage=None if conformal is None else conformal["coverage"],
            threshold=self.threshold,
            images=images,
            explanation=explanation,
            clinical={name: clinical.get(name) for name in self.clinical_features},
            **about,
        )
        yield answer
        if maps:
            progress(0.75, "Looking inside the most telling cells")
            with self._turn:
                found = self._maps(inputs, answer)
            yield replace(answer, maps=found)

    def _maps(self, inputs: Mapping[str, torch.Tensor], answer: Answer) -> dict[int, np.ndarray]:
        groups = answer.groups()
        shown = [*groups["for"], *groups["against"]]
        if not shown:
            return {}
        found = cell_maps(
            self.model,
            inputs["pixel_values"],
            shown,
            target=answer.explanation.target,
            clinical=inputs.get("clinical"),
            cell_embeddings=answer.explanation.cell_embeddings,
        )
        return dict(zip(shown, found, strict=True))


def has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware; elsewhere it is slower than single precision."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def _performance(source: str, labels: Sequence[str]) -> Performance | None:
    """From `evaluation.json` beside the model: scores, and patients per label, as `lymph evaluate` writes them."""
    path = cached_file(
        source,
        "evaluation.json",
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None or len(labels) != 2:
        return None
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        scores, numbers = found["scores"], found["n_per_label"]
        return Performance(
            sensitivity=float(scores["sensitivity"]["value"]),
            specificity=float(scores["specificity"]["value"]),
            patients=sum(numbers.values()),
            positives=numbers[labels[1]],
        )
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("evaluation.json of the model cannot be used (%s): no predictive values", error)
        return None
