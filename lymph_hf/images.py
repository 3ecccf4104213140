"""Bytes of one cell image -> an RGB picture that was decoded completely, or a reason why not.

A microscope export holds half-copied files, 16-bit masters and the odd text file named ``.jpg``. Each of them
would otherwise become a grey patch or a silently rescaled picture in some patient's bag. So nothing is
repaired: an image is either read exactly, read with a note saying what was converted, or refused.
"""

import io
import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import ExifTags, Image, ImageFile

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})
MIN_SIDE = 16  # pixels; below this a cell shows no nucleus and is most likely a thumbnail or an icon
MAX_PIXELS = 32_000_000  # a whole camera frame, not a cell; also bounds the memory of one decode to about 100 MB

_FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")
_MODE_NOTES = {
    "RGB": (),
    "RGBA": (),
    "RGBX": (),
    "1": ("grayscale converted",),
    "L": ("grayscale converted",),
    "LA": ("grayscale converted",),
    "P": ("palette converted",),
    "PA": ("palette converted",),
    "CMYK": ("CMYK converted",),
    "YCbCr": ("YCbCr converted",),
}
_ORIENTATIONS = {  # EXIF tag 0x0112 -> what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_WARNINGS_LOCK = threading.Lock()


class CellImageError(ValueError):
    """The bytes are no acceptable cell image; the message is a short reason without the file's name."""


@dataclass(frozen=True)
class CellImage:
    """One decoded cell.

    Attributes:
        image: PIL image in mode ``RGB``, 8 bits per channel, upright, of the size stored in the file (or a part of
            it, if that was asked for).
        notes: what was converted on the way (``"grayscale converted"``, ``"EXIF rotation applied"``,
            ``"alpha composited on white"``, ``"CMYK converted"``, ``"palette converted"``,
            ``"YCbCr converted"``); empty for a plain RGB file.
    """

    image: Image.Image
    notes: tuple[str, ...] = ()


def open_cell_image(source: bytes | Path, *, at_least: tuple[int, int] | None = None) -> CellImage:
    """Decode one cell image completely.

    Args:
        source: the file's bytes, or its path. The format is read from the content, never from the suffix.
        at_least: width and height that are enough: a JPEG at least twice as large is decoded at a half, a quarter or
            an eighth of its size, in half of the time and less. By default everything comes at its full size.

    Raises:
        CellImageError: the file is empty, unreadable, no JPEG/PNG/BMP/TIFF/WebP, truncated or damaged, has
            more than 8 bits per channel, more than one frame, a side under ``MIN_SIDE`` pixels or more than
            ``MAX_PIXELS`` pixels (judged on the header, before anything is decoded).
        RuntimeError: Pillow was told elsewhere in this process to accept truncated files.

    Example:
        >>> open_cell_image(b"")
        Traceback (most recent call last):
        lymph_hf.images.CellImageError: empty file
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise RuntimeError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set, so half-copied images would pass as whole ones; "
            "set it to False before reading a cohort"
        )
    data = source if isinstance(source, bytes) else _read(source)
    if not data:
        raise CellImageError("empty file")
    try:
        return _decode(data, at_least)
    except CellImageError:
        raise
    # Hostile bytes make Pillow raise nearly anything: OSError, SyntaxError, struct.error, KeyError ...
    except Exception as error:
        raise CellImageError(f"damaged or truncated: {error or type(error).__name__}") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CellImageError(f"cannot be read: {error.strerror or type(error).__name__}") from error


def _decode(data: bytes, at_least: tuple[int, int] | None) -> CellImage:
    # An explicit close would also drop the pixels of formats that Pillow maps; BytesIO needs none.
    image, orientation = _open_header(data)
    notes = _MODE_NOTES[image.mode]
    if at_least is not None:
        image.draft(None, at_least)  # does nothing for other formats
    image.load()
    if orientation in _ORIENTATIONS:
        notes += ("EXIF rotation applied",)
        if image.format != "TIFF":  # Pillow itself turns TIFF files upright while loading
            image = image.transpose(_ORIENTATIONS[orientation])
    if image.has_transparency_data:
        notes += ("alpha composited on white",)
        picture = image.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return CellImage(Image.alpha_composite(white, picture).convert("RGB"), notes)
    return CellImage(image.convert("RGB"), notes)


def _open_header(data: bytes) -> tuple[Image.Image, int]:
    """The checked, still undecoded image and its EXIF orientation (1 = upright)."""
    with _quiet_pillow():
        try:
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
        except Image.UnidentifiedImageError:
            raise CellImageError(f"not an image in one of the formats {', '.join(_FORMATS)}") from None
        except Image.DecompressionBombError:
            raise CellImageError(f"more than {MAX_PIXELS:,} pixels") from None
        _check_header(image)
        return image, image.getexif().get(ExifTags.Base.Orientation, 1)


def _check_header(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise CellImageError(f"{width}x{height} has more than {MAX_PIXELS:,} pixels")
    if min(width, height) < MIN_SIDE:
        raise CellImageError(f"{width}x{height} is smaller than {MIN_SIDE} pixels on a side")
    frames = getattr(image, "n_frames", 1)
    if frames != 1:
        raise CellImageError(f"{frames} frames; expected a single picture")
    if _is_deep(image):
        raise CellImageError("more than 8 bits per channel; export it with 8 bits")
    if image.mode not in _MODE_NOTES:
        raise CellImageError(f"colour mode {image.mode} is not supported; export it as 8-bit RGB")


def _is_deep(image: Image.Image) -> bool:
    """Whether the file stores more than 8 bits per channel.

    Pillow opens a 16-bit RGB file as mode ``RGB`` and drops the low bytes without a word; only the raw mode
    in the decoder's tile tells. BMP is left out: its ``BGR;16`` means 16 bits per *pixel*.
    """
    if image.mode.startswith(("I", "F")):
        return True
    if image.format not in ("PNG", "TIFF"):
        return False
    arguments = [tile.args if isinstance(tile.args, tuple) else (tile.args,) for tile in image.tile]
    raw_modes = [value for values in arguments for value in values if isinstance(value, str)]
    return any(";16" in mode or ";32" in mode for mode in raw_modes)


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Keep Pillow's header warnings (large image, odd EXIF) off: each is checked here and ends as an error.

    ``warnings.catch_warnings`` swaps process-wide state, which is safe from one thread at a time only. The
    lock covers the header alone; decoding, where the time goes, stays parallel.
    """
    with _WARNINGS_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
