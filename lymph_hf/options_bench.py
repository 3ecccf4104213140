"""Options of `lymph bench`."""

from dataclasses import dataclass
from typing import ClassVar

from .options import option
from .precision import AUTO, PRECISION_HELP, Precision


@dataclass(kw_only=True)
class BenchOptions:
    """What is measured, on what."""

    _argument_group_name: ClassVar[str] = "bench"

    run: str | None = option(
        None, "run folder, model folder or Hub id to measure prediction of; by default a new model with an adapter"
    )
    encoder: str = option("vit_small_patch16_224", "of the new model: any timm model name")
    image_size: int | None = option(None, "of the new model: side of the input; by default what the encoder expects")
    adapter: str = option("lora", "of the new model: a name in ADAPTERS, or none to train the whole encoder")
    adapter_options: str | None = option(None, "JSON of the adapter's options; by default rank 32 for lora")
    cells: int = option(84, "cells of the patient")
    chunk_size: str = option("auto", "cells that pass the encoder at once, as in lymph train")
    training: bool = option(True, "measure a training step of the new model, too")
    rounds: int = option(3, "the ways are measured in turns, this many times; the median of the ratios is reported")
    threads: int = option(1, "of the CPU; with 1, CPU seconds are counted, which do not mind a busy machine")
    mixed_precision: Precision = option(AUTO, PRECISION_HELP)
    cpu: bool = option(False, "stay on the CPU though there is an accelerator")
    seed: int = option(0, "of weights and images")
