"""Options of `lymph pretrain` and `lymph probe`."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from .options import LoopOptions, option
from .precision import AUTO, PRECISION_HELP, Precision


@dataclass(kw_only=True)
class PretrainOptions(LoopOptions):
    """What an encoder learns from, and how."""

    _argument_group_name: ClassVar[str] = "pretraining"

    data: list[str] = option(
        ..., "cells to learn from: folders of patients, folders of images (or of <cell_type>/*), parquet files"
    )
    split: str | None = option(
        None,
        "run folder or split file whose validation and test patients are left out; folders of patients need it: "
        "'none' says that nobody will be evaluated on them",
    )
    objective: Literal["mae", "cell-type", "patient-label"] = option(
        "mae",
        "mae: reconstruct hidden patches, no labels needed; cell-type: learn the labels of the cells; patient-label: "
        "give every cell the label of its patient",
    )
    encoder: str = option("vit_tiny_patch16_224", "any timm model name; a plain vision transformer for mae")
    encoder_weights: str | None = option(
        None, "start from 'timm' for published weights, or a file or folder of weights; by default random"
    )
    encoder_options: str | None = option(None, "JSON of further timm.create_model arguments")
    image_size: int | None = option(None, "side of the input in pixels; by default what the encoder expects")
    mask_ratio: float = option(0.75, "mae: share of the patches that the encoder does not see")
    decoded_share: float = option(1.0, "mae: share of the hidden patches that are decoded; less is faster")
    decoder_depth: int = option(4, "mae: transformer blocks of the decoder")
    decoder_width: int = option(256, "mae: width of the decoder")
    decoder_heads: int = option(8, "mae: attention heads of the decoder")
    norm_pix_loss: bool = option(True, "mae: predict pixels standardised within each patch")
    label_smoothing: float = option(0.1, "cell-type, patient-label: in [0, 1)")
    layer_decay: float | None = option(
        None,
        "rate of each block relative to the next one, in (0, 1]; by default 1 for mae and from random weights, 0.75 "
        "for labels from given weights (He et al. 2022)",
    )
    validation_fraction: float = option(0.1, "share of the cells held out for loss and probe, patients as a whole")
    probe_cells: int = option(2000, "most labelled cells on each side of the kNN probe; 0 makes none")
    figure_every: int = option(10, "mae: epochs between pictures of reconstructions; 0 draws the last only")
    augment: bool = option(True, "random views of the cells")
    epochs: int = option(100, "passes over the cells")
    batch_size: int = option(256, "cells per optimizer step, over all processes")
    micro_batch: int = option(256, "cells per forward pass of one process; changes memory, not the result")
    learning_rate: float | None = option(
        None, "peak rate; by default (He et al. 2022) batch size / 256 times 1.5e-4 for mae, 1e-3 for labels"
    )
    weight_decay: float = option(0.05, "of AdamW; norms, biases, positions and tokens have none")
    patience: int = option(0, "stop after this many epochs without a better validation; 0 never stops early")
    preload: bool = option(False, "decode every cell once and keep the pixels in memory (side x side x 3 bytes each)")
    cache_dir: str | None = option(None, "where the Arrow copy of a cohort goes; by default the datasets cache")


@dataclass(kw_only=True)
class ProbeOptions:
    """Which encoder is probed on which cells."""

    _argument_group_name: ClassVar[str] = "probe"

    data: str = option(..., "labelled cells: a folder of <cell_type>/*, a folder with cells.csv, or parquet")
    output: str = option(..., "folder for probe.json and neighbours.png")
    encoder: str = option("vit_tiny_patch16_224", "any timm model name")
    encoder_weights: str | None = option(
        None, "'timm' for published weights, or a file or folder of weights; by default random weights"
    )
    encoder_options: str | None = option(None, "JSON of further timm.create_model arguments")
    image_size: int | None = option(None, "side of the input in pixels; by default what the encoder expects")
    held_out: str | None = option(
        None,
        "folder of pretrained weights whose record decides: cells it has not seen are scored, against those it has; "
        "by default cross-validation over all cells",
    )
    folds: int = option(5, "folds of the cross-validation, patients as a whole where they are known")
    neighbours: int = option(20, "k of the kNN probe")
    max_cells: int | None = option(None, "random sample of at most this many cells; by default all")
    resamples: int = option(2000, "bootstrap resamples, of patients where they are known, else of cells")
    seed: int = option(0, "of initial weights, sample, folds and bootstrap")
    batch_size: int = option(64, "cells per forward pass")
    mixed_precision: Precision = option(AUTO, PRECISION_HELP)
    workers: int = option(0, "processes that decode images beside the main process")
    cache_dir: str | None = option(None, "where the Arrow copy of a cohort goes; by default the datasets cache")
    cpu: bool = option(False, "stay on the CPU though there is an accelerator")
