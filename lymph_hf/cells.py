"""Rows of single cells, for pretraining and probes: each with its image, its type and its patient."""

import bisect
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from tqdm.auto import tqdm

from .augment import Augmentation
from .bags import derived_seed
from .clinical_table import CohortError
from .images import open_cell_image
from .processing_lymph import LymphImageProcessor
from .sampling import Key

Reader = Callable[[int], bytes]


@dataclass(frozen=True)
class Cells:
    """A row per cell; images are read one at a time and only when asked for.

    Attributes:
        source: name of the folder or file, for messages.
        files: name of each image, unique within its source and patient.
        digests: SHA-256 of each image's bytes.
        cell_types: `None` where it is not known.
        patient_ids: `None` where it is not known.
        read: row -> the encoded image.
    """

    source: str
    files: tuple[str, ...]
    digests: tuple[str, ...]
    cell_types: tuple[str | None, ...]
    patient_ids: tuple[str | None, ...]
    read: Reader

    def __len__(self) -> int:
        return len(self.files)

    @property
    def type_names(self) -> tuple[str, ...]:
        """Sorted distinct cell types."""
        return tuple(sorted({name for name in self.cell_types if name is not None}))

    @property
    def groups(self) -> np.ndarray:
        """(n,) integers: cells of one patient share one; a cell without a patient is on its own."""
        keys = [f"cell {i}" if p is None else f"patient {p}" for i, p in enumerate(self.patient_ids)]
        return np.unique(keys, return_inverse=True)[1]

    @property
    def fingerprint(self) -> str:
        """A hash of images, types and patients in their order; of no path."""
        rows = zip(self.digests, self.cell_types, self.patient_ids, strict=True)
        return hashlib.sha256(repr(list(rows)).encode()).hexdigest()[:32]

    def select(self, rows: Iterable[int]) -> Self:
        """The rows named, in the order given."""
        rows = tuple(int(row) for row in rows)
        columns = {name: tuple(getattr(self, name)[row] for row in rows) for name in _COLUMNS}
        return replace(self, **columns, read=_Chosen(self.read, rows))

    def labelled(self) -> Self:
        """The rows with a cell type."""
        return self.select(row for row, name in enumerate(self.cell_types) if name is not None)


_BYTES_AT_ONCE = 2**21  # of pictures that are decoded and augmented together: few, so that they stay in the cache
_COLUMNS = ("files", "digests", "cell_types", "patient_ids")


def join_cells(parts: Sequence[Cells]) -> Cells:
    """Several sources as one. Patients of different sources stay different, whatever their names."""
    if len(parts) == 1:
        return parts[0]
    columns = {name: sum((getattr(part, name) for part in parts), ()) for name in _COLUMNS[:-1]}
    patient_ids = [None if p is None else f"{n}:{p}" for n, part in enumerate(parts) for p in part.patient_ids]
    return Cells(
        source=" + ".join(part.source for part in parts),
        **columns,
        patient_ids=tuple(patient_ids),
        read=_Joined([part.read for part in parts], np.cumsum([len(part) for part in parts]).tolist()),
    )


def hold_out(cells: Cells, fraction: float, seed: int, *, by_type: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Rows to learn from, and held-out rows; a patient, or an image that stands twice, is never on both sides.

    Args:
        fraction: share of the cells to hold out, 0 to below 1; patients go as a whole, so it is met roughly.
        seed: of the draw.
        by_type: hold out that share of each type, but at least one patient; for types that are the same in all cells
            of a patient.

    Raises:
        CohortError: nothing would be left on one side.
    """
    every = np.arange(len(cells))
    if fraction == 0:
        return every, every[:0]
    # Cells of one patient, or with the same bytes, belong together.
    groups = _merged(cells.groups, np.unique(cells.digests, return_inverse=True)[1])
    order = np.random.default_rng(seed).permutation(groups.max() + 1)
    held = np.zeros(len(cells), dtype=bool)
    for rows in _rows_of_types(cells, groups) if by_type else [every]:
        drawn = order[np.isin(order, groups[rows])]
        sizes = np.bincount(groups[rows], minlength=len(order))[drawn]
        # Of each type at least one patient, if by type: a score needs all of them.
        share = max(fraction * len(rows), sizes[0] / 2 if by_type else 0)
        held[np.isin(groups, drawn[np.cumsum(sizes) - sizes / 2 <= share])] = True
        if not held[rows].any() or held[rows].all():
            raise CohortError(
                f"{cells.source}: a share of {fraction} of {len(rows)} cells of {len(drawn)} patients or "
                "images cannot be held out; change --validation-fraction (0 holds out none)"
            )
    return every[~held], every[held]


def _rows_of_types(cells: Cells, groups: np.ndarray) -> list[np.ndarray]:
    """Rows by type, each group at the type of its first row."""
    _, first = np.unique(groups, return_index=True)
    types = np.array(cells.cell_types)[first][groups]
    return [np.flatnonzero(types == name) for name in np.unique(types)]


def _merged(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(n,) numbers from 0 of the groups that result when rows equal in either column are put together."""
    nodes = first.max() + 1 + second
    size = int(nodes.max()) + 1
    _, component = connected_components(coo_array((np.ones(len(first)), (first, nodes)), shape=(size, size)))
    return np.unique(component[first], return_inverse=True)[1]


class CellDataset(torch.utils.data.Dataset):
    """Cells as inputs of a model: decoded, augmented and normalised on access.

    What is random is decided by `(seed, epoch, row)` alone, the masks of a masked autoencoder included, so it does
    not depend on processes or workers, and a resumed run sees what it would have seen.

    Args:
        cells: the rows.
        processor: size, mean and standard deviation of the model's input.
        label2id: number of each cell type; `None` leaves the labels out.
        patches: of an image, to draw the `noise` that decides its mask; `None` draws none.
        augmentation: random views for training; `None` shows the cells as they are.
        seed: of noise and augmentation.
        preload: decode all cells now and keep their pixels, `len(cells) * 3 * H * W` bytes.
    """

    def __init__(
        self,
        cells: Cells,
        processor: LymphImageProcessor,
        *,
        label2id: dict[str, int] | None = None,
        patches: int | None = None,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        preload: bool = False,
    ):
        self.cells = cells
        self.processor = processor
        self.label_ids = None if label2id is None else [label2id[name] for name in cells.cell_types]
        self.patches = patches
        self.augmentation = augmentation
        self.seed = seed
        self.pixels = None
        if preload:
            rows = tqdm(range(len(cells)), desc="decoding cells", leave=False, disable=None)
            self.pixels = torch.cat([self._decoded([row]) for row in rows])

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, key: Key | int) -> dict[str, Any]:
        """`(epoch, row)`, or a row alone (epoch 0) -> `pixel_values` (3, H, W), and `noise` (L,) or `labels` ()."""
        return {name: values[0] for name, values in self.__getitems__([key]).items()}

    def __getitems__(self, keys: Sequence[Key | int]) -> dict[str, torch.Tensor]:
        """What a `DataLoader` asks for: the items of several keys, stacked; it takes `collate_fn=default_convert`.

        Pictures are made in the batch's own memory, a few at once: to get new memory from the system and to copy into
        it took as long as to decode and augment.
        """
        pairs = [key if isinstance(key, tuple) else (0, key) for key in keys]
        rows = [row for _, row in pairs]
        generators = [torch.Generator().manual_seed(derived_seed(self.seed, *pair)) for pair in pairs]
        pixels = torch.empty(len(rows), 3, self.processor.size.height, self.processor.size.width)
        at_once = max(1, _BYTES_AT_ONCE // pixels[0].nbytes)
        for start in range(0, len(rows), at_once):
            some = slice(start, start + at_once)
            self._fill(pixels[some], rows[some], generators[some])
        batch = {"pixel_values": pixels}
        if self.patches is not None:
            batch["noise"] = torch.stack([torch.rand(self.patches, generator=generator) for generator in generators])
        if self.label_ids is not None:
            batch["labels"] = torch.tensor([self.label_ids[row] for row in rows])
        return batch

    def _fill(self, pixels: torch.Tensor, rows: Sequence[int], generators: Sequence[torch.Generator]) -> None:
        """Make the inputs of some rows in (n, 3, H, W) float32."""
        cells = self._decoded(rows) if self.pixels is None else self.pixels.index_select(0, torch.tensor(rows))
        if self.augmentation is None:
            pixels.copy_(cells)
        else:
            # Cells come in any order: each is stained as a patient of its own.
            self.augmentation.of_patients(cells[:, None], generators, out=pixels[:, None])
        self.processor.normalize_cells(pixels, inplace=True)

    def _decoded(self, rows: Sequence[int]) -> torch.Tensor:
        """(n, 3, H, W) uint8"""
        # A moved and restained view is no exact picture, and JPEGs of twice the size are read much faster at half.
        size = None if self.augmentation is None else (self.processor.size.width, self.processor.size.height)
        return self.processor.stack([open_cell_image(self.cells.read(row), at_least=size).image for row in rows])


@dataclass(frozen=True)
class _Chosen:
    read: Reader
    rows: tuple[int, ...]

    def __call__(self, row: int) -> bytes:
        return self.read(self.rows[row])


@dataclass(frozen=True)
class _Joined:
    parts: Sequence[Reader]
    ends: Sequence[int]

    def __call__(self, row: int) -> bytes:
        part = bisect.bisect_right(self.ends, row)
        return self.parts[part](row - (self.ends[part - 1] if part else 0))
