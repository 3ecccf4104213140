"""What each kind of card has to hold, and how a template becomes a card."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import ModelCard

SECTIONS = (
    "Intended use",
    "Out-of-scope use",
    "Training data",
    "Reference standard",
    "Evaluation",
    "Decision threshold",
    "Prevalence",
    "Calibration",
    "Referral",
    "Subgroups",
    "Limitations",
    "How to use",
    "Training procedure",
    "Environmental cost",
    "Privacy",
    "Citation",
)
_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{%|\[More Information Needed\]|\b(TODO|TBD|NaN|nan)\b|[|(] *None *[|)]")


class CardError(ValueError):
    """The card would be incomplete; the message says what is missing and which option gives it."""


@dataclass(frozen=True)
class CardPattern:
    """What a kind of card has to hold.

    Attributes:
        sections: headings of the second level.
        metadata: keys of the YAML block.
        disclaimer: words that have to stand in the text.
    """

    sections: tuple[str, ...]
    metadata: tuple[str, ...]
    disclaimer: str = "not a medical device"


_WEIGHTS = ("license", "library_name", "tags")
MODEL_CARD = CardPattern(SECTIONS, (*_WEIGHTS, "pipeline_tag", "model-index"))
ADAPTER_CARD = CardPattern(SECTIONS, (*MODEL_CARD.metadata, "base_model"))
BASE_CARD = CardPattern(("What it is for", "Settings", "How to use", "Privacy"), _WEIGHTS)
ENCODER_CARD = CardPattern(
    (
        "Intended use",
        "Out-of-scope use",
        "Training data",
        "Evaluation",
        "Limitations",
        "How to use",
        "Training procedure",
        "Environmental cost",
        "Privacy",
        "Citation",
    ),
    (*_WEIGHTS, "pipeline_tag"),
)
DATA_CARD = CardPattern(
    (
        "Patients",
        "Reference standard",
        "Images",
        "Columns",
        "Left out",
        "Privacy",
        "Out-of-scope use",
        "How to use",
        "Citation",
    ),
    ("license", "task_categories", "size_categories", "tags", "dataset_info", "configs"),
)
SPACE_CARD = CardPattern((), ("sdk", "app_file", "license", "title"), disclaimer="")


def filled_card(name: str, content: Mapping[str, Any], pattern: CardPattern, subject: Path) -> str:
    """The template `<name>_card_template.md` with its blanks filled.

    Args:
        content: of every blank.
        pattern: which the result has to follow.
        subject: what the card is of, for the message of an error.

    Raises:
        CardError: the card would be incomplete.
    """
    template = Path(__file__).with_name(f"{name}_card_template.md").read_text(encoding="utf-8")
    # Strict, unlike ModelCard.from_template: a misspelt name must not become a blank.
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)
    text = environment.from_string(template).render(content)
    if problems := card_problems(text, pattern):
        raise CardError(f"{subject}: its card would be incomplete: {'; '.join(problems)}.")
    return text


def card_problems(text: str, pattern: CardPattern = MODEL_CARD) -> list[str]:
    """What is missing in a card: sections, metadata, or words that a template left behind."""
    try:
        card = ModelCard(text)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        return [f"the metadata cannot be read ({error})"]
    headings = set(re.findall(r"^## (.+)$", card.text, flags=re.MULTILINE))
    problems = [f"no section {section!r}" for section in pattern.sections if section not in headings]
    metadata = card.data.to_dict()
    problems += [f"no {key!r} in the metadata" for key in pattern.metadata if not metadata.get(key)]
    if pattern.disclaimer not in card.text:
        problems.append("it does not say that this is not a medical device")
    prose = re.sub(r"```.*?```", "", card.text, flags=re.DOTALL)
    problems += [f"left behind: {found.group()!r}" for found in _PLACEHOLDER.finditer(prose)]
    return problems
