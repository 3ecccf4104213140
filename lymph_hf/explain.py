"""Which cells and clinical values made a patient model answer as it did.

The encoder sees each cell once. What a cell contributes is then asked of the head alone, on the embeddings: what
would the model say of this patient without the cell? That holds for every pooling and fusion, where an attention
weight only says how far a cell was looked at, not which label it spoke for.

Where inside a cell the evidence lies: `explain_maps`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

Effect = Literal["leave_one_out", "sampled"]

# Cells of all bags that the head sees at once; their embeddings of 384 numbers take 25 MB.
_CELLS_AT_ONCE = 16_384
_FEWEST_SAMPLES = 128


@dataclass(frozen=True, eq=False)  # arrays have no single truth value
class Explanation:
    """What made a model answer as it did for one patient of N cells.

    Attributes:
        probabilities: (C,), what the model says of the patient.
        target: number of the label explained.
        attentions: (N,), the pooling's weights: how far a cell was looked at, for whichever label. `None` where the
            model gives none.
        effects: (N,), change of P(target) that a cell makes, in -1..1; above 0 it speaks for the target. NaN for the
            only cell of a patient, without which there is nothing to judge.
        clinical_effects: clinical value -> P(target) minus P(target) with that value missing; 0 where it is missing.
        cell_embeddings: (N, D), what `explain_maps.cell_maps` can reuse.
    """

    probabilities: np.ndarray
    target: int
    attentions: np.ndarray | None
    effects: np.ndarray
    clinical_effects: dict[str, float]
    cell_embeddings: np.ndarray

    def ranking(self, by: Literal["effect", "attention"] = "effect") -> np.ndarray:
        """(N,) positions of the cells: strongest evidence for the target first, or most attended first.

        Raises:
            ValueError: another criterion, or attention where the model gives none.
        """
        scores = {"effect": self.effects, "attention": self.attentions}.get(by)
        if scores is None:
            raise ValueError(f"by={by!r}: expected 'effect', or 'attention' where the model gives weights.")
        return np.argsort(-scores, kind="stable")


def explain_bag(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    *,
    target: int | None = None,
    effect: Effect = "leave_one_out",
    seed: int = 0,
) -> Explanation:
    """Explain the answer for one patient; the encoder runs once.

    Args:
        model: a patient classifier or an ensemble of them in evaluation mode, with or without adapters.
        inputs: what the image processor gives for one patient: `pixel_values` (1, N, 3, H, W), `bag_mask` and, where
            the model takes it, `clinical` (1, F). Padding is left out: N are the real cells.
        target: label to explain; by default the positive one (1) of two, else the one that the model favours.
        effect: `"leave_one_out"`: against the same patient without this cell; exact. `"sampled"`: the mean over random
            halves of the other cells, so that cells which stand in for each other are seen too.
        seed: of the sampling.

    Raises:
        ValueError: not one patient, an unknown label or effect, a regression model, or a model in training mode.

    Example:

    ```python
    >>> import torch
    >>> from lymph_hf import LymphMILConfig, LymphMILForBagClassification
    >>> from lymph_hf.explain import explain_bag

    >>> model = LymphMILForBagClassification(LymphMILConfig(encoder="test_vit", image_size=32)).eval()
    >>> explanation = explain_bag(model, {"pixel_values": torch.randn(1, 5, 3, 32, 32)})
    >>> explanation.effects.shape, sorted(explanation.clinical_effects)
    ((5,), ['age', 'lymphocyte_count', 'sex'])

    ```
    """
    if effect not in _EFFECTS:
        raise ValueError(f"effect={effect!r}: expected one of {', '.join(_EFFECTS)}.")
    patient = PatientHead(model, inputs)
    with torch.no_grad():
        embeddings, attentions = patient.encode()
        probabilities = patient.probabilities(embeddings)[0]
        target = check_target(target, probabilities)
        clinical_effects = _clinical_effects(patient, embeddings, target)
        effects = cell_effects(patient, embeddings, target, effect, seed)
    return Explanation(
        probabilities=probabilities.cpu().numpy(),
        target=target,
        attentions=None if attentions is None else attentions.float().cpu().numpy(),
        effects=effects.cpu().numpy(),
        clinical_effects=clinical_effects,
        cell_embeddings=embeddings.float().cpu().numpy(),
    )


class PatientHead:
    """A patient model seen from one patient: cells -> embeddings, and any subset of them -> probabilities.

    Args:
        model, inputs: as in `explain_bag`.

    Attributes:
        model: without PEFT's wrapper; the adapters are inside.
        cells: (N, 3, H, W), the real ones.
        clinical: (1, F), or `None`.

    Raises:
        ValueError: as in `explain_bag`.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Tensor]):
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.features = list(self.model.config.clinical_features)
        if self.model.config.num_labels < 2:
            raise ValueError("The model has a single output (regression): only answers of classifiers are explained.")
        if model.training:
            raise ValueError("The model is in training mode, in which dropout answers at random: call model.eval().")
        pixel_values, mask, clinical = (inputs.get(name) for name in ("pixel_values", "bag_mask", "clinical"))
        if pixel_values.ndim != 5 or len(pixel_values) != 1:
            raise ValueError(f"pixel_values is {tuple(pixel_values.shape)}: expected one patient, (1, N, 3, H, W).")
        cells = pixel_values[0] if mask is None else pixel_values[0][mask[0].bool()]
        self.cells = cells.to(self.model.device, self.model.dtype)
        self.clinical = None if clinical is None else clinical.to(self.model.device)

    def encode(self) -> tuple[Tensor, Tensor | None]:
        """Embeddings (N, D) of all cells, and the pooling's weights (N,); those of an ensemble side by side."""
        outputs = self.model.base_model(self.cells.unsqueeze(0), clinical=self.clinical)
        weights = outputs.attentions
        return outputs.cell_embeddings[0], None if weights is None else weights[0]

    def logits(self, embeddings: Tensor, mask: Tensor | None = None, clinical: Tensor | None = None) -> Tensor:
        """What the model says of the patient with some of the cells.

        Args:
            embeddings: (N, D)
            mask: (B, N) bool, the cells of each of B imagined patients; `None` = one with all.
            clinical: (B, F); by default the patient's own for all of them.

        Returns:
            (B, C) float64
        """
        if mask is None:
            mask = torch.ones(1, len(embeddings), dtype=torch.bool, device=embeddings.device)
        if clinical is None and self.clinical is not None:
            clinical = self.clinical.expand(len(mask), -1)
        at_once = max(1, _CELLS_AT_ONCE // len(embeddings))
        parts = []
        for start in range(0, len(mask), at_once):
            rows = slice(start, start + at_once)
            outputs = self.model(
                cell_embeddings=embeddings.expand(len(mask[rows]), -1, -1),
                bag_mask=mask[rows],
                clinical=None if clinical is None else clinical[rows],
            )
            parts.append(outputs.logits.double())
        return torch.cat(parts)

    def probabilities(self, embeddings: Tensor, mask: Tensor | None = None, clinical: Tensor | None = None) -> Tensor:
        """As `logits`, (B, C) with rows that sum to 1."""
        return self.logits(embeddings, mask, clinical).softmax(dim=-1)


def check_target(target: int | None, probabilities: Tensor | np.ndarray) -> int:
    """The label to explain, of C with these probabilities (C,): the positive one of two, else the favoured one.

    Raises:
        ValueError: a label that the model does not have.
    """
    labels = len(probabilities)
    if target is None:
        return 1 if labels == 2 else int(probabilities.argmax())
    if not 0 <= target < labels:
        raise ValueError(f"target={target}: expected a label from 0 to {labels - 1}.")
    return int(target)


def cell_effects(patient: PatientHead, embeddings: Tensor, target: int, effect: Effect, seed: int = 0) -> Tensor:
    """Change of P(target) that each cell makes, (N,) float64; see `explain_bag`.

    Args:
        patient: whose model answers.
        embeddings: (N, D) of `patient.encode`.
        target, effect, seed: as in `explain_bag`.
    """
    if len(embeddings) == 1:
        return embeddings.new_full((1,), torch.nan, dtype=torch.float64)

    def answer(mask: Tensor) -> Tensor:
        return patient.probabilities(embeddings, mask.to(embeddings.device))[:, target]

    return _EFFECTS[effect](answer, len(embeddings), seed)


def _leave_one_out(answer: Callable[[Tensor], Tensor], cells: int, seed: int) -> Tensor:
    everybody = torch.ones(1, cells, dtype=torch.bool)
    return answer(everybody) - answer(~torch.eye(cells, dtype=torch.bool))


def _sampled(answer: Callable[[Tensor], Tensor], cells: int, seed: int) -> Tensor:
    """The Banzhaf value: mean change that a cell makes to a random half of the others.

    Banzhaf values are the coefficients of the best linear approximation of the answer over all subsets (Hammer and
    Holzman, 1992), here fitted to random subsets, each with its complement. Of the values of cooperative games they
    suffer least from noise (Wang and Jia, "Data Banzhaf", AISTATS 2023, arXiv 2205.15466).
    """
    generator = torch.Generator().manual_seed(seed)
    halves = torch.rand(max(_FEWEST_SAMPLES, 2 * cells), cells, generator=generator) < 0.5
    sizes = halves.sum(dim=1)
    halves = halves[(sizes > 0) & (sizes < cells)]  # no model answers for a patient without cells
    difference = answer(halves) - answer(~halves)
    signs = torch.where(halves, 1.0, -1.0).to(difference)
    return torch.linalg.lstsq(signs, difference.unsqueeze(1)).solution.squeeze(1)


_EFFECTS: dict[str, Callable[[Callable[[Tensor], Tensor], int, int], Tensor]] = {
    "leave_one_out": _leave_one_out,
    "sampled": _sampled,
}


def _clinical_effects(patient: PatientHead, embeddings: Tensor, target: int) -> dict[str, float]:
    """P(target) minus P(target) where a value is taken away."""
    if not patient.features or patient.clinical is None:
        return dict.fromkeys(patient.features, 0.0)
    number = len(patient.features)
    without = patient.clinical.repeat(1 + number, 1)  # the first row keeps all
    without[1:][torch.eye(number, dtype=torch.bool)] = torch.nan
    mask = torch.ones(1 + number, len(embeddings), dtype=torch.bool, device=embeddings.device)
    answers = patient.probabilities(embeddings, mask, without)[:, target]
    return dict(zip(patient.features, (answers[0] - answers[1:]).tolist(), strict=True))


__all__ = ["Effect", "Explanation", "PatientHead", "cell_effects", "check_target", "explain_bag"]
