"""Painted smear fields: one white cell among red cells, as an automated microscope would crop it.

Light follows the Beer-Lambert law: every object adds optical density on one of three stain planes
(haemoglobin, chromatin, basophilic cytoplasm), and the picture is ``background * exp(-density)``. The colour
of a stain can therefore vary per smear without touching any shape.

Lengths are in pixels of a 224-pixel field, where a red cell of 7.5 um is about 47 pixels wide; other image
sizes scale. Colours and sizes were set beside CellaVision crops of Giemsa-stained smears.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter

FIELD = 224.0
"""Side of the painted field; all lengths below are in these pixels."""

Range = tuple[float, float]
Array = np.ndarray

_HAEMOGLOBIN, _CHROMATIN, _CYTOPLASM = range(3)  # the stain planes
_FAR = -8.0  # signed distance reported where no red cell is near


@dataclass(frozen=True)
class Morphology:
    """What makes one type of white cell; a pair is the range a cell draws from uniformly."""

    nucleus_radius: Range
    cytoplasm_margin: Range  # mean width of the cytoplasm around the nucleus
    darkness: Range  # optical density of the nucleus, 1 = a small mature lymphocyte
    clumping: Range  # contrast of the chromatin blocks ("soccer ball")
    grain: Range  # contrast of the fine chromatin
    basophilia: Range  # optical density of the cytoplasm
    rim: Range = (0.1, 0.4)  # darker edge of the cytoplasm
    elongation: Range = (0.02, 0.12)  # 0 = round nucleus
    irregularity: Range = (0.01, 0.03)  # lobing of the nucleus, share of its radius
    cell_irregularity: Range = (0.01, 0.04)  # the same for the cell's outline
    offset: Range = (0.2, 0.9)  # eccentric nucleus, share of the margin
    indentation: Range = (0.0, 0.1)  # depth of a kidney-shaped dent, share of the radius
    clefts: Range = (0.0, 0.0)  # number of narrow folds
    nucleoli: Range = (0.0, 0.0)
    vacuoles: Range = (0.0, 0.4)
    granules: Range = (0.0, 3.0)
    red_cell_contact: Range = (0.75, 1.1)  # nearest red cell, in its radii; below 1 it dents the cell
    fraying: float = 0.0  # ragged nucleus without membrane (a smudge)


CELL_TYPES: dict[str, Morphology] = {
    "small_mature": Morphology(
        nucleus_radius=(25, 31), cytoplasm_margin=(4, 9), darkness=(0.92, 1.1), clumping=(0.14, 0.3),
        grain=(0.06, 0.1), basophilia=(0.55, 0.95), indentation=(0.0, 0.2),
    ),
    "reactive": Morphology(
        nucleus_radius=(29, 37), cytoplasm_margin=(14, 23), darkness=(0.68, 0.9), clumping=(0.03, 0.12),
        grain=(0.06, 0.1), basophilia=(0.28, 0.6), rim=(0.5, 1.3), elongation=(0.06, 0.2),
        irregularity=(0.015, 0.05), cell_irregularity=(0.05, 0.1), offset=(0.3, 0.8), indentation=(0.0, 0.3),
        nucleoli=(0.0, 1.2), vacuoles=(0.0, 3.0), granules=(0.0, 6.0), red_cell_contact=(0.35, 0.75),
    ),
    "large_granular": Morphology(
        nucleus_radius=(25, 31), cytoplasm_margin=(12, 19), darkness=(0.85, 1.05), clumping=(0.1, 0.2),
        grain=(0.06, 0.1), basophilia=(0.16, 0.34), rim=(0.1, 0.4), cell_irregularity=(0.02, 0.06),
        offset=(0.5, 0.95), indentation=(0.05, 0.35), granules=(9.0, 26.0), red_cell_contact=(0.6, 1.0),
    ),
    "cll_like": Morphology(
        nucleus_radius=(25, 31), cytoplasm_margin=(1.5, 4.5), darkness=(0.98, 1.15), clumping=(0.24, 0.4),
        grain=(0.05, 0.09), basophilia=(0.45, 0.8), elongation=(0.0, 0.08), granules=(0.0, 1.0),
    ),
    "prolymphocyte": Morphology(
        nucleus_radius=(31, 37), cytoplasm_margin=(5, 11), darkness=(0.78, 0.95), clumping=(0.08, 0.2),
        grain=(0.05, 0.09), basophilia=(0.55, 0.9), nucleoli=(1.0, 1.6), granules=(0.0, 1.0),
    ),
    "cleaved": Morphology(
        nucleus_radius=(25, 31), cytoplasm_margin=(2, 6), darkness=(0.88, 1.08), clumping=(0.1, 0.25),
        grain=(0.06, 0.1), basophilia=(0.45, 0.8), irregularity=(0.03, 0.07), indentation=(0.15, 0.5),
        clefts=(1.0, 2.6), granules=(0.0, 1.0),
    ),
    "smudge": Morphology(
        nucleus_radius=(32, 42), cytoplasm_margin=(0.0, 0.0), darkness=(0.42, 0.72), clumping=(0.1, 0.3),
        grain=(0.1, 0.17), basophilia=(0.0, 0.0), elongation=(0.05, 0.3), irregularity=(0.05, 0.11),
        vacuoles=(0.0, 0.0), granules=(0.0, 0.0), red_cell_contact=(0.6, 1.0), fraying=1.0,
    ),
}  # fmt: skip
"""Cell types by name. Every type is painted by the same code; only these figures differ."""


@dataclass(frozen=True, eq=False)  # arrays have no single truth value
class Smear:
    """What all fields of one patient share: stain, red cells, optics. Independent of the patient's label."""

    background: Array  # (3,) RGB of bare glass, 0 to 255
    stains: Array  # (3, 3) optical density per stain plane (rows) and RGB channel (columns)
    red_radius: float
    red_spacing: float  # smallest distance of two red cells, in diameters; below 1 they overlap
    red_fill: float  # share of the candidate places that hold a red cell
    pallor: float  # depth of the central pallor, 0 to 1
    pallor_width: float  # its radius, share of the red cell's
    crenation: float  # amplitude of the spikes of crenated red cells, share of the radius
    blur: float  # focus, standard deviation in pixels
    noise: float  # sensor noise, standard deviation in grey levels
    shading: Array  # (2,) relative change of the illumination from the centre to the edge, x and y

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Smear":
        """Draw a smear: from peach glass with mauve red cells to cream glass with greyish ones."""
        pale, blue = rng.uniform(0, 1, 2)
        background = _mix((254, 228, 204), (252, 244, 226), pale) + rng.normal(0, 2.0, 3)
        haemoglobin = _mix((0.36, 0.62, 0.33), (0.37, 0.50, 0.32), pale) * rng.uniform(0.75, 1.1)
        chromatin = _mix((0.78, 1.50, 0.46), (1.12, 1.72, 0.44), blue) * rng.uniform(0.88, 1.06)
        cytoplasm = _mix((0.62, 0.62, 0.22), (0.74, 0.56, 0.16), blue) * rng.uniform(0.85, 1.15)
        return cls(
            background=background,
            stains=np.stack([haemoglobin, chromatin, cytoplasm]).astype(np.float32),
            red_radius=rng.uniform(21, 25),
            red_spacing=rng.uniform(0.85, 1.1),
            red_fill=rng.uniform(0.35, 0.95),
            pallor=rng.uniform(0.2, 0.9),
            pallor_width=rng.uniform(0.25, 0.5),
            crenation=rng.uniform(0.03, 0.06) if rng.random() < 0.12 else 0.0,
            blur=rng.uniform(0.45, 1.0),
            noise=rng.uniform(0.8, 2.2),
            shading=rng.uniform(-0.025, 0.025, 2),
        )


def paint_cell(cell_type: str, smear: Smear, rng: np.random.Generator, size: int = 224) -> Array:
    """Paint one field.

    Args:
        cell_type: a key of `CELL_TYPES`.
        smear: stain and optics of the patient's smear.
        rng: source of every random choice; the same state gives the same pixels.
        size: side of the square image in pixels, at least 32.

    Returns:
        uint8 array (size, size, 3), RGB.
    """
    if size < 32:
        raise ValueError(f"image size {size} is too small for a cell to be seen: give at least 32 pixels.")
    form = CELL_TYPES[cell_type]
    centre = complex(*(FIELD / 2 + rng.normal(0, 3.0, 2)))
    radius = rng.uniform(*form.nucleus_radius)
    margin = rng.uniform(*form.cytoplasm_margin)
    stains = np.zeros((3, size, size), np.float32)
    nearest_red = _paint_red_cells(stains, smear, centre, radius + margin, form, rng)
    _paint_platelets(stains, centre, radius + margin, rng)
    _paint_white_cell(stains, smear, nearest_red, centre, radius, margin, form, rng)
    return _develop(stains, smear, rng)


def contact_sheet(images: Sequence[Image.Image], columns: int, row_names: Sequence[str] = ()) -> Image.Image:
    """Lay equally sized images out in rows of `columns`; `row_names` are written at the start of the rows."""
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for position, image in enumerate(images):
        sheet.paste(image, (position % columns * width, position // columns * height))
    pen = ImageDraw.Draw(sheet)
    for row, name in enumerate(row_names):
        pen.text((4, row * height + 2), name, fill="black")
    return sheet


def _paint_red_cells(
    stains: Array, smear: Smear, centre: complex, extent: float, form: Morphology, rng: np.random.Generator
) -> Array:
    """Add the red cells; return (size, size) signed distances to the nearest one, positive inside it."""
    size = stains.shape[-1]
    scale = size / FIELD
    centres = _red_cell_centres(smear, centre, extent, form, rng)
    radii = smear.red_radius * rng.normal(1, 0.06, len(centres)).clip(0.8, 1.2)
    half = int(np.ceil(smear.red_radius * 1.45 * scale)) + 1
    corners = np.floor(np.stack([centres.imag, centres.real], 1) * scale).astype(int) - half  # (K, 2)
    rows, columns = ((corners[:, :, None] + np.arange(2 * half + 1) + 0.5) / scale).swapaxes(0, 1)  # (K, w)
    z = columns[:, None, :] + 1j * rows[:, :, None] - centres[:, None, None]
    z = z.astype(np.complex64)  # (K, w, w), relative to each centre
    distance = np.abs(z)
    outline = _outline(np.angle(z), (0.055, 0.02, 0.012, 0, 0, 0, 0, 0, 0, smear.crenation), rng)
    reach = radii[:, None, None].astype(np.float32) * (1 + outline)
    inside = reach - distance
    rho2 = (distance / reach) ** 2
    pallor = (smear.pallor * rng.uniform(0.5, 1.1, (len(centres), 1, 1))).astype(np.float32)
    thickness = 1 - pallor * np.exp(-rho2 / smear.pallor_width**2) + 0.12 * np.exp(-((inside - 2.5) ** 2) / 6)
    thickness *= rng.normal(1, 0.07, (len(centres), 1, 1)).astype(np.float32)
    density = _cover(inside, 1.2 + 2 * smear.blur) * thickness
    density -= 0.05 * np.exp(-((inside + 2.0) ** 2) / 3)  # refraction: a bright fringe outside

    nearest = np.full((size, size), _FAR, np.float32)
    for corner, cell, edge in zip(corners, density, inside, strict=True):
        field, local = _overlap(corner, cell.shape[0], size)
        below = stains[_HAEMOGLOBIN][field]
        # Overlapping cells flatten where they touch, so the second layer adds little.
        stains[_HAEMOGLOBIN][field] = np.maximum(below, cell[local]) + 0.3 * np.minimum(below, cell[local])
        np.maximum(nearest[field], edge[local], out=nearest[field])
    return nearest


def _red_cell_centres(
    smear: Smear, centre: complex, extent: float, form: Morphology, rng: np.random.Generator
) -> Array:
    """Drop red cells one after another where they keep their distance; (K,) complex positions."""
    clearance = extent + smear.red_radius * rng.uniform(*form.red_cell_contact)
    spacing = 2 * smear.red_radius * smear.red_spacing
    places = rng.uniform(-smear.red_radius, FIELD + smear.red_radius, (int(90 * smear.red_fill), 2))
    candidates = places @ (1, 1j)
    candidates = candidates[np.abs(candidates - centre) > clearance]
    tolerance = rng.choice([1, 0.55], len(candidates), p=[0.85, 0.15])  # some let others overlap them
    apart = np.abs(candidates[:, None] - candidates) > spacing * tolerance
    kept: list[int] = []
    for index in range(len(candidates)):
        if apart[index, kept].all():
            kept.append(index)
    return candidates[kept]


def _paint_platelets(stains: Array, centre: complex, extent: float, rng: np.random.Generator) -> None:
    """Add a few platelets: small granular purple discs."""
    z = _plane(stains.shape[-1])
    for _ in range(rng.poisson(0.6)):
        spot = complex(*rng.uniform(0, FIELD, 2))
        if abs(spot - centre) > extent + 10:
            window = _box(spot, 12, stains.shape[-1])
            disc = _cover(rng.uniform(4, 7) - np.abs(z[window] - spot), 3.0)
            stains[_CHROMATIN][window] += disc * rng.uniform(0.2, 0.7, disc.shape).astype(np.float32)


def _paint_white_cell(
    stains: Array,
    smear: Smear,
    nearest_red: Array,
    centre: complex,
    radius: float,
    margin: float,
    form: Morphology,
    rng: np.random.Generator,
) -> None:
    """Add the white cell: outline, nucleus inside it, cytoplasm around the nucleus."""
    size = stains.shape[-1]
    window = _box(centre, 1.35 * (radius + margin) + 6, size)
    z = _plane(size)[window] - np.complex64(centre)
    red = nearest_red[window]
    shift = margin * rng.uniform(*form.offset) * np.exp(1j * rng.uniform(0, 2 * np.pi))

    cell = _blob(z, radius + margin, rng.uniform(*form.elongation), rng.uniform(*form.cell_irregularity), rng)
    nucleus = _blob(z - shift, radius, rng.uniform(*form.elongation), rng.uniform(*form.irregularity), rng)
    nucleus = _dent(nucleus, z - shift, radius, rng.uniform(*form.indentation), rng)
    nucleus = _smooth_minimum(nucleus, -red - 2.0)
    if form.fraying:
        nucleus += form.fraying * _texture(z.shape, 1.8, size, rng)
        nucleus += 3.0 * form.fraying * _texture(z.shape, 5.0, size, rng)
    if margin:
        cell = np.maximum(cell + 0.5 * _texture(z.shape, 1.8, size, rng), nucleus + 1.0)
        cell = np.minimum(cell, -red - 0.5)  # the cytoplasm skirts the red cells
    else:
        cell = nucleus

    cover = _cover(nucleus, 1.8 + 2.0 * form.fraying)
    stains[_CHROMATIN][window] += cover * _chromatin(z - shift, nucleus, radius, form, size, rng)
    stains[_HAEMOGLOBIN][window] -= 0.05 * np.exp(-((cell + 2.5) ** 2) / 4)  # bright fringe
    if margin:
        body = _cover(cell, 2.0) * (1 - cover)
        stains[_CYTOPLASM][window] += body * _cytoplasm(z, cell, nucleus, form, size, rng)
        stains[_CHROMATIN][window] += body * _granules(z, cell, nucleus, form, rng)
    for plane in (
        stains[_CHROMATIN],
        stains[_CYTOPLASM],
    ):  # the edge of red cells is already as soft as the focus
        plane[window] = gaussian_filter(plane[window], smear.blur * size / FIELD, truncate=2.5)


def _chromatin(z: Array, inside: Array, radius: float, form: Morphology, size: int, rng: np.random.Generator) -> Array:
    """Optical density of the nucleus: blocks, fine grain, membrane, folds, nucleoli."""
    warp = 1.6 * (_texture(z.shape, 3.5, size, rng) + 1j * _texture(z.shape, 3.5, size, rng))
    density = 1 + rng.uniform(*form.clumping) * _blocks(z + warp, radius, rng)
    density += rng.uniform(*form.grain) * _texture(z.shape, 1.4, size, rng)
    density += 0.07 * _texture(z.shape, 5.0, size, rng)
    density += 0.25 * (1 - form.fraying) * np.exp(-((inside - 1.2) ** 2) / 2.5)
    for _ in range(int(rng.uniform(*form.clefts))):
        density *= 1 - rng.uniform(0.35, 0.6) * np.exp(-((_fold(z, radius, rng) / 1.5) ** 2))
    for _ in range(int(rng.uniform(*form.nucleoli))):
        spot = 0.4 * radius * np.sqrt(rng.random()) * np.exp(1j * rng.uniform(0, 2 * np.pi))
        edge = rng.uniform(4.5, 7.0) - np.abs(z - spot)
        density *= 1 - rng.uniform(0.4, 0.55) * _cover(edge, 2.5) + 0.22 * np.exp(-((edge + 1.6) ** 2) / 2.5)
    return rng.uniform(*form.darkness) * density.clip(0.15)


def _cytoplasm(z: Array, cell: Array, nucleus: Array, form: Morphology, size: int, rng: np.random.Generator) -> Array:
    """Optical density of the cytoplasm: basophilic rim, pale zone beside the nucleus, vacuoles."""
    density = 1 + rng.uniform(*form.rim) * np.exp(-((cell - 1.0) ** 2) / 14)
    density += 0.16 * _texture(z.shape, 1.3, size, rng) + 0.12 * _texture(z.shape, 5.0, size, rng)
    side = np.exp(1j * rng.uniform(0, 2 * np.pi))
    density -= 0.3 * np.exp(-((nucleus + 3) ** 2) / 12) * (1 + (z * side).real / (np.abs(z) + 1))
    for spot in _places(cell, nucleus, int(rng.uniform(*form.vacuoles)), z, rng):
        density *= 1 - 0.8 * _cover(rng.uniform(1.8, 3.5) - np.abs(z - spot), 1.8)
    return rng.uniform(*form.basophilia) * density.clip(0.1)


def _granules(z: Array, cell: Array, nucleus: Array, form: Morphology, rng: np.random.Generator) -> Array:
    """Azurophilic granules: dots of about half a micrometre, in the colour of chromatin."""
    density = np.zeros(z.shape, np.float32)
    spots = _places(cell, nucleus, int(rng.uniform(*form.granules)), z, rng)
    for spot in spots:
        density += rng.uniform(0.3, 0.75) * np.exp(-(np.abs(z - spot) ** 2) / rng.uniform(1.0, 2.5))
    return density


def _places(cell: Array, nucleus: Array, count: int, z: Array, rng: np.random.Generator) -> Array:
    """Up to `count` points of the cytoplasm, clear of the nucleus and of the cell's edge."""
    free = z[(cell > 2.5) & (nucleus < -2.5)]
    return rng.choice(free, min(count, len(free)), replace=False) if len(free) else free


def _blocks(z: Array, radius: float, rng: np.random.Generator) -> Array:
    """Chromatin blocks, -1 in the pale channels between them to 0.5: the cells of a Voronoi diagram."""
    number = 20
    rings = np.sqrt((np.arange(number) + 0.5) / number)  # a sunflower: evenly spread, then shaken
    seeds = radius * rings * np.exp(2.4j * np.arange(number) + 1j * rng.uniform(0, 7))
    seeds = (seeds + rng.normal(0, 0.09 * radius, (number, 2)) @ (1, 1j)).astype(np.complex64)
    first = second = np.full(z.shape, np.inf, np.float32)
    for seed in seeds:  # the two nearest seeds; a running minimum is faster than a partition
        distance = np.abs(z - seed)
        first, second = np.minimum(first, distance), np.minimum(second, np.maximum(first, distance))
    return np.minimum((second - first) / (0.2 * radius), 1.5) - 1


def _fold(z: Array, radius: float, rng: np.random.Generator) -> Array:
    """Distance to a bent line from the nucleus' edge inwards."""
    turned = z * np.exp(1j * rng.uniform(0, 2 * np.pi))
    bend = turned.imag + rng.uniform(-0.25, 0.25) * radius - rng.uniform(-0.012, 0.012) * turned.real**2
    beyond = np.maximum(turned.real - rng.uniform(-0.1, 0.6) * radius, 0)
    return np.hypot(bend, beyond)


def _dent(inside: Array, z: Array, radius: float, depth: float, rng: np.random.Generator) -> Array:
    """Press a round dent of the given depth (share of the radius) into an outline."""
    ball = radius * rng.uniform(0.35, 0.7)
    at = (radius * (1 - depth) + ball) * np.exp(1j * rng.uniform(0, 2 * np.pi))
    return _smooth_minimum(inside, np.abs(z - at) - ball)


def _blob(z: Array, radius: float, elongation: float, irregularity: float, rng: np.random.Generator) -> Array:
    """Signed distance (approximate, positive inside) to a closed curve around 0."""
    distance = np.abs(z)
    scales = (elongation, *(irregularity * np.array([1.0, 0.8, 0.6, 0.5, 0.4])))
    return radius * (1 + _outline(np.angle(z), scales, rng)) - distance


def _outline(angle: Array, scales: Sequence[float], rng: np.random.Generator) -> Array:
    """Random Fourier outline: sum over k = 2, 3, ... of a_k cos(k angle + phase_k) with mean sizes `scales`.

    `angle` is (..., h, w) in radians; each leading index is an outline of its own. The curve is tabulated
    once and looked up, which is several times faster than evaluating the series at every pixel.
    """
    shape, steps = (*angle.shape[:-2], len(scales)), 512
    spectrum = np.zeros((*shape[:-1], steps // 2 + 1), np.complex64)
    size = np.asarray(scales) * rng.uniform(0.5, 1.5, shape)
    spectrum[..., 2 : 2 + len(scales)] = size * np.exp(1j * rng.uniform(0, 2 * np.pi, shape))
    table = np.fft.irfft(spectrum, steps).astype(np.float32) * (steps / 2)
    index = (angle * np.float32(steps / (2 * np.pi))).astype(np.int32) & (steps - 1)
    return np.take_along_axis(table, index.reshape(*shape[:-1], -1), -1).reshape(angle.shape)


def _cover(inside: Array, width: float) -> Array:
    """Soft edge: 0 outside to 1 inside, over `width` pixels."""
    t = np.clip(inside / width + 0.5, 0, 1)
    return t * t * (3 - 2 * t)


def _smooth_minimum(a: Array, b: Array, width: float = 4.0) -> Array:
    t = np.maximum(width - np.abs(a - b), 0) / width
    return np.minimum(a, b) - 0.25 * width * t * t


def _texture(shape: tuple[int, ...], sigma: float, size: int, rng: np.random.Generator) -> Array:
    """Smooth noise of unit variance and correlation length `sigma`."""
    sigma = max(sigma * size / FIELD, 0.4)
    noise = gaussian_filter(rng.standard_normal(shape, np.float32), sigma, mode="wrap", truncate=2.5)
    return noise / noise.std()


def _develop(stains: Array, smear: Smear, rng: np.random.Generator) -> Array:
    """Stain planes -> uint8 RGB: Beer-Lambert, illumination, sensor noise."""
    size = stains.shape[-1]
    plane = _plane(size) / np.float32(FIELD)
    light = 1 + np.float32(smear.shading[0]) * plane.real + np.float32(smear.shading[1]) * plane.imag
    image = np.exp(np.einsum("khw,kc->chw", stains, -smear.stains)).transpose(1, 2, 0)  # einsum starts no threads
    image *= smear.background.astype(np.float32)
    image *= light[..., None]
    image += np.float32(smear.noise * 12**0.5) * (rng.random((size, size, 1), np.float32) - 0.5) + 0.5
    return image.clip(0, 255, out=image).astype(np.uint8, order="C")


def _mix(a: Sequence[float], b: Sequence[float], share: float) -> Array:
    return (1 - share) * np.asarray(a) + share * np.asarray(b)


@cache
def _plane(size: int) -> Array:
    """Pixel centres as complex numbers x + iy in field pixels; (size, size), read-only."""
    ticks = ((np.arange(size) + 0.5) * FIELD / size).astype(np.float32)
    plane = (ticks + 1j * ticks[:, None]).astype(np.complex64)
    plane.setflags(write=False)
    return plane


def _box(centre: complex, half: float, size: int) -> tuple[slice, slice]:
    """Rows and columns of the square of half-width `half` around a point, cut at the image's border."""
    scale = size / FIELD
    return tuple(
        slice(max(int((middle - half) * scale), 0), min(int((middle + half) * scale) + 1, size))
        for middle in (centre.imag, centre.real)
    )


def _overlap(corner: Array, width: int, size: int) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where a (width, width) stamp at `corner` meets the image: slices of the image and of the stamp."""
    start, stop = np.clip(corner, 0, size), np.clip(corner + width, 0, size)
    field = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    return field, tuple(slice(a, b) for a, b in zip(start - corner, stop - corner, strict=True))
