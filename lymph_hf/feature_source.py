"""From image files to features: a frozen encoder over bags of cells."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from .adapters import evaluation_mode
from .augment import Augmentation
from .bags import cell_pixels
from .encoders import encode_cells
from .feature_keys import bag_digest, feature_key
from .feature_store import FeatureStore, StoredBag
from .processing_lymph import LymphImageProcessor

_FILE_BYTES = 2**26  # of features in one file: bounds the memory of writing and what an interruption loses


class FeatureError(RuntimeError):
    """Features cannot be computed or kept; the message says why and what to do."""


@dataclass(frozen=True)
class Bag:
    """One view of one patient's images.

    Attributes:
        images: files.
        image_digests: SHA-256 of their bytes, in the same order.
        view: 0 = as they are.
        digest: of all that, but for the names of the files.
    """

    images: tuple[Path, ...]
    image_digests: tuple[str, ...]
    view: int
    digest: str


class FeatureSource:
    """A frozen encoder and how its images are prepared.

    Args:
        encoder: (N, 3, H, W) -> (N, D), on the accelerator's device, in any mode.
        processor: prepares the images.
        augmentation: makes the views 1, 2 ...
        accelerator: precision and processes.
    """

    def __init__(
        self, encoder: nn.Module, processor: LymphImageProcessor, augmentation: Augmentation, accelerator: Accelerator
    ):
        self.encoder = encoder
        self.processor = processor
        self.augmentation = augmentation
        self.accelerator = accelerator
        self.key = feature_key(encoder, processor, accelerator.mixed_precision)

    def bags(self, images: Sequence[Path], image_digests: Sequence[str], views: int) -> list[Bag]:
        """The views 0 to `views` of one patient."""
        images, digests = tuple(images), tuple(image_digests)
        return [Bag(images, digests, v, bag_digest(digests, v, self.augmentation)) for v in range(views + 1)]

    def store(
        self,
        bags: Sequence[Bag],
        store: FeatureStore,
        about: Mapping[str, str],
        *,
        chunk_size: int | str | None,
        workers: int,
    ) -> None:
        """Encode bags and store them, shared among the processes; called by each of them with the same bags."""
        is_main = self.accelerator.is_main_process
        with store.locked() if is_main else nullcontext():
            # Another program may have stored some while this one waited for the lock.
            stored = store.read([bag.digest for bag in bags]) if is_main else {}
            left = set(agreed([bag.digest for bag in bags if bag.digest not in stored], self.accelerator))
            left = [bag for bag in bags if bag.digest in left]
            mine = left[self.accelerator.process_index :: self.accelerator.num_processes]
            for batch in _in_files(self.encoded(mine, chunk_size=chunk_size, workers=workers)):
                store.write(batch, about)
            self.accelerator.wait_for_everyone()

    def encoded(self, bags: Sequence[Bag], *, chunk_size: int | str | None, workers: int) -> Iterator[StoredBag]:
        """The bags with their features, one after the other.

        Raises:
            FeatureError: a feature is not finite, or an image has changed.
        """
        pixels = _Pixels(bags, self.processor, self.augmentation)
        # Its own generator: a loader would otherwise draw from the global one, and caching would change a run.
        loader = DataLoader(pixels, batch_size=None, num_workers=workers, generator=torch.Generator())
        dtype = next(self.encoder.parameters()).dtype
        shown = None if self.accelerator.is_main_process else True  # None: shown on a terminal
        cells = sum(len(bag.images) for bag in bags)
        with evaluation_mode(self.encoder), tqdm(total=cells, desc="encoding", unit="cell", disable=shown) as bar:
            for bag, pixel_values in zip(bags, loader, strict=True):
                pixel_values = pixel_values.to(self.accelerator.device, dtype)
                with torch.no_grad(), self.accelerator.autocast():
                    features = encode_cells(self.encoder, pixel_values, chunk_size).float().cpu()
                if not features.isfinite().all():
                    raise FeatureError(
                        f"{bag.images[0].parent}: the encoder gives numbers that are not finite. Use mixed precision "
                        "bf16 or no, or other weights."
                    )
                bar.update(len(features))
                yield StoredBag(bag.digest, bag.view, features)


class _Pixels(Dataset):
    """Normalised pixels (N, 3, H, W) of bags; the random views follow from the digest of the bag."""

    def __init__(self, bags: Sequence[Bag], processor: LymphImageProcessor, augmentation: Augmentation):
        self.bags = bags
        self.processor = processor
        self.augmentation = augmentation

    def __len__(self) -> int:
        return len(self.bags)

    def __getitem__(self, index: int) -> torch.Tensor:
        bag = self.bags[index]
        encoded = [path.read_bytes() for path in bag.images]
        if tuple(hashlib.sha256(image).hexdigest() for image in encoded) != bag.image_digests:
            raise FeatureError(f"{bag.images[0].parent}: an image has changed since the cohort was checked. Run again.")
        generator = torch.Generator().manual_seed(int(bag.digest[:15], 16))
        return cell_pixels(encoded, self.processor, self.augmentation if bag.view else None, generator)


def agreed(digests: list[str], accelerator: Accelerator) -> list[str]:
    """The main process's list, in every process."""
    shared = [digests]
    if accelerator.num_processes > 1:
        broadcast_object_list(shared)
    return shared[0]


def _in_files(bags: Iterator[StoredBag]) -> Iterator[list[StoredBag]]:
    """Bags in groups, each the content of a file."""
    group, size = [], 0
    for bag in bags:
        group.append(bag)
        size += bag.features.nbytes
        if size >= _FILE_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group
