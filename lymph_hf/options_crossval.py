"""Options of `lymph crossval`: the folds, what is searched inside them, and what stands beside the network."""

from dataclasses import dataclass
from typing import ClassVar

from .options import option

BASELINES = ("bag_size", "image_vote")


@dataclass(kw_only=True)
class CrossvalOptions:
    """How the patients are divided, and how the folds are worked on.

    Raises:
        ValueError: an unknown baseline, or a share of training patients outside (0, 1].
    """

    _argument_group_name: ClassVar[str] = "cross-validation"

    folds: int = option(5, "parts of the patients, stratified by label; each is predicted by a model of the others")
    repeats: int = option(1, "how often the patients are divided anew")
    validation_fraction: float = option(
        0.2, "share of each fold's training patients that chooses its epoch and fits its calibration and threshold"
    )
    positive_label: str | None = option(
        None, "label whose probability is reported (two labels); by default the last in sorted order"
    )
    jobs: int = option(1, "folds worked on at the same time, each in a process with its share of the threads")
    ensemble: bool = option(True, "save the folds' models as one model, lymph-mil")
    search: str | None = option(
        None, "YAML file of options to search inside each fold: name -> list of values, or {low, high, log}"
    )
    trials: int = option(20, "settings that the search tries in each fold")
    baselines: list[str] | None = option(
        None,
        "what stands beside the network, fitted on each fold's training patients: bag_size (logistic regression on the "
        "number of cells), image_vote (logistic regression on the features of each cell, counted and averaged per "
        "patient; cheap with --freeze-encoder --feature-cache), or none; by default bag_size. The clinical model and "
        "the blend are those of --clinical-baseline",
    )
    learning_curve: list[float] | None = option(
        None,
        "shares of each fold's training patients, such as 0.25 0.5, to train on as well; validation patients and folds "
        "stay the same",
    )
    resamples: int = option(2000, "bootstrap resamples of patients")

    def __post_init__(self) -> None:
        unknown = set(self.baselines or ()) - {*BASELINES, "none"}
        if unknown:
            raise ValueError(
                f"--baselines {' '.join(sorted(unknown))}: expected some of {', '.join(BASELINES)}, or none."
            )
        wrong = [share for share in self.learning_curve or () if not 0 < share <= 1]
        if wrong:
            raise ValueError(f"--learning-curve {' '.join(map(str, wrong))}: expected shares above 0, up to 1.")

    @property
    def baseline_names(self) -> tuple[str, ...]:
        """The baselines that each fold gets."""
        return tuple(name for name in self.baselines or ("bag_size",) if name != "none")
