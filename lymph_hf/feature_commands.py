"""`lymph features`: build, list and prune a cache of frozen-encoder features."""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pandas as pd
from accelerate.utils import set_seed
from torch import nn

from .configuration_lymph import LymphMILConfig
from .encoder_weights import load_first_weights
from .encoders import build_encoder, resolve_encoder
from .feature_source import FeatureError
from .feature_store import FeatureFile, remove_files, stored_files
from .features import Features, cached_features
from .options import CohortOptions, InferenceOptions, chunk_size_option, json_option
from .options_features import FeatureBuildOptions, FeatureListOptions, FeaturePruneOptions
from .patient_data import read_checked
from .patient_models import load_model
from .processing_lymph import LymphImageProcessor
from .training import make_accelerator

logger = logging.getLogger(__name__)

_DAY = 86_400  # seconds


@dataclass(frozen=True)
class Entry:
    """The features of one set of images by one encoder, which were stored together and go together.

    Attributes:
        files: at least one.
    """

    files: tuple[FeatureFile, ...]

    @property
    def key(self) -> tuple[str, str]:
        """Of the encoder, and of the images."""
        return self.files[0].path.parent.name, self.files[0].about.get("data", "")

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(file.size for file in self.files)

    @property
    def last_used(self) -> float:
        """Seconds since 1970."""
        return max(file.last_used for file in self.files)

    def row(self) -> dict[str, str | int]:
        """For the table."""
        about = [file.about for file in self.files]
        total = {name: sum(int(entry[name]) for entry in about) for name in ("patients", "cells")}
        whole = all(file.whole for file in self.files)
        return {
            "encoder": about[0].get("encoder", ""),
            "key": self.key[0][:8],
            "data": self.key[1],
            **total,
            "views": max(int(entry.get("views", 0)) for entry in about),
            "MB": f"{self.size / 1e6:.1f}",
            "last used": datetime.fromtimestamp(self.last_used).strftime("%Y-%m-%d %H:%M"),
            "state": "" if whole else "damaged",
        }


def build(cohort_options: CohortOptions, options: FeatureBuildOptions, inference: InferenceOptions) -> Features:
    """Encode a cohort into a cache, as far as it is not there yet; labels are not needed and not used.

    Raises:
        FeatureError: neither or both of a run and an encoder, or what `cached_features` raises.
    """
    if (options.run is None) == (options.encoder is None):
        raise FeatureError("Give the encoder either by --run (a trained model) or by --encoder (a timm name).")
    accelerator = make_accelerator(inference)
    model, processor = _named_encoder(options) if options.run is None else load_model(options.run)
    return cached_features(
        model,
        processor,
        read_checked(cohort_options, accelerator),
        options.feature_cache,
        views=options.feature_views,
        accelerator=accelerator,
        chunk_size=chunk_size_option(options.chunk_size),
        workers=inference.workers,
    )


def list_features(options: FeatureListOptions) -> pd.DataFrame:
    """Log what a cache holds, the last used first; a row per encoder and set of images.

    Raises:
        FeatureError: there is no such folder.
    """
    entries = list(reversed(_entries(options.feature_cache)))
    table = _table(entries)
    logger.info("%s: %s", options.feature_cache, _told(entries))
    return table


def prune(options: FeaturePruneOptions) -> list[Path]:
    """Remove features by age or by size; files that are not features, whatever their place, stay.

    Returns:
        The files that are gone, or would be with `dry_run`.

    Raises:
        FeatureError: there is no such folder, or not exactly one rule.
    """
    rules = [options.older_than is not None, options.keep_size is not None, options.all]
    if sum(rules) != 1:
        raise FeatureError("Say what goes by exactly one of --older-than DAYS, --keep-size GB and --all.")
    going = list(_going(_entries(options.feature_cache), options))
    files = [file for entry in going for file in entry.files]
    if options.dry_run:
        _table(going)
        logger.info("Would remove %s", _told(going))
    else:
        files = remove_files(options.feature_cache, files)
        logger.info("Removed %d files, %.1f MB.", len(files), sum(file.size for file in files) / 1e6)
    return [file.path for file in files]


def _named_encoder(options: FeatureBuildOptions) -> tuple[nn.Module, LymphImageProcessor]:
    choice = resolve_encoder(options.encoder)
    config = LymphMILConfig(
        encoder=choice.name,
        encoder_options=choice.options_with(json_option("encoder_options", options.encoder_options)),
        image_size=options.image_size,
    )
    set_seed(options.seed)
    encoder = build_encoder(config)
    load_first_weights(encoder, options.encoder_weights, choice.weights)
    return encoder, LymphImageProcessor.from_config(config)


def _entries(cache_dir: str) -> list[Entry]:
    """The one that was used longest ago first."""
    if not Path(cache_dir).is_dir():
        raise FeatureError(f"{cache_dir}: no such folder. lymph features build makes it.")
    groups: dict[tuple[str, str], list[FeatureFile]] = {}
    for file in stored_files(cache_dir):
        groups.setdefault(Entry((file,)).key, []).append(file)
    return sorted((Entry(tuple(files)) for files in groups.values()), key=lambda entry: entry.last_used)


def _going(entries: Sequence[Entry], options: FeaturePruneOptions) -> Iterator[Entry]:
    if options.older_than is not None:
        limit = time.time() - options.older_than * _DAY
        yield from (entry for entry in entries if entry.last_used < limit)
    elif options.keep_size is not None:
        left = sum(entry.size for entry in entries)
        for entry in entries:
            if left <= options.keep_size * 1e9:
                return
            left -= entry.size
            yield entry
    else:
        yield from entries


def _table(entries: Sequence[Entry]) -> pd.DataFrame:
    """One row per entry, which is logged as well."""
    table = pd.DataFrame([entry.row() for entry in entries])
    if not table.empty:
        logger.info("%s", table.to_string(index=False))
    return table


def _told(entries: Sequence[Entry]) -> str:
    return f"{len(entries)} sets of features, {sum(entry.size for entry in entries) / 1e6:.1f} MB"
