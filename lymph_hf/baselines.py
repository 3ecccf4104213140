"""The rows beside a network: other predictions of the same patients, scored alike and compared with it."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from .clinical import ClinicalModel
from .clinical_baseline import blend, choose_blend
from .cohort import Cohort
from .configuration_lymph import LymphMILConfig
from .evaluation import label_names
from .files import write_json
from .metrics import Bootstrap, bootstrap_intervals, choose_threshold
from .metrics_comparison import paired_bootstrap
from .reporting import scores_table

logger = logging.getLogger(__name__)

CLINICAL_MODEL = "clinical-model"
BLEND = "blend.json"
# Names of rows; of votes the beginning: "image vote, mean" ...
NETWORK, CLINICAL_ALONE, BLENDED, VOTE = "network", "clinical alone", "blend", "image vote"


@dataclass(frozen=True)
class Row:
    """What something else than the network says of the same patients.

    Attributes:
        name: for tables, such as "clinical alone".
        probabilities: (n, C), in the order of the patients and of the network's labels.
        threshold: its own frozen decision threshold; two labels only.
    """

    name: str
    probabilities: np.ndarray
    threshold: float


@dataclass(frozen=True)
class Blend:
    """How much of the clinical model goes into the blend, and where it decides; both chosen on validation patients.

    Attributes:
        clinical_weight: in [0, 1]; the network has the rest.
        threshold: two labels only.
        patients: how many validation patients chose them.
    """

    clinical_weight: float
    threshold: float
    patients: int

    @classmethod
    def choose(cls, labels: Sequence[int], network: np.ndarray, clinical: np.ndarray) -> Self:
        """The weight of least log-loss, then a threshold for balanced accuracy.

        Args:
            labels: (n,) of validation patients.
            network, clinical: (n, C), what either model says of them.
        """
        weight = choose_blend(labels, network, clinical)
        return cls(weight, frozen_threshold(labels, blend(network, clinical, weight)), len(labels))

    def save(self, run: Path) -> None:
        """Write `blend.json` into a run folder."""
        write_json(run / BLEND, asdict(self))

    @classmethod
    def load(cls, run: Path) -> Self | None:
        """What `save` wrote; `None` where there is none."""
        path = run / BLEND
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None

    def row(self, network: np.ndarray, clinical: np.ndarray) -> Row:
        """The blend of two predictions (n, C) of the same patients."""
        return Row(BLENDED, blend(network, clinical, self.clinical_weight), self.threshold)


def clinical_rows(run: Path, cohort: Cohort, network: np.ndarray, config: LymphMILConfig) -> list[Row]:
    """The run's clinical model and its blend with the network, where the run has them.

    Args:
        run: folder of the run.
        cohort: the patients, in the order of `network`.
        network: (n, C).
        config: of the network, for the order of its labels.

    Raises:
        ClinicalError: the clinical model cannot be read, or a value that it cannot take.
    """
    if not (run / CLINICAL_MODEL).is_dir():
        return []
    model = ClinicalModel.load(run / CLINICAL_MODEL)
    probabilities = ordered_columns(model.predict_proba(cohort.to_frame()), model.label_names, label_names(config))
    rows = [Row(CLINICAL_ALONE, probabilities, model.decision_threshold)]
    chosen = Blend.load(run)
    return rows if chosen is None else [*rows, chosen.row(network, probabilities)]


def score_rows(
    labels: Sequence[int],
    network: np.ndarray,
    threshold: float,
    rows: Sequence[Row],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Scores of every row with intervals, and the network's lead over it in pairs of the same resamples.

    Args:
        labels: (n,).
        network: (n, C).
        threshold: of the network.
        resamples, seed: of the bootstrap over patients.

    Returns:
        Name -> `threshold`, `scores` and `network_lead`, whose differences are network minus row.
    """
    report = {}
    for row in rows:
        intervals = bootstrap_intervals(
            labels, row.probabilities, threshold=row.threshold, resamples=resamples, seed=seed
        )
        lead = paired_bootstrap(
            labels,
            row.probabilities,
            network,
            thresholds=(row.threshold, threshold),
            bootstrap=Bootstrap(resamples, seed=seed),
        )
        report[row.name] = {
            "threshold": row.threshold if network.shape[1] == 2 else None,
            "scores": {name: interval.as_dict() for name, interval in intervals.items()},
            "network_lead": {name: comparison.as_dict() for name, comparison in lead.items()},
        }
        logger.info("%s (AUROC of the network minus its own: %s)", row.name, lead["auroc"].difference)
        logger.info("%s", scores_table(intervals))
    return report


def frozen_threshold(labels: Sequence[int], probabilities: np.ndarray) -> float:
    """A threshold for balanced accuracy; 0.5 where it cannot be chosen: other than two labels, or one alone."""
    two = probabilities.shape[1] == 2 and len(set(labels)) == 2
    return choose_threshold(labels, probabilities) if two else 0.5


def ordered_columns(probabilities: np.ndarray, names: Sequence[str], wanted: Sequence[str]) -> np.ndarray:
    """(n, C) with the columns of another model's labels.

    Raises:
        ValueError: other labels.
    """
    if set(names) != set(wanted):
        raise ValueError(f"a model of the labels {list(names)} cannot stand beside one of {list(wanted)}")
    return probabilities[:, [list(names).index(name) for name in wanted]]
