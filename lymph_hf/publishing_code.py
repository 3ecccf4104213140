"""The code that a published folder carries, so that its model loads where this package is not installed."""

import json
import shutil
import sys
from pathlib import Path

from transformers import AutoImageProcessor, AutoModel, PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files

from .files import write_json
from .processing_lymph import LymphImageProcessor


def export_with_code(model: PreTrainedModel, processor: LymphImageProcessor, folder: str | Path) -> Path:
    """Save model and image processor so that they load where this package is not installed.

    The folder loads with `trust_remote_code=True` there; where the package is imported, its own classes are used.

    Returns:
        The folder.
    """
    folder = Path(folder)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    add_code(model, processor, folder)
    return folder


def add_code(model: PreTrainedModel, processor: LymphImageProcessor, folder: Path) -> None:
    """Copy the modules of a saved model beside it, and say in its settings where the classes are."""
    name_code(model, processor, folder)
    for name, source in _modules([_source(cls) for cls in (type(model), type(model.config), type(processor))]).items():
        shutil.copyfile(source, folder / name)


def name_code(model: PreTrainedModel, processor: LymphImageProcessor, folder: Path, *, repo: str | None = None) -> None:
    """Say in the settings of a saved model where its classes are: beside it, or in another repository."""
    _name_classes(folder / "config.json", {"AutoConfig": type(model.config), "AutoModel": type(model)}, repo)
    _name_classes(folder / "preprocessor_config.json", {"AutoImageProcessor": type(processor)}, repo)


def outdated_code(folder: str | Path) -> list[str]:
    """Modules of a published folder that differ from the package's, that it lacks, or that it no longer needs."""
    folder = Path(folder)
    current = _named_modules(folder)
    there = {path.name for path in folder.glob("*.py")}
    differing = {name for name in there & current.keys() if (folder / name).read_bytes() != current[name].read_bytes()}
    return sorted(differing | (there ^ current.keys()))


def refresh_code(folder: str | Path) -> list[str]:
    """Bring the modules of a published folder up to the package's; weights, settings and card stay as they are.

    Returns:
        The names of the modules that were written or removed.
    """
    folder, changed = Path(folder), outdated_code(folder)
    current = _named_modules(folder)
    for name in changed:
        if name in current:
            shutil.copyfile(current[name], folder / name)
        else:
            (folder / name).unlink()
    return changed


def load_published(folder: Path) -> tuple[PreTrainedModel, LymphImageProcessor]:
    """Model and image processor of a folder, by the classes of this package."""
    return AutoModel.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)


def _named_modules(folder: Path) -> dict[str, Path]:
    """The modules that the settings of a folder name, with all that they import; empty if it carries no code."""
    settings = [folder / name for name in ("config.json", "preprocessor_config.json")]
    maps = [json.loads(path.read_text(encoding="utf-8")).get("auto_map") or {} for path in settings if path.exists()]
    stems = {target.split(".")[0] for auto_map in maps for target in auto_map.values() if "--" not in target}
    return _modules([Path(__file__).with_name(f"{stem}.py") for stem in sorted(stems)])


def _modules(sources: list[Path]) -> dict[str, Path]:
    """These modules and all that they import of the package, by file name."""
    return {Path(file).name: Path(file) for source in sources for file in [source, *get_relative_import_files(source)]}


def _name_classes(path: Path, classes: dict[str, type], repo: str | None) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    place = "" if repo is None else f"{repo}--"
    content["auto_map"] = {auto: f"{place}{_source(cls).stem}.{cls.__name__}" for auto, cls in classes.items()}
    write_json(path, content)


def _source(cls: type) -> Path:
    return Path(sys.modules[cls.__module__].__file__)
