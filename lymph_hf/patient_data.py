"""The patients of a run: read and checked, split, on record, and as the items that a model learns from."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from .augment import Augmentation
from .bags import BagDataset, build_bags, cohort_fingerprint
from .cohort import Cohort, read_cohort, scan_images
from .features import FeatureBags, cached_features
from .files import write_json
from .modeling_lymph import LymphMILForBagClassification
from .options import CohortOptions, SplitOptions
from .processing_lymph import LymphImageProcessor
from .runs import Run, RunError
from .split_files import PARTS
from .splits import Split, make_split, read_split

logger = logging.getLogger(__name__)


class RecipeError(ValueError):
    """Options and data do not fit together; the message says what to change."""


def read_checked(options: CohortOptions, accelerator: Accelerator | None = None) -> Cohort:
    """A folder of patients, read and checked by the main process and handed to the others.

    Raises:
        CohortError: with file, row and what was expected.
    """
    shared = [None]
    if accelerator is None or accelerator.is_main_process:
        cohort = read_cohort(options.data, reference_date=options.reference_date)
        shared = [scan_images(cohort, strict=options.strict)]
        logger.info("%s", shared[0].summary())
    if accelerator is not None and accelerator.num_processes > 1:
        broadcast_object_list(shared)
    return shared[0]


def patients_of_part(cohort: Cohort, part: str) -> Cohort:
    """The patients of a folder of the challenge ("train", "test"), or "all" of any cohort.

    Raises:
        RecipeError: the layout has no such folder, or no usable patient lies in it.
    """
    if part == "all":
        return cohort
    if cohort.layout != "challenge":
        raise RecipeError(
            f"{cohort.root} is in the {cohort.layout} layout, which has no {part} folder; use --part all."
        )
    chosen = [patient.patient_id for patient in cohort.patients if patient.part == part]
    if not chosen:
        raise RecipeError(f"{cohort.root}: no usable patient in its {part} folder.")
    return cohort.select(chosen)


def ordered_labels(cohort: Cohort, positive_label: str | None) -> list[str]:
    """Label names in the order of their numbers; of two labels the positive one is last.

    Raises:
        RecipeError: the positive label is not in the cohort, or there are more than two.
    """
    names = list(cohort.label_names)
    if positive_label is None:
        return names
    if positive_label not in names or len(names) != 2:
        raise RecipeError(f"positive_label={positive_label!r}: expected one of two labels, the cohort has {names}.")
    return sorted(names, key=lambda name: name == positive_label)


def choose_split(cohort: Cohort, options: SplitOptions, seed: int) -> Split:
    """The split that the options name, or the one that they draw.

    Raises:
        SplitError: it cannot be read or drawn.
    """
    if options.split is not None:
        return read_split(options.split, cohort)
    return make_split(
        cohort,
        validation_fraction=options.validation_fraction,
        test_fraction=options.test_fraction,
        seed=seed,
    )


def record_data(run: Run, cohort: Cohort, split: Split, learnt: frozenset[str] = frozenset()) -> None:
    """Store what a run is trained on; on resume, refuse data that has changed meanwhile.

    Args:
        learnt: images that the weights knew before, from pretraining or through a teacher. They count as training
            images, so that their patients are never scored as held-out ones.

    Raises:
        RunError: the data has changed.
    """
    fingerprint = cohort_fingerprint(cohort)
    if run.cohort.exists():
        recorded = json.loads(run.cohort.read_text())["fingerprint"]
        if recorded != fingerprint:
            raise RunError(
                f"{cohort.root} has changed since {run.folder} was started (images, labels or clinical values). "
                "Restore it to resume, or start a new run in another --output."
            )
    split.save(run.split)
    digests = {
        part: {digest for patient_id in getattr(split, part) for digest in cohort.digests[patient_id]} for part in PARTS
    }
    digests["train"] |= learnt
    record = {
        "data": cohort.root.name,
        "fingerprint": fingerprint,
        "patients": {part: len(getattr(split, part)) for part in PARTS},
        "exclusions": [asdict(exclusion) for exclusion in cohort.exclusions],
        "warnings": list(cohort.warnings),
        "digests": {part: sorted(images) for part, images in digests.items()},
    }
    write_json(run.cohort, record)


class Bags:
    """The images of a cohort, and data sets over some of its patients.

    Args:
        cohort: checked.
        processor: of the model.
        label2id: of the model; `None` where labels are not needed.
        cache_dir: of the rows, see `build_bags`.
    """

    def __init__(
        self,
        cohort: Cohort,
        processor: LymphImageProcessor,
        label2id: dict[str, int] | None,
        cache_dir: str | None,
        accelerator: Accelerator,
    ):
        with accelerator.main_process_first():
            self.rows = build_bags(cohort, cache_dir=cache_dir)
        self.position = {patient.patient_id: i for i, patient in enumerate(cohort.patients)}
        self.processor = processor
        self.label2id = label2id

    def subset(self, ids: Sequence[str], **options) -> BagDataset:
        """Options as in `BagDataset`."""
        rows = self.rows.select([self.position[patient_id] for patient_id in ids])
        return BagDataset(rows, self.processor, label2id=self.label2id, **options)


class CachedBags:
    """The features of a cohort, and data sets over some of its patients, with the interface of `Bags`.

    Args:
        model: its encoder makes the features that the cache lacks.
        folder: of the cache.
        views: augmented views of each cell, 0 for none.
    """

    def __init__(
        self,
        cohort: Cohort,
        model: LymphMILForBagClassification,
        processor: LymphImageProcessor,
        accelerator: Accelerator,
        folder: str,
        *,
        views: int = 0,
        workers: int,
    ):
        self.cohort = cohort
        self.processor = processor
        self.label2id = model.config.label2id
        self.features = cached_features(
            model,
            processor,
            cohort,
            folder,
            views=views,
            accelerator=accelerator,
            chunk_size=model.config.chunk_size,
            workers=workers,
        )

    def subset(self, ids: Sequence[str], *, augmentation: Augmentation | None = None, **options) -> FeatureBags:
        """Options as in `FeatureBags`."""
        augmented = augmentation is not None and self.features.views > 0
        patients, standardizer = self.cohort.select(ids).patients, self.processor.standardizer
        return FeatureBags(
            self.features, patients, standardizer, label2id=self.label2id, augmented=augmented, **options
        )
