"""The inner loop of a nested cross-validation: settings chosen on a fold's training patients alone.

The patients of the fold itself are not even handed over. The others are divided once more, and each trial is a
training run on one part whose score is that of the other. The winner is then trained anew as the model of the fold, on
training and validation patients of its own, so that epoch, calibration and threshold are not chosen on the patients
that have chosen the settings.
"""

import difflib
import importlib
import json
import logging
import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

import numpy as np
import yaml

from .cohort import Cohort
from .files import remove_folder, write_json
from .options import CohortOptions, ModelOptions, SplitOptions, TrainingOptions
from .options_crossval import CrossvalOptions
from .recipes import train
from .runs import FREE_ON_RESUME
from .splits import make_split

logger = logging.getLogger(__name__)

# Options that do not change how well an epoch ranks the validation patients.
_NOT_SEARCHED = FREE_ON_RESUME | {
    "output",
    "seed",
    "threshold",
    "calibration",
    "coverage",
    "clinical_baseline",
    "checkpoint_every",
    "micro_batch",
    "chunk_size",
    "feature_cache",
}
_RECORD = "trials.json"
_HINTS = {
    name: hint
    for group in (ModelOptions, TrainingOptions)
    for name, hint in get_type_hints(group).items()
    if name in group.__dataclass_fields__ and name not in _NOT_SEARCHED
}


class SearchError(ValueError):
    """Settings cannot be searched; the message names file, option and value, and says what was expected."""


@dataclass(frozen=True)
class Choice:
    """One of these values."""

    values: tuple[str | int | float | bool | None, ...]

    def distribution(self, optuna: Any) -> Any:
        """The same for Optuna."""
        return optuna.distributions.CategoricalDistribution(self.values)


@dataclass(frozen=True)
class Range:
    """A number from `low` to `high`, both included; whole numbers only if `whole`, on a logarithmic scale if `log`."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def distribution(self, optuna: Any) -> Any:
        """The same for Optuna."""
        if self.whole:
            return optuna.distributions.IntDistribution(int(self.low), int(self.high), log=self.log)
        return optuna.distributions.FloatDistribution(self.low, self.high, log=self.log)


@dataclass(frozen=True)
class SearchSpace:
    """Which values of which options are tried.

    Attributes:
        options: name of an option of model or training -> its values.
    """

    options: Mapping[str, Choice | Range]

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a YAML or JSON file: `name: [value, ...]` or `name: {low: ..., high: ..., log: true}`.

        Raises:
            SearchError: an unreadable file, an option that there is not or that no score depends on, or values that
                it cannot take.
        """
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise SearchError(f"--search {path}: {error}") from error
        if not isinstance(content, dict) or not content:
            raise SearchError(f"--search {path}: expected a table such as 'learning_rate: {{low: 1e-5, high: 1e-3}}'.")
        names = {str(name).replace("-", "_"): given for name, given in content.items()}
        return cls({name: _values(path, name, given) for name, given in names.items()})

    def distributions(self, optuna: Any) -> dict[str, Any]:
        """The same for Optuna."""
        return {name: values.distribution(optuna) for name, values in self.options.items()}


def search_settings(
    space: SearchSpace,
    patients: Cohort,
    given: tuple[CohortOptions, CrossvalOptions, ModelOptions, TrainingOptions],
    folder: Path,
) -> tuple[ModelOptions, TrainingOptions]:
    """Try settings on these patients and return the options with the best ones.

    Best is the highest AUROC on the inner validation patients, and among equals the lowest Brier score. `trials.json`
    holds every finished trial; an interrupted search goes on with the very settings that it was trying.

    Args:
        space: what to try.
        patients: checked; the fold's training patients, whose labels may be learnt from.
        given: the options, of which those in `space` are replaced.
        folder: of the search; the trials' own folders go when their scores are noted.

    Raises:
        SearchError: no trial was asked for, or all failed; the message holds the last failure.
        SplitError: too few patients to divide once more.
    """
    _, options, model, training = given
    if options.trials < 1:
        raise SearchError(f"--trials {options.trials}: expected at least 1.")
    record = folder / _RECORD
    trials: list[dict[str, Any]] = json.loads(record.read_text(encoding="utf-8")) if record.exists() else []
    if len(trials) < options.trials:
        objective = _Objective(patients, given, folder)
        while len(trials) < options.trials:
            settings = _next_settings(space, trials, training.seed)
            logger.info("Trial %d of %d: %s", len(trials) + 1, options.trials, settings)
            trials.append({"settings": settings, **_tried(objective, settings, folder / f"trial-{len(trials) + 1}")})
            write_json(record, trials)
        remove_folder(objective.cache)
    best = chosen_settings(folder)
    logger.info("Best of %d trials (inner AUROC %.4f): %s", len(trials), best["inner_auroc"], best["settings"])
    return with_settings(model, best["settings"]), with_settings(training, best["settings"])


def chosen_settings(folder: Path) -> dict[str, Any]:
    """The best settings of a finished search, and how it found them.

    Raises:
        SearchError: every trial failed.
    """
    trials = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    complete = [trial for trial in trials if trial["auroc"] is not None]
    if not complete:
        reason = trials[-1].get("failure", "an undefined AUROC")
        raise SearchError(f"{folder}: all {len(trials)} trials failed, the last with {reason}")
    best = max(complete, key=lambda trial: (trial["auroc"], -trial["brier"]))
    return {
        "settings": best["settings"],
        "inner_auroc": best["auroc"],
        "inner_brier": best["brier"],
        "trials": len(trials),
        "failed": len(trials) - len(complete),
    }


def with_settings(options: Any, settings: Mapping[str, Any]) -> Any:
    """The options with those settings that they have a field for."""
    return replace(options, **{name: value for name, value in settings.items() if hasattr(options, name)})


class _Objective:
    """Settings -> AUROC and Brier score on the inner validation patients."""

    def __init__(
        self,
        patients: Cohort,
        given: tuple[CohortOptions, CrossvalOptions, ModelOptions, TrainingOptions],
        folder: Path,
    ):
        cohort_options, options, self.model, training = given
        self.patients = patients
        self.cache = folder / "cache"
        # Another seed than that of the fold's own validation patients.
        seed = int(np.random.SeedSequence([training.seed, 1]).generate_state(1)[0])
        split = make_split(patients, validation_fraction=options.validation_fraction, seed=seed)
        split.save(folder / "split.json")
        self.cohort_options = replace(cohort_options, cache_dir=str(self.cache))
        self.split = SplitOptions(split=str(folder / "split.json"), positive_label=options.positive_label)
        self.training = replace(training, clinical_baseline="none", tracker="none", resume=True)

    def __call__(self, settings: Mapping[str, Any], run: Path) -> dict[str, float]:
        training = with_settings(replace(self.training, output=str(run)), settings)
        train(self.cohort_options, self.split, with_settings(self.model, settings), training, cohort=self.patients)
        scores = json.loads((run / "validation.json").read_text(encoding="utf-8"))["scores"]
        return {name: scores[name]["value"] for name in ("auroc", "brier")}


def _tried(objective: _Objective, settings: Mapping[str, Any], run: Path) -> dict[str, Any]:
    """Scores of one trial, or why it failed: settings that do not fit together count as tried."""
    try:
        found = objective(settings, run)
    except (ValueError, RuntimeError) as error:
        logger.warning("The trial failed: %s: %s", type(error).__name__, error)
        found = {"auroc": None, "brier": None, "failure": f"{type(error).__name__}: {error}"}
    remove_folder(run)  # not after an interruption: then it is resumed
    return found


def _next_settings(space: SearchSpace, trials: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """What Optuna (tree-structured Parzen estimator) tries after these trials.

    A function of them and the seed alone, so that a search can be interrupted anywhere.
    """
    optuna = _optuna()
    states, distributions = optuna.trial.TrialState, space.distributions(optuna)
    own_seed = int(np.random.SeedSequence([seed, len(trials)]).generate_state(1)[0])
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=own_seed))
    for trial in trials:
        value = trial["auroc"]
        state = states.FAIL if value is None else states.COMPLETE
        study.add_trial(
            optuna.trial.create_trial(state=state, value=value, params=trial["settings"], distributions=distributions)
        )
    return study.ask(distributions).params


def _values(path: str | Path, name: str, given: Any) -> Choice | Range:
    """The values of one option, checked against its type."""
    where = f"--search {path}: {name}"
    if name not in _HINTS:
        near = difflib.get_close_matches(name, _HINTS, n=1)
        guess = f" Did you mean {near[0]}?" if near else ""
        raise SearchError(f"{where}: no option of model or training that can be searched.{guess}")
    if isinstance(given, dict):
        return _range(where, given, whole=_fits(0, _HINTS[name]) and not _fits(0.5, _HINTS[name]))
    if not isinstance(given, list) or not given:
        raise SearchError(f"{where} is {given!r}: expected a list of values, or low, high and log.")
    values = tuple(json.dumps(value) if isinstance(value, dict) else value for value in given)
    for value in values:
        if not _fits(value, _HINTS[name]):
            raise SearchError(f"{where} has the value {value!r}: expected {_described(_HINTS[name])}.")
    return Choice(values)


def _range(where: str, given: Mapping[str, Any], *, whole: bool) -> Range:
    unknown = given.keys() - {"low", "high", "log"}
    if unknown or not {"low", "high"} <= given.keys() or not isinstance(given.get("log", False), bool):
        raise SearchError(f"{where} is {given!r}: expected low, high, and log: true or false.")
    # YAML reads 1e-5, without a point, as text.
    low, high = (_number(where, given[end]) for end in ("low", "high"))
    log = given.get("log", False)
    if not low < high or (log and low <= 0):
        raise SearchError(f"{where} is {given!r}: expected low below high{', and above 0 with log' if log else ''}.")
    if whole and not (low.is_integer() and high.is_integer()):
        raise SearchError(f"{where} is {given!r}: expected whole numbers.")
    return Range(low, high, log, whole)


def _number(where: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise SearchError(f"{where}: {value!r} is no number.") from None
    if not math.isfinite(number):
        raise SearchError(f"{where}: {value!r} is not finite.")
    return number


def _fits(value: Any, hint: Any) -> bool:
    """Whether an option of this type can have this value; text is checked for Literal types only."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if isinstance(hint, types.UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _described(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _optuna() -> Any:
    try:
        optuna = importlib.import_module("optuna")
    except ImportError as error:
        raise SearchError(f"optuna is not installed ({error}): pip install 'lymph-hf[train]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
