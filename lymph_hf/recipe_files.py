"""Recipes: stages that follow each other, each a run folder, from one file and with one split.

```yaml
output: runs/two-stage
split: {validation_fraction: 0.2, seed: 0}    # or the path of a split file
shared: {data: cohort, encoder: vit_tiny_patch16_224}    # options of every stage that knows them
stages:
  cells: {command: pretrain, objective: patient-label, epochs: 10}
  patients: {command: train, encoder_weights: "stage:cells", adapter: lora}
  vote: {command: image-vote, run: "stage:patients", classifier: "stage:cells"}
  test: {command: evaluate, run: "stage:patients"}
```

The split is drawn first and holds for all stages, so that no stage learns from patients that a later one is judged by.
"""

import difflib
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers.hf_argparser import HfArgumentParser

from .distillation import distill
from .files import write_json
from .image_vote import image_vote
from .options import (
    CohortOptions,
    EvaluateOptions,
    InferenceOptions,
    ModelOptions,
    SplitOptions,
    TrainingOptions,
    as_flags,
    option,
)
from .options_distill import DistillOptions
from .options_pretrain import PretrainOptions
from .options_recipe import ImageVoteOptions, RecipeOptions
from .patient_data import choose_split, read_checked, record_data
from .pretraining import pretrain
from .recipes import evaluate, train
from .runs import FREE_ON_RESUME, Run
from .splits import Split

logger = logging.getLogger(__name__)

REFERENCE = "stage:"


class RecipeFileError(ValueError):
    """The file cannot be run; the message names stage and option, and says what was expected."""


@dataclass(frozen=True)
class Kind:
    """A command that can be a stage.

    Attributes:
        run: the function behind it.
        options: what it takes.
        trains: it makes weights, in a run folder that resumes; others are cheap and are simply repeated.
        product: exists in its folder once it has finished.
    """

    run: Callable[..., Any]
    options: tuple[type, ...]
    trains: bool
    product: str

    @property
    def names(self) -> set[str]:
        """Of its options."""
        return {field.name for group in self.options for field in fields(group)}


_STUDENT = (CohortOptions, SplitOptions, ModelOptions, TrainingOptions)
KINDS = {
    "pretrain": Kind(pretrain, (PretrainOptions,), True, "encoder"),
    "train": Kind(train, _STUDENT, True, "lymph-mil"),
    "distill": Kind(distill, (*_STUDENT, DistillOptions), True, "lymph-mil"),
    "image-vote": Kind(image_vote, (CohortOptions, ImageVoteOptions, InferenceOptions), False, "image-vote.json"),
    "evaluate": Kind(evaluate, (CohortOptions, EvaluateOptions, InferenceOptions), False, "metrics.json"),
}
# Which options may name another stage: the commands that make what they need, and where in its folder it lies.
_REFERENCES = {
    "encoder_weights": (("pretrain",), "encoder"),
    "classifier": (("pretrain",), ""),
    "run": (("train", "distill"), ""),
    "teacher": (("train", "distill"), ""),
}
# What the recipe itself decides.
_OWN = frozenset({"output", "resume", "split", "test_fraction", "positive_label"})


@dataclass(kw_only=True)
class RecipeSplit(SplitOptions):
    """The split of a recipe, drawn once."""

    seed: int = option(0, "of the draw")


@dataclass(frozen=True)
class Stage:
    """A stage, its options checked and complete.

    Attributes:
        name: of the stage.
        command: a key of `KINDS`.
        folder: where it writes.
        options: what its function takes.
        after: names of the stages it builds on.
    """

    name: str
    command: str
    folder: Path
    options: tuple[Any, ...]
    after: frozenset[str]

    @property
    def kind(self) -> Kind:
        """The command behind it."""
        return KINDS[self.command]

    @property
    def settings(self) -> dict[str, Any]:
        """Every option that can change the result."""
        found = {name: value for group in self.options for name, value in asdict(group).items()}
        return {name: value for name, value in found.items() if name not in FREE_ON_RESUME}


@dataclass(frozen=True)
class RecipeFile:
    """A checked recipe.

    Attributes:
        output: folder of all stages; also holds `split.json`, `cohort.json` (fingerprint and images of each part) and
            `recipe.json` (which stages have finished, and with which settings).
        split: how the split is drawn.
        stages: in their order.
    """

    output: Path
    split: RecipeSplit
    stages: tuple[Stage, ...]


def run_recipe(options: RecipeOptions) -> Path:
    """Run the stages of a file; finished ones are skipped, an interrupted one goes on where it was.

    Returns:
        The folder of all stages.

    Raises:
        RecipeFileError: a mistake anywhere in the file, found before anything runs; a finished stage whose settings
            have changed, or that rests on a stage which has been made anew.
        RunError, and what the stages raise: each with what to do.
    """
    recipe = read_recipe(options.file, options.output)
    for stage in recipe.stages:
        logger.info("%s: lymph %s, in %s", stage.name, stage.command, stage.folder)
    if options.check:
        return recipe.output
    diary = _Diary(recipe)
    _share_split(recipe)
    fresh: set[str] = set()
    for stage in recipe.stages:
        if diary.is_finished(stage, fresh):
            logger.info("%s: finished before, skipped", stage.name)
            continue
        logger.info("Stage %s (lymph %s)", stage.name, stage.command)
        stage.kind.run(*stage.options)
        diary.note(stage)
        fresh.add(stage.name)
    return recipe.output


def read_recipe(path: str | Path, output: str | Path | None = None) -> RecipeFile:
    """Read a file and check all of it: sections, commands, options, their values, references and data folders.

    Args:
        output: in place of the file's own.

    Raises:
        RecipeFileError: the first mistake.
    """
    content = _read_yaml(Path(path))
    _refuse_unknown(content, {"output", "split", "shared", "stages"}, f"{path}", "section")
    output = output or content.get("output")
    if not output:
        raise RecipeFileError(f"{path}: no output; write 'output: runs/NAME' or give --output")
    split = content.get("split") or {}
    split = _parsed((RecipeSplit,), {"split": split} if isinstance(split, str) else _table(split, "split"), "split")[0]
    shared, stages = _table(content.get("shared") or {}, "shared"), _table(content.get("stages") or {}, "stages")
    checked: dict[str, Stage] = {}
    for name, values in stages.items():
        checked[name] = _stage(name, _table(values, f"stage {name}"), shared, Path(output), split, checked)
    _refuse_different_patients(checked.values())
    known = set().union(*(stage.kind.names - _OWN for stage in checked.values()))
    _refuse_unknown(shared, known, "shared", "option of any stage")
    return RecipeFile(Path(output), split, tuple(checked.values()))


def _stage(
    name: str,
    values: Mapping[str, Any],
    shared: Mapping[str, Any],
    output: Path,
    split: RecipeSplit,
    earlier: Mapping[str, Stage],
) -> Stage:
    where = f"stage {name}"
    command = values.get("command")
    if command not in KINDS:
        raise RecipeFileError(f"{where}: no command {command!r}{_near(command, KINDS)}; expected one of {list(KINDS)}")
    kind = KINDS[command]
    own = {key: value for key, value in values.items() if key != "command"}
    decided = _OWN | ({"validation_fraction"} if command in ("train", "distill") else set())
    if taken := sorted(decided & own.keys()):
        raise RecipeFileError(
            f"{where}: {', '.join(taken)} cannot be set for one stage; the recipe decides it for all (sections output "
            "and split)"
        )
    _refuse_unknown(own, kind.names - decided, where, f"option of lymph {command}")
    given = {key: value for key, value in shared.items() if key in kind.names - decided} | own
    after: set[str] = set()
    given = {key: _resolved(key, value, where, earlier, after) for key, value in given.items()}
    folder = output / name
    fixed: dict[str, Any] = {"output": str(folder), "resume": True}
    # Pretraining knows evaluation patients by their images too, which cohort.json beside the split tells.
    fixed["split"] = str(output if command == "pretrain" else Run(output).split)
    fixed["positive_label"] = split.positive_label
    options = _parsed(kind.options, given | {k: v for k, v in fixed.items() if k in kind.names}, where)
    _refuse_absent_data(options, where)
    return Stage(name, command, folder if "output" in kind.names else Path(given["run"]), options, frozenset(after))


def _resolved(option_name: str, value: Any, where: str, earlier: Mapping[str, Stage], after: set[str]) -> Any:
    """The value with every `stage:NAME` replaced by a path; the names are added to `after`."""
    if isinstance(value, list):
        return [_resolved(option_name, item, where, earlier, after) for item in value]
    if not (isinstance(value, str) and value.startswith(REFERENCE)):
        return value
    name = value.removeprefix(REFERENCE)
    if option_name not in _REFERENCES:
        raise RecipeFileError(f"{where}: {option_name} cannot be another stage; only {', '.join(_REFERENCES)} can")
    if name not in earlier:
        raise RecipeFileError(
            f"{where}: {option_name} names no earlier stage {name!r}{_near(name, earlier)}; before it come "
            f"{', '.join(earlier) or 'none'}"
        )
    commands, part = _REFERENCES[option_name]
    if earlier[name].command not in commands:
        raise RecipeFileError(
            f"{where}: {option_name} needs a stage of {' or '.join(commands)}; {name} is one of {earlier[name].command}"
        )
    after.add(name)
    return str(earlier[name].folder / part)


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RecipeFileError(f"{self.prog}: {message}")


def _parsed(groups: tuple[type, ...], values: Mapping[str, Any], where: str) -> tuple[Any, ...]:
    """Options from a table, with the types and ranges of the command line."""
    _refuse_unknown(values, {field.name for group in groups for field in fields(group)}, where, "option")
    try:
        return _Parser(groups, prog=where, allow_abbrev=False).parse_args_into_dataclasses(
            as_flags(values), look_for_args_file=False
        )
    except RecipeFileError:
        raise
    except ValueError as error:
        raise RecipeFileError(f"{where}: {error}") from error


def _refuse_unknown(found: Iterable[str], known: Iterable[str], where: str, what: str) -> None:
    known = sorted(known)
    for name in found:
        if name not in known:
            raise RecipeFileError(f"{where}: no {what} {name!r}{_near(name, known)}")


def _near(name: Any, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def _refuse_absent_data(options: tuple[Any, ...], where: str) -> None:
    for value in filter(None, (getattr(group, "data", None) for group in options)):
        for path in value if isinstance(value, list) else [value]:
            if not Path(path).exists():
                raise RecipeFileError(f"{where}: data {path}: no such file or folder")


def _refuse_different_patients(stages: Iterable[Stage]) -> None:
    """One split is for one folder of patients, read in one way."""
    trained = {stage.name: stage.options[0] for stage in stages if stage.command in ("train", "distill")}
    if not trained:
        raise RecipeFileError("stages: none of them is train or distill, so there is nobody to split")
    first, cohort = next(iter(trained.items()))
    for name, other in trained.items():
        if (other.data, other.reference_date) != (cohort.data, cohort.reference_date):
            raise RecipeFileError(
                f"stage {name}: trains on {other.data}, stage {first} on {cohort.data}; a recipe has one split, so all "
                "of them need the same data and reference_date"
            )


def _table(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RecipeFileError(f"{where}: expected a table 'name: value', found {value!r}")
    return value


class _Loader(yaml.SafeLoader):
    """YAML in which a key stands once."""


def _unique_keys(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[str, Any]:
    pairs = loader.construct_pairs(node, deep=True)
    twice = [key for number, (key, _) in enumerate(pairs) if key in [k for k, _ in pairs[:number]]]
    if twice:
        raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} stands twice", node.start_mark)
    return dict(pairs)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_keys)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # a safe loader
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeFileError(f"{path}: cannot be read as a recipe: {error}") from error
    return _table(content, f"{path}")


def _share_split(recipe: RecipeFile) -> None:
    """Draw the split and write it, with the images of each part, before any stage runs."""
    shared = Run(recipe.output)
    cohort_options = next(stage.options[0] for stage in recipe.stages if stage.command in ("train", "distill"))
    cohort = read_checked(cohort_options)
    split = choose_split(cohort, recipe.split, recipe.split.seed)
    if shared.split.is_file() and Split.load(shared.split) != split:
        raise RecipeFileError(
            f"{shared.split}: stages were trained on another split than the one that the file now draws; restore the "
            "section split, or choose another --output"
        )
    record_data(shared, cohort, split)


class _Diary:
    """`recipe.json`: the stages that have finished, with their settings."""

    def __init__(self, recipe: RecipeFile):
        self.path = recipe.output / "recipe.json"
        self.finished: dict[str, Any] = {}
        if self.path.is_file():
            self.finished = json.loads(self.path.read_text(encoding="utf-8"))["finished"]
        for stage in recipe.stages:
            self._refuse_changes(stage)

    def is_finished(self, stage: Stage, fresh: set[str]) -> bool:
        """Whether a stage can be skipped.

        Args:
            fresh: stages that have run in this call.
        """
        if not self._is_made(stage) or self.finished[stage.name] != self._entry(stage):
            return False
        renewed = sorted(stage.after & fresh)
        if renewed and stage.kind.trains:
            raise RecipeFileError(
                f"stage {stage.name} was trained on an earlier {renewed[0]}, which has just been made anew; remove "
                f"{stage.folder} to train it again"
            )
        return not renewed

    def note(self, stage: Stage) -> None:
        """Write down that a stage has finished."""
        self.finished[stage.name] = self._entry(stage)
        write_json(self.path, {"finished": self.finished})

    def _refuse_changes(self, stage: Stage) -> None:
        if not stage.kind.trains or not self._is_made(stage):
            return
        before, now = self.finished[stage.name], self._entry(stage)
        pairs = {"command": (before["command"], now["command"])}
        names = sorted(before["settings"].keys() | now["settings"].keys())
        pairs |= {name: (before["settings"].get(name), now["settings"].get(name)) for name in names}
        changed = [f"{name}: {old!r} -> {new!r}" for name, (old, new) in pairs.items() if old != new]
        if changed:
            raise RecipeFileError(
                f"stage {stage.name} has finished with other settings ({'; '.join(changed)}); restore them, remove "
                f"{stage.folder} to train it again, or choose another --output"
            )

    def _is_made(self, stage: Stage) -> bool:
        return stage.name in self.finished and (stage.folder / stage.kind.product).exists()

    def _entry(self, stage: Stage) -> dict[str, Any]:
        return json.loads(json.dumps({"command": stage.command, "settings": stage.settings}))
