"""The card of a published cohort."""

from collections import Counter
from collections.abc import Mapping

import datasets
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCardData

from .card import citation, require
from .card_patterns import DATA_CARD, filled_card
from .cohort import Cohort
from .options_publish import CardOptions

TAGS = ["medical", "haematology", "blood-smear", "multiple-instance-learning", "lymphocytosis", "lymph-hf"]
_SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M"}


def data_card(
    cohort: Cohort,
    features: datasets.Features,
    splits: Mapping[str, datasets.SplitInfo],
    facts: CardOptions,
    *,
    repo: str,
    tag: str,
) -> str:
    """Write the card of a cohort as it is published.

    Args:
        cohort: checked.
        features: the columns.
        splits: patients and bytes of each.
        facts: what the files cannot say.
        repo: where it will be published, organisation/name.
        tag: the version that the examples pin.

    Raises:
        CardError: a fact is missing.
    """
    require(facts, ["training_data", "reference_standard", "acquisition", "data_license"])
    content = {
        "metadata": _metadata(features, splits, facts).to_yaml(),
        "card": facts,
        "repo": repo,
        "tag": tag,
        "name": repo.split("/")[-1],
        "splits": splits,
        "labels": {split: _labels(cohort, split) for split in splits},
        "label_names": list(cohort.label_names),
        "cells": sum(len(patient.images) for patient in cohort.patients),
        "cells_range": _range([len(patient.images) for patient in cohort.patients]),
        "patients": len(cohort.patients),
        "missing": _missing(cohort),
        "exclusions": dict(sorted(Counter(item.reason.split(":")[0] for item in cohort.exclusions).items())),
        "citation": citation(facts),
    }
    return filled_card("data", content, DATA_CARD, cohort.root)


def _metadata(
    features: datasets.Features, splits: Mapping[str, datasets.SplitInfo], facts: CardOptions
) -> DatasetCardData:
    patients = sum(split.num_examples for split in splits.values())
    size = sum(split.num_bytes for split in splits.values())
    data = DatasetCardData(
        license=facts.data_license,
        task_categories=["image-classification"],
        size_categories=[next((name for limit, name in _SIZES.items() if patients < limit), "n>1M")],
        tags=[*TAGS, *(["synthetic"] if facts.synthetic else [])],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"data/{split}-*.parquet"} for split in splits],
            }
        ],
    )
    info = datasets.DatasetInfo(
        features=features, splits=datasets.SplitDict(splits), download_size=size, dataset_size=size
    )
    DatasetInfosDict({"default": info}).to_dataset_card_data(data)
    return data


def _labels(cohort: Cohort, split: str) -> dict[str, int]:
    labels = (patient.label or "without label" for patient in cohort.patients if (patient.part or "train") == split)
    return dict(sorted(Counter(labels).items()))


def _range(numbers: list[int]) -> str:
    return f"{min(numbers)} to {max(numbers)}"


def _missing(cohort: Cohort) -> dict[str, int]:
    table = cohort.to_frame()
    return {name: int(table[name].isna().sum()) for name in ("age", "sex", "lymphocyte_count")}
