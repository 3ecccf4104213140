"""What given weights have learnt from: patients whom they know are no evaluation patients of what is built on them."""

import json
import logging
from collections.abc import Iterable
from pathlib import Path

from .cohort import Cohort
from .probing import RECORD
from .runs import Run
from .splits import Split

logger = logging.getLogger(__name__)


class LineageError(ValueError):
    """Weights have learnt from patients who are to be evaluated; the message says which and what to do."""


def learnt_images(source: str | Path) -> tuple[frozenset[str], bool] | None:
    """SHA-256 of the images that weights were trained on, and whether with their patients' labels.

    Args:
        source: a run of `lymph train` or `lymph pretrain`, or a folder that lies in one (`encoder`, `classifier`,
            `lymph-mil`, `clinical-model`).

    Returns:
        `None` where no record tells: published weights, a model from elsewhere.
    """
    for folder in (Path(source), Path(source).parent):
        if (folder / RECORD).is_file():
            record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            return frozenset(record["digests"]), record.get("objective") == "patient-label"
        run = Run(folder)
        if run.cohort.is_file():
            recorded = json.loads(run.cohort.read_text(encoding="utf-8"))["digests"]
            return frozenset(recorded["train"]), True
    return None


def ancestors_images(sources: Iterable[str | Path | None], cohort: Cohort, split: Split) -> frozenset[str]:
    """The images that all these weights were trained on, after a check against a split.

    Args:
        sources: as in `learnt_images`; `None` and sources without a record are passed over.
        cohort: checked, so that it has digests.
        split: of its patients.

    Raises:
        LineageError: weights that know the labels of validation or test patients. Of weights that only know their
            images, as a masked autoencoder does, a warning is logged.
    """
    found: set[str] = set()
    for source in filter(None, sources):
        known = learnt_images(source)
        if known is None:
            continue
        digests, labels = known
        refuse_known(source, digests, cohort.select((*split.validation, *split.test)), labels=labels)
        found |= digests
    return frozenset(found)


def refuse_known(source: str | Path, digests: frozenset[str], patients: Cohort, *, labels: bool = True) -> None:
    """Check that weights do not know these patients.

    Args:
        source: of the weights, for the message.
        digests: of the images that they were trained on.
        patients: to be evaluated.
        labels: whether the weights learnt labels; else it is a warning.

    Raises:
        LineageError: they know some.
    """
    known = [p.patient_id for p in patients.patients if not digests.isdisjoint(patients.digests[p.patient_id])]
    if not known:
        return
    told = (
        f"{source} was trained on {len(known)} of the {len(patients.patients)} validation and test patients "
        f"(first {known[0]!r}), so no score of them would hold. Train both on the same split: --split RUN/split.json, "
        "or lymph pretrain --split RUN."
    )
    if labels:
        raise LineageError(told)
    logger.warning("%s", told)
