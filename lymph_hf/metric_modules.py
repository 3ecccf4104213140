"""`evaluate.Metric` modules over `metrics`, made in the package: they work offline, without `evaluate.load`.

Importing this module imports `evaluate`, which takes seconds: import it inside the function that needs it.

Example:
    >>> from lymph_hf.metric_modules import PatientMetrics
    >>> metric = PatientMetrics()
    >>> metric.add_batch(predictions=[0.1, 0.9], references=[0, 1])
    >>> metric.compute(threshold=0.5)["balanced_accuracy"]
    1.0
"""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np

from .metrics import bootstrap_intervals, score

_INPUTS = """
Args:
    predictions: one entry per patient. Configuration "default": the probability of class 1, a float.
        Configuration "multiclass": the probabilities of the C >= 3 classes, floats that sum to 1.
    references: the true class of each patient, an integer in 0..C-1.
    threshold: "default" only; class 1 is decided when its probability >= threshold (default 0.5). Freeze it
        on validation patients.
"""

_CITATION = """\
@article{hanley1982meaning,
  title   = {The meaning and use of the area under a receiver operating characteristic ({ROC}) curve},
  author  = {Hanley, James A. and McNeil, Barbara J.},
  journal = {Radiology},
  volume  = {143},
  number  = {1},
  pages   = {29--36},
  year    = {1982}
}
@article{brier1950verification,
  title   = {Verification of forecasts expressed in terms of probability},
  author  = {Brier, Glenn W.},
  journal = {Monthly Weather Review},
  volume  = {78},
  number  = {1},
  pages   = {1--3},
  year    = {1950}
}
"""

_BOOTSTRAP_CITATION = """\
@article{efron1987better,
  title   = {Better bootstrap confidence intervals},
  author  = {Efron, Bradley},
  journal = {Journal of the American Statistical Association},
  volume  = {82},
  number  = {397},
  pages   = {171--185},
  year    = {1987}
}
"""


class _PatientModule(evaluate.Metric):
    """What the modules share: their input features and how a batch of them becomes arrays."""

    DESCRIPTION: str
    CITATION: str
    INPUTS: str

    def _info(self) -> evaluate.MetricInfo:
        probability = datasets.Value("float64")
        predictions = {"default": probability, "multiclass": datasets.List(probability)}
        if self.config_name not in predictions:
            raise ValueError(f"config_name must be one of {sorted(predictions)}, got {self.config_name!r}")
        return evaluate.MetricInfo(
            description=self.DESCRIPTION,
            citation=self.CITATION,
            inputs_description=self.INPUTS,
            license="Apache-2.0",
            features=datasets.Features(
                {"predictions": predictions[self.config_name], "references": datasets.Value("int64")}
            ),
        )

    def _probabilities(self, predictions: Sequence) -> np.ndarray:
        """(n,) or (n, C). Without patients C is unknown, and any C >= 3 names the same scores."""
        if self.config_name == "multiclass" and len(predictions) == 0:
            return np.empty((0, 3))
        return np.asarray(predictions, dtype=np.float64)


class PatientMetrics(_PatientModule):
    """`metrics.score` as an `evaluate` module."""

    DESCRIPTION = (
        "Patient-level scores of a probabilistic classifier. Two classes: balanced accuracy, AUROC, average"
        " precision, sensitivity, specificity, Brier score and accuracy. Three or more: balanced accuracy,"
        " macro one-versus-rest AUROC, multi-class Brier score and accuracy. A score that the references"
        " leave undefined is NaN."
    )
    CITATION = _CITATION
    INPUTS = _INPUTS + "Returns:\n    a dictionary of the scores as floats, and the number of patients, n.\n"

    def _compute(self, predictions: Sequence, references: Sequence[int], threshold: float = 0.5) -> dict[str, float]:
        return score(references, self._probabilities(predictions), threshold=threshold)


class PatientIntervals(_PatientModule):
    """`metrics.bootstrap_intervals` as an `evaluate` module; its keys differ from `PatientMetrics`."""

    DESCRIPTION = (
        "Confidence intervals of the patient-level scores, by the bootstrap over patients: percentile, or"
        " bias-corrected and accelerated. Resamples in which a score is undefined are left out and their"
        " share is reported."
    )
    CITATION = _CITATION + _BOOTSTRAP_CITATION
    INPUTS = _INPUTS + (
        "    resamples, level, seed, method: as in lymph_hf.metrics.bootstrap_intervals.\n"
        'Returns:\n    a dictionary "<score>_interval" -> {"value", "low", "high", "level", "dropped"};'
        " None = undefined.\n"
    )

    def _compute(
        self, predictions: Sequence, references: Sequence[int], **options
    ) -> dict[str, dict[str, float | None]]:
        intervals = bootstrap_intervals(references, self._probabilities(predictions), **options)
        return {f"{name}_interval": interval.as_dict() for name, interval in intervals.items()}
