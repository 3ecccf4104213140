"""Options of distillation, beside those of `lymph train` or `lymph crossval` for the student."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from .options import option


@dataclass(kw_only=True)
class TeachingOptions:
    """What a student learns from its teacher.

    Raises:
        ValueError: a number outside its range.
    """

    _argument_group_name: ClassVar[str] = "distillation"

    alpha: float = option(
        0.5, "share of the labels in the loss, in [0, 1]; the teacher has the rest, 1 is plain training"
    )
    temperature: float = option(2.0, "above 0; what softens the probabilities of teacher and student")
    feature_weight: float = option(0.0, "weight of the likeness of the patients' embeddings, by a learnt projection")
    feature_loss: Literal["cosine", "mse"] = option("cosine", "how embeddings are compared")
    attention_weight: float = option(0.0, "weight of the divergence between the attentions over the same cells")
    teacher_cache: str | None = option(
        None, "where the teacher's answers are kept, a file per patient; by default beside the datasets cache"
    )

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"--alpha {self.alpha}: expected a number from 0 (teacher alone) to 1 (labels alone).")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"--temperature {self.temperature}: expected a number above 0; 1 to 5 are common.")
        for name in ("feature_weight", "attention_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected 0 (without) or more.")


@dataclass(kw_only=True)
class DistillOptions(TeachingOptions):
    """Who teaches, and what the student learns from it."""

    teacher: list[str] = option(
        ...,
        "run folder, model folder or Hub id of a patient model, or RUN/clinical-model; the probabilities of several "
        "are averaged",
    )


@dataclass(kw_only=True)
class FoldTeacherOptions(TeachingOptions):
    """Who teaches the models of a cross-validation."""

    teacher: str | None = option(
        None,
        "output of another lymph crossval with the same patients, folds and seed: the model of each of its folds "
        "teaches that of the same fold, so that no teacher knows the patients that its student is scored on",
    )
