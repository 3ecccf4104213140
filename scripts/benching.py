"""What the benchmarks share: memory that a function takes, and models to measure."""

import ctypes
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lymph_hf import LymphMILConfig, LymphMILForBagClassification
from lymph_hf.adapters import attach_adapter


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int:
    """The most memory that a call takes above what is held before it.

    On a CPU it is the resident memory of the process, as the system counts it (Linux); on a GPU what torch allocates.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL(None).malloc_trim(0)  # what is free already would hide what the call takes
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def adapted_model(encoder: str, adapter: str, options: str = "{}", **config: Any) -> LymphMILForBagClassification:
    """A patient model with an adapter ("none": the whole encoder is trained), the same at every call."""
    torch.manual_seed(0)
    model = LymphMILForBagClassification(LymphMILConfig(encoder=encoder, **config))
    return model if adapter == "none" else attach_adapter(model, adapter, **json.loads(options))


def packed(cells: torch.Tensor) -> dict[str, torch.Tensor]:
    """One patient, as the training loop hands it over."""
    offsets, label = torch.tensor([0, len(cells)]), torch.ones(1, dtype=torch.long)
    return {"pixel_values": cells, "bag_offsets": offsets.to(cells.device), "labels": label.to(cells.device)}
