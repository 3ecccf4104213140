"""What the tests of publishing share: facts for the cards, and the client's process that pushes."""

import contextlib
import io
import os
import re
from dataclasses import replace

from huggingface_hub import ModelCard

from lymph_hf.options_publish import CardOptions, PublishOptions
from lymph_hf.publishing import publish

WRITER = "hf_writer"
FACTS = CardOptions(
    training_data="Painted patients, seed 0.",
    evaluation_data="Painted patients, seed 9.",
    reference_standard="The painter knows.",
    acquisition="Painted, not stained.",
    synthetic=True,
)


def options(run=None, **changes) -> PublishOptions:
    return replace(PublishOptions(run=None if run is None else str(run), repo="org/run", dry_run=True), **changes)


def sent(run=None, **changes) -> PublishOptions:
    return options(run, dry_run=False, **changes)


def publish_as(token, arguments, card=FACTS):
    """In the client's process."""
    if token is not None:
        os.environ["HF_TOKEN"] = token
    try:
        return publish(arguments, card).commit
    finally:
        os.environ.pop("HF_TOKEN", None)


def run_examples(repo, folder, repo_type="model"):
    """The examples of a card, as a reader would run them in a folder with what they name; what they print."""
    printed = []
    os.chdir(folder)
    text = ModelCard.load(repo, repo_type=repo_type).text
    for code in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(code, "card", "exec"), {})
        printed.append(out.getvalue())
    return printed
