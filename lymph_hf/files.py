"""Outputs that are complete or absent: written beside their place, then renamed."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def writing_file(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` with the same suffix; renamed to `path` when the block ends well.

    When the block fails, what stood at `path` before stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".writing-{os.getpid()}-{path.name}")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def writing_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside `path`, renamed to `path` when the block ends well; an older one is replaced."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".writing-{path.name}")
    remove_folder(beside)
    beside.mkdir()
    try:
        yield beside
        put_in_place(beside, path)
    finally:
        remove_folder(beside)


def put_in_place(beside: Path, path: Path) -> None:
    """Rename a finished folder to its place. The older one moves aside first, then goes."""
    older = path.with_name(f".replaced-{path.name}")
    remove_folder(older)
    if path.exists():
        path.rename(older)
    beside.rename(path)
    remove_folder(older)


def remove_folder(path: Path) -> None:
    """Remove a folder with its content, if it is there."""
    shutil.rmtree(path, ignore_errors=True)


def folder_files(folder: Path) -> dict[str, Path]:
    """Every file of a folder by its path inside, with slashes, sorted."""
    paths = sorted(path for path in folder.rglob("*") if not path.is_dir())
    return {path.relative_to(folder).as_posix(): path for path in paths}


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in one step."""
    with writing_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: Any) -> None:
    """Write readable JSON in one step; NaN becomes null, as JSON has no NaN."""
    write_text(path, json.dumps(_without_nan(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _without_nan(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_nan(value) for value in content]
    if isinstance(content, float) and not abs(content) < float("inf"):
        return None
    return content
