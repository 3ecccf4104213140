"""Cells in a picture of a whole smear field -> one crop per nucleated cell, at the scale of the training images.

Giemsa-stained nuclei absorb red light far more than red cells do; where the limit lies in a given smear is read off
the two peaks of the optical density. The red cells are the ruler: they are about 7.5 um wide in every smear, and so
tell the magnification.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

RED_CELLS_PER_CROP = 4.8  # width of a training image of 224 pixels, in red cells of 47
_WORKING_SIDE = 1600  # pixels; finer detail does not help to find cells
_NUCLEUS = 0.40  # least optical density in red, above the background
_FOREGROUND = 0.12  # optical density in green, above the background
_NUCLEUS_AREA = (0.4, 8.0)  # in areas of a red cell; smaller: platelets; larger: clumps and stain deposits
_FEWEST_RED_CELLS = 5
_ROUND = 1.35  # area over that of the largest disc inside; above, red cells touch
_LARGEST_OVERVIEW = 1000  # pixels


class SmearError(ValueError):
    """No cell can be cut out of the field; the message says why, and what to do."""


@dataclass(frozen=True)
class Field:
    """What was found in one smear field.

    Attributes:
        crops: RGB squares around each cell, in reading order.
        overview: the field, small, with numbered frames.
        crop_side: pixels of the field.
        red_cells: number of single red cells that were measured; 0 where the side was given.
        at_border: nuclei left out because the border cuts them.
    """

    crops: tuple[Image.Image, ...]
    overview: Image.Image
    crop_side: int
    red_cells: int
    at_border: int


def find_cells(field: Image.Image, crop_side: int | None = None) -> Field:
    """Find the nucleated cells of a smear field.

    Args:
        field: RGB.
        crop_side: of the square cut around a cell, in pixels of the field; `None` = from the width of the red cells.

    Raises:
        SmearError: no ruler (fewer than five single red cells) and no side given, or no nucleus.
    """
    reduction = max(1.0, max(field.size) / _WORKING_SIDE)
    small = field if reduction == 1 else field.resize([round(side / reduction) for side in field.size])
    density = _density(small)
    foreground = density[..., 1] > _FOREGROUND
    nuclei = ndimage.binary_opening(density[..., 0] > _limit(density[..., 0][foreground]), iterations=1)
    if crop_side is None:
        widths = _red_cell_widths(foreground, nuclei)
        if len(widths) < _FEWEST_RED_CELLS:
            raise SmearError(
                f"Only {len(widths)} single red cells were found, too few to tell the magnification. Give the crop "
                f"size: about {RED_CELLS_PER_CROP:g} times the width of a red cell, in pixels."
            )
        width = float(np.median(widths))
        side = round(RED_CELLS_PER_CROP * width * reduction)
    else:
        widths, width, side = [], crop_side / RED_CELLS_PER_CROP / reduction, crop_side
    centres, at_border = _nuclei(nuclei, width)
    if not centres:
        raise SmearError(
            "No nucleated cell was found: no stained nucleus of the right size lies whole inside the field. "
            "Check stain and focus, or send crops of single cells."
        )
    centres = [(y * reduction, x * reduction) for y, x in centres]
    pixels = np.asarray(field)
    crops = tuple(Image.fromarray(_crop(pixels, centre, side)) for centre in centres)
    return Field(crops, _overview(field, centres, side), side, len(widths), at_border)


def _density(image: Image.Image) -> np.ndarray:
    """(H, W, 3) optical density above the background, which is the lightest twentieth of the field."""
    density = -np.log((np.asarray(image, np.float32) + 1) / 256)
    density = ndimage.gaussian_filter(density, (1, 1, 0))
    return density - np.percentile(density[::4, ::4], 5, axis=(0, 1))


def _limit(density: np.ndarray) -> float:
    """Between red cells and nuclei: the cut that parts the values best (Otsu, IEEE Trans. SMC 9:62, 1979)."""
    counts, edges = np.histogram(density, bins=128, range=(0.0, 2.0))
    middles = (edges[:-1] + edges[1:]) / 2
    below, above = counts.cumsum(), counts.sum() - counts.cumsum()
    mass = (counts * middles).cumsum()
    means_below, means_above = mass / np.maximum(below, 1), (mass[-1] - mass) / np.maximum(above, 1)
    between = below * above * (means_above - means_below) ** 2.0
    return max(_NUCLEUS, float(edges[1:][between.argmax()]))


def _red_cell_widths(foreground: np.ndarray, nuclei: np.ndarray) -> list[float]:
    """Diameters of the red cells that neither touch another cell nor the border."""
    cells = ndimage.binary_fill_holes(ndimage.binary_opening(foreground, iterations=2))
    labels, number = ndimage.label(cells)
    if number == 0:
        return []
    excluded = {*np.unique(labels[nuclei]), *_border(labels), 0}
    index = np.arange(1, number + 1)
    areas = ndimage.sum_labels(cells, labels, index)
    radii = ndimage.maximum(ndimage.distance_transform_edt(cells), labels, index)
    whole = [label not in excluded and area > 60 for label, area in zip(index, areas, strict=True)]
    return [
        2 * float(np.sqrt(area / np.pi))
        for area, radius, usable in zip(areas, radii, whole, strict=True)
        if usable and area <= _ROUND * np.pi * radius**2
    ]


def _nuclei(nuclei: np.ndarray, width: float) -> tuple[list[tuple[float, float]], int]:
    """Centres (y, x) in reading order, and the number of nuclei that the border cuts."""
    lobes = max(1, round(0.1 * width))
    joined = ndimage.binary_fill_holes(ndimage.binary_closing(np.pad(nuclei, lobes), iterations=lobes))
    joined = joined[lobes:-lobes, lobes:-lobes]
    labels, number = ndimage.label(joined)
    if number == 0:
        return [], 0
    areas = ndimage.sum_labels(joined, labels, np.arange(1, number + 1)) / (np.pi / 4 * width**2)
    cut = _border(labels)
    centres, at_border = [], 0
    for label, (area, box) in enumerate(zip(areas, ndimage.find_objects(labels), strict=True), start=1):
        if not _NUCLEUS_AREA[0] <= area <= _NUCLEUS_AREA[1]:
            continue
        if label in cut:
            at_border += 1
            continue
        corner = np.array([part.start for part in box])
        centres += [tuple(corner + centre) for centre in _centres(labels[box] == label, width)]
    row = 2 * width
    return sorted(centres, key=lambda centre: (centre[0] // row, centre[1])), at_border


def _centres(blob: np.ndarray, width: float) -> list[np.ndarray]:
    """One centre, or one per nucleus where several touch: the tops of the distance to the outline."""
    inside = ndimage.distance_transform_edt(np.pad(blob, 1))[1:-1, 1:-1]
    smooth = ndimage.gaussian_filter(inside, 0.1 * width)
    tops = (smooth == ndimage.maximum_filter(smooth, size=max(3, round(0.9 * width)))) & (inside > 0.35 * width)
    marks, number = ndimage.label(tops)
    if number < 2:
        return [np.array(ndimage.center_of_mass(blob))]
    return [np.array(centre) for centre in ndimage.center_of_mass(tops, marks, np.arange(1, number + 1))]


def _border(labels: np.ndarray) -> set[int]:
    edges = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    return set(np.unique(edges)) - {0}


def _crop(pixels: np.ndarray, centre: tuple[float, float], side: int) -> np.ndarray:
    """(side, side, 3); where the square leaves the field, the field is mirrored."""
    places = []
    for middle, length in zip(centre, pixels.shape[:2], strict=True):
        place = np.arange(side) + round(middle - side / 2)
        places.append(np.abs(np.abs(place + 0.5) - 2 * np.maximum(np.abs(place + 0.5) - length, 0)).astype(int))
    rows, columns = (np.clip(place, 0, length - 1) for place, length in zip(places, pixels.shape[:2], strict=True))
    return pixels[np.ix_(rows, columns)]


def _overview(field: Image.Image, centres: list[tuple[float, float]], side: int) -> Image.Image:
    scale = min(1.0, _LARGEST_OVERVIEW / max(field.size))
    overview = field.resize([max(1, round(length * scale)) for length in field.size])
    pen = ImageDraw.Draw(overview)
    half = 0.3 * side  # the cell itself; the crops overlap
    for number, (y, x) in enumerate(centres, start=1):
        box = [scale * (x - half), scale * (y - half), scale * (x + half), scale * (y + half)]
        pen.rectangle(box, outline=(0, 70, 160), width=3)
        text = str(number)
        left, top, right, bottom = pen.textbbox((box[0] + 5, box[1] + 4), text, font_size=16)
        pen.rectangle([left - 3, top - 2, right + 3, bottom + 2], fill=(0, 70, 160))
        pen.text((box[0] + 5, box[1] + 4), text, fill="white", font_size=16)
    return overview
