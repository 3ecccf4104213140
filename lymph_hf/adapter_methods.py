"""The adapters by name. Adding one = a function that makes its PEFT configuration for a model, and its entry here."""

from collections.abc import Callable
from functools import partial
from typing import Literal

from peft import IA3Config, LNTuningConfig, LoraConfig, OFTConfig, PeftConfig
from transformers import PreTrainedModel

from .adapter_configs import AdaptFormerConfig, BitFitConfig, BottleneckConfig, PartialLoraConfig, PromptConfig
from .adapter_targets import AdapterError, EncoderParts, is_inside

Targets = Literal["q", "k", "v", "qk", "qv", "kv", "qkv", "attention", "linear", "conv"]


def lora(
    model: PreTrainedModel,
    *,
    targets: Targets | None = None,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    last: int | None = None,
    dora: bool = False,
    rslora: bool = False,
) -> PeftConfig:
    """LoRA: Hu et al., ICLR 2022, arXiv 2106.09685.

    Args:
        model: a patient model.
        targets: which layers of the encoder: queries, keys and values ("qv", "qkv" ...), these and the output of
            the attention ("attention"), all linear layers ("linear"), all convolutions ("conv"). By default "qv" in a
            transformer ("qkv" with `dora`) and "conv" in a convolutional network.
        rank: of each change; at least 1.
        alpha: factor on the change, over the rank; `None` = the rank, a factor of 1.
        dropout: on the layer's input, in [0, 1).
        last: only the last that many blocks or stages; those before then run without keeping activations.
        dora: learn the length of the weights apart from their direction (Liu et al., ICML 2024, arXiv 2402.09353).
        rslora: divide alpha by the root of the rank (Kalajdzievski, arXiv 2312.03732).
    """
    parts = EncoderParts(model, last)
    targets = targets or (("qkv" if dora else "qv") if parts.blocks else "conv")
    alpha = rank if alpha is None else alpha
    if set(targets) < set("qkv") and parts.fused_projections():
        if dora:
            raise AdapterError(f'DoRA on {targets!r}: queries, keys and values are one layer here; use targets="qkv".')
        names = parts.fused_projections()
        return PartialLoraConfig(
            target_modules=names, parts=targets, rank=rank, alpha=alpha, dropout=dropout, rank_stabilised=rslora
        )
    return LoraConfig(
        target_modules=_layers(parts, targets),
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_dora=dora,
        use_rslora=rslora,
    )


def ia3(model: PreTrainedModel, *, last: int | None = None) -> PeftConfig:
    """IA3: learnt factors on queries, keys, values and on the hidden values of the MLPs (arXiv 2205.05638)."""
    parts = EncoderParts(model, last)
    feed_forward = parts.feed_forward_outputs()
    targets = _some(parts.projections("qkv") + feed_forward, "transformer blocks")
    return IA3Config(target_modules=targets, feedforward_modules=feed_forward)


def layer_norm(model: PreTrainedModel, *, last: int | None = None) -> PeftConfig:
    """Training of the norms alone (Zhao et al., ICLR 2024, arXiv 2312.11420)."""
    return LNTuningConfig(target_modules=_some(EncoderParts(model, last).norms(), "norms without running statistics"))


def oft(
    model: PreTrainedModel, *, targets: Targets = "attention", block_size: int = 32, last: int | None = None
) -> PeftConfig:
    """Orthogonal fine-tuning: weights are turned, block by block (Qiu et al., NeurIPS 2023, arXiv 2306.07280).

    Args:
        model: a patient model.
        targets: as in `lora`, but whole linear layers only: "qkv", "attention" or "linear".
        block_size: of the rotations; a divisor of the width of the encoder.
        last: only the last that many blocks.
    """
    if targets not in ("qkv", "attention", "linear"):
        raise AdapterError(f'targets={targets!r}: expected "qkv", "attention" or "linear"')
    parts = EncoderParts(model, last)
    names = _layers(parts, targets)
    if odd := sorted(
        {parts.modules[name].in_features for name in names if parts.modules[name].in_features % block_size}
    ):
        raise AdapterError(f"block_size={block_size}: expected a divisor of {odd}")
    return OFTConfig(target_modules=names, oft_block_size=block_size)


def bitfit(model: PreTrainedModel, *, last: int | None = None) -> PeftConfig:
    """Training of the biases alone: `adapter_layers.BiasLayer`."""
    names = [name for name, *_ in EncoderParts(model, last).biases()]
    return BitFitConfig(target_modules=_some(names, "layers with biases"))


def bottleneck(
    model: PreTrainedModel,
    *,
    reduction: int = 16,
    activation: str = "relu",
    dropout: float = 0.0,
    after: Literal["attention", "mlp", "both"] = "both",
    train_norms: bool = False,
    last: int | None = None,
) -> PeftConfig:
    """Bottlenecks behind attention and MLP: `adapter_layers.BottleneckLayer`.

    Args:
        model: a patient model.
        reduction: width of the encoder over width of the bottleneck.
        activation: "relu", "gelu" or "silu".
        dropout: in the bottleneck, in [0, 1).
        after: "both" (Houlsby), "mlp" (Pfeiffer) or "attention".
        train_norms: train the norms of the encoder as well.
        last: only the last that many blocks.
    """
    parts = EncoderParts(model, last)
    children = {"attention": ["attn"], "mlp": ["mlp"], "both": ["attn", "mlp"]}.get(after, [])
    targets = [f"{block}.{child}" for block in parts.blocks for child in children]
    return BottleneckConfig(
        target_modules=_some(targets, "transformer blocks"),
        reduction=reduction,
        activation=activation,
        dropout=dropout,
        after=after,
        modules_to_save=[name for name in parts.norms() if not is_inside(name, targets)] if train_norms else None,
    )


def residual(
    model: PreTrainedModel,
    *,
    reduction: int = 16,
    activation: str = "relu",
    dropout: float = 0.0,
    last: int | None = None,
) -> PeftConfig:
    """Bottlenecks of 1 x 1 convolutions behind the stages of a convolutional network; options as in `bottleneck`."""
    names = _some(EncoderParts(model, last).stages, "a convolutional network with stages")
    return BottleneckConfig(
        target_modules=names, reduction=reduction, activation=activation, dropout=dropout, after="stage"
    )


def adaptformer(
    model: PreTrainedModel,
    *,
    reduction: int = 8,
    activation: str = "relu",
    dropout: float = 0.0,
    scale: float = 0.1,
    last: int | None = None,
) -> PeftConfig:
    """Bottlenecks parallel to the MLPs: `adapter_layers.ParallelLayer`; `scale` is the start of a learnt factor."""
    names = _some(EncoderParts(model, last).blocks, "transformer blocks")
    return AdaptFormerConfig(
        target_modules=names, reduction=reduction, activation=activation, dropout=dropout, scale=scale
    )


def prompts(
    model: PreTrainedModel, *, tokens: int = 16, deep: bool = True, dropout: float = 0.0, last: int | None = None
) -> PeftConfig:
    """Visual prompt tuning: `adapter_layers.PromptLayer`.

    Args:
        model: a patient model.
        tokens: number of prompts.
        deep: own prompts for each block; else one set for the whole encoder.
        dropout: on the prompts, in [0, 1).
        last: deep prompts for the last that many blocks only.
    """
    parts = EncoderParts(model, last)
    obstacle = parts.prompt_obstacle()
    if obstacle is not None:
        raise AdapterError(obstacle)
    if last is not None and not deep:
        raise AdapterError("last goes with deep prompts: shallow ones enter the first block")
    names = parts.blocks if deep else list(dict.fromkeys((parts.blocks[0], parts.blocks[-1])))
    return PromptConfig(target_modules=names, tokens=tokens, deep=deep, dropout=dropout)


def _layers(parts: EncoderParts, targets: str) -> list[str]:
    if targets not in Targets.__args__:
        raise AdapterError(f"targets={targets!r}: expected one of {', '.join(Targets.__args__)}")
    if targets == "linear":
        return _some(parts.linears(), "linear layers")
    if targets == "conv":
        return _some(parts.convolutions(), "convolutions")
    names = parts.projections("qkv" if targets == "attention" else targets)
    if targets == "attention":
        names = names + parts.attention_outputs()
    return _some(names, "transformer blocks with linear query, key and value projections")


def _some(names: list[str], needed: str) -> list[str]:
    if not names:
        raise AdapterError(f"it needs {needed}")
    return list(names)


ADAPTERS: dict[str, Callable[..., PeftConfig]] = {
    "lora": lora,
    "dora": partial(lora, dora=True),
    "rslora": partial(lora, rslora=True),
    "ia3": ia3,
    "layer_norm": layer_norm,
    "bitfit": bitfit,
    "oft": oft,
    "bottleneck": bottleneck,
    "adaptformer": adaptformer,
    "vpt_shallow": partial(prompts, deep=False),
    "vpt_deep": prompts,
    "residual": residual,
}
