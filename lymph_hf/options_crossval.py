"""Options of `lymph crossval`: the folds, and what is searched inside them."""

from dataclasses import dataclass
from typing import ClassVar

from .options import option


@dataclass(kw_only=True)
class CrossvalOptions:
    """How the patients are divided, and how the folds are worked on."""

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
    resamples: int = option(2000, "bootstrap resamples of patients")
