"""Configuration of the multiple instance learning (MIL) models."""

import difflib
import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

CLINICAL_FEATURES = ("age", "sex", "lymphocyte_count")


@strict
class LymphMILConfig(PreTrainedConfig):
    r"""
    Everything needed to rebuild a patient model: encoder, pooling, fusion, labels and the frozen decision threshold.

    Args:
        encoder (`str`, defaults to `"vit_tiny_patch16_224"`):
            Any timm model name (`timm.list_models()`). Its input size, mean and standard deviation come from timm.
        encoder_options (`dict`, *optional*):
            Further arguments of `timm.create_model`, such as `{"drop_path_rate": 0.1}`. `None` means none.
        image_size (`int`, *optional*):
            Side of the square input in pixels; at least 16. `None` takes timm's size for the encoder, which is 518
            for DINOv2: pass 224 there unless the images are larger.
        pooling (`str`, defaults to `"gated_attention"`): A name in `POOLERS`.
        pooling_options (`dict`, *optional*): Keyword arguments of that pooler.
        fusion (`str`, defaults to `"concat"`): A name in `FUSERS`; `"none"` ignores the clinical values.
        fusion_options (`dict`, *optional*): Keyword arguments of that fuser.
        clinical_features (`list[str]`, *optional*):
            Order of the columns of `clinical`. `None` means age, sex and lymphocyte count; an empty list means that
            the model takes no clinical value.
        dropout (`float`, defaults to 0.1): Dropout before the classifier, in [0, 1).
        chunk_size (`int`, *optional*, defaults to 32):
            Cells that pass the encoder at once, which bounds the working memory; `None` passes all at once.
        class_weights (`list[float]`, *optional*):
            One weight per label in the loss. The loss is `mean(w[y] * cross_entropy)` over patients, so weights
            keep their effect when a batch holds a single patient. `None` weighs all alike.
        label_smoothing (`float`, defaults to 0.0): In [0, 1).
        decision_threshold (`float`, defaults to 0.5):
            A patient is called positive (label 1) when its probability is at least this. Chosen on validation
            patients and frozen with the model; used by two-label models only.

    Raises:
        ValueError: when a value is out of range; the message names the value and the legal range.

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
    pooling: str = "gated_attention"
    pooling_options: dict[str, Any] | None = None
    fusion: str = "concat"
    fusion_options: dict[str, Any] | None = None
    clinical_features: list[str] | tuple[str, ...] | None = None
    dropout: float | int = 0.1
    chunk_size: int | None = 32
    class_weights: list[float | int] | tuple[float | int, ...] | None = None
    label_smoothing: float | int = 0.0
    decision_threshold: float | int = 0.5

    def __post_init__(self, **kwargs):
        features = CLINICAL_FEATURES if self.clinical_features is None else self.clinical_features
        self.clinical_features = list(features)
        if self.class_weights is not None:
            self.class_weights = list(self.class_weights)
        _refuse_misspelt(kwargs, {*self.__dataclass_fields__, "num_labels"})
        super().__post_init__(**kwargs)

    def validate_ranges(self):
        """Refuse numbers outside their legal range."""
        for name in ("dropout", "label_smoothing"):
            _expect(0 <= getattr(self, name) < 1, name, getattr(self, name), "a number in [0, 1)")
        _expect(
            0 <= self.decision_threshold <= 1,
            "decision_threshold",
            self.decision_threshold,
            "a number in [0, 1]",
        )
        _expect(
            self.chunk_size is None or self.chunk_size >= 1,
            "chunk_size",
            self.chunk_size,
            "at least 1, or None",
        )
        _expect(
            self.image_size is None or self.image_size >= 16,
            "image_size",
            self.image_size,
            "at least 16, or None",
        )

    def validate_clinical_features(self):
        """Refuse a clinical feature named twice."""
        features = self.clinical_features or []
        _expect(len(set(features)) == len(features), "clinical_features", features, "each name once")

    def validate_class_weights(self):
        """Refuse weights that are not one positive number per label."""
        if self.class_weights is None:
            return
        fits = len(self.class_weights) == self.num_labels
        positive = all(math.isfinite(weight) and weight > 0 for weight in self.class_weights)
        _expect(fits and positive, "class_weights", self.class_weights, f"{self.num_labels} positive numbers")


def _refuse_misspelt(unknown: dict, known: set):
    """Unknown keys are legal in a Hub configuration, but one that is a near miss of ours is a mistake."""
    for name in unknown:
        if hasattr(PreTrainedConfig, name):
            continue
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
        if close:
            raise ValueError(f"Unknown configuration key {name!r}: did you mean {close[0]!r}?")


def _expect(holds: bool, name: str, value, expected: str):
    if not holds:
        raise ValueError(f"{name}={value!r}: expected {expected}.")


__all__ = ["LymphMILConfig"]
