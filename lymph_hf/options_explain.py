"""Options of `lymph explain`: which patients, how, and against what the rankings are judged."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from .options import option


@dataclass(kw_only=True)
class ExplainOptions:
    """What is explained, and how."""

    _argument_group_name: ClassVar[str] = "explanation"

    run: str = option(..., "run folder, or a model folder or Hub id")
    output: str = option(..., "folder to write to: one folder per patient, and the judgement")
    patient: list[str] | None = option(None, "identifiers of the patients to explain")
    all: bool = option(False, "explain every patient of the folder")
    label: str | None = option(
        None, "label to explain; by default the positive one of two, else the one that the model favours"
    )
    effect: Literal["leave_one_out", "sampled"] = option(
        "leave_one_out", "effect of a cell: without it and nothing else, or the mean over random halves of the others"
    )
    maps: Literal["auto", "integrated", "grad_cam", "none"] = option(
        "integrated",
        "where inside a cell: integrated gradients of the pixels, or for encoders with a feature map Grad-CAM",
    )
    shown: int = option(8, "cells for and cells against the label in the gallery")
    seed: int = option(0, "of the sampling and the bootstrap")


@dataclass(kw_only=True)
class JudgeOptions:
    """How the rankings of the cells are judged, if at all."""

    _argument_group_name: ClassVar[str] = "judgement"

    judge: str | None = option(
        None, "table of the cells' true types (patient_id, file, cell_type): judge the rankings against it"
    )
    positive: list[str] | None = option(
        None, "cell types that speak for the label, as whole words: 'blast' is any blast, but no erythroblast"
    )
    judge_label: str | None = option(None, "judge on patients with this label only")
    resamples: int = option(2000, "bootstrap resamples of patients")
