"""From probabilities to decisions: what is fitted after training, on patients the model was not trained on, and frozen.

The order matters: the calibration moves the probabilities, the threshold is chosen on the moved ones, and the
prediction sets speak of the probabilities that users will see.
"""

import logging
from collections.abc import Sequence

import numpy as np
from scipy.special import softmax

from .calibration import REFER, Conformal, fit_calibration, fit_conformal, logits_of, scaling_from_dict
from .configuration_lymph import LymphMILConfig
from .metrics import choose_threshold

logger = logging.getLogger(__name__)

REFERRED = "refer to flow cytometry"


def freeze_decisions(
    config: LymphMILConfig,
    labels: Sequence[int],
    probabilities: np.ndarray,
    *,
    calibration: str = "auto",
    threshold: float | None = None,
    coverage: float = 0.9,
) -> np.ndarray:
    """Fit calibration, threshold and prediction sets, and write them into a model's configuration.

    Args:
        config: of a model that has no calibration yet; `calibration`, `decision_threshold` and `conformal` are set.
        labels: (n,) of patients that the model was not trained on.
        probabilities: (n, C) of the model.
        calibration: `temperature`, `platt`, `none`, or `auto`: Platt scaling of two labels that both occur, as class
            weights move the mean that only it can move back; else temperature scaling.
        threshold: to freeze; `None` chooses it for the best balanced accuracy.
        coverage: of the prediction sets; 0 fits none.

    Returns:
        The calibrated probabilities (n, C).

    Raises:
        CalibrationError, ValueError: patients or options that allow no fit.
    """
    if config.calibration is not None:
        raise ValueError("The model is calibrated already: its probabilities cannot be calibrated a second time.")
    two = config.num_labels == 2 and len(set(labels)) == 2
    if calibration == "auto":
        calibration = "platt" if two else "temperature"
    if calibration != "none":
        scaling = fit_calibration(labels, logits_of(probabilities), method=calibration)
        config.calibration = scaling.to_dict()
        probabilities = calibrate(probabilities, config)
        logger.info("Calibration on %d patients: %s", len(labels), config.calibration)
    if threshold is not None:
        config.decision_threshold = threshold
    elif two:
        config.decision_threshold = choose_threshold(labels, probabilities)
    elif config.num_labels == 2:
        logger.warning(
            "All %d patients have one label: the decision threshold stays at %g.",
            len(labels),
            config.decision_threshold,
        )
    if coverage:
        conformal = fit_conformal(labels, probabilities, coverage=coverage)
        config.conformal = conformal.to_dict()
        _log_sets(config, conformal)
    return probabilities


def calibrate(probabilities: np.ndarray, config: LymphMILConfig) -> np.ndarray:
    """Probabilities (n, C) from before the calibration of `config` -> those from after it."""
    if config.calibration is None:
        return probabilities
    return softmax(scaling_from_dict(config.calibration).apply(logits_of(probabilities)), axis=1)


def decisions(probabilities: np.ndarray, config: LymphMILConfig) -> list[str] | None:
    """What the prediction sets say of each patient: a label's name, or `REFERRED`; `None` if the model has no sets."""
    if config.conformal is None:
        return None
    decided = Conformal.from_dict(config.conformal).decide(probabilities)
    return [REFERRED if label == REFER else config.id2label[int(label)] for label in decided]


def _log_sets(config: LymphMILConfig, conformal: Conformal) -> None:
    endless = [config.id2label[i] for i, quantile in enumerate(conformal.quantiles) if np.isinf(quantile)]
    if endless:
        logger.warning(
            "Prediction sets: too few patients of %s to ever rule it out with coverage %g, so everybody is referred;"
            " more validation patients, a lower --coverage or lymph crossval (all patients, out of fold) help.",
            " and of ".join(endless),
            conformal.coverage,
        )
