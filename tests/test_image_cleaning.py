"""Metadata go, pixels stay."""

import io

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from lymph_hf.image_cleaning import without_metadata
from lymph_hf.images import open_cell_image

PIXELS = np.random.default_rng(0).integers(0, 255, (37, 41, 3), dtype=np.uint8)


def encoded(format, image=None, **options) -> bytes:
    buffer = io.BytesIO()
    (image or Image.fromarray(PIXELS)).save(buffer, format=format, **options)
    return buffer.getvalue()


def exif(orientation=1) -> Image.Exif:
    entries = Image.Exif()
    entries[0x0112] = orientation
    entries[0x010F] = "analyser of Mrs X"
    return entries


def noted() -> PngImagePlugin.PngInfo:
    note = PngImagePlugin.PngInfo()
    note.add_text("Comment", "analyser of Mrs X")
    return note


PICTURES = {
    "jpeg": encoded("JPEG", exif=exif()),
    "progressive": encoded("JPEG", exif=exif(), progressive=True),
    "restarts": encoded("JPEG", exif=exif(), restart_marker_blocks=1),
    "comment": encoded("JPEG", comment=b"analyser of Mrs X"),
    "profile": encoded("JPEG", icc_profile=b"analyser of Mrs X" * 20),
    "grey": encoded("JPEG", Image.fromarray(PIXELS).convert("L"), exif=exif()),
    "cmyk": encoded("JPEG", Image.fromarray(PIXELS).convert("CMYK"), exif=exif()),
    "second picture behind the end": encoded("JPEG", exif=exif()) + b"analyser of Mrs X",
    "on its side": encoded("JPEG", exif=exif(orientation=6)),
    "png": encoded("PNG", pnginfo=noted()),
    "transparent": encoded("PNG", Image.fromarray(PIXELS).convert("RGBA"), pnginfo=noted()),
    "tiff": encoded("TIFF", exif=exif()),
    "webp": encoded("WEBP", lossless=True, exif=exif()),
    "bmp": encoded("BMP"),
}


@pytest.mark.parametrize("case", PICTURES)
def test_only_the_pixels_are_left_and_they_are_the_same(case):
    before = PICTURES[case]
    after = without_metadata(before)
    assert np.array_equal(open_cell_image(after).image, open_cell_image(before).image)
    assert b"Mrs X" not in after
    with Image.open(io.BytesIO(after)) as image:
        assert not image.getexif()
        assert not {"exif", "comment", "icc_profile", "Comment"} & set(image.info)
    assert without_metadata(after) == after, "nothing is left to remove"


def test_an_upright_jpeg_is_not_coded_anew():
    plain = encoded("JPEG")
    assert without_metadata(PICTURES["jpeg"]) == without_metadata(plain)
    assert len(without_metadata(plain)) <= len(plain)
    assert without_metadata(PICTURES["on its side"]).startswith(b"\x89PNG")


def test_a_thumbnail_in_the_header_goes():
    plain = encoded("JPEG")
    at = plain.index(b"JFIF")
    thumbnail = b"\x10\x10" + bytes(range(256)) * 3
    assert plain[at + 12 : at + 14] == b"\0\0"
    header = plain[: at - 2] + (16 + 768).to_bytes(2) + plain[at : at + 12] + thumbnail
    assert without_metadata(header + plain[at + 14 :]) == without_metadata(plain)
