"""`lymph bench`: how fast a patient is predicted and learnt from, beside the plain way, on this machine.

The plain way is float32 in sub-batches of 16 cells, with every activation kept in training. Both ways have the same
model, run in turns in one process, and are reported as ratios.
"""

import logging
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .adapters import attach_adapter, trainable_report
from .configuration_lymph import LymphMILConfig
from .encoders import encoder_data_config
from .modeling_lymph import LymphMILForBagClassification
from .options import chunk_size_option, json_option
from .options_bench import BenchOptions
from .patient_models import load_model
from .training import make_accelerator

logger = logging.getLogger(__name__)

SUB_BATCH = 16
# Sides of square matrices: which one shows the highest rate depends on the caches.
_SIDES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Patient:
    """A patient of random images, what a model says of it, and a step of training on it.

    Args:
        model: a patient classifier, also with an adapter.
        accelerator: device and precision.
        cells: number of images.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator, cells: int):
        self.accelerator = accelerator
        self.model = model.to(accelerator.device)
        self.cells = torch.randn(cells, *encoder_data_config(model.config)["input_size"], device=accelerator.device)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def predict(self, cells: Tensor, *, plain: bool) -> Tensor:
        """Probabilities, (C,)."""
        self.model.eval()
        with torch.no_grad():
            return self._output(cells, plain).logits.double().softmax(dim=-1)[0]

    def learn(self, cells: Tensor, *, plain: bool) -> None:
        """One step of training."""
        self.model.train()
        self.optimizer.zero_grad()
        label = torch.zeros(1, dtype=torch.long, device=cells.device)
        self._output(cells, plain, labels=label).loss.backward()
        self.optimizer.step()

    def _output(self, cells: Tensor, plain: bool, **inputs: Tensor):
        with nullcontext() if plain else self.accelerator.autocast():
            if not plain:
                offsets = torch.tensor([0, len(cells)], device=cells.device)
                return self.model(pixel_values=cells, bag_offsets=offsets, **inputs)
            encoder = self._base().base_model.encoder
            embeddings = torch.cat([encoder(part) for part in cells.split(SUB_BATCH)])
            return self.model(cell_embeddings=embeddings[None], **inputs)

    def _base(self) -> nn.Module:
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model


def bench(options: BenchOptions) -> dict[str, float]:
    """Measure and log a table.

    Returns:
        `prediction_ratio`, `patients_per_second`, `largest_difference` of a probability, `matrix_rate` (FLOP/s), and
        with training `training_ratio`, `training_steps_per_second` and `training_rate` (FLOP/s).

    Raises:
        ValueError: less than one cell, round or thread.
    """
    for name in ("cells", "rounds", "threads"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)}: expected at least 1.")
    torch.set_num_threads(options.threads)
    accelerator = make_accelerator(options)
    patient = Patient(_model(options), accelerator, options.cells)
    clock = clock_of(accelerator.device, options.threads)
    logger.info("%s", _heading(patient, options))
    probabilities = [patient.predict(patient.cells, plain=plain) for plain in (True, False)]
    results = {"largest_difference": float((probabilities[0] - probabilities[1]).abs().max())}
    measured = {"prediction": _alternating(patient.predict, patient.cells, options.rounds, clock)}
    if options.training and options.run is None:
        measured["training"] = _alternating(patient.learn, patient.cells, options.rounds, clock)
        results["training_rate"] = step_flops(patient) / measured["training"][1]
        results["training_steps_per_second"] = 1 / measured["training"][1]
    results |= {f"{name}_ratio": ratio for name, (_, _, ratio) in measured.items()}
    results["patients_per_second"] = 1 / measured["prediction"][1]
    results["matrix_rate"] = matrix_rate(accelerator.device, accelerator.mixed_precision, clock)
    logger.info("%s", _table(measured))
    logger.info("Largest difference of a probability: %.2g.", results["largest_difference"])
    logger.info("%s", _utilisation(results, accelerator.mixed_precision))
    return results


def matrix_rate(device: torch.device, precision: str, clock: Callable[[], float]) -> float:
    """Highest FLOP/s of a product of square matrices in a precision."""
    rates = []
    for side in _SIDES.get(device.type, _SIDES["cpu"]):
        left, right = (torch.randn(side, side, device=device, dtype=_DTYPES.get(precision)) for _ in range(2))
        left @ right
        for _ in range(3):
            start = clock()
            for _ in range(4):
                left @ right
            rates.append(4 * 2 * side**3 / (clock() - start))
    return max(rates)


def step_flops(patient: Patient) -> float:
    """Floating-point operations of a training step in which nothing is computed twice."""
    part = patient.cells[:2]
    # The counter knows the products that attention is made of, not every fused attention.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        patient.learn(part, plain=True)
    return counter.get_total_flops() / len(part) * len(patient.cells)


def _alternating(
    run: Callable[..., object], cells: Tensor, rounds: int, clock: Callable[[], float]
) -> tuple[float, float, float]:
    """Median seconds of the plain way and of ours, and the median of their ratios, after a small first call of each."""
    for plain in (True, False):
        run(cells[:2], plain=plain)
    times: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(rounds):
        for plain, found in times.items():
            start = clock()
            run(cells, plain=plain)
            found.append(clock() - start)
    ratios = [slow / fast for slow, fast in zip(times[True], times[False], strict=True)]
    return statistics.median(times[True]), statistics.median(times[False]), statistics.median(ratios)


def clock_of(device: torch.device, threads: int) -> Callable[[], float]:
    """Seconds that a device has worked: of this process alone where one thread of a CPU computes."""
    if device.type == "cpu":
        # Threads that wait for each other spin: their CPU seconds mean nothing.
        return time.process_time if threads == 1 else time.perf_counter

    def synchronised() -> float:
        torch.accelerator.synchronize()
        return time.perf_counter()

    return synchronised


def _model(options: BenchOptions) -> nn.Module:
    if options.run is not None:
        return load_model(options.run)[0]
    set_seed(options.seed)
    config = LymphMILConfig(
        encoder=options.encoder,
        image_size=options.image_size,
        fusion="clinical_query",
        chunk_size=chunk_size_option(options.chunk_size),
    )
    model = LymphMILForBagClassification(config)
    if options.adapter == "none":
        return model
    given = json_option("adapter_options", options.adapter_options)
    if given is None:
        given = {"rank": 32} if options.adapter == "lora" else {}
    return attach_adapter(model, options.adapter, **given)


def _heading(patient: Patient, options: BenchOptions) -> str:
    device = patient.accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{options.threads} thread(s)"
    size = "x".join(map(str, patient.cells.shape[-2:]))
    what = options.run or options.encoder
    trained = "" if options.run or not options.training else f"; {trainable_report(patient.model)}"
    return f"{what}, one patient of {len(patient.cells)} cells of {size} pixels, {device.type}, {name}{trained}"


def _table(measured: Mapping[str, tuple[float, float, float]]) -> str:
    rows = [f"| per second | float32, sub-batches of {SUB_BATCH} | here | ratio |", "|---|---|---|---|"]
    units = {"prediction": "patients predicted", "training": "steps of training"}
    for name, (plain, ours, ratio) in measured.items():
        rows.append(f"| {units[name]} | {1 / plain:.3f} | {1 / ours:.3f} | {ratio:.2f} |")
    return "\n".join(rows)


def _utilisation(results: Mapping[str, float], precision: str) -> str:
    text = f"Matrix products reach {results['matrix_rate'] / 1e12:.2f} TFLOP/s with precision {precision}"
    if "training_rate" not in results:
        return f"{text}."
    share = results["training_rate"] / results["matrix_rate"]
    return f"{text}, the training step {results['training_rate'] / 1e12:.2f} ({share:.0%} of it)."
