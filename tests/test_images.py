"""Reading one cell image: exactly, with a note, or not at all."""

import contextlib
import io
import struct
import threading
import warnings
import zlib

import numpy as np
import pytest
from cohort_factory import SHARED_DATA, encoded, image_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageFile

from lymph_hf.images import IMAGE_SUFFIXES, MAX_PIXELS, MIN_SIDE, CellImageError, open_cell_image

GRAY_RAMP = np.linspace(0, 255, 32 * 24).reshape(32, 24).astype(np.uint8)


def oriented(orientation: int, kind: str, **options) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return encoded(Image.fromarray(GRAY_RAMP).convert("RGB"), kind, exif=exif, **options)


def deep_png_rgb() -> bytes:
    """A 16-bit RGB PNG, which Pillow cannot write: its chunks by hand."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20, 20, 16, 2, 0, 0, 0)
    rows = (b"\0" + bytes(20 * 6)) * 20
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def deep_tiff_rgb() -> bytes:
    """A 16-bit RGB TIFF, which Pillow cannot write: one uncompressed strip by hand."""
    short, long = 3, 4
    tags = [
        (256, short, 1, 20),
        (257, short, 1, 20),
        (258, short, 3, 122),
        (259, short, 1, 1),
        (262, short, 1, 2),
    ]
    tags += [(273, long, 1, 128), (277, short, 1, 3), (278, short, 1, 20), (279, long, 1, 20 * 20 * 6)]
    directory = b"".join(struct.pack("<HHII", *tag) for tag in tags)  # 9 tags of 12 bytes from offset 10
    start = b"II*\0" + struct.pack("<IH", 8, len(tags)) + directory + struct.pack("<I", 0)
    return start + struct.pack("<HHH", 16, 16, 16) + bytes(20 * 20 * 6)


def animated(kind: str) -> bytes:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


class TestReducedSize:
    """JPEGs can be decoded at a part of their size, by what their blocks hold."""

    PICTURE = Image.fromarray(GRAY_RAMP).convert("RGB").resize((160, 120), Image.Resampling.BICUBIC)

    @pytest.mark.parametrize(
        ("at_least", "size"),
        [((160, 120), (160, 120)), ((81, 60), (160, 120)), ((80, 60), (80, 60)), ((16, 16), (40, 30))],
    )
    def test_is_the_smallest_that_is_enough(self, at_least, size):
        assert open_cell_image(encoded(self.PICTURE, "JPEG"), at_least=at_least).image.size == size

    def test_shows_the_same_picture(self):
        reduced = open_cell_image(encoded(self.PICTURE, "JPEG"), at_least=(80, 60)).image
        expected = np.asarray(self.PICTURE, float).reshape(60, 2, 80, 2, 3).mean(axis=(1, 3))
        assert np.abs(np.asarray(reduced) - expected).max() < 4

    def test_is_for_jpegs_alone(self):
        assert open_cell_image(encoded(self.PICTURE, "PNG"), at_least=(16, 16)).image.size == (160, 120)

    def test_truncated_files_are_refused_all_the_same(self):
        with pytest.raises(CellImageError, match="truncated"):
            open_cell_image(encoded(self.PICTURE, "JPEG")[:-300], at_least=(80, 60))


class TestRead:
    @pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
    def test_lossless_formats_give_the_pixels_that_were_written(self, kind):
        pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        cell = open_cell_image(encoded(Image.fromarray(pixels), kind))
        assert cell.image.mode == "RGB"
        assert cell.notes == ()
        np.testing.assert_array_equal(np.asarray(cell.image), pixels)

    @pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
    def test_lossy_formats_are_read_without_note(self, kind):
        cell = open_cell_image(image_bytes(side=20, kind=kind))
        assert (cell.image.mode, cell.image.size, cell.notes) == ("RGB", (20, 20), ())

    def test_a_path_reads_like_its_bytes(self, tmp_path):
        (tmp_path / "cell.png").write_bytes(image_bytes(3))
        from_path, from_bytes = open_cell_image(tmp_path / "cell.png"), open_cell_image(image_bytes(3))
        assert from_path.image.tobytes() == from_bytes.image.tobytes()

    def test_the_smallest_side_allowed_is_read(self):
        assert open_cell_image(image_bytes(side=MIN_SIDE)).image.size == (MIN_SIDE, MIN_SIDE)


class TestConverted:
    @pytest.mark.parametrize("mode", ["1", "L"])
    def test_grayscale_is_repeated_over_the_channels(self, mode):
        gray = Image.fromarray(GRAY_RAMP).convert(mode)
        cell = open_cell_image(encoded(gray))
        assert cell.notes == ("grayscale converted",)
        for channel in range(3):
            np.testing.assert_array_equal(np.asarray(cell.image)[..., channel], np.asarray(gray.convert("L")))

    def test_palette_gives_the_colours_it_names(self):
        picture = Image.new("P", (20, 20), 1)
        picture.putpalette([0, 0, 0, 200, 100, 50])
        cell = open_cell_image(encoded(picture))
        assert cell.notes == ("palette converted",)
        assert cell.image.getpixel((5, 5)) == (200, 100, 50)

    @pytest.mark.parametrize("transparency", [1, bytes([255, 0])])
    def test_a_transparent_palette_colour_becomes_white(self, transparency):
        picture = Image.new("P", (20, 20), 1)
        picture.putpalette([0, 0, 0, 200, 100, 50])
        picture.putpixel((0, 0), 0)
        cell = open_cell_image(encoded(picture, transparency=transparency))
        assert cell.notes == ("palette converted", "alpha composited on white")
        assert cell.image.getpixel((5, 5)) == (255, 255, 255)
        assert cell.image.getpixel((0, 0)) == (0, 0, 0)

    def test_cmyk_is_converted(self):
        cell = open_cell_image(image_bytes(side=20, mode="CMYK", kind="JPEG"))
        assert (cell.image.mode, cell.notes) == ("RGB", ("CMYK converted",))

    def test_alpha_is_laid_on_white_by_the_formula(self):
        cell = open_cell_image(encoded(Image.new("RGBA", (20, 20), (100, 0, 200, 51))))
        expected = [round(0.2 * value + 0.8 * 255) for value in (100, 0, 200)]
        assert cell.notes == ("alpha composited on white",)
        np.testing.assert_allclose(cell.image.getpixel((3, 3)), expected, atol=1)

    def test_gray_with_alpha_says_both(self):
        cell = open_cell_image(encoded(Image.new("LA", (20, 20), (0, 0))))
        assert cell.notes == ("grayscale converted", "alpha composited on white")
        assert cell.image.getpixel((0, 0)) == (255, 255, 255)

    @pytest.mark.parametrize("mode", ["L", "RGB"])
    def test_a_colour_key_is_transparency_too(self, mode):
        key = 7 if mode == "L" else (7, 7, 7)
        cell = open_cell_image(encoded(Image.new(mode, (20, 20), key), transparency=key))
        assert "alpha composited on white" in cell.notes
        assert cell.image.getpixel((0, 0)) == (255, 255, 255)

    @pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
    @pytest.mark.parametrize("orientation", range(2, 9))
    def test_every_exif_orientation_is_applied_once(self, kind, orientation):
        options = {"lossless": True} if kind == "WEBP" else {}
        cell = open_cell_image(oriented(orientation, kind, **options))
        upright = {  # what a reader of the EXIF standard does with numpy
            2: lambda a: a[:, ::-1],
            3: lambda a: a[::-1, ::-1],
            4: lambda a: a[::-1],
            5: lambda a: a.transpose(1, 0, 2),
            6: lambda a: np.rot90(a, -1),
            7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
            8: lambda a: np.rot90(a),
        }[orientation]
        assert cell.notes == ("EXIF rotation applied",)
        np.testing.assert_array_equal(np.asarray(cell.image), upright(np.stack([GRAY_RAMP] * 3, axis=-1)))

    def test_an_upright_orientation_needs_no_note(self):
        assert open_cell_image(oriented(1, "JPEG")).notes == ()
        assert open_cell_image(oriented(6, "JPEG")).notes == ("EXIF rotation applied",)


class TestRefused:
    def refused(self, data: bytes, reason: str) -> None:
        with pytest.raises(CellImageError, match=reason):
            open_cell_image(data)

    def test_empty_file(self):
        self.refused(b"", "empty file")

    @pytest.mark.parametrize("data", [b"patient list\n", b"\0" * 300, b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"])
    def test_no_image(self, data):
        with pytest.raises(CellImageError):
            open_cell_image(data)

    def test_a_format_not_meant_for_cells(self):
        self.refused(image_bytes(side=20, kind="GIF"), "not an image in one of the formats")

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "TIFF", "WEBP"])
    @pytest.mark.parametrize("kept", [0.3, 0.6, 0.9])
    def test_truncated(self, kind, kept):
        data = image_bytes(side=64, kind=kind)
        with pytest.raises(CellImageError):
            open_cell_image(data[: int(len(data) * kept)])

    @pytest.mark.parametrize(
        "data",
        [
            pytest.param(deep_png_rgb(), id="png-rgb"),
            pytest.param(deep_tiff_rgb(), id="tiff-rgb"),
            pytest.param(encoded(Image.new("I;16", (20, 20), 4000)), id="png-gray"),
            pytest.param(encoded(Image.new("I;16", (20, 20), 4000), "TIFF"), id="tiff-gray"),
            pytest.param(encoded(Image.new("I", (20, 20), 4000), "TIFF"), id="tiff-int32"),
            pytest.param(encoded(Image.new("F", (20, 20), 0.5), "TIFF"), id="tiff-float"),
        ],
    )
    def test_more_than_eight_bits(self, data):
        self.refused(data, "more than 8 bits per channel")

    @pytest.mark.parametrize("data", [deep_png_rgb(), deep_tiff_rgb()], ids=["png", "tiff"])
    def test_pillow_hides_sixteen_bit_rgb(self, data):
        """Why the raw mode is looked at: without it these files would pass as ordinary ones."""
        image = Image.open(io.BytesIO(data))
        image.load()
        assert image.mode == "RGB"

    @pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
    def test_animated(self, kind):
        self.refused(animated(kind), "2 frames")

    @pytest.mark.parametrize("size", [(15, 40), (40, 15), (1, 1)])
    def test_too_small(self, size):
        self.refused(encoded(Image.new("RGB", size)), "smaller than 16 pixels")

    @pytest.mark.parametrize("side", [5657, 10_000, 13_400])
    def test_too_many_pixels_is_judged_on_the_header_without_a_warning(self, side, monkeypatch):
        """Below, at and beyond Pillow's own limits (warning from 89, error from 179 megapixels)."""
        assert side**2 > MAX_PIXELS
        data = encoded(Image.new("1", (side, side)))
        monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded before the check"))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.refused(data, "more than 32,000,000 pixels")
        assert caught == []

    def test_an_unsupported_colour_space(self):
        self.refused(encoded(Image.new("LAB", (20, 20)), "TIFF"), "colour mode LAB")

    def test_an_absent_file(self, tmp_path):
        with pytest.raises(CellImageError, match="cannot be read"):
            open_cell_image(tmp_path / "absent.png")

    def test_a_process_that_accepts_truncated_files_is_stopped(self, monkeypatch):
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
        with pytest.raises(RuntimeError, match="LOAD_TRUNCATED_IMAGES"):
            open_cell_image(image_bytes())

    def test_the_truncated_jpegs_of_a_real_export(self):
        folder = SHARED_DATA / "broken-jpegs"
        if not folder.is_dir():
            pytest.skip("real truncated JPEGs are not beside the repository (../shared/data/broken-jpegs)")
        files = sorted(folder.glob("*.jpg"))
        assert len(files) == 4
        for path in files:
            with pytest.raises(CellImageError, match="truncated"):
                open_cell_image(path)


VALID = [image_bytes(side=20, kind=kind) for kind in ("JPEG", "PNG", "BMP", "TIFF", "WEBP")]


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(VALID),
    st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_damaged_bytes_give_an_rgb_image_or_the_one_error(data, changes):
    damaged = bytearray(data)
    for position, value in changes:
        damaged[position % len(damaged)] = value
    with contextlib.suppress(CellImageError):
        assert open_cell_image(bytes(damaged)).image.mode == "RGB"


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_give_the_one_error(data):
    with pytest.raises(CellImageError):
        open_cell_image(data)


def test_the_callers_warning_filters_survive_parallel_reading():
    before = list(warnings.filters)
    threads = [threading.Thread(target=open_cell_image, args=(image_bytes(seed),)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before


def test_the_suffixes_counted_as_images():
    assert {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"} == IMAGE_SUFFIXES
