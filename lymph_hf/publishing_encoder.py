"""A run of `lymph pretrain` -> its encoder as timm loads it from the Hub, and beside it the model it was trained in."""

import json
import shutil
from pathlib import Path

from .card_encoder import encoder_card
from .files import write_json, write_text
from .golden import golden_embeddings, write_golden
from .options_publish import CardOptions, PublishOptions
from .probing import RECORD
from .publication_checks import ENCODER, WHOLES
from .publishing_stage import Staged, store_weights_as
from .runs import Run, RunError

FIGURE = "history.png"


def stage_encoder(run: Run, folder: Path, options: PublishOptions, card: CardOptions) -> Staged:
    """The encoder with its card, its learning curve and, in a sub-folder, the model it was trained in.

    The record of the run lists the digests of the images that were seen. They stay behind, as whoever has an image
    could ask whether it was among them; one fingerprint of all of them together is published.

    Raises:
        CardError: as in `publish`.
        RunError: the run has not finished.
    """
    record = json.loads((run.folder / RECORD).read_text(encoding="utf-8"))
    if "epochs" not in record:
        raise RunError(f"{run.folder} has not finished: continue it with lymph pretrain --resume.")
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(run.folder / "encoder" / name, folder / name)
    _keep_no_names(folder / "config.json")
    store_weights_as(options.dtype, folder)
    whole = next((name for name in WHOLES if (run.folder / name).is_dir()), None)
    if whole is not None:
        shutil.copytree(run.folder / whole, folder / whole)
        _keep_no_names(folder / whole / "config.json")
        store_weights_as(options.dtype, folder / whole)
    if (run.folder / FIGURE).exists():
        shutil.copyfile(run.folder / FIGURE, folder / FIGURE)
    probes = [json.loads(Path(path).read_text(encoding="utf-8")) for path in options.probe or ()]
    place = {"repo": options.repo, "tag": options.tag}
    text = encoder_card(run, record, probes, card, **place, whole=whole, dtype=options.dtype)
    write_text(folder / "README.md", text)
    write_golden(folder, golden_embeddings(folder))
    return Staged(folder, ENCODER, digests=frozenset(record["digests"]))


def _keep_no_names(path: Path) -> None:
    """Names of local folders say nothing elsewhere, and may say too much: the card tells what the data are."""
    config = json.loads(path.read_text(encoding="utf-8"))
    places = [config, config.get("model_args") or {}]
    for place in places:
        if place.get("pretraining"):
            place["pretraining"].pop("data", None)
    write_json(path, config)
