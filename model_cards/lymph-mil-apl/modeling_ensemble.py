"""Several patient models that answer as one: the mean of their probabilities."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_ensemble import LymphMILEnsembleConfig
from .configuration_lymph import LymphMILConfig
from .encoders import embedding_size
from .modeling_lymph import (
    LymphMILForBagClassification,
    LymphMILOutput,
    LymphMILPreTrainedModel,
    calibrated,
)
from .processing_lymph import ClinicalStandardizer

_ENCODER_SETTINGS = ("encoder", "encoder_options", "image_size")


class EnsembleError(ValueError):
    """Models cannot become one; the message says which differ, and in what."""


@dataclass
class LymphMILEnsembleOutput(LymphMILOutput):
    """What `LymphMILEnsembleForBagClassification` returns, for M members.

    Attributes:
        loss: scalar, when `labels` were given: the mean over patients of the negative log-likelihood.
        logits: (B, num_labels): logarithm of the mean of the members' probabilities, then the ensemble's calibration.
        attentions: (B, N), the mean over the members; `None` if a member has none.
        bag_embedding: (B, E), those of the members side by side: each lives in a space of its own.
        cell_embeddings: (B, N, D) of the shared encoder, or those of the members' encoders side by side.
        member_logits: (B, M, num_labels), what each member says by itself.
    """

    cell_embeddings: torch.FloatTensor | None = None
    member_logits: torch.FloatTensor | None = None


class LymphMILEnsembleForBagClassification(LymphMILPreTrainedModel):
    """Patient classifier whose probabilities are the mean of those of its members.

    The mean of probabilities (the linear opinion pool) rather than of logits: a member that is far too sure of itself
    moves it by 1 / M at most (Lakshminarayanan, Pritzel and Blundell, NeurIPS 2017, arXiv 1612.01474).

    Args:
        config: with the settings of at least two members.

    Raises:
        ValueError: a configuration without members.

    Example:

    ```python
    >>> import torch
    >>> from lymph_hf import LymphMILConfig, LymphMILEnsembleForBagClassification, LymphMILForBagClassification

    >>> config = LymphMILConfig(encoder="test_vit", image_size=32, fusion="none", clinical_features=[])
    >>> folds = [LymphMILForBagClassification(config).eval() for _ in range(3)]
    >>> ensemble = LymphMILEnsembleForBagClassification.from_members(folds)
    >>> ensemble(torch.randn(2, 5, 3, 32, 32)).logits.exp().sum(-1).allclose(torch.ones(2))
    True

    ```
    """

    config: LymphMILEnsembleConfig
    base_model_prefix = ""

    def __init__(self, config: LymphMILEnsembleConfig):
        super().__init__(config)
        if not config.members:
            raise ValueError("The configuration has no members: an ensemble is built of at least two.")
        self.members = nn.ModuleList(LymphMILForBagClassification(member) for member in config.member_configs)
        if config.shared_encoder:
            for member in self.members[1:]:
                member.model.encoder = None
        self._keep_own_initialisation()
        self.post_init()

    @classmethod
    def from_members(
        cls,
        members: Sequence[LymphMILForBagClassification],
        standardizers: Sequence[ClinicalStandardizer] | None = None,
        standardizer: ClinicalStandardizer | None = None,
    ):
        """Trained models -> one, in evaluation mode; without calibration, threshold and prediction sets of its own.

        An encoder that is the same in all members, bit for bit, as when it was frozen, is kept once.

        Args:
            members: at least two, without adapters, of the same labels and image size. They are copied.
            standardizers: of each member: how its clinical values were scaled. `None` = all like the ensemble's.
            standardizer: of the ensemble: how its image processor scales them. It has every feature that a member
                has. `None` only if no member takes clinical values, or all were scaled alike.

        Raises:
            EnsembleError: members that do not fit together, or a feature that the ensemble's standardizer lacks.
        """
        _refuse_different(members)
        config = LymphMILEnsembleConfig(
            members=[member.config.to_dict() for member in members],
            shared_encoder=_share_encoder(members),
            chunk_size=members[0].config.chunk_size,
            **_clinical_settings(members, standardizers, standardizer),
        )
        ensemble = cls(config)
        for own, given in zip(ensemble.members, members, strict=True):
            state = given.state_dict()
            if own.model.encoder is None:
                state = {name: tensor for name, tensor in state.items() if not name.startswith("model.encoder.")}
            own.load_state_dict(state)
        return ensemble.to(members[0].dtype).eval()

    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        bag_mask: torch.BoolTensor | None = None,
        clinical: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        bag_offsets: torch.LongTensor | None = None,
        cell_embeddings: torch.FloatTensor | None = None,
    ) -> LymphMILEnsembleOutput:
        r"""
        Inputs as in `LymphMILModel`; `clinical` is standardised by the ensemble's processor, and `cell_embeddings` are
        those of the shared encoder (B, N, D), or of the members' encoders side by side.

        Args:
            labels: (B,) in 0..num_labels-1.
        """
        if cell_embeddings is None:
            cell_embeddings, bag_mask = self._encode(pixel_values, bag_mask, bag_offsets)
        outputs = [
            member(cell_embeddings=embeddings, bag_mask=bag_mask, clinical=self._clinical_of(number, clinical))
            for number, (member, embeddings) in enumerate(
                zip(self.members, self._embeddings_by_member(cell_embeddings), strict=True)
            )
        ]
        member_logits = torch.stack([output.logits.float() for output in outputs], dim=1)  # (B, M, C)
        log_mean = member_logits.log_softmax(dim=-1).logsumexp(dim=1) - math.log(len(outputs))
        logits = calibrated(log_mean, self.config.calibration)
        attentions = [output.attentions for output in outputs]
        return LymphMILEnsembleOutput(
            loss=None if labels is None else F.cross_entropy(logits, labels),
            logits=logits,
            attentions=None if any(weights is None for weights in attentions) else torch.stack(attentions).mean(dim=0),
            bag_embedding=torch.cat([output.bag_embedding for output in outputs], dim=-1),
            cell_embeddings=cell_embeddings,
            member_logits=member_logits,
        )

    def _encoding_members(self) -> list[LymphMILForBagClassification]:
        return [member for member in self.members if member.model.encoder is not None]

    def _encode(self, pixel_values, bag_mask, bag_offsets) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of every encoder side by side, (B, N, sum of D), and the mask (B, N)."""
        encoded = []
        for member in self._encoding_members():
            member.config.chunk_size = self.config.chunk_size  # it may have been changed after the ensemble was built
            encoded.append(member.model.encode_bags(pixel_values, bag_mask, bag_offsets))
        embeddings, masks = zip(*encoded, strict=True)
        return torch.cat(embeddings, dim=-1), masks[0]

    def _embeddings_by_member(self, cell_embeddings: torch.Tensor) -> list[torch.Tensor]:
        """(B, N, sum of D) -> (B, N, D) for each member."""
        widths = [embedding_size(member.model.encoder) for member in self._encoding_members()]
        if cell_embeddings.shape[-1] != sum(widths):
            raise ValueError(
                f"cell_embeddings is {tuple(cell_embeddings.shape)}, expected {sum(widths)} numbers per cell: the "
                f"embeddings of {len(widths)} encoder(s) side by side."
            )
        parts = list(cell_embeddings.split(widths, dim=-1))
        return parts * len(self.members) if self.config.shared_encoder else parts

    def _clinical_of(self, number: int, clinical: torch.Tensor | None) -> torch.Tensor | None:
        """Clinical values (B, F) of the ensemble's processor -> (B, F') as the member's own processor gives them."""
        features = self.members[number].config.clinical_features
        if clinical is None or not features:
            return None
        if clinical.shape[-1] != len(self.config.clinical_features):
            raise ValueError(
                f"clinical is {tuple(clinical.shape)}, expected a column for each of {self.config.clinical_features}."
            )
        chosen = clinical[:, [self.config.clinical_features.index(name) for name in features]]
        if self.config.clinical_maps is None:
            return chosen
        pairs = [self.config.clinical_maps[number][name] for name in features]
        scale, shift = chosen.new_tensor(pairs).unbind(dim=-1)
        return scale * chosen + shift

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func=None, every_n_layers: int = 1
    ):
        for member in self._encoding_members():
            member.model.encoder.set_grad_checkpointing(enable)


def _refuse_different(members: Sequence[LymphMILForBagClassification]) -> None:
    if len(members) < 2:
        raise EnsembleError(f"{len(members)} model(s): an ensemble is built of at least two.")
    first = members[0].config
    for number, member in enumerate(members[1:], start=2):
        for name in ("id2label", "image_size"):
            one, other = getattr(first, name), getattr(member.config, name)
            if one != other:
                raise EnsembleError(f"Models 1 and {number} differ in {name}: {one} and {other}.")


def _share_encoder(members: Sequence[LymphMILForBagClassification]) -> bool:
    """Whether the encoders are the same, bit for bit."""

    def settings(config: LymphMILConfig) -> list:
        return [getattr(config, name) for name in _ENCODER_SETTINGS]

    first, state = members[0], members[0].model.encoder.state_dict()
    for member in members[1:]:
        if settings(member.config) != settings(first.config):
            return False
        other = member.model.encoder.state_dict()
        if not (other.keys() == state.keys() and all(torch.equal(other[name], state[name]) for name in state)):
            return False
    return True


def _clinical_settings(
    members: Sequence[LymphMILForBagClassification],
    standardizers: Sequence[ClinicalStandardizer] | None,
    standardizer: ClinicalStandardizer | None,
) -> dict:
    """`clinical_features` and `clinical_maps` of the ensemble."""
    needed = sorted({name for member in members for name in member.config.clinical_features})
    if not needed:
        return {}
    if standardizer is None:
        if standardizers is not None or any(
            member.config.clinical_features != members[0].config.clinical_features for member in members
        ):
            raise EnsembleError("The members take clinical values: give the standardizer of the ensemble's processor.")
        return {"clinical_features": members[0].config.clinical_features}
    if missing := sorted(set(needed) - set(standardizer.features)):
        raise EnsembleError(f"The ensemble's standardizer lacks {missing}; it has {list(standardizer.features)}.")
    standardizers = [standardizer] * len(members) if standardizers is None else standardizers
    if len(standardizers) != len(members):
        raise EnsembleError(f"{len(standardizers)} standardizers for {len(members)} models: give one for each.")
    return {
        "clinical_features": list(standardizer.features),
        "clinical_maps": [
            _clinical_map(member.config.clinical_features, own, standardizer)
            for member, own in zip(members, standardizers, strict=True)
        ],
    }


def _clinical_map(
    features: Sequence[str], own: ClinicalStandardizer, common: ClinicalStandardizer
) -> dict[str, list[float]]:
    """Feature -> scale and shift from the common standardisation to a member's own.

    With x = (v - m) / s and x' = (v - m') / s', x' = (s / s') x + (m - m') / s'.
    """
    if list(own.features) != list(features):
        raise EnsembleError(f"A standardizer has the features {list(own.features)}, its model {list(features)}.")
    ours = {name: (m, s) for name, m, s in zip(common.features, common.mean, common.std, strict=True)}
    return {
        name: [ours[name][1] / std, (ours[name][0] - mean) / std]
        for name, mean, std in zip(own.features, own.mean, own.std, strict=True)
    }


__all__ = ["LymphMILEnsembleForBagClassification"]
