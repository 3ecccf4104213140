"""What is about to be published, and the refusal of what may not be."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .files import folder_files, writing_file
from .hub_push import PublishError, RepoType
from .options_publish import Dtype
from .publication_checks import Contents, folder_problems, searchable


@dataclass(frozen=True)
class Staged:
    """A folder as it will stand on the Hub.

    Attributes:
        folder: its content.
        contents: what may and must be in it.
        repo_type: kind of repository.
        identifiers: of the patients it was made from.
        digests: of the images it was made from.
        notes: what else was checked, and what could not be.
        before_push: what the Hub has to hold first; may change the folder.
        space_sdk: of a Space.
    """

    folder: Path
    contents: Contents
    repo_type: RepoType = "model"
    identifiers: frozenset[str] = frozenset()
    digests: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    before_push: Callable[[], None] | None = field(default=None, compare=False)
    space_sdk: str | None = None

    def check(self) -> tuple[str, ...]:
        """Refuse what may not leave.

        Returns:
            What was checked, in words.

        Raises:
            PublishError: with every problem.
        """
        refuse(folder_problems(self.folder, self.identifiers, self.contents, self.digests))
        return (identifiers_note(self.identifiers), *self.notes)

    def files(self) -> dict[str, str]:
        """Name -> SHA-256 of its content."""
        paths = folder_files(self.folder)
        return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in paths.items()}


def refuse(problems: Sequence[str]) -> None:
    """Stop when there are problems.

    Raises:
        PublishError: with all of them.
    """
    if problems:
        raise PublishError("Not published, as checks failed:\n" + "\n".join(f"  {problem}" for problem in problems))


def identifiers_note(identifiers: Iterable[str]) -> str:
    """What the search for identifiers covered."""
    identifiers = set(identifiers)
    if not identifiers:
        return "No date and no path stands in any text; it was made from no patients whose identifiers are known."
    names = searchable(identifiers)
    note = f"None of {len(names)} patient identifiers, no date and no path stands in any text."
    if short := len(identifiers) - len(names):
        note += f" {short} identifiers are too short to be told from numbers and were not searched for."
    return note


def store_weights_as(dtype: Dtype, folder: Path) -> None:
    """Round the weight matrices of the safetensors in a folder to another precision.

    Norms and biases, which are small and sensitive, keep theirs. So does `dtype` in `config.json`: it says in which
    precision a model is loaded, and transformers loads it in float32, wherever it runs, unless it is asked otherwise.
    """
    if dtype == "float32":
        return
    for path in folder.glob("*.safetensors"):
        weights = load_file(path)
        matrices = {name for name, tensor in weights.items() if tensor.is_floating_point() and tensor.ndim > 1}
        weights |= {name: weights[name].to(getattr(torch, dtype)) for name in matrices}
        with writing_file(path) as beside:
            save_file(weights, beside, metadata={"format": "pt"})


def listing(folder: Path, head: str) -> str:
    """Every file with its size and the beginning of its SHA-256, under a line that ends with number and size."""
    paths = folder_files(folder)
    lines = [
        f"  {path.stat().st_size:>12,}  {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}  {name}"
        for name, path in paths.items()
    ]
    total = sum(path.stat().st_size for path in paths.values())
    return "\n".join([f"{head}: {len(paths)} files, {total:,} bytes", *lines])
