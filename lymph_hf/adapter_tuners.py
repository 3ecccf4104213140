"""PEFT methods of this package: bottleneck, AdaptFormer, prompts, BitFit, LoRA on parts of a fused projection.

`register_methods`, called when `adapters` is imported, makes `get_peft_model`, `PeftModel.from_pretrained`,
`model.add_adapter`, `AutoModel.from_pretrained(adapter_folder)` and the rest of PEFT treat them like its own.
"""

import math
from typing import Any

from peft import IA3Model, LNTuningModel, OFTModel, mapping
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .adapter_configs import (
    AdaptFormerConfig,
    BitFitConfig,
    BottleneckConfig,
    EncoderAdapterConfig,
    PartialLoraConfig,
    PromptConfig,
)
from .adapter_layers import (
    AdapterLayer,
    BiasLayer,
    BiasShift,
    Bottleneck,
    BottleneckLayer,
    ParallelLayer,
    PartialLowRank,
    PartialLowRankLayer,
    PromptLayer,
    Prompts,
)
from .adapter_targets import AdapterError, EncoderParts

Sites = dict[str, dict[str, Any]]  # name of a module -> what its branch must know of it


class EncoderTuner(BaseTuner):
    """PEFT's handle on a model for one of these methods.

    Subclasses tell to which modules of an encoder the method applies (`sites`) and make its branches (`branch`).
    """

    tuner_layer_cls: type[AdapterLayer]
    target_module_mapping: dict[str, list[str]] = {}

    @staticmethod
    def sites(config: EncoderAdapterConfig, parts: EncoderParts) -> Sites:
        """Every module that the method applies to, and what its branch must know of it.

        Raises:
            AdapterError: there is none.
        """
        raise NotImplementedError

    @staticmethod
    def branch(config: EncoderAdapterConfig, **site: Any) -> nn.Module:
        """A new branch for one module."""
        raise NotImplementedError

    def layer(self, module: nn.Module, **site: Any) -> AdapterLayer:
        """The layer that stands in the module's place."""
        return self.tuner_layer_cls(module)

    def _prepare_adapter_config(self, peft_config, model_config):
        return peft_config  # the targets depend on the modules: `_prepare_model`

    def _prepare_model(self, peft_config, model):
        self._sites = self.sites(peft_config, EncoderParts(model))
        if peft_config.target_modules is None:
            peft_config.target_modules = list(self._sites)

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, parameter_name=None
    ):
        if current_key not in self._sites:
            raise AdapterError(f"{peft_config.peft_type.value} does not apply to {current_key}: {list(self._sites)}.")
        site = self._sites[current_key]
        layer = target if isinstance(target, self.tuner_layer_cls) else self.layer(target, **site)
        branch = self.branch(peft_config, **site)
        layer.add_branch(adapter_name, branch, inference_mode=peft_config.inference_mode)
        if adapter_name not in self.active_adapters:
            branch.requires_grad_(False)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent, child_name, new_module, child):
        # PEFT's own would hang weight and bias of the module into its place, and a block has neither.
        setattr(parent, child_name, new_module)
        if isinstance(child, ParallelLayer):
            child.detach_from_block()

    def _check_merge_allowed(self):
        obstacle = self.tuner_layer_cls.merge_obstacle
        if obstacle is not None:
            raise ValueError(f"This adapter cannot be merged: {obstacle}. Use it as it is, or unload it.")

    @classmethod
    def _remove_adapter_name_from_key(cls, key, adapter_name):
        # The branches are modules of modules; PEFT looks for the name only just before a parameter.
        place = cls.tuner_layer_cls.adapter_layer_names[0]
        return key.replace(f".{place}.{adapter_name}.", f".{place}.", 1)


class BottleneckTuner(EncoderTuner):
    """See `BottleneckLayer`."""

    prefix = "lymph_bottleneck_"
    tuner_layer_cls = BottleneckLayer

    @staticmethod
    def sites(config, parts):
        after = config.after or ("both" if parts.blocks else "stage")
        if after == "stage":
            sites = {name: {"width": parts.stage_width(name), "channels_first": True} for name in parts.stages}
            return _some(sites, "a convolutional network with stages")
        children = {"attention": ["attn"], "mlp": ["mlp"], "both": ["attn", "mlp"]}[after]
        sites = {
            f"{block}.{child}": {"width": parts.block_width(block), "channels_first": False}
            for block in parts.blocks
            for child in children
        }
        return _some(sites, "transformer blocks")

    @staticmethod
    def branch(config, width, channels_first):
        return Bottleneck(
            width,
            max(1, width // config.reduction),
            activation=config.activation,
            dropout=config.dropout,
            channels_first=channels_first,
        )


class AdaptFormerTuner(EncoderTuner):
    """See `ParallelLayer`."""

    prefix = "lymph_adaptformer_"
    tuner_layer_cls = ParallelLayer

    @staticmethod
    def sites(config, parts):
        return _some({block: {"width": parts.block_width(block)} for block in parts.blocks}, "transformer blocks")

    @staticmethod
    def branch(config, width):
        hidden = max(1, width // config.reduction)
        return Bottleneck(width, hidden, activation=config.activation, dropout=config.dropout, scale=config.scale)


class PromptTuner(EncoderTuner):
    """See `PromptLayer`."""

    prefix = "lymph_prompt_"
    tuner_layer_cls = PromptLayer

    @staticmethod
    def sites(config, parts):
        obstacle = parts.prompt_obstacle()
        if obstacle is not None:
            raise AdapterError(obstacle)
        blocks = parts.blocks
        first, last = blocks[0], blocks[-1]
        leading = parts.encoder.num_prefix_tokens
        return {
            block: {
                "leading": leading,
                "width": parts.block_width(block) if config.deep or block == first else None,
                "leaves": config.deep or block == last,
            }
            for block in (blocks if config.deep else dict.fromkeys((first, last)))
        }

    def layer(self, module, leading, **site):
        return PromptLayer(module, leading)

    @staticmethod
    def branch(config, leading, width, leaves):
        return Prompts(config.tokens, width, dropout=config.dropout, leaves=leaves)


class BitFitTuner(EncoderTuner):
    """See `BiasLayer`."""

    prefix = "lymph_bitfit_"
    tuner_layer_cls = BiasLayer

    @staticmethod
    def sites(config, parts):
        sites = {name: {"size": size, "channels_first": first} for name, size, first in parts.biases()}
        return _some(sites, "layers with biases")

    def layer(self, module, channels_first, **site):
        return BiasLayer(module, channels_first)

    @staticmethod
    def branch(config, size, channels_first):
        return BiasShift(size)


class PartialLoraTuner(EncoderTuner):
    """See `PartialLowRankLayer`."""

    prefix = "lymph_partial_lora_"
    tuner_layer_cls = PartialLowRankLayer

    @staticmethod
    def sites(config, parts):
        names = parts.fused_projections()
        sizes = {name: parts.modules[name] for name in names}
        sites = {n: {"input_size": m.in_features, "width": m.out_features // 3} for n, m in sizes.items()}
        return _some(sites, "transformer blocks with a fused query-key-value projection")

    @staticmethod
    def branch(config, input_size, width):
        scale = config.alpha / (math.sqrt(config.rank) if config.rank_stabilised else config.rank)
        return PartialLowRank(input_size, width, config.parts, config.rank, scale, config.dropout)


def _some(sites: Sites, needed: str) -> Sites:
    if not sites:
        raise AdapterError(f"it needs {needed}")
    return sites


class HeadAware:
    """For PEFT's own tuners: heads of several layers can be taken off again.

    PEFT 0.21 hangs `weight` of the trained copy into the place of the head when it unloads or merges these methods,
    which fails where the head is more than one layer; norm tuning leaves the wrapper in place.
    """

    def _replace_module(self, parent, child_name, new_module, child):
        if isinstance(child, AuxiliaryTrainingWrapper):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _unload_and_optionally_merge(self, *args, **kwargs):
        return BaseTuner._unload_and_optionally_merge(self, *args, **kwargs)


class HeadAwareIA3(HeadAware, IA3Model):
    """IA3."""


class HeadAwareLNTuning(HeadAware, LNTuningModel):
    """Norm tuning."""


class HeadAwareOFT(HeadAware, OFTModel):
    """Orthogonal fine-tuning."""


METHODS: dict[type[EncoderAdapterConfig], type[EncoderTuner]] = {
    BottleneckConfig: BottleneckTuner,
    AdaptFormerConfig: AdaptFormerTuner,
    PromptConfig: PromptTuner,
    BitFitConfig: BitFitTuner,
    PartialLoraConfig: PartialLoraTuner,
}


def register_methods() -> None:
    """Make the methods known to PEFT, as `peft.utils.register_peft_method` does for PEFT's own types only."""
    for config, tuner in METHODS.items():
        mapping.PEFT_TYPE_TO_CONFIG_MAPPING[config.method] = config
        mapping.PEFT_TYPE_TO_TUNER_MAPPING[config.method] = tuner
        mapping.PEFT_TYPE_TO_PREFIX_MAPPING[config.method] = tuner.prefix
    mapping.PEFT_TYPE_TO_TUNER_MAPPING |= {
        PeftType.IA3: HeadAwareIA3,
        PeftType.LN_TUNING: HeadAwareLNTuning,
        PeftType.OFT: HeadAwareOFT,
    }
