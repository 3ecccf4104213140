"""Images without anything beside their pixels: no EXIF, no comment, no thumbnail, no colour profile, no time."""

import io

import numpy as np

from .images import open_cell_image

_START, _END, _SCAN = b"\xff\xd8", 0xD9, 0xDA
# JFIF (how pixels are spaced) and Adobe (how colours are coded); every other application segment may tell anything.
_KEPT_APPLICATION_SEGMENTS = {0xE0: b"JFIF\0", 0xEE: b"Adobe"}
_COMMENT = 0xFE


def without_metadata(data: bytes) -> bytes:
    """The same picture without metadata: of a JPEG the coded pixels as they are, of anything else a PNG.

    A JPEG that lies on its side by its EXIF entry becomes an upright PNG. Whatever is done, the pixels that
    `open_cell_image` reads are the same as before.

    Raises:
        CellImageError: no acceptable cell image.
    """
    picture = open_cell_image(data).image
    stripped = _stripped_jpeg(data) if data.startswith(_START) else None
    if stripped is not None and np.array_equal(open_cell_image(stripped).image, picture):
        return stripped
    buffer = io.BytesIO()
    picture.info.clear()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _stripped_jpeg(data: bytes) -> bytes | None:
    """The segments that decoding needs, up to the end of the first picture; `None` where they cannot be told."""
    kept, at = [_START], 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == _END:
            return b"".join([*kept, data[at : at + 2]])
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4])
        if marker == _SCAN:
            end = _end_of_scan(data, end)
        if _is_needed(marker, data[at + 4 : end]):
            kept.append(_bare(marker, data[at:end]))
        at = end
    return b"".join([*kept, data[at : at + 2]]) if data[at : at + 2] == bytes([0xFF, _END]) else None


def _is_needed(marker: int, content: bytes) -> bool:
    if marker == _COMMENT:
        return False
    if 0xE0 <= marker <= 0xEF:
        return content.startswith(_KEPT_APPLICATION_SEGMENTS.get(marker, b"\0no such segment"))
    return True


def _bare(marker: int, segment: bytes) -> bytes:
    """A JFIF segment may hold a thumbnail behind its 14 bytes: left out, its size set to none."""
    if marker != 0xE0:
        return segment
    return segment[:2] + (16).to_bytes(2) + segment[4:16] + b"\0\0"


def _end_of_scan(data: bytes, at: int) -> int:
    """Where the coded pixels end: at the next marker that is neither a stuffed byte nor a restart."""
    while (at := data.find(b"\xff", at)) >= 0:
        if at + 1 < len(data) and data[at + 1] not in (0x00, 0xFF, *range(0xD0, 0xD8)):
            return at
        at += 1
    return len(data)
