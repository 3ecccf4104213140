"""Options of `lymph recipe` and `lymph image-vote`."""

from dataclasses import dataclass
from typing import ClassVar

from .options import option


@dataclass(kw_only=True)
class RecipeOptions:
    """Which stages follow each other, and where they go."""

    _argument_group_name: ClassVar[str] = "recipe"

    file: str = option(..., "YAML file of stages, as those in scripts/recipes")
    output: str | None = option(None, "folder of all stages; by default the file's own output")
    check: bool = option(False, "check the whole file and run nothing")


@dataclass(kw_only=True)
class ImageVoteOptions:
    """Whose cells vote, and who counts them."""

    _argument_group_name: ClassVar[str] = "image vote"

    run: str = option(..., "run folder of a patient model, beside which the vote is put")
    classifier: str = option(..., "run folder of lymph pretrain --objective patient-label")
    resamples: int = option(2000, "bootstrap resamples of patients")
    seed: int = option(0, "of the bootstrap")
