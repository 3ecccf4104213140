"""A finished run -> the folder of its model: weights, code, card, figures and golden answers.

The run is one of `lymph train`, or of `lymph crossval`, whose model is the ensemble of its folds.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .card import model_card
from .card_evaluation import evaluations
from .files import write_json, write_text
from .golden import golden_answers, write_golden
from .options_publish import CardOptions, Dtype, PublishOptions
from .publication_checks import MODEL, run_digests, run_identifiers
from .publishing_code import add_code, load_published
from .publishing_predictions import check_predictions
from .publishing_stage import Staged, store_weights_as
from .runs import Run, RunError


def stage_model(run: Run, folder: Path, options: PublishOptions, card: CardOptions) -> Staged:
    """The complete model of a run.

    Raises:
        CardError, PublishError, RunError: as in `publish`.
    """
    stage_run(run, folder, card, repo=options.repo, tag=options.tag, dtype=options.dtype)
    return Staged(
        folder,
        MODEL,
        identifiers=frozenset(run_identifiers(run)),
        digests=frozenset(run_digests(run)),
        notes=(check_predictions(run, folder, options),),
    )


def stage_run(run: Run, folder: Path, card: CardOptions, *, repo: str, tag: str, dtype: Dtype = "float32") -> Path:
    """Put together what is published of a run: model, code, card, figures and golden answers; nothing else of it.

    Returns:
        The folder, which loads with `from_pretrained`.

    Raises:
        CardError: as in `publish`.
        RunError: the model of the run cannot be loaded.
    """
    text = str(model_card(run, card, repo=repo, tag=tag, dtype=dtype))
    for path in run.model.iterdir():
        shutil.copyfile(path, folder / path.name)
    store_weights_as(dtype, folder)
    try:
        model, processor = load_published(folder)
    except (OSError, ValueError, RuntimeError) as error:
        raise RunError(f"{run.model} cannot be loaded: {error}") from error
    add_code(model, processor, folder)
    add_card(run, folder, text)
    write_golden(folder, golden_answers(model, processor))
    return folder


def add_card(run: Run, folder: Path, text: str) -> None:
    """Write the card, with the figures of the run that it shows, and the scores of unseen patients for programs."""
    write_text(folder / "README.md", text)
    found = evaluations(run)
    unseen = next((evaluation for evaluation in found if evaluation.kind.unseen), None)
    if unseen is not None:
        write_json(folder / "evaluation.json", _published_scores(unseen.report))
    for evaluation in found:
        if evaluation.figure is not None:
            shutil.copyfile(evaluation.figure, folder / evaluation.figure.name)


def _published_scores(report: Mapping[str, Any]) -> dict[str, Any]:
    """Of a report the scores and counts; neither the name of the data nor groups, which may be single patients.

    Four decimals: a longer fraction could be taken for a patient's number.
    """
    kept = {name: report[name] for name in ("n", "n_per_label", "interval")}
    kept["threshold"] = _rounded(report["threshold"])
    scores = {
        name: {bound: _rounded(interval[bound]) for bound in ("value", "low", "high")}
        for name, interval in report["scores"].items()
    }
    return kept | {"scores": scores}


def _rounded(number: float | None) -> float | None:
    return None if number is None else round(number, 4)
