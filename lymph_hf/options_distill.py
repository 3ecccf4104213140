"""Options of `lymph distill`, beside those of `lymph train` for the student."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from .options import option


@dataclass(kw_only=True)
class DistillOptions:
    """Who teaches, and what the student learns from it.

    Raises:
        ValueError: a number outside its range.
    """

    _argument_group_name: ClassVar[str] = "distillation"

    teacher: list[str] = option(
        ...,
        "run folder, model folder or Hub id of a patient model, or RUN/clinical-model; the probabilities of several "
        "are averaged",
    )
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
