"""Configuration of an ensemble of patient models."""

import math
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .configuration_lymph import LymphMILConfig, expect, refuse_misspelt

# What a member's settings are in an ensemble; where it was loaded from and by which version is none of them.
_MEMBER_KEYS = (*LymphMILConfig.__annotations__.keys() - {"model_type"}, "id2label", "label2id")


@strict
class LymphMILEnsembleConfig(PreTrainedConfig):
    r"""
    Several patient models that answer as one, such as those of the folds of a cross-validation.

    Args:
        members (`list[dict]`, *optional*):
            Settings of each member, as `LymphMILConfig` takes them: at least two, with the same labels. `None` is an
            ensemble without members, which no model can be built from.
        shared_encoder (`bool`, defaults to `False`):
            The members have one and the same encoder, bit for bit; it is stored once and runs once.
        clinical_features (`list[str]`, *optional*):
            Order of the columns of `clinical`, as the ensemble's image processor standardises them. `None` means that
            the ensemble takes no clinical value.
        clinical_maps (`list[dict]`, *optional*):
            For each member feature -> `[scale, shift]`: `scale * x + shift` is the value as the member was trained
            on, if `x` is the value as the ensemble's processor gives it. `None` leaves the values as they are.
        chunk_size (`int` or `"auto"`, *optional*, defaults to 32): As in `LymphMILConfig`, for every member.
        decision_threshold (`float`, defaults to 0.5): As in `LymphMILConfig`, on the ensemble's probability.
        calibration (`dict`, *optional*): As in `LymphMILConfig`, of the ensemble's logits; members have their own.
        conformal (`dict`, *optional*): As in `LymphMILConfig`.

        id2label, label2id (`dict`, *optional*): Names of the labels; by default those of the members.

    Raises:
        StrictDataclassError: a value of the wrong type or out of range; the message names it and the legal range.
        ValueError: an unknown key that is a near miss of a known one.
    """

    model_type = "lymph_mil_ensemble"

    members: list[dict[str, Any]] | tuple[dict[str, Any], ...] | None = None
    shared_encoder: bool = False
    clinical_features: list[str] | tuple[str, ...] | None = None
    clinical_maps: list[dict[str, Any]] | tuple[dict[str, Any], ...] | None = None
    chunk_size: int | Literal["auto"] | None = 32
    decision_threshold: float | int = 0.5
    calibration: dict[str, Any] | None = None
    conformal: dict[str, Any] | None = None

    def __post_init__(self, **kwargs):
        refuse_misspelt(kwargs, {*self.__dataclass_fields__, "num_labels"})
        self.members = [_settings(LymphMILConfig(**member)) for member in self.members or ()]
        self.clinical_features = list(self.clinical_features or ())
        if self.members and self.id2label is None:
            self.id2label = dict(self.members[0]["id2label"])
        super().__post_init__(**kwargs)
        if self.label2id is None:
            self.label2id = {name: number for number, name in self.id2label.items()}

    @property
    def member_configs(self) -> list[LymphMILConfig]:
        """The configuration of each member, with the ensemble's chunk size."""
        return [LymphMILConfig(**member | {"chunk_size": self.chunk_size}) for member in self.members]

    @property
    def image_size(self) -> int | None:
        """Side of the square input in pixels, the same for every member."""
        return self.members[0]["image_size"] if self.members else None

    validate_labels = LymphMILConfig.validate_labels
    validate_calibration = LymphMILConfig.validate_calibration
    validate_clinical_features = LymphMILConfig.validate_clinical_features
    prediction_set = LymphMILConfig.prediction_set

    def validate_members(self):
        """Refuse members that do not answer the same question."""
        if not self.members:
            return
        expect(len(self.members) >= 2, "members", f"[{len(self.members)} member]", "at least two")
        for number, member in enumerate(self.members, start=1):
            names = member["id2label"]
            expect(names == self.id2label, f"id2label of member {number}", names, f"the ensemble's {self.id2label}")
            size = member["image_size"]
            expect(size == self.image_size, f"image_size of member {number}", size, f"{self.image_size}, as the first")
        expect(self.num_labels >= 2, "num_labels", self.num_labels, "at least 2: classifiers are averaged")

    def validate_clinical_maps(self):
        """Refuse clinical values that a member cannot be given."""
        if self.clinical_maps is None:
            maps = [dict.fromkeys(self.clinical_features, (1.0, 0.0))] * len(self.members)
        else:
            maps = self.clinical_maps
        expect(
            len(maps) == len(self.members), "clinical_maps", self.clinical_maps, f"{len(self.members)}, one a member"
        )
        for number, (member, pairs) in enumerate(zip(self.members, maps, strict=True), start=1):
            needed = set(member["clinical_features"])
            fits = needed <= set(pairs) and needed <= set(self.clinical_features)
            expect(fits, f"clinical_maps of member {number}", pairs, f"[scale, shift] for {sorted(needed)}")
            finite = all(len(pair) == 2 and all(math.isfinite(v) for v in pair) for pair in pairs.values())
            expect(finite, f"clinical_maps of member {number}", pairs, "two finite numbers a feature")

    def validate_ranges(self):
        """Refuse numbers outside their legal range."""
        expect(0 <= self.decision_threshold <= 1, "decision_threshold", self.decision_threshold, "a number in [0, 1]")
        chunks = self.chunk_size in (None, "auto") or self.chunk_size >= 1
        expect(chunks, "chunk_size", self.chunk_size, 'at least 1, "auto" or None')


def _settings(config: LymphMILConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in sorted(_MEMBER_KEYS)}


__all__ = ["LymphMILEnsembleConfig"]
