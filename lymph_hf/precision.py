"""The number format of the heavy computations: bfloat16 where the device has hardware for it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

AUTO = "auto"
Precision = Literal["auto", "no", "bf16", "fp16"]
PRECISION_HELP = (
    "number format of the encoder's computations; auto: bf16 where the device computes it in hardware "
    "(probabilities then differ by less than 0.01), else no"
)
# Either instruction set multiplies pairs of bfloat16; without one, every operation is a detour over float32.
_CPU_INSTRUCTIONS = ("amx_bf16", "avx512_bf16")

Options = TypeVar("Options")


def resolve_precision(precision: Precision, device: torch.device | str | None = None) -> str:
    """What `auto` means on a device; anything else stays as it is.

    Args:
        precision: as in the options.
        device: by default the accelerator, or the CPU where there is none.
    """
    if precision != AUTO:
        return precision
    device = torch.device(device) if device is not None else _default_device()
    return "bf16" if has_bfloat16(device) else "no"


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 in hardware: CUDA from 8.0, and CPUs with AMX or AVX-512 BF16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        abilities = getattr(torch.cpu, "get_capabilities", dict)()
        return any(abilities.get(name, False) for name in _CPU_INSTRUCTIONS)
    return False


def with_settled_precision(options: Options) -> Options:
    """Options of a run with `auto` replaced, so that its settings hold what it does.

    A run that is resumed keeps the precision it was started with, also on a machine that would choose another.

    Args:
        options: a dataclass with `mixed_precision`, `cpu`, `resume` and `output`.
    """
    return replace(options, mixed_precision=_recorded(options) or precision_of(options))


def precision_of(options: Any) -> str:
    """The precision that options with `mixed_precision` and `cpu` ask for on this machine."""
    return resolve_precision(options.mixed_precision, "cpu" if options.cpu else None)


def _recorded(options: Any) -> str | None:
    settings = Path(options.output) / "settings.json"
    if options.mixed_precision != AUTO or not options.resume or not settings.exists():
        return None
    return json.loads(settings.read_text(encoding="utf-8")).get("mixed_precision")


def _default_device() -> torch.device:
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
