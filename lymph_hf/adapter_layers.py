"""Layers of the package's own adapters: a frozen module of an encoder with a small trained branch per adapter."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


class AdapterLayer(nn.Module, BaseTunerLayer):
    """A frozen module, and how its trained branches change what it gives.

    Subclasses name the attribute that holds the branches, one per adapter, and implement `_adapted`. With several
    active adapters all their branches take part; without any, the module is the frozen one.

    Attributes:
        adapter_layer_names: the one attribute with the branches; PEFT saves what is in it.
        merge_obstacle: why no weight of the frozen module can stand for a branch; `None` where one can.
    """

    merge_obstacle: str | None = None

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.merged_adapters: list[str] = []
        setattr(self, self.adapter_layer_names[0], nn.ModuleDict())

    @property
    def branches(self) -> nn.ModuleDict:
        """Adapter name -> branch."""
        return getattr(self, self.adapter_layer_names[0])

    def add_branch(self, adapter_name: str, branch: nn.Module, *, inference_mode: bool) -> None:
        """Put a branch beside the frozen module, on its device and in its precision."""
        self.branches[adapter_name] = branch
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [] if self.disable_adapters or self.merged else self.active_adapters
        branches = [self.branches[name] for name in names if name in self.branches]
        if not branches:
            return self.base_layer(x, *args, **kwargs)
        return self._adapted(branches, x, *args, **kwargs)

    def _adapted(self, branches: Sequence[nn.Module], x: Tensor, *args, **kwargs) -> Tensor:
        raise NotImplementedError

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the branches into the weights of the frozen module.

        Args:
            safe_merge: refuse where that would give a weight that is not finite.
            adapter_names: which; by default the active ones.

        Raises:
            ValueError: the branch is no linear map, or a weight would not be finite.
        """
        if self.merge_obstacle is not None:
            raise ValueError(f"This adapter cannot be merged: {self.merge_obstacle}. Use it as it is, or unload it.")
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.branches:
                if safe_merge and not self.get_delta_weight(name).isfinite().all():
                    raise ValueError(f"Adapter {name!r} holds weights that are not finite: it is not merged.")
                self._shift(name, 1)
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take the merged branches out again."""
        while self.merged_adapters:
            self._shift(self.merged_adapters.pop(), -1)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """What `merge` adds to `_merged_parameter`."""
        return self.branches[adapter_name].delta()

    @property
    def _merged_parameter(self) -> nn.Parameter:
        raise NotImplementedError

    def _shift(self, adapter_name: str, sign: int) -> None:
        parameter = self._merged_parameter
        parameter.data += sign * self.get_delta_weight(adapter_name).to(parameter.dtype)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        # PEFT looks at `weight`, which a whole block has not.
        parameter = next(base_layer.parameters())
        return parameter.device, parameter.dtype


class Bottleneck(nn.Module):
    """Down-projection, activation, up-projection; zero at the start, so that training starts from the encoder.

    Args:
        width: of input and output, (N, ..., width), or (N, width, H, W) with `channels_first`.
        hidden: width in between.
        activation: a key of `ACTIVATIONS`.
        dropout: on the hidden values, in [0, 1).
        channels_first: 1 x 1 convolutions in place of linear layers.
        scale: start of a learnt factor on the output; `None` = no factor.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        activation: str,
        dropout: float,
        channels_first: bool = False,
        scale: float | None = None,
    ):
        super().__init__()
        self.down = nn.Conv2d(width, hidden, 1) if channels_first else nn.Linear(width, hidden)
        self.activation = ACTIVATIONS[activation]()
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Conv2d(hidden, width, 1) if channels_first else nn.Linear(hidden, width)
        self.scale = None if scale is None else nn.Parameter(torch.tensor(float(scale)))
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        change = self.up(self.dropout(self.activation(self.down(x.to(self.down.weight.dtype)))))
        return (change if self.scale is None else self.scale * change).to(x.dtype)


class BottleneckLayer(AdapterLayer):
    """A bottleneck behind a module: `y + f(y)` with `y` its output, before the residual connection.

    Houlsby et al., ICML 2019, arXiv 1902.00751 (behind attention and MLP); Pfeiffer et al., EACL 2021, arXiv
    2005.00247 (behind the MLP only). Behind the stages of a convolutional network: Rebuffi et al., NeurIPS 2017,
    arXiv 1705.08045.
    """

    adapter_layer_names = ("lymph_bottleneck_branches",)
    merge_obstacle = "a bottleneck has an activation in the middle, so no weight of the encoder can stand for it"

    def _adapted(self, branches, x, *args, **kwargs):
        y = self.base_layer(x, *args, **kwargs)
        for branch in branches:
            y = y + branch(y)
        return y


class ParallelLayer(AdapterLayer):
    """AdaptFormer: a bottleneck parallel to norm and MLP of a block (Chen et al., NeurIPS 2022, arXiv 2205.13535).

    `x' + mlp(norm2(x')) + s f(x')`, where x' is what the attention leaves: the branch reads it before the norm.
    """

    adapter_layer_names = ("lymph_adaptformer_branches",)
    merge_obstacle = "the parallel branch has an activation in the middle, so no weight of the MLP can stand for it"

    def __init__(self, base_layer: nn.Module):
        super().__init__(base_layer)
        self._after_attention: Tensor | None = None
        self._hook = base_layer.norm2.register_forward_pre_hook(self._keep)

    def _keep(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._after_attention = inputs[0]

    def _adapted(self, branches, x, *args, **kwargs):
        y = self.base_layer(x, *args, **kwargs)
        after_attention, self._after_attention = self._after_attention, None
        for branch in branches:
            y = y + branch(after_attention)
        return y

    def forward(self, x, *args, **kwargs):
        y = super().forward(x, *args, **kwargs)
        self._after_attention = None  # where no branch has read it, it must not outlive the block
        return y

    def detach_from_block(self) -> None:
        """Leave the block as it was before."""
        self._hook.remove()


class Prompts(nn.Module):
    """Learnt tokens.

    Args:
        count: number of tokens.
        width: of a token; `None` where the tokens are those that an earlier block has brought in.
        dropout: on the tokens, in [0, 1).
        leaves: the tokens are taken out behind this block.
    """

    def __init__(self, count: int, width: int | None, *, dropout: float, leaves: bool):
        super().__init__()
        self.count = count
        self.leaves = leaves
        self.dropout = nn.Dropout(dropout)
        self.tokens = None if width is None else nn.Parameter(torch.empty(count, width))
        if width is not None:
            nn.init.trunc_normal_(self.tokens, std=0.02)  # as timm's class token and positions


class PromptLayer(AdapterLayer):
    """Prompts for a transformer block, between the class (distillation, register) tokens and the patches.

    Jia et al., "Visual Prompt Tuning", ECCV 2022, arXiv 2203.12119. Deep: each block brings its own prompts in and
    takes them out again, so they replace those of the block before and the number of tokens stays the same. Shallow:
    the first block brings them in, the last takes them out. What follows the blocks never meets a prompt.

    Args:
        base_layer: the block.
        leading: class, distillation and register tokens, which stay in front.
    """

    adapter_layer_names = ("lymph_prompt_branches",)
    merge_obstacle = "prompts are further tokens, not a change of a weight"

    def __init__(self, base_layer: nn.Module, leading: int):
        super().__init__(base_layer)
        self.leading = leading

    def _adapted(self, branches, x, *args, **kwargs):
        # Those that leave stand in front of those that stay.
        entering = sorted((b for b in branches if b.tokens is not None), key=lambda branch: not branch.leaves)
        tokens = [branch.dropout(branch.tokens).to(x.dtype).expand(len(x), -1, -1) for branch in entering]
        if tokens:
            x = torch.cat([x[:, : self.leading], *tokens, x[:, self.leading :]], dim=1)
        y = self.base_layer(x, *args, **kwargs)
        leaving = sum(branch.count for branch in branches if branch.leaves)
        return torch.cat([y[:, : self.leading], y[:, self.leading + leaving :]], dim=1) if leaving else y


class BiasShift(nn.Module):
    """Learnt change of a bias, zero at the start."""

    def __init__(self, size: int):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(size))

    def delta(self) -> Tensor:
        """(size,)"""
        return self.shift


class BiasLayer(AdapterLayer):
    """BitFit: the bias is trained, nothing else (Ben Zaken et al., ACL 2022, arXiv 2106.10199).

    The change is added to the output of the module, which is the same as adding it to its bias.

    Args:
        base_layer: linear layer, convolution or norm with a bias.
        channels_first: the channels of the output are its second axis.
    """

    adapter_layer_names = ("lymph_bitfit_branches",)

    def __init__(self, base_layer: nn.Module, channels_first: bool):
        super().__init__(base_layer)
        self.channels_first = channels_first

    def _adapted(self, branches, x, *args, **kwargs):
        y = self.base_layer(x, *args, **kwargs)
        for branch in branches:
            shift = branch.shift.to(y.dtype)
            y = y + (shift[:, None, None] if self.channels_first else shift)
        return y

    @property
    def _merged_parameter(self):
        return self.get_base_layer().bias


class PartialLowRank(nn.Module):
    """Low-rank changes of some of the three parts of a fused query-key-value projection; zero at the start.

    Args:
        width: of the input, and of each part of the output.
        parts: some of "q", "k", "v".
        rank: of each part's change.
        scale: factor on the change.
        dropout: on the input, in [0, 1).
    """

    def __init__(self, input_size: int, width: int, parts: str, rank: int, scale: float, dropout: float):
        super().__init__()
        self.parts = parts
        self.width = width
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        self.down = nn.ModuleDict({part: nn.Linear(input_size, rank, bias=False) for part in parts})
        self.up = nn.ModuleDict({part: nn.Linear(rank, width, bias=False) for part in parts})
        for part in parts:
            nn.init.zeros_(self.up[part].weight)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs (..., input_size) -> (..., P rank) and (P rank, 3 width), whose product is the change; P parts."""
        return F.linear(self.dropout(x), self._down()), self._up().mT

    def delta(self) -> Tensor:
        """Change of the fused weight, (3 width, input_size)."""
        return self._up() @ self._down()

    def _down(self) -> Tensor:
        return torch.cat([self.down[part].weight for part in self.parts])

    def _up(self) -> Tensor:
        """(3 width, P rank): zeros where a part meets the hidden values of another."""
        none = self.up[self.parts[0]].weight.new_zeros(self.width, 0)
        return self.scale * torch.block_diag(*(self.up[p].weight if p in self.parts else none for p in "qkv"))


class PartialLowRankLayer(AdapterLayer):
    """LoRA (Hu et al., ICLR 2022, arXiv 2106.09685) on parts of a fused query-key-value projection.

    timm holds the three projections in one linear layer, of which LoRA would adapt all or none.
    """

    adapter_layer_names = ("lymph_partial_lora_branches",)

    def __init__(self, base_layer: nn.Linear):
        super().__init__(base_layer)
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features

    def _adapted(self, branches, x, *args, **kwargs):
        y = self.base_layer(x, *args, **kwargs)
        for branch in branches:
            hidden, up = branch(x.to(branch.down[branch.parts[0]].weight.dtype))
            # Product and sum in one pass: on a CPU the step waits for memory more than for the products.
            rows = torch.addmm(y.flatten(0, -2), hidden.flatten(0, -2).to(y.dtype), up.to(y.dtype))
            y = rows.view(y.shape)
        return y

    @property
    def _merged_parameter(self):
        return self.get_base_layer().weight

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True: `peft.convert_to_lora` gives an adapter that PEFT reads without this package."""
        return True
