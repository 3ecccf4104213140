"""Configurations of the PEFT methods of this package; what stands in their `adapter_config.json`."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, Literal

from peft import PeftConfig

from .adapter_layers import ACTIVATIONS
from .adapter_targets import AdapterError


class LymphPeftType(str, Enum):  # noqa: UP042 - PEFT's own types are of this kind, and mixing needs equal hashes
    """Names of the methods in `adapter_config.json`."""

    LYMPH_BOTTLENECK = "LYMPH_BOTTLENECK"
    LYMPH_ADAPTFORMER = "LYMPH_ADAPTFORMER"
    LYMPH_PROMPT = "LYMPH_PROMPT"
    LYMPH_BITFIT = "LYMPH_BITFIT"
    LYMPH_PARTIAL_LORA = "LYMPH_PARTIAL_LORA"


@dataclass
class EncoderAdapterConfig(PeftConfig):
    """What the methods share.

    Args:
        target_modules: names of modules, or a regular expression; `None` = all that the method applies to.
        exclude_modules: names that are left out.
        modules_to_save: further modules to train and save whole, such as pooling, fusion and classifier.
    """

    method: ClassVar[LymphPeftType]

    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = self.method


@dataclass
class BottleneckConfig(EncoderAdapterConfig):
    """Bottleneck behind modules of the encoder: see `BottleneckLayer`.

    Args:
        reduction: width of the encoder over width of the bottleneck, at least 1.
        activation: a key of `ACTIVATIONS`.
        dropout: in the bottleneck, in [0, 1).
        after: "attention", "mlp" or "both" in a transformer, "stage" in a convolutional network; `None` = "both" or
            "stage".
    """

    method = LymphPeftType.LYMPH_BOTTLENECK

    reduction: int = 16
    activation: str = "relu"
    dropout: float = 0.0
    after: Literal["attention", "mlp", "both", "stage"] | None = None

    def __post_init__(self):
        super().__post_init__()
        _check_bottleneck(self)
        _check_choice("after", self.after, ("attention", "mlp", "both", "stage", None))


@dataclass
class AdaptFormerConfig(EncoderAdapterConfig):
    """Bottleneck parallel to the MLP of transformer blocks: see `ParallelLayer`.

    Args:
        reduction: width of the encoder over width of the bottleneck, at least 1.
        activation: a key of `ACTIVATIONS`.
        dropout: in the bottleneck, in [0, 1).
        scale: start of the learnt factor on the branch.
    """

    method = LymphPeftType.LYMPH_ADAPTFORMER

    reduction: int = 8
    activation: str = "relu"
    dropout: float = 0.0
    scale: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        _check_bottleneck(self)


@dataclass
class PromptConfig(EncoderAdapterConfig):
    """Visual prompt tuning: see `PromptLayer`.

    Args:
        tokens: number of prompts, at least 1.
        deep: own prompts for each block, in place of those of the block before.
        dropout: on the prompts, in [0, 1).
    """

    method = LymphPeftType.LYMPH_PROMPT

    tokens: int = 16
    deep: bool = True
    dropout: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        _check_least("tokens", self.tokens, 1)
        _check_fraction("dropout", self.dropout)


@dataclass
class BitFitConfig(EncoderAdapterConfig):
    """Training of biases alone: see `BiasLayer`."""

    method = LymphPeftType.LYMPH_BITFIT


@dataclass
class PartialLoraConfig(EncoderAdapterConfig):
    """LoRA on parts of fused query-key-value projections: see `PartialLowRankLayer`.

    Args:
        parts: some of "q", "k", "v", in this order, such as "qv".
        rank: of the change of each part, at least 1.
        alpha: factor on the change, over `rank`.
        dropout: on the input, in [0, 1).
        rank_stabilised: divide alpha by the root of the rank instead (Kalajdzievski, arXiv 2312.03732).
    """

    method = LymphPeftType.LYMPH_PARTIAL_LORA

    parts: str = "qv"
    rank: int = 8
    alpha: float = 8
    dropout: float = 0.0
    rank_stabilised: bool = False

    def __post_init__(self):
        super().__post_init__()
        _check_least("rank", self.rank, 1)
        _check_fraction("dropout", self.dropout)
        _check_choice("parts", self.parts, ("q", "k", "v", "qk", "qv", "kv", "qkv"))


def _check_bottleneck(config: BottleneckConfig | AdaptFormerConfig) -> None:
    _check_least("reduction", config.reduction, 1)
    _check_choice("activation", config.activation, tuple(ACTIVATIONS))
    _check_fraction("dropout", config.dropout)


def _check_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise AdapterError(f"{name}={value!r}: expected at least {least}.")


def _check_fraction(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise AdapterError(f"{name}={value!r}: expected a number in [0, 1).")


def _check_choice(name: str, value: Any, choices: tuple) -> None:
    if value not in choices:
        raise AdapterError(f"{name}={value!r}: expected one of {', '.join(map(repr, choices))}.")
