"""The folds of a cross-validation: who is in them, what is run for one, and running many at the same time."""

import contextlib
import json
import logging
import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from multiprocessing.connection import Connection, wait
from pathlib import Path

import numpy as np
import torch

from .cohort import Cohort
from .crossval_baselines import Case, read_baselines, write_baselines
from .crossval_search import SearchSpace, search_settings
from .distillation import Distillation
from .files import remove_folder
from .options import CohortOptions, EvaluateOptions, InferenceOptions, ModelOptions, SplitOptions, TrainingOptions
from .options_crossval import CrossvalOptions
from .options_distill import DistillOptions, FoldTeacherOptions
from .patient_data import ordered_labels
from .recipes import evaluate, train
from .split_files import PARTS
from .splits import Split, make_folds, make_split

logger = logging.getLogger(__name__)


class CrossvalError(RuntimeError):
    """A cross-validation cannot go on; the message names the fold and says what to do."""


@dataclass(frozen=True)
class Fold:
    """One fold of one repeat.

    Attributes:
        repeat, number: from 1.
        split: its test patients are the fold; training and validation patients are drawn from the others.
        seed: of its training; differs from fold to fold.
        folder: of its run.
    """

    repeat: int
    number: int
    split: Split
    seed: int
    folder: Path

    def __str__(self) -> str:
        return f"repeat {self.repeat}, fold {self.number}"

    @property
    def split_file(self) -> Path:
        """Where the patients of the fold are written down."""
        return self.folder.with_name(f"{self.folder.name}-split.json")

    @property
    def search_folder(self) -> Path:
        """Where settings were searched."""
        return self.folder.with_name(f"{self.folder.name}-search")

    @property
    def finished(self) -> bool:
        """Whether its test patients have been scored, which is the last thing that is done."""
        return (self.folder / "metrics.json").exists()

    @cached_property
    def report(self) -> dict:
        """What `lymph evaluate` says of its test patients."""
        return json.loads((self.folder / "metrics.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class FoldPlan:
    """What is done for every fold alike: the options, the settings to search and the teacher, if any."""

    cohort_options: CohortOptions
    options: CrossvalOptions
    model: ModelOptions
    training: TrainingOptions
    space: SearchSpace | None = None
    teacher: FoldTeacherOptions | None = None

    def done(self, fold: Fold) -> bool:
        """Whether nothing is left to do for a fold."""
        return fold.finished and set(self.options.baseline_names) <= read_baselines(fold.folder).keys()


def draw_folds(cohort: Cohort, options: CrossvalOptions, output: Path, seed: int) -> list[Fold]:
    """Every fold of every repeat, with validation patients drawn, stratified, from those outside of the fold.

    Raises:
        SplitError: too few patients of a class for so many folds, or for validation patients of each.
        CrossvalError: less than one repeat.
    """
    if options.repeats < 1:
        raise CrossvalError(f"--repeats {options.repeats}: expected at least 1.")
    folds = []
    for repeat in range(options.repeats):
        for number, fold in enumerate(make_folds(cohort, options.folds, seed=seed, repeat=repeat)):
            # A seed of its own, so that no repeat starts from the same weights or draws the same validation patients.
            own_seed = int(np.random.SeedSequence([seed, repeat, number]).generate_state(1)[0])
            others = cohort.select(fold.train)
            inner = make_split(others, validation_fraction=options.validation_fraction, seed=own_seed)
            split = replace(inner, test=fold.test, source=f"{fold.source}; of the others {inner.source}")
            folder = output / f"repeat-{repeat + 1}" / f"fold-{number + 1}"
            folds.append(Fold(repeat + 1, number + 1, split, own_seed, folder))
    return folds


def run_fold(fold: Fold, plan: FoldPlan, cohort: Cohort) -> None:
    """Search settings if asked to, train, score the fold's own patients, and put the baselines beside.

    What is done already is not repeated.
    """
    training = plan.training
    inference = InferenceOptions(mixed_precision=training.mixed_precision, workers=training.workers, cpu=training.cpu)
    if not fold.finished:
        _train_and_score(fold, plan, cohort, inference)
    names = tuple(ordered_labels(cohort, plan.options.positive_label))
    case = Case(fold.folder, cohort, fold.split, names, inference, training.feature_cache, fold.seed)
    write_baselines(plan.options.baseline_names, case)


def _train_and_score(fold: Fold, plan: FoldPlan, cohort: Cohort, inference: InferenceOptions) -> None:
    fold.split.save(fold.split_file)
    training = replace(plan.training, output=str(fold.folder), seed=fold.seed, resume=True)
    model = plan.model
    if plan.space is not None:
        patients = cohort.select((*fold.split.train, *fold.split.validation))  # the search never sees the others
        model, training = search_settings(
            plan.space,
            patients,
            (plan.cohort_options, plan.options, model, training),
            fold.search_folder,
        )
    split_options = SplitOptions(split=str(fold.split_file), positive_label=plan.options.positive_label)
    train(plan.cohort_options, split_options, model, training, teaching=_teaching(fold, plan), cohort=cohort)
    evaluation = EvaluateOptions(
        run=str(fold.folder),
        subset="test",
        resamples=plan.options.resamples,
        figures=False,  # a fold is too small to look at
        feature_cache=training.feature_cache,
    )
    evaluate(plan.cohort_options, evaluation, inference, cohort=cohort)
    remove_folder(fold.folder / "checkpoints")  # gigabytes over many folds, and nothing is left to resume


def check_teacher(folds: Sequence[Fold], plan: FoldPlan) -> None:
    """See that the teacher has the same folds, so that none of its models knows patients whom its student is scored on.

    Raises:
        CrossvalError: it has not, or is not finished; or what is asked for does not go with a teacher.
    """
    if plan.teacher is None:
        return
    if plan.space is not None or plan.options.learning_curve:
        option = "--search" if plan.space is not None else "--learning-curve"
        raise CrossvalError(
            f"--teacher with {option}: it would be that of students without a teacher, or of one who "
            "knows more patients than they; run it without --teacher."
        )
    for fold in folds:
        taught = _fold_of(plan.teacher.teacher, fold)
        if not taught.finished:
            raise CrossvalError(f"--teacher {plan.teacher.teacher}: no finished {fold} there ({taught.folder}).")
        split = Split.load(taught.split_file)
        parts = [part for part in PARTS if set(getattr(split, part)) != set(getattr(fold.split, part))]
        if parts:
            raise CrossvalError(
                f"--teacher {plan.teacher.teacher}: {fold} has other {' and '.join(parts)} patients there. Give both "
                "the same data, --folds, --repeats, --validation-fraction and --seed."
            )


def _fold_of(crossval: str, fold: Fold) -> Fold:
    """The same fold of another cross-validation."""
    return replace(fold, folder=Path(crossval, *fold.folder.parts[-2:]))


def _teaching(fold: Fold, plan: FoldPlan) -> Distillation | None:
    if plan.teacher is None:
        return None
    options = asdict(plan.teacher) | {"teacher": [str(_fold_of(plan.teacher.teacher, fold).folder)]}
    return Distillation(DistillOptions(**options))


def run_folds(folds: Sequence[Fold], plan: FoldPlan, cohort: Cohort, logs: Path) -> None:
    """Work on the folds that are not finished, `jobs` at a time, and log how far it is.

    The messages of a fold go to a file in `logs`. With one job the folds are trained in this process. With more each
    has a process of its own; the first that fails stops the others, which lose nothing: they are resumed later.

    Raises:
        CrossvalError: a fold failed; the message names it.
    """
    jobs = plan.options.jobs
    if jobs < 1:
        raise CrossvalError(f"--jobs {jobs}: expected at least 1.")
    waiting = [fold for fold in folds if not plan.done(fold)]
    progress = _Progress(folds, len(waiting))
    if len(waiting) < len(folds):
        logger.info("%d of %d folds are finished already.", len(folds) - len(waiting), len(folds))
    finished = (
        _in_this_process(waiting, plan, cohort, logs) if jobs == 1 else _in_processes(waiting, plan, cohort, logs)
    )
    with contextlib.closing(finished):
        for fold in finished:
            progress.log(fold)


class _Progress:
    """How far the folds are, how well they do, and how long the rest will take."""

    def __init__(self, folds: Sequence[Fold], waiting: int):
        self.folds = folds
        self.started = time.monotonic()
        self.waiting = self.left = waiting

    def log(self, fold: Fold) -> None:
        """Say that a fold is finished."""
        self.left -= 1
        areas = [_auroc(fold) for fold in self.folds if fold.finished]
        left = self.left * (time.monotonic() - self.started) / (self.waiting - self.left)
        logger.info(
            "%s: AUROC %.3f on %d patients. %d of %d folds done, mean AUROC so far %.3f%s",
            fold,
            _auroc(fold),
            fold.report["n"],
            len(self.folds) - self.left,
            len(self.folds),
            np.nanmean(areas) if not np.isnan(areas).all() else np.nan,
            f", about {_duration(left)} left" if left else "",
        )


def _auroc(fold: Fold) -> float:
    value = fold.report["scores"]["auroc"]["value"]
    return np.nan if value is None else value


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _in_this_process(folds: Sequence[Fold], plan: FoldPlan, cohort: Cohort, logs: Path) -> Iterator[Fold]:
    for fold in folds:
        log = _log_file(fold, logs)
        logger.info("%s: messages in %s", fold, log)
        try:
            with _messages_to(log):
                run_fold(fold, plan, cohort)
        except Exception as error:
            raise _failed(fold, f"{type(error).__name__}: {error}") from error
        yield fold


def _in_processes(folds: Sequence[Fold], plan: FoldPlan, cohort: Cohort, logs: Path) -> Iterator[Fold]:
    context = multiprocessing.get_context("spawn")  # forked copies of a process that has used a GPU or threads hang
    threads = max(1, torch.get_num_threads() // plan.options.jobs)
    waiting, running = deque(folds), {}
    try:
        while waiting or running:
            while waiting and len(running) < plan.options.jobs:
                fold = waiting.popleft()
                log = _log_file(fold, logs)
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_fold_process, args=(fold, plan, cohort, threads, log, sender))
                process.start()
                sender.close()
                running[process.sentinel] = (process, fold, log, receiver)
                logger.info("%s: messages in %s", fold, log)
            for sentinel in wait(list(running)):
                process, fold, log, receiver = running.pop(sentinel)
                process.join()
                if process.exitcode != 0:
                    raise _failed(fold, f"{_reason(receiver, process.exitcode)} (messages in {log})")
                yield fold
    finally:
        for process, *_ in running.values():
            process.terminate()
        for process, *_ in running.values():
            process.join()


def _fold_process(fold: Fold, plan: FoldPlan, cohort: Cohort, threads: int, log: Path, sender: Connection) -> None:
    """What a process of `_in_processes` does."""
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.getLogger("lymph_hf").setLevel(logging.INFO)
    with log.open("a", encoding="utf-8") as file, contextlib.redirect_stderr(file), _messages_to(log):
        try:
            run_fold(fold, plan, cohort)
        except Exception as error:
            logger.exception("%s failed", fold)
            sender.send(f"{type(error).__name__}: {error}")
            raise SystemExit(1) from error


def _end_with_parent() -> None:
    """A fold whose parent was killed must not go on: it would stand in the way of whoever resumes."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _log_file(fold: Fold, logs: Path) -> Path:
    logs.mkdir(parents=True, exist_ok=True)
    return logs / f"repeat-{fold.repeat}-fold-{fold.number}.log"


@contextlib.contextmanager
def _messages_to(log: Path) -> Iterator[None]:
    """The messages of a fold go to a file; elsewhere only its warnings are heard, between the progress of the folds."""
    package = logging.getLogger("lymph_hf")
    others = [(handler, handler.level) for handler in package.handlers]
    file = logging.FileHandler(log, encoding="utf-8")
    package.addHandler(file)
    for handler, _ in others:
        handler.setLevel(logging.WARNING)
    try:
        yield
    finally:
        package.removeHandler(file)
        file.close()
        for handler, level in others:
            handler.setLevel(level)


def _reason(receiver: Connection, exitcode: int) -> str:
    with contextlib.suppress(EOFError):
        if receiver.poll():
            return receiver.recv()
    if exitcode < 0:
        return f"its process was ended by signal {-exitcode}; of too little memory: use fewer --jobs"
    return f"its process ended with status {exitcode}"


def _failed(fold: Fold, reason: str) -> CrossvalError:
    return CrossvalError(f"{fold}: {reason}. What is finished is kept: go on with --resume.")
