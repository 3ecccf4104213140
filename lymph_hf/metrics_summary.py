"""What a clinician asks of a two-class model beyond its plain scores, in one table of intervals."""

from numpy.typing import ArrayLike

from .metrics_bootstrap import Bootstrap, Interval
from .metrics_calibration import calibration_intervals
from .metrics_decision import predictive_values, sensitivity_at_specificity, specificity_at_sensitivity


def clinical_intervals(
    labels: ArrayLike,
    probabilities: ArrayLike,
    *,
    threshold: float,
    prevalence: float | None = None,
    bootstrap: Bootstrap | None = None,
) -> dict[str, Interval]:
    """Operating points, calibration, and predictive values at a prevalence, by names that fit `metrics.score`.

    `sensitivity_at_95_specificity`, `specificity_at_95_sensitivity`, `ece`, `calibration_slope`,
    `calibration_intercept`, and with a prevalence `ppv` and `npv` at the frozen threshold.

    Args:
        prevalence: share of positive patients where the model is to be used; None leaves the predictive values out.

    Raises:
        ValueError: as `metrics.score`; not two classes, prevalence outside (0, 1).
    """
    found = {
        "sensitivity_at_95_specificity": sensitivity_at_specificity(labels, probabilities, 0.95, bootstrap=bootstrap),
        "specificity_at_95_sensitivity": specificity_at_sensitivity(labels, probabilities, 0.95, bootstrap=bootstrap),
        **calibration_intervals(labels, probabilities, bootstrap=bootstrap),
    }
    if prevalence is not None:
        found |= predictive_values(
            labels, probabilities, prevalence=prevalence, threshold=threshold, bootstrap=bootstrap
        )
    return found
