"""Parameter-efficient training of the encoder, by name: `ADAPTERS`, `attach_adapter`.

Every adapter is a PEFT method, PEFT's own or one that `adapter_tuners` registers, so all of PEFT works with it. What
is trained beside the adapter is what the encoder knows nothing of: pooling, fusion and classifier. They are saved
with it.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from .adapter_methods import ADAPTERS
from .adapter_targets import AdapterError, EncoderParts, head_modules, original, unwrapped
from .adapter_tuners import register_methods
from .encoders import encoder_data_config

register_methods()


def adapter_config(model: nn.Module, adapter: str | PeftConfig, **options) -> PeftConfig:
    """The PEFT configuration of an adapter for this model, with pooling, fusion and classifier to train and save.

    Args:
        model: a patient model, also with adapters.
        adapter: a key of `ADAPTERS`, or a configuration, which is completed where it says nothing of
            `modules_to_save`.
        **options: of the entry in `ADAPTERS`.

    Raises:
        AdapterError: unknown name or option, an option out of range, or a method that does not apply to the encoder.
    """
    model = unwrapped(model)
    if isinstance(adapter, PeftConfig):
        if options:
            raise AdapterError(f"Options {sorted(options)} go with the name of an adapter, not with a configuration.")
        config = deepcopy(adapter)
        if config.modules_to_save is None:
            config.modules_to_save = head_modules(model)
        return config
    _check_options(adapter, options)
    try:
        config = ADAPTERS[adapter](model, **options)
    except AdapterError as error:
        raise AdapterError(
            f"adapter {adapter!r} with encoder {model.config.encoder!r}: {error}. "
            f"What applies to it: {', '.join(applicable_adapters(model))}."
        ) from error
    config.modules_to_save = head_modules(model) + list(config.modules_to_save or ())
    return config


def applicable_adapters(model: nn.Module) -> list[str]:
    """Names in `ADAPTERS` that apply to the encoder of a patient model with their default options."""
    model = unwrapped(model)
    called = _called_modules(model)
    return [name for name, build in ADAPTERS.items() if _applies(build, model, called)]


def attach_adapter(
    model: PreTrainedModel | PeftModel, adapter: str | PeftConfig, *, adapter_name: str = "default", **options
) -> PeftModel:
    """Freeze the encoder and put an adapter on it; pooling, fusion and classifier stay trainable.

    Args:
        model: a patient model, changed in place; or the result of an earlier call, for a further adapter, which is
            then chosen with `set_adapter`.
        adapter: a key of `ADAPTERS`, or any `PeftConfig`.
        adapter_name: under which PEFT knows it.
        **options: of the entry in `ADAPTERS`.

    Raises:
        AdapterError: as in `adapter_config`, or an adapted layer that the encoder never calls.

    Example:

    ```python
    >>> from lymph_hf import LymphMILConfig, LymphMILForBagClassification
    >>> from lymph_hf.adapters import attach_adapter, trainable_report

    >>> model = LymphMILForBagClassification(LymphMILConfig(encoder="test_vit", image_size=32))
    >>> model = attach_adapter(model, "lora", rank=4)
    >>> model.save_pretrained("my-adapter")  # doctest: +SKIP

    ```
    """
    config = adapter_config(model, adapter, **options)
    was_training = model.training
    with warnings.catch_warnings():
        # PEFT does not know timm's layer norm, of which it only makes a copy.
        warnings.filterwarnings("ignore", "Unsupported layer type")
        if isinstance(model, PeftModel):
            model.add_adapter(adapter_name, config)
        else:
            model = get_peft_model(model, config, adapter_name=adapter_name)
    model.train(was_training)
    base = unwrapped(model)
    idle = _idle_layers(base)
    if idle:
        others = ", ".join(applicable_adapters(model))
        model.delete_adapter(adapter_name)
        if not model.peft_config:
            model.unload()
        raise AdapterError(
            f"The encoder {model.config.encoder!r} never calls {', '.join(idle[:3])}: it reads the weight alone, so an "
            f"adapter there would do nothing. Choose other targets, or one of {others}."
        )
    return model


def trainable_report(model: nn.Module) -> str:
    """How much is trained, such as "1,843,202 of 23,512,345 parameters are trained (7.8 %)".

    The frozen originals of modules that are trained whole are not counted beside their trained copies.
    """
    originals = [m.original_module for m in model.modules() if isinstance(m, ModulesToSaveWrapper)]
    originals += [m.base_layer for m in model.modules() if isinstance(m, LNTuningLayer)]
    replaced = {id(parameter) for module in originals for parameter in module.parameters()}
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters() if id(p) not in replaced]
    trained, total = sum(size for size, is_trained in sizes if is_trained), sum(size for size, _ in sizes)
    return f"{trained:,} of {total:,} parameters are trained ({trained / total:.1%})"


def save_adapted(model: PeftModel, folder: str | Path) -> None:
    """Write the frozen model and its adapter into one folder, which `AutoModel.from_pretrained` loads complete.

    `model.save_pretrained(folder)` writes the adapter alone, to go with a frozen model published elsewhere.
    """
    deepcopy(model).unload().save_pretrained(folder)
    model.save_pretrained(str(folder))


def _check_options(adapter: str, options: dict) -> None:
    if adapter not in ADAPTERS:
        raise AdapterError(f"adapter={adapter!r}: expected one of {', '.join(ADAPTERS)}.")
    legal = list(inspect.signature(ADAPTERS[adapter]).parameters)[1:]
    if unknown := sorted(options.keys() - set(legal)):
        raise AdapterError(f"adapter {adapter!r} has no option {', '.join(unknown)}; expected some of: {legal}.")


def _applies(build: Callable[..., PeftConfig], model: PreTrainedModel, called: set[nn.Module]) -> bool:
    try:
        targets = build(model).target_modules
    except AdapterError:
        return False
    modules = EncoderParts(model).modules
    return all(modules[name] in called for name in targets)


def _idle_layers(model: PreTrainedModel) -> list[str]:
    """Adapted layers that the encoder does not call."""
    called = _called_modules(model)
    layers = EncoderParts(model).encoder.named_modules()
    return [name for name, layer in layers if isinstance(layer, BaseTunerLayer) and original(layer) not in called]


def _called_modules(model: PreTrainedModel) -> set[nn.Module]:
    """Modules of the encoder, without their adapters, that two blank images pass."""
    encoder = EncoderParts(model).encoder
    called = set()
    hooks = [
        module.register_forward_pre_hook(lambda module, _: called.add(original(module))) for module in encoder.modules()
    ]
    images = next(encoder.parameters()).new_zeros(2, *encoder_data_config(model.config)["input_size"])
    try:
        with evaluation_mode(encoder), torch.no_grad():
            encoder(images)
    finally:
        for hook in hooks:
            hook.remove()
    return called


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Fixed statistics and no dropout inside; each part is in its own mode again at the end."""
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for child, mode in modes:
            child.training = mode


__all__ = [
    "ADAPTERS",
    "AdapterError",
    "adapter_config",
    "applicable_adapters",
    "attach_adapter",
    "evaluation_mode",
    "save_adapted",
    "trainable_report",
]
