"""Distillation: a small student learns from the labels and from what a trained teacher says of the same patients.

    loss = alpha * (the student's own loss) + (1 - alpha) * T^2 * KL(teacher || student at temperature T)
           + feature_weight * distance of embeddings + attention_weight * KL(teacher || student) of attentions

The factor T^2 keeps the gradient of the soft labels as large as that of the hard ones, whatever the temperature
(Hinton, Vinyals and Dean 2015, arXiv 1503.02531, section 2). The feature term follows FitNets (Romero et al. 2015,
arXiv 1412.6550), the attention term compares who counts among the cells of a patient.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from peft import PeftModel
from torch import nn
from torch.utils.data import Dataset

from .adapters import unwrapped
from .bags import SampledBags
from .cohort import Cohort
from .lineage import learnt_images
from .modeling_lymph import LymphMILForBagClassification, LymphMILOutput
from .options import CohortOptions, ModelOptions, SplitOptions, TrainingOptions
from .options_distill import DistillOptions
from .recipes import Lesson, train
from .sampling import Key
from .teachers import Answer, DistillationError, Ensemble

logger = logging.getLogger(__name__)

# An attention of 0 where the teacher looks has an infinite divergence.
_SMALLEST_ATTENTION = 1e-8


def distill(
    cohort_options: CohortOptions,
    split_options: SplitOptions,
    model_options: ModelOptions,
    options: TrainingOptions,
    distill_options: DistillOptions,
) -> Path:
    """Train a student beside a teacher; everything else is as in `recipes.train`.

    Returns:
        The exported student, a patient model like any other.

    Raises:
        DistillationError: a teacher that cannot be read, has other labels or lacks what a term needs.
        LineageError: a teacher was trained on validation or test patients of the student.
    """
    return train(cohort_options, split_options, model_options, options, teaching=Distillation(distill_options))


class Distillation:
    """The teaching of a student by one or more teachers; see `recipes.Teaching`.

    Args:
        options: who teaches, and how the terms of the loss are weighed.
    """

    def __init__(self, options: DistillOptions):
        self.options = options
        self.sources = tuple(options.teacher)
        for source in self.sources:
            if learnt_images(source) is None:
                logger.warning(
                    "%s: no record of its training patients, so whether it knows the validation and test patients "
                    "cannot be checked. Give the run folder where you have it.",
                    source,
                )

    def lesson(self, plain: Lesson, patients: Cohort, rows: datasets.Dataset, accelerator: Accelerator) -> Lesson:
        """The student with the teacher's answers: asked once per patient before the training, then read.

        The teacher looks at the images as they are, whatever the student is shown: views of them or features.
        """
        student = unwrapped(plain.model)
        _refuse_without_attention(student, self.options)
        teachers = Ensemble(self.sources, student.config, needs=self.options)
        answers = teachers.answers(patients, rows, accelerator, cache_dir=self.options.teacher_cache)
        model = DistillationModel(plain.model, self.options, answers[0])
        return Lesson(model, TaughtBags(plain.dataset, answers), taught_collate(plain.collate))


class TaughtBags(Dataset):
    """Patients of a data set with the teacher's answers about the very cells that are shown.

    Args:
        bags: of the student.
        answers: one per patient, about all of its cells.
    """

    def __init__(self, bags: SampledBags, answers: list[Answer]):
        self.bags, self.answers = bags, answers

    def __len__(self) -> int:
        return len(self.bags)

    def __getitem__(self, key: Key | int) -> dict[str, Any]:
        """An item of the student with the fields of an `Answer`: `teacher_logits` (K, C) and so on."""
        answer = self.answers[key[1] if isinstance(key, tuple) else key]
        item = self.bags[key] | {f"teacher_{name}": tensor for name, tensor in answer.tensors().items()}
        if answer.attentions is not None:
            shown = self.bags.sampled_cells(key, len(answer.attentions))
            item["teacher_attentions"] = restricted(answer.attentions, shown)
        return item


def restricted(attentions: torch.Tensor, cells: list[int]) -> torch.Tensor:
    """(N,) -> (n,), the attentions of some cells, summing to 1 again; zeros where the teacher looks at none of them."""
    chosen = attentions[cells]
    return chosen / chosen.sum().clamp_min(_SMALLEST_ATTENTION)


def taught_collate(collate: Callable[[list], dict[str, torch.Tensor]]) -> Callable[[list], dict[str, torch.Tensor]]:
    """The collation of the student's inputs, with the teacher's answers stacked; attentions (B, N) padded with 0."""

    def taught(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = collate(items)
        for name in (name for name in items[0] if name.startswith("teacher_")):
            batch[name] = nn.utils.rnn.pad_sequence([item[name] for item in items], batch_first=True)
        return batch

    return taught


class DistillationModel(nn.Module):
    """A student whose loss also asks what the teacher said; without a teacher's answer it is the student alone.

    The teacher is frozen and its answers are inputs, so that no weight of it is here: nothing of it can be trained,
    change its mode, or be exported.

    Args:
        student: a patient model, with or without an adapter.
        options: weights of the terms.
        answer: any answer of the teacher, for the width of its embedding.
    """

    def __init__(self, student: LymphMILForBagClassification | PeftModel, options: DistillOptions, answer: Answer):
        super().__init__()
        self.student = student
        self.options = options
        self.projection = None
        if options.feature_weight:
            width = unwrapped(student).model.fuser.output_size
            self.projection = nn.Linear(width, len(answer.embedding))

    def forward(
        self,
        teacher_logits: torch.Tensor | None = None,
        teacher_embedding: torch.Tensor | None = None,
        teacher_attentions: torch.Tensor | None = None,
        **inputs: torch.Tensor,
    ) -> LymphMILOutput:
        r"""
        Args:
            teacher_logits: (B, K, C) of K teachers; `None` gives the student's own output.
            teacher_embedding: (B, E), for the feature term.
            teacher_attentions: (B, N), rows sum to 1, for the attention term.
            **inputs: of the student, with `labels`.
        """
        output = self.student(**inputs)
        if teacher_logits is None:
            return output
        options = self.options
        loss = options.alpha * output.loss
        if options.alpha < 1:
            loss = loss + (1 - options.alpha) * soft_label_loss(output.logits, teacher_logits, options.temperature)
        if options.feature_weight:
            distance = feature_loss(self.projection(output.bag_embedding), teacher_embedding, options.feature_loss)
            loss = loss + options.feature_weight * distance
        if options.attention_weight:
            loss = loss + options.attention_weight * attention_loss(output.attentions, teacher_attentions)
        output.loss = loss
        return output


def soft_label_loss(logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 KL(teacher || student), mean over patients.

    Args:
        logits: (B, C) of the student.
        teacher_logits: (B, K, C); the teacher is the mean of the K softened probabilities.
        temperature: T > 0, divides the logits of both.
    """
    target = (teacher_logits.float() / temperature).softmax(dim=-1).mean(dim=1)
    predicted = (logits.float() / temperature).log_softmax(dim=-1)
    return temperature**2 * F.kl_div(predicted, target, reduction="batchmean")


def feature_loss(projected: torch.Tensor, teacher: torch.Tensor, kind: str) -> torch.Tensor:
    """Distance of embeddings (B, E), mean over patients: 1 - cosine in [0, 2], or the mean squared error."""
    if kind == "cosine":
        return (1 - F.cosine_similarity(projected.float(), teacher.float(), dim=-1)).mean()
    return F.mse_loss(projected.float(), teacher.float())


def attention_loss(attentions: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) of attentions (B, N) over the same cells, 0 on padding; mean over patients."""
    logarithms = attentions.float().clamp_min(_SMALLEST_ATTENTION).log()
    return F.kl_div(logarithms, teacher.float(), reduction="batchmean")


def _refuse_without_attention(student: LymphMILForBagClassification, options: DistillOptions) -> None:
    pooler = student.model.pooler
    if options.attention_weight and pooler is not None and not pooler.is_attention:
        raise DistillationError(
            f"--attention-weight {options.attention_weight}: the student's --pooling {student.config.pooling} has no "
            "attention; choose one that has, such as gated_attention, or leave the term out"
        )
