"""The folder of a training run: what lies where, who may write into it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .files import write_json

# Options that change how fast or how visibly a run goes, or what stands beside its result, never the result itself: a
# resumed run may change them.
FREE_ON_RESUME = frozenset(
    {"resume", "workers", "tracker", "cache_dir", "cpu", "jobs", "ensemble", "baselines", "learning_curve"}
)


# What a run writes before it trains.
_BEFORE_TRAINING = frozenset(
    {
        "settings.json",
        "split.json",
        "cohort.json",
        "logs",
        "clinical-model",
        "clinical-validation.csv",
        "clinical-test.csv",
    }
)


class RunError(RuntimeError):
    """The run folder cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Run:
    """A run folder.

    ```
    settings.json            every option of the run
    split.json               patients of train, validation and test
    cohort.json              fingerprint of the data, exclusions, warnings, digests of the training images
    checkpoints/             the last two, to resume from
    history.csv, .png        losses and validation scores by epoch
    lymph-mil/               what from_pretrained loads: weights, configuration, image processor
    validation.json, .csv    scores and predictions of the validation patients
    metrics.json, predictions.csv, evaluation.png     what `lymph evaluate` wrote last
    logs/                    curves of the tracker
    ```
    """

    folder: Path

    @property
    def model(self) -> Path:
        """The exported model."""
        return self.folder / "lymph-mil"

    @property
    def split(self) -> Path:
        """The patients of each part."""
        return self.folder / "split.json"

    @property
    def cohort(self) -> Path:
        """What the run was trained on."""
        return self.folder / "cohort.json"

    @property
    def settings(self) -> Path:
        """The options of the run."""
        return self.folder / "settings.json"

    @property
    def evaluation(self) -> Path:
        """Where an evaluation is written: the run itself, or beside the scores that a cross-validation has already."""
        return self.folder / "evaluation" if (self.folder / "out-of-fold.csv").exists() else self.folder

    def claim(self, settings: dict[str, Any], *, resume: bool) -> FileLock:
        """Take the folder for writing, and store the settings or compare them with those of the run.

        Returns:
            A lock to keep until the run ends; it falls with the process.

        Raises:
            RunError: the folder holds something else, another process writes into it, or `resume` with settings
                that differ from the run's.
        """
        content = {path.name for path in self.folder.iterdir()} - {".lock"} if self.folder.exists() else set()
        # A run that stopped before its first checkpoint, over a misspelt option say, holds nothing to lose.
        abandoned = self.settings.exists() and content <= _BEFORE_TRAINING
        occupied = bool(content) and not abandoned
        if occupied and not (resume and self.settings.exists()):
            advice = "use --resume to continue the run, or choose" if self.settings.exists() else "choose"
            raise RunError(f"{self.folder} is not empty: {advice} another --output.")
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RunError(
                f"{self.folder} is being written by another process: wait, or choose another --output."
            ) from None
        if occupied:
            self._compare(settings)
        else:
            self.cohort.unlink(missing_ok=True)
            write_json(self.settings, settings)
        return lock

    def _compare(self, settings: dict[str, Any]) -> None:
        # What only a later version knows is no change as long as it is off.
        off = {name: value for name, value in settings.items() if not value}
        saved = off | json.loads(self.settings.read_text())
        names = sorted((saved.keys() | settings.keys()) - FREE_ON_RESUME)
        changed = [f"{n}: {saved.get(n)!r} -> {settings.get(n)!r}" for n in names if saved.get(n) != settings.get(n)]
        if changed:
            raise RunError(
                f"{self.folder} was started with other settings ({'; '.join(changed)}). "
                "A resumed run keeps its settings: leave them out, or start a new run in another --output."
            )


def model_source(source: str | Path) -> str:
    """What to pass to `from_pretrained`: the model of a run folder, or the folder or Hub id itself.

    Raises:
        RunError: the folder is a run that has not finished.
    """
    run = Run(Path(source))
    if run.model.exists():
        return str(run.model)
    if run.settings.exists():
        command = "crossval" if "folds" in json.loads(run.settings.read_text()) else "train"
        raise RunError(
            f"{source} is a run without a finished model: continue it with lymph {command} --resume --output {source}."
        )
    return str(source)
