"""Configuration of the multiple instance learning (MIL) models."""

import difflib
import math
from collections.abc import Sequence
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

CLINICAL_FEATURES = ("age", "sex", "lymphocyte_count")
CONFORMAL_SLACK = 1e-6  # as calibration.SLACK, which says why
# The parameters of each scaling of the logits; the first one is the scale.
CALIBRATIONS = {"temperature": ("temperature",), "platt": ("slope", "intercept")}


@strict
class LymphMILConfig(PreTrainedConfig):
    r"""
    Everything needed to rebuild a patient model: encoder, pooling, fusion, labels and the frozen decision threshold.

    Args:
        encoder (`str`, defaults to `"vit_tiny_patch16_224"`):
            Any timm model name (`timm.list_models()`). Its input size, mean and standard deviation come from timm.
            For a model on the Hub or in a folder, `resolve_encoder` gives the name and the options to put here.
        encoder_options (`dict`, *optional*):
            Further arguments of `timm.create_model`, such as `{"drop_path_rate": 0.1}`. `None` means none.
        image_size (`int`, *optional*):
            Side of the square input in pixels; at least 16, and a multiple of a transformer's patch. `None` takes
            timm's size for the encoder, which is 518 for DINOv2: pass 224 there unless the images are larger.
        standardize_cells (`bool`, defaults to `False`):
            Whether each feature of the encoder is brought to mean 0 and standard deviation 1 before the pooling, by
            statistics of the training patients that are saved with the weights. For a frozen encoder; without
            statistics it changes nothing.
        pooling (`str`, defaults to `"gated_attention"`): A name in `POOLERS`.
        pooling_options (`dict`, *optional*): Keyword arguments of that pooler.
        fusion (`str`, defaults to `"concat"`): A name in `FUSERS`; `"none"` ignores the clinical values.
        fusion_options (`dict`, *optional*): Keyword arguments of that fuser.
        clinical_features (`list[str]`, *optional*):
            Order of the columns of `clinical`. `None` means age, sex and lymphocyte count; an empty list means that
            the model takes no clinical value.
        dropout (`float`, defaults to 0.1): Dropout before the classifier, in [0, 1).
        chunk_size (`int` or `"auto"`, *optional*, defaults to `"auto"`):
            Cells that pass the encoder at once. A number bounds the working memory: in training, the activations of
            so many cells are kept. `"auto"` passes chunks too, and keeps as many activations as fit into half of the
            free memory; `None` passes all at once.
        class_weights (`list[float]`, *optional*):
            One weight per label in the loss. The loss is `mean(w[y] * cross_entropy)` over patients, so weights
            keep their effect when a batch holds a single patient. `None` weighs all alike.
        label_smoothing (`float`, defaults to 0.0): In [0, 1).
        decision_threshold (`float`, defaults to 0.5):
            A patient is called positive (label 1) when its probability is at least this. Chosen on validation
            patients and frozen with the model; used by two-label models only.
        calibration (`dict`, *optional*):
            Scaling of the logits, fitted on patients that the model was not trained on, and part of `forward`:
            `{"method": "temperature", "temperature": T}`, or for two labels
            `{"method": "platt", "slope": a, "intercept": b}`. `None` leaves the logits as they are.
        conformal (`dict`, *optional*):
            Prediction sets, as `calibration.Conformal.to_dict()` gives them: a label belongs to a patient's set when
            1 - its probability is at most the quantile of the label; whoever has not exactly one label goes on to
            flow cytometry. `None` when no sets were fitted.

        id2label, label2id (`dict`, *optional*):
            Names of the labels 0..num_labels-1; either follows from the other. The positive label of two is 1.

    Raises:
        StrictDataclassError: a value of the wrong type or out of range; the message names it and the legal range.
        ValueError: an unknown key that is a near miss of a known one.

    Example:

    ```python
    >>> from lymph_hf import LymphMILConfig, LymphMILForBagClassification

    >>> config = LymphMILConfig(encoder="vit_tiny_patch16_224", id2label={0: "reactive", 1: "tumoral"})
    >>> model = LymphMILForBagClassification(config)
    ```
    """

    model_type = "lymph_mil"

    encoder: str = "vit_tiny_patch16_224"
    encoder_options: dict[str, Any] | None = None
    image_size: int | None = None
    standardize_cells: bool = False
    pooling: str = "gated_attention"
    pooling_options: dict[str, Any] | None = None
    fusion: str = "concat"
    fusion_options: dict[str, Any] | None = None
    clinical_features: list[str] | tuple[str, ...] | None = None
    dropout: float | int = 0.1
    chunk_size: int | Literal["auto"] | None = "auto"
    class_weights: list[float | int] | tuple[float | int, ...] | None = None
    label_smoothing: float | int = 0.0
    decision_threshold: float | int = 0.5
    calibration: dict[str, Any] | None = None
    conformal: dict[str, Any] | None = None

    def __post_init__(self, **kwargs):
        features = CLINICAL_FEATURES if self.clinical_features is None else self.clinical_features
        self.clinical_features = list(features)
        if self.class_weights is not None:
            self.class_weights = list(self.class_weights)
        refuse_misspelt(kwargs, {*self.__dataclass_fields__, "num_labels"})
        if self.id2label is None and self.label2id is not None:
            self.id2label = _inverse(self.label2id)
        super().__post_init__(**kwargs)
        if self.label2id is None:
            self.label2id = _inverse(self.id2label)

    def validate_encoder(self):
        """Refuse names that only the Hub or this machine could resolve: a saved model must build anywhere."""
        expect(
            self.encoder != "" and not {":", "/"} & set(self.encoder),
            "encoder",
            self.encoder,
            "a plain timm name; for a model on the Hub or in a folder, `resolve_encoder` gives it with its options",
        )

    def validate_labels(self):
        """Refuse labels that are not numbered from 0, or names that do not lead back to their numbers."""
        expect(self.num_labels >= 1, "num_labels", self.num_labels, "at least 1")
        numbers = list(range(self.num_labels))
        expect(sorted(self.id2label) == numbers, "id2label", self.id2label, f"keys 0 to {self.num_labels - 1}")
        matches = self.label2id == _inverse(self.id2label) and len(self.label2id) == self.num_labels
        expect(matches, "label2id", self.label2id, f"the inverse of id2label={self.id2label}, each name once")

    def validate_ranges(self):
        """Refuse numbers outside their legal range."""
        for name in ("dropout", "label_smoothing"):
            expect(0 <= getattr(self, name) < 1, name, getattr(self, name), "a number in [0, 1)")
        expect(0 <= self.decision_threshold <= 1, "decision_threshold", self.decision_threshold, "a number in [0, 1]")
        chunks = self.chunk_size in (None, "auto") or self.chunk_size >= 1
        expect(chunks, "chunk_size", self.chunk_size, 'at least 1, "auto" or None')
        expect(self.image_size is None or self.image_size >= 16, "image_size", self.image_size, "at least 16, or None")

    def validate_clinical_features(self):
        """Refuse a clinical feature named twice."""
        features = self.clinical_features or []
        expect(len(set(features)) == len(features), "clinical_features", features, "each name once")

    def validate_class_weights(self):
        """Refuse weights that are not one positive number per label."""
        if self.class_weights is None:
            return
        fits = len(self.class_weights) == self.num_labels
        positive = all(math.isfinite(weight) and weight > 0 for weight in self.class_weights)
        expect(fits and positive, "class_weights", self.class_weights, f"{self.num_labels} positive numbers")

    def validate_calibration(self):
        """Refuse a scaling that `forward` could not apply, and prediction sets for other labels."""
        if self.calibration is not None:
            method = self.calibration.get("method")
            parameters = CALIBRATIONS.get(method)
            known = " or ".join(f"{name} with {', '.join(fields)}" for name, fields in CALIBRATIONS.items())
            expect(parameters is not None, "calibration", self.calibration, f"method {known}")
            expect(set(self.calibration) == {"method", *parameters}, "calibration", self.calibration, known)
            scale = self.calibration[parameters[0]]
            expect(math.isfinite(scale) and scale > 0, f"calibration {parameters[0]}", scale, "a number above 0")
            expect(method != "platt" or self.num_labels == 2, "calibration", method, "two labels for Platt scaling")
        if self.conformal is not None:
            quantiles = self.conformal.get("quantiles", ())
            expect(
                len(quantiles) == self.num_labels,
                "conformal",
                self.conformal,
                f"{self.num_labels} quantiles, one a label",
            )

    def prediction_set(self, probabilities: Sequence[float]) -> list[str] | None:
        """Labels that one patient's prediction set holds, at least one; `None` if no sets were fitted.

        More than one label means: refer to flow cytometry. The set of a patient whom no label fits holds them all.

        Args:
            probabilities: (num_labels,) of the model.
        """
        if self.conformal is None:
            return None
        limits = self.conformal["quantiles"]  # None = endless: too few patients to ever leave the label out
        fits = [
            limit is None or 1 - p <= limit + CONFORMAL_SLACK for p, limit in zip(probabilities, limits, strict=True)
        ]
        return [self.id2label[i] for i, fit in enumerate(fits) if fit or not any(fits)]


def refuse_misspelt(unknown: dict, known: set):
    """Unknown keys are legal in a Hub configuration, but one that is a near miss of ours is a mistake."""
    for name in unknown:
        if hasattr(PreTrainedConfig, name):
            continue
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
        if close:
            raise ValueError(f"Unknown configuration key {name!r}: did you mean {close[0]!r}?")


def _inverse(names: dict) -> dict:
    return {value: key for key, value in names.items()}


def expect(holds: bool, name: str, value, expected: str):
    if not holds:
        raise ValueError(f"{name}={value!r}: expected {expected}.")


__all__ = ["LymphMILConfig"]
