"""From a run folder to a repository on the Hub: what is sent, what is checked first, and one commit."""

import hashlib
import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from transformers import AutoImageProcessor, AutoModel, PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files

from .bags import BagDataset, build_bags
from .card import FIGURES, model_card
from .cohort import Cohort, read_cohort, scan_images
from .files import write_json, write_text, writing_folder
from .hub_push import PublishError, push_folder
from .inference import infer
from .options import InferenceOptions
from .options_publish import CardOptions, PublishOptions
from .processing_lymph import LymphImageProcessor
from .publication_checks import folder_problems, prediction_problems, run_identifiers, searchable
from .runs import Run, RunError
from .training import make_accelerator

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Publication:
    """What was, or would be, published.

    Attributes:
        files: name -> SHA-256 of its content.
        notes: what was checked, and what could not be.
        commit: on the Hub; `None` for a dry run.
    """

    files: dict[str, str]
    notes: tuple[str, ...]
    commit: str | None


def publish(options: PublishOptions, card: CardOptions) -> Publication:
    """Check a finished run, list everything that would be sent, and send it in one commit.

    Nothing is sent when a check fails, or in a dry run, which needs neither a token nor a connection.

    Raises:
        CardError: the card lacks a fact that only the publisher knows.
        PublishError: a check fails, or the Hub refuses; what to do stands in the message.
        RunError: the run has not finished.
    """
    run = Run(Path(options.run))
    if not run.model.exists():
        raise RunError(f"{options.run} holds no finished model: expected a run folder of lymph train.")
    identifiers = run_identifiers(run)
    with tempfile.TemporaryDirectory(prefix="lymph-publish-") as temporary:
        folder = stage_run(run, Path(temporary), card, repo=options.repo, tag=options.tag)
        _refuse(folder_problems(folder, identifiers))
        notes = (_identifiers_note(identifiers), _check_predictions(folder, run, options))
        files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
        logger.info("%s", _listing(folder, files, options))
        for note in notes:
            logger.info("%s", note)
        if options.output is not None:
            with writing_folder(options.output) as beside:
                shutil.copytree(folder, beside, dirs_exist_ok=True)
        commit = None
        if options.dry_run:
            logger.info("Dry run: nothing was sent.")
        else:
            commit = push_folder(folder, options.repo, tag=options.tag, private=options.private)
            logger.info("Published: %s at version %s, commit %s", options.repo, options.tag, commit)
    return Publication(files, notes, commit)


def stage_run(run: Run, folder: Path, card: CardOptions, *, repo: str, tag: str) -> Path:
    """Put together what is published of a run: model, code, card and figures; nothing else of it.

    Returns:
        The folder, which loads with `from_pretrained`.

    Raises:
        CardError: as in `publish`.
        RunError: the model of the run cannot be loaded.
    """
    text = str(model_card(run, card, repo=repo, tag=tag))
    for path in run.model.iterdir():
        shutil.copyfile(path, folder / path.name)
    try:
        model = AutoModel.from_pretrained(folder)
        processor = AutoImageProcessor.from_pretrained(folder)
    except (OSError, ValueError, RuntimeError) as error:
        raise RunError(f"{run.model} cannot be loaded: {error}") from error
    _add_code(model, processor, folder)
    write_text(folder / "README.md", text)
    for figure in FIGURES.values():
        if figure in text:
            shutil.copyfile(run.folder / figure, folder / figure)
    return folder


def export_with_code(model: PreTrainedModel, processor: LymphImageProcessor, folder: str | Path) -> Path:
    """Save model and image processor so that they load where this package is not installed.

    The folder loads with `trust_remote_code=True` there; where the package is imported, its own classes are used.

    Returns:
        The folder.
    """
    folder = Path(folder)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    _add_code(model, processor, folder)
    return folder


def _add_code(model: PreTrainedModel, processor: LymphImageProcessor, folder: Path) -> None:
    """Copy the modules of a saved model beside it, and say in its settings where the classes are."""
    _name_classes(folder / "config.json", {"AutoConfig": type(model.config), "AutoModel": type(model)})
    _name_classes(folder / "preprocessor_config.json", {"AutoImageProcessor": type(processor)})
    modules = [_source(cls) for cls in (type(model), type(model.config), type(processor))]
    for source in {Path(file) for module in modules for file in [module, *get_relative_import_files(module)]}:
        shutil.copyfile(source, folder / source.name)


def _name_classes(path: Path, classes: dict[str, type]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    content["auto_map"] = {auto: f"{_source(cls).stem}.{cls.__name__}" for auto, cls in classes.items()}
    write_json(path, content)


def _source(cls: type) -> Path:
    return Path(sys.modules[cls.__module__].__file__)


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise PublishError("Not published, as checks failed:\n" + "\n".join(f"  {problem}" for problem in problems))


def _identifiers_note(identifiers: set[str]) -> str:
    names = searchable(identifiers)
    note = f"None of {len(names)} patient identifiers of the run, no date and no path stands in any text."
    if short := len(identifiers) - len(names):
        note += f" {short} identifiers are too short to be told from numbers and were not searched for."
    return note


def _check_predictions(folder: Path, run: Run, options: PublishOptions) -> str:
    """Let the staged model predict the patients at hand anew.

    Raises:
        PublishError: the stored predictions are not reproduced, or the data are those of none.
    """
    if options.data is None:
        return "The stored predictions were not reproduced, as the patients are not at hand: pass --data to do so."
    settings = json.loads(run.settings.read_text(encoding="utf-8"))
    cohort = read_cohort(options.data, reference_date=options.reference_date or settings["reference_date"])
    cohort = scan_images(cohort)
    name, table = _stored_table(run, cohort, options.data)
    model, processor = AutoModel.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    rows = build_bags(cohort.select(table["patient_id"]), cache_dir=options.cache_dir)
    accelerator = make_accelerator(InferenceOptions(cpu=True))
    probabilities = infer(accelerator.prepare(model), BagDataset(rows, processor), accelerator).probabilities
    columns = [f"probability_{model.config.id2label[i]}" for i in range(model.config.num_labels)]
    if "probability" in table:
        columns, probabilities = ["probability"], probabilities[:, 1:]
    _refuse([f"{name}: {problem}" for problem in prediction_problems(table, probabilities, columns)])
    return f"The model reproduces the {len(table)} predictions of {name}."


def _stored_table(run: Run, cohort: Cohort, data: str) -> tuple[str, pd.DataFrame]:
    """The predictions whose patients these are, recognised by name and number of cells."""
    cells = {patient.patient_id: len(patient.images) for patient in cohort.patients}
    for name in ("validation.csv", "predictions.csv"):
        path = run.folder / name
        if path.exists():
            table = pd.read_csv(path, dtype={"patient_id": str})
            if all(cells.get(row.patient_id) == row.cells for row in table.itertuples()):
                return name, table
    raise PublishError(f"--data {data}: these are not the patients of validation.csv or predictions.csv of the run.")


def _listing(folder: Path, files: dict[str, str], options: PublishOptions) -> str:
    lines = [f"  {(folder / name).stat().st_size:>12,}  {digest[:12]}  {name}" for name, digest in files.items()]
    total = sum((folder / name).stat().st_size for name in files)
    visibility = "private" if options.private else "public"
    head = f"{options.repo} ({visibility}, version {options.tag}): {len(files)} files, {total:,} bytes"
    return "\n".join([head, *lines])
