"""The `lymph` command: one function per sub-command, options from `options.py`; parsing only."""

import difflib
import importlib
import json
import logging
import os
import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers.hf_argparser import HfArgumentParser

from . import options as o
from . import options_bench as ob
from . import options_crossval as oc
from . import options_distill as od
from . import options_explain as oe
from . import options_features as of
from . import options_pretrain as p
from . import options_publish as op
from . import options_recipe as orc
from . import options_report as orp
from .version import __version__

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Command:
    """A sub-command.

    Attributes:
        function: `module:name` inside the package, imported when the command runs.
        options: dataclasses passed to it, in this order.
        help: one line.
        examples: command lines.
    """

    function: str
    options: tuple[type, ...]
    help: str
    examples: tuple[str, ...]

    def run(self, parsed: Sequence[Any]) -> None:
        """Import the function and call it."""
        module, name = self.function.split(":")
        getattr(importlib.import_module(f"lymph_hf.{module}"), name)(*parsed)


COMMANDS = {
    "synth": Command(
        "recipes:synthesise",
        (o.SynthOptions,),
        "paint a synthetic cohort with a known best possible score",
        ("lymph synth cohort", "lymph synth challenge --layout challenge --patients 100 --seed 1"),
    ),
    "cohort check": Command(
        "recipes:check_cohort",
        (o.CohortOptions, o.CheckOptions),
        "say what is in a folder of patients, what is left out and why, and draw it",
        ("lymph cohort check cohort",),
    ),
    "cohort download": Command(
        "publishing_data:download",
        (op.DownloadOptions,),
        "make a folder of patients of a data set on the Hub",
        ("lymph cohort download org/name --output cohort",),
    ),
    "train": Command(
        "recipes:train",
        (o.CohortOptions, o.SplitOptions, o.ModelOptions, o.TrainingOptions),
        "train a patient model",
        (
            "lymph train --data cohort --output runs/first",
            "lymph train --data cohort --output runs/first --resume",
            "lymph train --config settings.yaml --epochs 40",
            "accelerate launch scripts/train.py --data cohort --output runs/first",
        ),
    ),
    "crossval": Command(
        "crossval:crossval",
        (o.CohortOptions, oc.CrossvalOptions, o.ModelOptions, o.TrainingOptions, od.FoldTeacherOptions),
        "cross-validate a patient model, and save the models of the folds as one",
        (
            "lymph crossval --data cohort --output runs/folds --folds 5 --repeats 3",
            "lymph crossval --data cohort --output runs/folds --jobs 2 --resume",
            "lymph crossval --data cohort --output runs/nested --search search.yaml --trials 20",
            "lymph crossval --output runs/folds --resume --baselines bag_size image_vote --learning-curve 0.25 0.5",
            "lymph crossval --data cohort --output runs/small --encoder vit_tiny_patch16_224 --teacher runs/folds",
        ),
    ),
    "pretrain": Command(
        "pretraining:pretrain",
        (p.PretrainOptions,),
        "pretrain a cell encoder (masked autoencoder, cell types, or the patients' labels)",
        (
            "lymph pretrain --data cells --output runs/mae",
            "lymph pretrain --data cells cohort --split runs/first --output runs/mae",
            "lymph pretrain --data cohort --split runs/first --objective patient-label --output runs/cells",
            "lymph pretrain --data cells --objective cell-type --encoder-weights runs/mae/encoder --output runs/types",
            "accelerate launch scripts/pretrain_mae.py --data cells --output runs/mae",
        ),
    ),
    "recipe": Command(
        "recipe_files:run_recipe",
        (orc.RecipeOptions,),
        "run stages that follow each other, with one split; finished ones are skipped",
        (
            "lymph recipe scripts/recipes/two-stage.yaml --check",
            "lymph recipe scripts/recipes/two-stage.yaml --output runs/two-stage",
        ),
    ),
    "distill": Command(
        "distillation:distill",
        (o.CohortOptions, o.SplitOptions, o.ModelOptions, o.TrainingOptions, od.DistillOptions),
        "train a small patient model beside a trained teacher",
        (
            "lymph distill --teacher runs/first --data cohort --split runs/first/split.json --output runs/small",
            "lymph distill --teacher runs/a runs/b --data cohort --split split.json --alpha 0.3 --output runs/small",
            "lymph distill --teacher runs/a/clinical-model --data cohort --split runs/a/split.json --output runs/small",
        ),
    ),
    "image-vote": Command(
        "image_vote:image_vote",
        (o.CohortOptions, orc.ImageVoteOptions, o.InferenceOptions),
        "put the vote of a patient's cells beside a patient model, as a baseline",
        ("lymph image-vote runs/second --classifier runs/cells --data cohort",),
    ),
    "probe": Command(
        "probing:probe",
        (p.ProbeOptions,),
        "kNN and linear probe of an encoder on labelled cells",
        ("lymph probe --data cells --encoder-weights runs/mae/encoder --held-out runs/mae/encoder --output probe",),
    ),
    "evaluate": Command(
        "recipes:evaluate",
        (o.CohortOptions, o.EvaluateOptions, o.InferenceOptions),
        "score a model on labelled patients, with confidence intervals",
        ("lymph evaluate runs/first --data cohort",),
    ),
    "report": Command(
        "report_page:report",
        (orp.ReportOptions,),
        "show a scored run as one HTML page",
        ("lymph report runs/first", "lymph report runs/first --evaluation runs/other --output first.html"),
    ),
    "predict": Command(
        "recipes:predict",
        (o.CohortOptions, o.PredictOptions, o.InferenceOptions),
        "write probability and label of each patient",
        (
            "lymph predict runs/first --data cohort --output predictions.csv",
            "lymph predict runs/first --data challenge --output submission.csv --submission",
        ),
    ),
    "features build": Command(
        "feature_commands:build",
        (o.CohortOptions, of.FeatureBuildOptions, o.InferenceOptions),
        "keep what a frozen encoder gives for each cell, for lymph train --freeze-encoder --feature-cache",
        (
            "lymph features build --data cohort --run runs/first --feature-cache cache",
            "lymph features build --data cohort --encoder resnet18 --encoder-weights timm --feature-cache cache",
        ),
    ),
    "features list": Command(
        "feature_commands:list_features",
        (of.FeatureListOptions,),
        "say what a cache of features holds",
        ("lymph features list --feature-cache cache",),
    ),
    "features prune": Command(
        "feature_commands:prune",
        (of.FeaturePruneOptions,),
        "remove features by age or size",
        (
            "lymph features prune --feature-cache cache --older-than 30 --dry-run",
            "lymph features prune --feature-cache cache --keep-size 2",
        ),
    ),
    "explain": Command(
        "explaining:explain",
        (o.CohortOptions, oe.ExplainOptions, oe.JudgeOptions),
        "show the cells and clinical values behind an answer, or judge the ranking of the cells",
        (
            "lymph explain runs/first --data cohort --patient P001 --output explanations",
            "lymph explain runs/first --data cohort --judge cohort/cells.csv --positive cll_like --output judgement",
        ),
    ),
    "publish": Command(
        "publishing:publish",
        (op.PublishOptions, op.CardOptions),
        "check and publish a model, adapter, encoder, data set or Space on the Hub",
        (
            "lymph publish runs/first --repo org/name --config card.yaml --dry-run",
            "lymph publish runs/first --repo org/name --config card.yaml --private",
            "lymph publish runs/folds --repo org/ensemble --config card.yaml --data cohort --dtype float16",
            "lymph publish runs/lora --repo org/adapter --base-model org/base --config card.yaml",
            "lymph publish runs/mae --repo org/encoder --config card.yaml --probe runs/probe/probe.json",
            (
                "lymph publish --data cohort --repo-type dataset --repo org/cells --config card.yaml "
                "--patients-may-be-published"
            ),
            "lymph publish --space space --repo org/space",
        ),
    ),
    "bench": Command(
        "bench:bench",
        (ob.BenchOptions,),
        "measure prediction and training of a patient beside the plain way, on this machine",
        ("lymph bench", "lymph bench runs/first --cells 100", "lymph bench --encoder resnet18 --adapter residual"),
    ),
}
# The one option of a command that may be given without its flag.
POSITIONAL = {
    "synth": "output",
    "cohort check": "data",
    "cohort download": "repo",
    "evaluate": "run",
    "report": "run",
    "explain": "run",
    "predict": "run",
    "publish": "run",
    "recipe": "file",
    "image-vote": "run",
    "bench": "run",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `lymph ...`; returns the exit status: 0, 2 for a mistake in the call, 1 for a failure with a message."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name, rest = _command(arguments)
    if name is None:
        return _overview(arguments)
    _log_to_terminal()
    command = COMMANDS[name]
    parsed = parse(name, rest)
    try:
        command.run(parsed)
    except KeyboardInterrupt:
        resumable = name in ("train", "crossval", "pretrain", "distill")
        advice = " Run the same command with --resume to go on." if resumable else ""
        logger.error("Interrupted.%s", advice)
        return 130
    except (ValueError, RuntimeError, OSError, StrictDataclassError) as error:
        # Expected failures say what to do; the traceback is for those who ask for it.
        logger.debug("Traceback", exc_info=True)
        logger.error("%s: %s", type(error).__name__, error)
        return 1
    return 0


def parse(name: str, arguments: Sequence[str]) -> tuple[Any, ...]:
    """Options of a command from the command line, over those of a `--config` file, over the defaults.

    Args:
        name: of the command, a key of `COMMANDS`.
        arguments: what follows it.

    Raises:
        SystemExit: an unknown option or an unreadable value, with the usage on standard error.
    """
    command = COMMANDS[name]
    parser = HfArgumentParser(
        command.options,
        prog=f"lymph {name}",
        description=command.help,
        epilog="examples:\n" + "\n".join(f"  {example}" for example in command.examples),
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON of options; the command line overrides it")
    if "-h" in arguments or "--help" in arguments:
        parser.print_help()
        raise SystemExit(0)
    arguments = _name_positional(name, arguments)
    from_files = _from_config(parser, arguments) + _from_saved_run(arguments)
    try:
        *parsed, _, unknown = parser.parse_args_into_dataclasses(
            [*from_files, *arguments], return_remaining_strings=True, look_for_args_file=False
        )
    except ValueError as error:  # a value that the options themselves refuse
        parser.error(str(error))
    if unknown:
        parser.error(_unknown(parser, unknown))
    return tuple(parsed)


def _unknown(parser: HfArgumentParser, unknown: Sequence[str]) -> str:
    known = [flag for action in parser._actions for flag in action.option_strings]
    near = [match for word in unknown for match in difflib.get_close_matches(word, known, n=1)]
    return f"unknown: {' '.join(unknown)}." + (f" Did you mean {', '.join(near)}?" if near else "")


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Defaults in the help, examples as they are written."""


def _command(arguments: list[str]) -> tuple[str | None, list[str]]:
    for words in (2, 1):
        name = " ".join(arguments[:words])
        if name in COMMANDS:
            return name, arguments[words:]
    return None, arguments


def _overview(arguments: list[str]) -> int:
    width = max(map(len, COMMANDS))
    lines = [
        f"lymph {__version__}: patient-level blood-cell diagnosis. Research use only, not a medical device.",
        "",
    ]
    lines += [f"  lymph {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    lines += ["", "lymph COMMAND --help tells the options and shows examples."]
    asked = not arguments or arguments[0] in ("-h", "--help", "--version")
    stream = sys.stdout if asked else sys.stderr
    if not asked:
        lines.insert(0, f"lymph: no command {' '.join(arguments[:2])!r}.\n")
    stream.write("\n".join(lines) + "\n")
    return 0 if asked else 2


def _name_positional(name: str, arguments: Sequence[str]) -> list[str]:
    """`lymph evaluate RUN ...` means `--run RUN`."""
    if name in POSITIONAL and arguments and not arguments[0].startswith("-"):
        return [f"--{POSITIONAL[name]}", *arguments]
    return list(arguments)


def _from_config(parser: HfArgumentParser, arguments: list[str]) -> list[str]:
    """The `--config` file as flags, so that one parser checks the names and types of both."""
    if "--config" not in arguments[:-1]:
        return []
    path = Path(arguments[arguments.index("--config") + 1])
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))  # YAML reads JSON too
    except (OSError, yaml.YAMLError) as error:
        parser.error(f"--config {path}: {error}")
    if not isinstance(content, dict):
        parser.error(f"--config {path}: expected a table of options, such as 'epochs: 40'.")
    return o.as_flags(content)


def _from_saved_run(arguments: list[str]) -> list[str]:
    """`--resume` takes the settings of the run in `--output`, so they need not be repeated."""
    if "--resume" not in arguments or "--output" not in arguments[:-1]:
        return []
    settings = Path(arguments[arguments.index("--output") + 1]) / "settings.json"
    return o.as_flags(json.loads(settings.read_text())) if settings.exists() else []


def _log_to_terminal() -> None:
    """The package's messages go to standard output, as they are; progress bars go to standard error."""
    package = logging.getLogger("lymph_hf")
    if not package.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        package.addHandler(handler)
        # Of several processes the first one speaks; the others only warn.
        package.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
