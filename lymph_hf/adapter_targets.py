"""Where adapters attach: the parts of an encoder, told by what the modules are, never by a piece of a name."""

from collections.abc import Iterable, Iterator

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from timm.layers import LayerNorm2d, RmsNorm, RmsNorm2d
from timm.models import VisionTransformer
from torch import nn

# Norms without running statistics, which a trained copy would have to keep as well.
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, RmsNorm, RmsNorm2d)
_QUERY_KEY_VALUE = (("q_proj", "k_proj", "v_proj"), ("q", "k", "v"))


class AdapterError(ValueError):
    """An adapter does not fit the encoder or its options are wrong; the message says what does fit."""


class EncoderParts:
    """Names of the modules of an encoder that an adapter may attach to.

    Names are those before any adapter was attached, as PEFT's `target_modules` wants them.

    Args:
        model: a patient model, its base model, or what PEFT made of it.
        last: only the last that many transformer blocks or stages; `None` = the whole encoder.

    Raises:
        AdapterError: `last` is not a number of blocks or stages that the encoder has.
    """

    def __init__(self, model: nn.Module, last: int | None = None):
        model = unwrapped(model)
        self.encoder = model.base_model.encoder
        everything = list(original_modules(model))
        self.name = next(name for name, module in everything if module is self.encoder)
        self.modules = {name: module for name, module in everything if is_inside(name, [self.name])}
        self.all_blocks = [name for name, module in self.modules.items() if _is_block(module)]
        units = self.all_blocks or self._stages()
        if last is not None and not 1 <= last <= len(units):
            raise AdapterError(f"last={last}: the encoder has {len(units)} blocks; expected 1 to {len(units)}.")
        chosen = units if last is None else units[-last:]
        self.blocks = [name for name in self.all_blocks if name in chosen]
        self.stages = [name for name in self._stages() if name in chosen]
        if last is not None:
            self.modules = {name: module for name, module in self.modules.items() if is_inside(name, chosen)}

    def of_type(self, *types: type[nn.Module]) -> list[str]:
        """Names of the modules of exactly these classes."""
        return [name for name, module in self.modules.items() if type(module) in types]

    def linears(self) -> list[str]:
        """Linear layers."""
        return self.of_type(nn.Linear)

    def convolutions(self) -> list[str]:
        """Convolutions in which every output sees every input channel."""
        return [name for name in self.of_type(nn.Conv2d) if self.modules[name].groups == 1]

    def norms(self) -> list[str]:
        """Layer norms and their like, with weights and without running statistics."""
        return [
            name
            for name, module in self.modules.items()
            if isinstance(module, _NORMS) and any(True for _ in module.parameters(recurse=False))
        ]

    def fused_projections(self) -> list[str]:
        """Linear layers that make queries, keys and values at once."""
        names = [f"{block}.attn.qkv" for block in self.blocks]
        return [n for n in names if n in self.modules and self.modules[n].out_features % 3 == 0]

    def projections(self, parts: str) -> list[str]:
        """Layers that make queries ("q"), keys ("k") and values ("v"); a fused layer stands for its parts."""
        found = self.fused_projections()
        for names in _QUERY_KEY_VALUE:
            wanted = [name for part, name in zip("qkv", names, strict=True) if part in parts]
            found += [n for n in self._in_blocks("attn", wanted) if isinstance(self.modules[n], nn.Linear)]
        return found

    def attention_outputs(self) -> list[str]:
        """Output projections of the attention."""
        return [name for name in self._in_blocks("attn", ["proj", "out_proj"]) if name in self.linears()]

    def feed_forward_outputs(self) -> list[str]:
        """Last linear layers of the MLPs."""
        mlps = [[n for n in self.linears() if is_inside(n, [f"{block}.mlp"])] for block in self.blocks]
        return [names[-1] for names in mlps if names]

    def biases(self) -> Iterator[tuple[str, int, bool]]:
        """Layers whose bias is added last: name, size, and whether channels are the second axis of the output."""
        for name, module in self.modules.items():
            channels_first = isinstance(module, nn.Conv2d | nn.GroupNorm | nn.BatchNorm2d | LayerNorm2d)
            last = channels_first or isinstance(module, nn.Linear | nn.LayerNorm)
            # timm has norms with an activation inside, behind the bias.
            if last and getattr(module, "bias", None) is not None and not hasattr(module, "act"):
                yield name, module.bias.numel(), channels_first

    def prompt_obstacle(self) -> str | None:
        """Why no tokens can be added; `None` where they can."""
        if not isinstance(self.encoder, VisionTransformer):
            return (
                "prompts need a plain vision transformer: rotary or relative positions and windows are made for a "
                "fixed grid of patches"
            )
        return None

    def block_width(self, name: str) -> int:
        """Width of the tokens of a block."""
        block = self.modules[name]
        return original(block.norm2).weight.numel()

    def stage_width(self, name: str) -> int:
        """Channels that leave a stage."""
        return self._stages()[name]

    def _in_blocks(self, child: str, names: Iterable[str]) -> list[str]:
        candidates = [f"{block}.{child}.{name}" for block in self.blocks for name in names]
        return [name for name in candidates if name in self.modules]

    def _stages(self) -> dict[str, int]:
        """Last module of each stage of a convolutional network -> its channels."""
        if self.all_blocks:
            return {}
        stages = {}
        for info in getattr(self.encoder, "feature_info", None) or ():
            name = f"{self.name}.{info['module']}"
            module = self.modules.get(name)
            if isinstance(module, nn.Sequential):
                name = f"{name}.{len(module) - 1}"
            if module is not None and any(True for _ in module.parameters()):
                stages[name] = info["num_chs"]
        return stages


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside a `PeftModel`, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def original(module: nn.Module) -> nn.Module:
    """The module that stood in this place before any adapter."""
    while isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        module = module.base_layer if isinstance(module, BaseTunerLayer) else module.original_module
    return module


def original_modules(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Names and modules as `named_modules` gave them before any adapter."""
    module = original(module)
    yield name, module
    for child_name, child in module.named_children():
        yield from original_modules(child, f"{name}.{child_name}" if name else child_name)


def head_modules(model: nn.Module) -> list[str]:
    """For `modules_to_save`: everything with weights outside of the encoder, to be trained and saved whole.

    PEFT takes every module whose name *ends* like an entry. Where a part of the head holds a module that ends like
    another entry (`model.pooler.classifier` and `classifier`), its children stand in the list in its place.

    Raises:
        AdapterError: a part of the head cannot be told from others by the ending of its name.
    """
    model = unwrapped(model)
    modules = dict(original_modules(model))
    encoder = EncoderParts(model).name
    above = [encoder[:i] for i, letter in enumerate(encoder) if letter == "."]
    names = [name for name in _children(modules, ["", *above]) if name not in (encoder, *above)]
    while clashing := [name for name in names if _hidden_inside(name, names, modules)]:
        if any(True for name in clashing for _ in modules[name].parameters(recurse=False)):
            raise AdapterError(f"The names of the modules in {clashing} end like those of other modules: {names}.")
        names = [n for n in names if n not in clashing] + _children(modules, clashing)
        names = [n for n in names if not any(n.endswith(other) for other in names if other != n)]
    caught = [n for n in modules if is_inside(n, [encoder]) and n.endswith(tuple(names))]
    if any(True for name in caught for _ in modules[name].parameters()):
        raise AdapterError(f"Modules of the encoder have names that end like those of the head: {caught}.")
    return names


def is_inside(name: str, parents: Iterable[str]) -> bool:
    """Whether a module is one of the parents or lies in one."""
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)


def _children(modules: dict[str, nn.Module], parents: list[str]) -> list[str]:
    """Children that have weights."""
    return [
        name
        for name, module in modules.items()
        if name and name.rpartition(".")[0] in parents and any(True for _ in module.parameters())
    ]


def _hidden_inside(name: str, names: list[str], modules: dict[str, nn.Module]) -> bool:
    return any(inner.startswith(f"{name}.") and inner.endswith(tuple(names)) for inner in modules)


def _is_block(module: nn.Module) -> bool:
    children = dict(module.named_children())
    return {"attn", "mlp", "norm2"} <= children.keys()
