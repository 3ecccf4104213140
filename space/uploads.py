"""Files that somebody sends -> pictures, within limits that are checked before anything is decoded.

Nothing is unpacked to disk: members of a ZIP are read one by one into memory, so a name can lead nowhere, and no
link is followed. What cannot be used is left out with a reason; what breaks a limit is refused as a whole.
"""

import hashlib
import stat
import struct
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from PIL import Image

from lymph_hf.images import IMAGE_SUFFIXES, CellImageError, open_cell_image

MEGABYTE = 2**20
IGNORED_NAMES = frozenset({"thumbs.db", "desktop.ini"})


@dataclass(frozen=True)
class Limits:
    """What one request may bring; bytes are counted before and after unpacking."""

    files: int = 500
    file_bytes: int = 50 * MEGABYTE
    total_bytes: int = 250 * MEGABYTE
    pixels: int = 150_000_000  # of all pictures together; one picture has the limit of lymph_hf.images
    directory_bytes: int = 4 * MEGABYTE  # table of contents of a ZIP, which would otherwise fill the memory first


PATIENT_LIMITS = Limits()
BATCH_LIMITS = Limits(files=10_000, total_bytes=400 * MEGABYTE)


class UploadError(ValueError):
    """The upload cannot be used; the message is for the person who sent it: what is wrong, and what to do."""


@dataclass(frozen=True)
class SourceFile:
    """One file, from disk or out of a ZIP; `path` has forward slashes and leads nowhere."""

    path: str
    data: bytes = field(repr=False)

    @property
    def name(self) -> str:
        """Last part of the path."""
        return PurePosixPath(self.path).name


@dataclass
class Pictures:
    """Decoded pictures of one patient, in the order of their names.

    Attributes:
        images: RGB, as large as they came.
        left_out: (name, reason) of each file that is no picture.
        repeated: number of pictures that were there a second time, pixel by pixel, and count once.
        converted: number of grey, palette, CMYK or transparent pictures that were converted.
    """

    images: list[Image.Image] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    repeated: int = 0
    converted: int = 0


def read_pictures(paths: Sequence[str | Path], limits: Limits = PATIENT_LIMITS) -> Pictures:
    """Read the pictures of one patient from image files, ZIP files, or both.

    Raises:
        UploadError: nothing usable, or a limit is broken.
    """
    if not paths:
        raise UploadError("No file yet. Add cell images, one ZIP file, or choose an example.")
    left_out: list[tuple[str, str]] = []
    pictures = decode(source_files(paths, limits, left_out), limits, left_out)
    if not pictures.images:
        raise UploadError(f"None of the files is a usable picture. {_first_reasons(left_out)}")
    return pictures


def source_files(paths: Sequence[str | Path], limits: Limits, left_out: list[tuple[str, str]]) -> Iterator[SourceFile]:
    """The files in a list of files and ZIP files, sorted by path; reads lazily, one file at a time.

    Args:
        paths: of files on disk.
        limits: of everything together.
        left_out: gets (name, reason) of what is not read.

    Raises:
        UploadError: a limit is broken, or a ZIP cannot be read.
    """
    if len(paths) > limits.files:
        raise UploadError(_too_many(len(paths), limits))
    budget = _Budget(limits)
    for path in sorted(map(Path, paths), key=lambda path: path.name):
        size = path.stat().st_size
        if is_zip(path):
            yield from _members(path, budget, left_out)
        elif size > limits.file_bytes:
            left_out.append((path.name, f"larger than {limits.file_bytes // MEGABYTE} MB"))
        else:
            budget.add(files=1, size=size)
            yield SourceFile(path.name, path.read_bytes())


def decode(files: Iterator[SourceFile], limits: Limits, left_out: list[tuple[str, str]]) -> Pictures:
    """Decode files one after another; identical pictures count once.

    Raises:
        UploadError: more pixels together than the limits allow.
    """
    pictures = Pictures(left_out=left_out)
    seen: set[bytes] = set()
    pixels = 0
    for file in files:
        try:
            picture = open_cell_image(file.data)
        except CellImageError as error:
            left_out.append((file.name, str(error)))
            continue
        pixels += picture.image.width * picture.image.height
        if pixels > limits.pixels:
            raise UploadError(
                f"The pictures have more than {limits.pixels // 1_000_000} million pixels together. "
                "Send fewer, or crops of single cells."
            )
        digest = hashlib.sha256(picture.image.tobytes() + str(picture.image.size).encode()).digest()
        if digest in seen:
            pictures.repeated += 1
            continue
        seen.add(digest)
        pictures.converted += bool(picture.notes)
        pictures.images.append(picture.image)
    return pictures


def is_zip(path: Path) -> bool:
    """Whether the content, not the name, is that of a ZIP file."""
    with path.open("rb") as file:
        return file.read(4) in (b"PK\3\4", b"PK\5\6")


class _Budget:
    def __init__(self, limits: Limits):
        self.limits, self.files, self.size = limits, 0, 0

    def add(self, *, files: int, size: int) -> None:
        self.files += files
        self.size += size
        if self.files > self.limits.files:
            raise UploadError(_too_many(self.files, self.limits))
        if self.size > self.limits.total_bytes:
            raise UploadError(
                f"More than {self.limits.total_bytes // MEGABYTE} MB, unpacked. Send fewer or smaller pictures."
            )


def _members(path: Path, budget: _Budget, left_out: list[tuple[str, str]]) -> Iterator[SourceFile]:
    _check_directory(path, budget.limits)
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if not _is_clutter(member)]
            # Of the whole archive, before anything is unpacked.
            budget.add(files=len(members), size=sum(member.file_size for member in members))
            for member in sorted(members, key=lambda member: member.filename):
                reason = _refusal(member, budget.limits)
                if reason is None:
                    # zipfile never yields more than the declared size, which the budget has counted.
                    data = archive.read(member)
                    reason = "a ZIP inside a ZIP" if data[:4] == b"PK\3\4" else None
                if reason is None:
                    yield SourceFile(member.filename, data)
                else:
                    left_out.append((PurePosixPath(member.filename).name, reason))
    except UploadError:
        raise
    # Hostile archives make zipfile raise many things: BadZipFile, zlib.error, EOFError, NotImplementedError ...
    except Exception as error:
        raise UploadError("The ZIP file is damaged or incomplete. Pack it again, or send the images.") from error


def _check_directory(path: Path, limits: Limits) -> None:
    """Refuse a table of contents that would take gigabytes of memory before its entries can be counted."""
    with path.open("rb") as file:
        file.seek(0, 2)
        file.seek(-min(file.tell(), 22 + 0xFFFF), 2)
        tail = file.read()
    end = tail.rfind(b"PK\5\6")
    if end < 0 or len(tail) < end + 22:
        raise UploadError("The ZIP file is damaged or incomplete. Pack it again, or send the images.")
    (directory_bytes,) = struct.unpack_from("<L", tail, end + 12)
    if directory_bytes > limits.directory_bytes or b"PK\6\7" in tail[max(end - 20, 0) : end]:
        raise UploadError(_too_many("far too many", limits))


def _is_clutter(member: zipfile.ZipInfo) -> bool:
    path = PurePosixPath(member.filename)
    parts = path.parts
    name = path.name.lower()
    return not parts or member.is_dir() or "__MACOSX" in parts or name.startswith(".") or name in IGNORED_NAMES


def _refusal(member: zipfile.ZipInfo, limits: Limits) -> str | None:
    """Why a member of a ZIP is not even unpacked."""
    path = PurePosixPath(member.filename)
    if path.is_absolute() or ".." in path.parts or "\\" in member.filename or ":" in path.parts[0]:
        return "its path leads out of the ZIP"
    if stat.S_ISLNK(member.external_attr >> 16):
        return "a link, not a file"
    if member.flag_bits & 1:
        return "encrypted; pack it without a password"
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "an unusual compression; pack it as an ordinary ZIP"
    if member.file_size > limits.file_bytes:
        return f"larger than {limits.file_bytes // MEGABYTE} MB"
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        return "no picture by its name"
    return None


def _too_many(number: int | str, limits: Limits) -> str:
    shown = f"{number:,}" if isinstance(number, int) else number
    return f"{shown[0].upper()}{shown[1:]} files: at most {limits.files:,} can be read at once. Send fewer."


def _first_reasons(left_out: Sequence[tuple[str, str]], shown: int = 3) -> str:
    reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out[:shown])
    more = len(left_out) - shown
    return reasons + (f"; and {more} more." if more > 0 else ".")
