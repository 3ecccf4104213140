"""Frozen-encoder features: computed once, kept on disk, and read in place of images.

Where the encoder does not learn, encoding the same cells again in each epoch is all of the cost of an epoch. Features
are stored under hashes of what they were computed from (`feature_keys`), so a file that does not fit is never found.
"""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from .adapter_targets import unwrapped
from .augment import Augmentation
from .bags import SampledBags, sample_cells
from .cohort import CLINICAL, Cohort, Patient, scan_images
from .feature_source import FeatureError, FeatureSource, agreed
from .feature_store import FeatureStore
from .processing_lymph import ClinicalStandardizer, LymphImageProcessor
from .sampling import Key

logger = logging.getLogger(__name__)


class Features(Mapping[str, torch.Tensor]):
    """Patient -> features (N, D) of its cells as they are, float32 and memory-mapped, in the order of the images.

    Attributes:
        views: number of augmented views beside them.
    """

    def __init__(self, bags: Mapping[str, Sequence[torch.Tensor]]):
        self._bags = {patient_id: tuple(bag) for patient_id, bag in bags.items()}
        self.views = min((len(bag) for bag in self._bags.values()), default=1) - 1

    def __getitem__(self, patient_id: str) -> torch.Tensor:
        return self.view(patient_id, 0)

    def __iter__(self) -> Iterator[str]:
        return iter(self._bags)

    def __len__(self) -> int:
        return len(self._bags)

    def view(self, patient_id: str, view: int) -> torch.Tensor:
        """(N, D): view 0 is the cells as they are, 1 to `views` are augmented."""
        return self._bags[patient_id][view]


def cached_features(
    model: nn.Module,
    processor: LymphImageProcessor,
    cohort: Cohort,
    cache_dir: str | Path,
    *,
    views: int = 0,
    augmentation: Augmentation | None = None,
    accelerator: Accelerator | None = None,
    chunk_size: int | str | None = 32,
    workers: int = 0,
) -> Features:
    """What the encoder gives for each cell of a cohort, from the cache as far as it is there.

    What is missing is encoded in evaluation mode and stored, shared among the processes of the accelerator.
    Independent programs may use one cache at the same time; of two that lack the same features, one computes them.

    Args:
        model: a patient model (also with adapters), or an encoder, (N, 3, H, W) -> (N, D); nothing of it is trained.
        processor: of the model.
        cohort: its labels and clinical values play no part.
        cache_dir: made if need be. It holds neither identifiers nor paths; features are patient data nevertheless.
        views: random views to keep beside the cells as they are. They depend on the images alone, on no seed of a run.
        augmentation: makes the views; `None` = `Augmentation()`.
        accelerator: device, precision and processes; `None` = what the machine has.
        chunk_size: cells that pass the encoder at once, as in `encode_cells`.
        workers: processes that decode images.

    Raises:
        FeatureError: a feature is not finite, or an image changed while it was read.
        CohortError: none of the images can be read.

    Example:

    ```python
    >>> features = cached_features(model, processor, read_cohort("cohort"), "cache")  # doctest: +SKIP
    >>> features["P001"].shape  # doctest: +SKIP
    torch.Size([84, 192])

    ```
    """
    if views < 0:
        raise FeatureError(f"views={views}: expected the number of augmented views, 0 for none.")
    cohort = cohort if cohort.digests else scan_images(cohort)
    accelerator = accelerator or Accelerator()
    source = FeatureSource(
        encoder_of(model).to(accelerator.device), processor, augmentation or Augmentation(), accelerator
    )
    store = FeatureStore(cache_dir, source.key)
    bags = {p.patient_id: source.bags(p.images, cohort.digests[p.patient_id], views) for p in cohort.patients}
    wanted = {bag.digest: bag for of_patient in bags.values() for bag in of_patient}
    found = store.read(wanted.keys())
    # The main process decides for all, or one would wait for others who have nothing left to do.
    absent = agreed([digest for digest in wanted if digest not in found], accelerator)
    if absent:
        about = {"encoder": encoder_name(model, processor), "data": _data_digest(cohort), "views": str(views)}
        source.store([wanted[digest] for digest in absent], store, about, chunk_size=chunk_size, workers=workers)
    if not wanted.keys() <= found.keys():
        found = store.read(wanted.keys())
    if lost := wanted.keys() - found.keys():
        raise FeatureError(f"{len(lost)} of {len(wanted)} bags vanished from {cache_dir} meanwhile; run it again.")
    cells = sum(len(patient.images) for patient in cohort.patients)
    logger.info("Features: %d cells, %d augmented views, %d bags encoded now.", cells, views, len(absent))
    return Features({patient_id: [found[bag.digest] for bag in of_patient] for patient_id, of_patient in bags.items()})


def encoder_of(model: nn.Module) -> nn.Module:
    """The encoder, with its adapters, of a patient model; any other module is taken for an encoder itself."""
    model = unwrapped(model)
    return model.base_model.encoder if isinstance(model, PreTrainedModel) else model


def encoder_name(model: nn.Module, processor: LymphImageProcessor) -> str:
    """For people: architecture and input, such as `vit_tiny_patch16_224 at 224 px`."""
    cfg = getattr(encoder_of(model), "pretrained_cfg", None) or {}
    name = cfg.get("architecture") or type(encoder_of(model)).__name__
    return f"{name} at {processor.size['height']} px"


def take_encoder(model: PreTrainedModel) -> nn.Module:
    """Remove the encoder of a patient model and return it; what stays is a head, which takes `cell_embeddings` only.

    The head moves to a device at once, and its checkpoints hold what is trained. `put_encoder` makes it whole again.
    """
    encoder, model.base_model.encoder = model.base_model.encoder, nn.Identity()
    return encoder


def put_encoder(model: PreTrainedModel, encoder: nn.Module) -> None:
    """The reverse of `take_encoder`."""
    model.base_model.encoder = encoder


class FeatureBags(SampledBags):
    """Patients as inputs of a model, as `BagDataset` gives them, with features in place of images.

    For the same key it draws the same cells as a `BagDataset` with the same seed. In training an augmented view is
    drawn for each epoch and patient, for all its cells: the stain of a smear changes as a whole (`Augmentation`).

    Args:
        features: of the patients and maybe others.
        patients: a key's index is the place in this list.
        standardizer: of the clinical values; the processor's.
        label2id, max_cells, seed: as in `BagDataset`.
        augmented: draw among the augmented views; False takes the cells as they are.
    """

    def __init__(
        self,
        features: Features,
        patients: Sequence[Patient],
        standardizer: ClinicalStandardizer,
        *,
        label2id: dict[str, int] | None = None,
        max_cells: int | None = None,
        augmented: bool = False,
        seed: int = 0,
    ):
        super().__init__(max_cells, seed)
        if augmented and features.views < 1:
            raise ValueError("augmented=True: the features have no augmented view; ask for views of at least 1.")
        self.bags = [[features.view(p.patient_id, v) for v in range(features.views + 1)] for p in patients]
        values = [{name: getattr(patient, name) for name in CLINICAL} for patient in patients]
        self.clinical = standardizer.transform(values) if standardizer.features else None
        self.label_ids = None if label2id is None else [label2id[patient.label] for patient in patients]
        self.augmented = augmented

    def __len__(self) -> int:
        return len(self.bags)

    def __getitem__(self, key: Key | int) -> dict[str, Any]:
        """`(epoch, index)`, or an index alone (epoch 0) -> `cell_embeddings` (N, D), `clinical` (F,), `labels`."""
        index = key[1] if isinstance(key, tuple) else key
        generator = self._generator(key)
        views = self.bags[index]
        chosen = sample_cells(len(views[0]), self.max_cells, generator)  # first, as a BagDataset does
        view = views[int(torch.randint(1, len(views), (), generator=generator)) if self.augmented else 0]
        item = {"cell_embeddings": view if len(chosen) == len(view) else view[chosen]}
        if self.clinical is not None:
            item["clinical"] = self.clinical[index]
        if self.label_ids is not None:
            item["labels"] = self.label_ids[index]
        return item


def _data_digest(cohort: Cohort) -> str:
    """For people: tells the images of one cohort from another's without naming it."""
    digests = sorted(digest for of_patient in cohort.digests.values() for digest in of_patient)
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:12]
