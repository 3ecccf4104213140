"""To the Hub: what is sent, what is checked first, and one commit."""

import logging
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .files import writing_folder
from .hub_push import PublishError, push_folder
from .options_publish import CardOptions, PublishOptions
from .publishing_adapter import stage_adapter
from .publishing_data import stage_data
from .publishing_encoder import stage_encoder
from .publishing_model import stage_model
from .publishing_space import stage_space
from .publishing_stage import Staged, listing
from .runs import Run, RunError

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
    """Check what is to be published, list everything that would be sent, and send it in one commit.

    What it is follows from the options: the model, adapter or encoder of a run folder, with `repo_type="dataset"` the
    patients of a cohort, or a Space. Nothing is sent when a check fails, or in a dry run, which needs neither a token
    nor a connection.

    Raises:
        CardError: the card lacks a fact that only the publisher knows.
        PublishError: a check fails, or the Hub refuses; what to do stands in the message.
        RunError: the run has not finished.
    """
    with tempfile.TemporaryDirectory(prefix="lymph-publish-") as temporary:
        folder = Path(temporary) / "repository"
        folder.mkdir()
        staged = _stage(folder, options, card)
        notes = staged.check()
        if not options.dry_run and staged.before_push is not None:
            staged.before_push()
        files = staged.files()
        visibility = "private" if options.private else "public"
        logger.info("%s", listing(folder, f"{options.repo} ({visibility}, version {options.tag})"))
        for note in notes:
            logger.info("%s", note)
        if options.output is not None:
            with writing_folder(options.output) as beside:
                shutil.copytree(folder, beside, dirs_exist_ok=True)
        if options.dry_run:
            logger.info("Dry run: nothing was sent.")
            return Publication(files, notes, None)
        commit = push_folder(
            folder,
            options.repo,
            tag=options.tag,
            private=options.private,
            repo_type=staged.repo_type,
            space_sdk=staged.space_sdk,
        )
        logger.info("Published: %s at version %s, commit %s", options.repo, options.tag, commit)
    return Publication(files, notes, commit)


def _stage(folder: Path, options: PublishOptions, card: CardOptions) -> Staged:
    """Put together what the options ask for."""
    of_patients = options.repo_type == "dataset"
    if (options.run is not None) + (options.space is not None) + of_patients != 1:
        raise PublishError(
            "Say what to publish: a run folder, --data FOLDER with --repo-type dataset, or --space FOLDER; one of them."
        )
    if options.dtype != "float32" and (options.space is not None or of_patients):
        raise PublishError(f"--dtype {options.dtype}: it is for the weights of models and encoders; leave it out.")
    if options.space is not None:
        return stage_space(Path(options.space), folder)
    if of_patients:
        return stage_data(folder, options, card)
    run = Run(Path(options.run))
    if (run.folder / "encoder" / "config.json").exists():
        return stage_encoder(run, folder, options, card)
    if not run.model.exists():
        raise RunError(
            f"{options.run} holds no finished model: expected a run folder of lymph train or lymph pretrain."
        )
    if (run.model / "adapter_config.json").exists():
        return stage_adapter(run, folder, options, card)
    return stage_model(run, folder, options, card)
