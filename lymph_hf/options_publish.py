"""Options of `lymph publish`: where to, and what a run cannot know about its data."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from .options import option

Dtype = Literal["float32", "float16", "bfloat16"]


@dataclass(kw_only=True)
class PublishOptions:
    """What is published, and where."""

    _argument_group_name: ClassVar[str] = "publication"

    run: str | None = option(None, "run folder of lymph train or lymph pretrain, finished")
    repo: str = option(..., "repository on the Hub, organisation/name")
    repo_type: Literal["model", "dataset"] = option(
        "model", "dataset: publish the patients of --data, with numbers in place of their identifiers"
    )
    space: str | None = option(None, "folder of a Space to publish")
    dry_run: bool = option(False, "check and list everything that would be sent, and send nothing")
    output: str | None = option(None, "folder in which to leave what is sent; an older one is replaced")
    private: bool = option(False, "make the repository private; an existing public one is then refused")
    dtype: Dtype = option(
        "float32",
        "model or encoder: precision in which weight matrices are stored; they are computed in float32 all the same. "
        "float16 halves the files, and rounds eight times less than bfloat16",
    )
    tag: str = option("v1", "name of this version on the Hub, which the card's examples pin")
    data: str | None = option(
        None,
        "folder of the run's patients, or of those of its last evaluation: the stored predictions are reproduced; "
        "with --repo-type dataset the patients that are published",
    )
    patients_may_be_published: bool = option(
        False,
        "data set: confirm that consent or law permits the publication of these patients' images, ages, sexes, counts "
        "and labels",
    )
    probe: list[str] | None = option(
        None,
        "encoder: probe.json of lymph probe, for the card; further ones of other weights on the same cells (random, "
        "timm's) stand beside it",
    )
    reference_date: str | None = option(None, "as in training; by default the run's")
    cache_dir: str | None = option(None, "where the Arrow copy of the images goes; by default the datasets cache")


@dataclass(kw_only=True)
class CardOptions:
    """What the card says beyond the run's files; best kept in a file for --config."""

    _argument_group_name: ClassVar[str] = "card"

    training_data: str | None = option(
        None, "who the training patients are: source, place, period, inclusion (required)"
    )
    evaluation_data: str | None = option(None, "the same of the evaluated patients (required once evaluated)")
    reference_standard: str | None = option(None, "how the true labels were established (required)")
    acquisition: str | None = option(None, "stain, analyser and export of the images (required)")
    encoder_data: str | None = option(
        None,
        "what the encoder's first weights had been trained on: source, licence, attribution (required where they are "
        "neither random nor published ones)",
    )
    synthetic: bool = option(False, "the patients are painted: the card says so in its first line")
    license: str = option("apache-2.0", "identifier of the licence of weights or code")
    data_license: str | None = option(None, "identifier of the licence of a published data set (required for one)")
    datasets: list[str] | None = option(None, "data sets on the Hub that the model was trained on")
    base_model: str | None = option(
        None,
        "model on the Hub whose weights the encoder started from; timm's is known. Of an adapter: the frozen model "
        "that it goes with, published with it unless it is there",
    )
    prevalence: list[float] | None = option(
        None, "shares of positive patients for which predictive values are given; by default 0.1, 0.18 and 0.5"
    )
    downstream: list[str] | None = option(
        None,
        "encoder: NAME=RUN, evaluated or cross-validated patient models for the card, of these weights and of others "
        "on the same patients",
    )
    limitations: list[str] | None = option(None, "limitations beyond those that hold for every such model")
    hardware: str | None = option(None, "what the model was trained on, such as '2 CPU cores'")
    hours: float | None = option(None, "training time in hours, for the environmental cost")
    watts: float | None = option(None, "mean power drawn in training, for the environmental cost")
    carbon_intensity: float | None = option(None, "grams of CO2 equivalent per kWh where it was trained")
    authors: str = option("The lymph-hf authors", "for the citation")
    year: int = option(2026, "for the citation")


@dataclass(kw_only=True)
class DownloadOptions:
    """Which published patients become a folder."""

    _argument_group_name: ClassVar[str] = "download"

    repo: str = option(..., "data set on the Hub, organisation/name, or a folder with its files")
    output: str = option(..., "folder of patients to make; must not exist yet")
    split: str = option("train", "part of the data set; 'train+test' joins two")
    revision: str | None = option(None, "version, branch or commit; by default the newest")
