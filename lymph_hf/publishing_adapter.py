"""A run with an adapter -> the adapter alone, on a frozen base that is published beside it, once for all its adapters.

The base is the complete patient model before training: the frozen encoder, from random, timm's or the publisher's own
weights, under a head that was never trained. PEFT puts the adapter's own head in its place.
"""

import json
import logging
import shutil
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file

from .card import base_card, model_card
from .files import write_json, write_text
from .golden import golden_answers, write_golden
from .hub_push import PublishError, explained, hub_api, push_folder
from .modeling_loading import ADAPTER_WEIGHTS
from .options_publish import CardOptions, PublishOptions
from .publication_checks import ADAPTER, BASE, folder_problems, run_digests, run_identifiers
from .publishing_code import add_code, load_published, name_code
from .publishing_model import add_card
from .publishing_predictions import check_predictions
from .publishing_stage import Staged, listing, refuse
from .runs import Run

logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
# What a training decides, of which a base for other trainings knows nothing.
_UNDECIDED = {"decision_threshold": 0.5, "calibration": None, "conformal": None, "class_weights": None}


def stage_adapter(run: Run, folder: Path, options: PublishOptions, card: CardOptions) -> Staged:
    """The adapter of a run, with its head, its configuration and its card; its base goes to the Hub first.

    The base carries the code, which the settings of the adapter name there.

    Raises:
        CardError, RunError: as in `publish`.
        PublishError: no base is named, or the base may not leave.
    """
    if card.base_model is None:
        raise PublishError(
            f"{run.folder} holds an adapter, which is published without the frozen model it goes with: name the "
            "repository of that with --base-model organisation/name. It is made unless it is there."
        )
    if options.dtype != "float32":
        raise PublishError(f"--dtype {options.dtype}: an adapter fits its base to the bit; leave --dtype out.")
    if card.base_model == options.repo:
        raise PublishError(f"--base-model {options.repo}: the base needs a repository of its own, beside --repo.")
    text = str(model_card(run, card, repo=options.repo, tag=options.tag))
    for name in (ADAPTER_WEIGHTS, "config.json", "preprocessor_config.json"):
        shutil.copyfile(run.model / name, folder / name)
    settings = json.loads((run.model / "adapter_config.json").read_text(encoding="utf-8"))
    _write_adapter_config(folder, settings, card.base_model, revision=None)
    add_card(run, folder, text)
    model, processor = load_published(run.model)
    name_code(model, processor, folder, repo=card.base_model)
    write_golden(folder, golden_answers(model, processor))
    base = folder.parent / "base"
    base.mkdir()
    stage_base(run, base, options, card)
    identifiers, digests = run_identifiers(run), run_digests(run)
    refuse([f"{card.base_model}: {problem}" for problem in folder_problems(base, identifiers, BASE, digests)])

    def settle_base() -> None:
        commit = publish_base(base, card.base_model, options)
        _write_adapter_config(folder, settings, card.base_model, revision=commit)

    return Staged(
        folder,
        ADAPTER,
        identifiers=frozenset(identifiers),
        digests=frozenset(digests),
        notes=(check_predictions(run, run.model, options), _base_note(base, card.base_model)),
        before_push=settle_base,
    )


def stage_base(run: Run, folder: Path, options: PublishOptions, card: CardOptions) -> None:
    """The frozen model of a run with an adapter: it loads by itself, and its head was never trained."""
    for name in (WEIGHTS, "config.json", "preprocessor_config.json"):
        shutil.copyfile(run.model / name, folder / name)
    path = folder / "config.json"
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | _UNDECIDED)
    add_code(*load_published(folder), folder)
    write_text(folder / "README.md", base_card(run, card, adapter=options.repo, tag=options.tag))


def publish_base(folder: Path, repo: str, options: PublishOptions) -> str:
    """Find the base on the Hub, or publish it.

    Returns:
        The commit to pin.

    Raises:
        PublishError: the repository holds other frozen weights, or the Hub refuses.
    """
    with explained(repo):
        commit = _published_commit(repo)
        if commit is not None:
            _compare(load_file(folder / WEIGHTS), repo, commit)
            logger.info("%s: the base is published already, commit %s", repo, commit)
            return commit
    return push_folder(
        folder, repo, tag=options.tag, private=options.private, message="Publish the frozen base of adapters"
    )


def _published_commit(repo: str) -> str | None:
    """The newest commit of a repository that holds something."""
    try:
        info = hub_api().model_info(repo)
    except RepositoryNotFoundError:
        return None  # or hidden from this token: then the push is refused
    return info.sha if any(file.rfilename != ".gitattributes" for file in info.siblings) else None


def _compare(weights: dict, repo: str, commit: str) -> None:
    """An adapter fits when what it leaves frozen is the same to the bit, and what it replaces has the same shape."""
    try:
        theirs = load_file(hf_hub_download(repo, WEIGHTS, revision=commit))
    except EntryNotFoundError as error:
        raise PublishError(f"--base-model {repo} holds no {WEIGHTS}: name the repository of a whole model.") from error
    shapes, their_shapes = ({name: w.shape for name, w in state.items()} for state in (weights, theirs))
    frozen = [name for name in weights if name.startswith("model.encoder.")]
    if shapes != their_shapes or not all(weights[name].equal(theirs[name]) for name in frozen):
        raise PublishError(
            f"--base-model {repo}: these are not the frozen weights that the adapter was trained on. Name the "
            "repository that holds them, or one that does not exist yet."
        )


def _write_adapter_config(folder: Path, settings: dict, base: str, revision: str | None) -> None:
    write_json(folder / "adapter_config.json", settings | {"base_model_name_or_path": base, "revision": revision})


def _base_note(folder: Path, repo: str) -> str:
    head = f"Base, sent first unless {repo} holds the same frozen weights; its commit is then written down"
    return listing(folder, head)
