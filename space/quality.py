"""What speaks against trusting an answer: too few cells, unusual colours, blur, what was left out.

The limits were set on 400 images each of three sources of Giemsa-stained cells, two from CellaVision analysers and
one painted: they lie outside everything seen there, and are crossed by the same images in grey or blurred with a
standard deviation of 2.5 of 224 pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy.ndimage import laplace

FEW_CELLS = 16  # fewest cells of a patient in the published lymphocytosis cohort
LARGE_CROP = 640  # pixels; single cells of analysers are 200 to 400 pixels wide
_SIDE = 112  # pixels; statistics do not depend on the size of the crops
_LIGHTEST = 200.0  # of 255: the background between the red cells
_NUCLEUS = 0.45  # optical density in red, which stained red cells do not absorb
_NUCLEAR_SHARE = (0.002, 0.6)  # share of the picture that is nucleus
_STAIN = np.array([[0.17, 0.40], [0.37, 0.60], [0.10, 0.36]])  # nuclear optical density: shares of red, green, blue
_SHARPNESS = 0.036  # variance of the Laplacian, over that of the picture
_SHARE_OF_CELLS = 0.2  # from which on a fault of cells is one of the patient


@dataclass(frozen=True)
class Faults:
    """Positions of the cells that have a fault."""

    unusual: tuple[int, ...]
    blurred: tuple[int, ...]
    large: tuple[int, ...]


def find_faults(images: Sequence[Image.Image]) -> Faults:
    """Look at every picture by itself."""
    looks = [_look(image) for image in images]
    return Faults(
        unusual=tuple(i for i, (usual, _) in enumerate(looks) if not usual),
        blurred=tuple(i for i, (usual, sharpness) in enumerate(looks) if usual and sharpness < _SHARPNESS),
        large=tuple(i for i, image in enumerate(images) if min(image.size) >= LARGE_CROP),
    )


def warnings_of(cells: int, faults: Faults, *, single_cells: bool = True) -> list[str]:
    """Sentences for the reader, the weightiest first.

    Args:
        cells: number of pictures.
        faults: of these pictures.
        single_cells: whether the pictures came as crops of single cells.
    """
    found = []
    if faults.unusual and len(faults.unusual) >= _SHARE_OF_CELLS * cells:
        found.append(
            f"{_of(faults.unusual, cells)} do not look like Giemsa-stained cells under a bright-field microscope "
            "(colours or background). The model has not learnt such images: do not rely on the answer."
        )
    if faults.blurred and len(faults.blurred) >= _SHARE_OF_CELLS * cells:
        found.append(f"{_of(faults.blurred, cells)} are out of focus or enlarged. Fine chromatin cannot be judged.")
    if cells < FEW_CELLS:
        found.append(
            f"Only {cells} cell{'s' if cells > 1 else ''}. The model was made for {FEW_CELLS} and more per patient; "
            "the answer depends on each of them."
        )
    if single_cells and faults.large:
        found.append(
            f"{_of(faults.large, cells)} are {LARGE_CROP} pixels wide or more. If they show whole fields of a smear, "
            "choose \N{LEFT DOUBLE QUOTATION MARK}Smear fields\N{RIGHT DOUBLE QUOTATION MARK} above."
        )
    return found


def _of(positions: Sequence[int], cells: int) -> str:
    return f"{len(positions)} of {cells} pictures"


def _look(image: Image.Image) -> tuple[bool, float]:
    """Whether colours and background are usual, and how sharp the picture is."""
    pixels = np.asarray(image.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BILINEAR), np.float32)
    grey = pixels.mean(axis=2)
    density = -np.log((pixels + 1) / 256)
    nucleus = density[..., 0] > _NUCLEUS
    share = nucleus.mean()
    usual = np.percentile(grey, 95) >= _LIGHTEST and _NUCLEAR_SHARE[0] <= share <= _NUCLEAR_SHARE[1]
    if usual:
        stain = density[nucleus].mean(axis=0)
        stain /= stain.sum()
        usual = bool(((stain >= _STAIN[:, 0]) & (stain <= _STAIN[:, 1])).all())
    return bool(usual), float(laplace(grey).var() / (grey.var() + 1))
