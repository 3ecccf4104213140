"""Options of `lymph features`."""

from dataclasses import dataclass
from typing import ClassVar

from .options import option


@dataclass(kw_only=True)
class FeatureBuildOptions:
    """Which encoder gives the features; that of a run, or one that is named."""

    _argument_group_name: ClassVar[str] = "encoder"

    feature_cache: str = option(..., "folder of features; made if need be")
    feature_views: int = option(0, "augmented views of each patient beside the cells as they are")
    run: str | None = option(None, "run folder, model folder or Hub id whose encoder and adapter are used")
    encoder: str | None = option(None, "in place of a run: any timm model name, hf-hub:owner/name or local-dir:folder")
    encoder_weights: str | None = option(
        None, "'timm' for published weights, or a file or folder of weights; by default random"
    )
    encoder_options: str | None = option(None, "JSON of further timm.create_model arguments")
    image_size: int | None = option(None, "side of the input in pixels; by default what the encoder expects")
    chunk_size: str = option("32", "cells that pass the encoder at once: a number, auto or none")
    seed: int = option(0, "of random weights, as in lymph train")


@dataclass(kw_only=True)
class FeatureListOptions:
    """Which cache."""

    _argument_group_name: ClassVar[str] = "cache"

    feature_cache: str = option(..., "folder of features")


@dataclass(kw_only=True)
class FeaturePruneOptions(FeatureListOptions):
    """What goes; exactly one of the three."""

    _argument_group_name: ClassVar[str] = "pruning"

    older_than: float | None = option(None, "remove what was last used more than this many days ago")
    keep_size: float | None = option(None, "remove what was used longest ago until at most this many GB (10^9) stay")
    all: bool = option(False, "remove all features")
    dry_run: bool = option(False, "say what would go, and remove nothing")
