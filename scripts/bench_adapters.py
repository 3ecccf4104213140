"""Every adapter: what it trains, what it costs, and which verbs of PEFT it passes.

    python scripts/bench_adapters.py --threads 1

Times are of a step of training on one patient, as a ratio to training the whole encoder, in turns in one process; CPU
seconds with one thread. Memory is the peak of that step above what is held before, activations of all cells kept.
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from benching import adapted_model, packed, peak_bytes
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModel

from lymph_hf.adapters import ADAPTERS, AdapterError, adapter_config, applicable_adapters

WHOLE = "none"


@dataclass
class Subject:
    """An adapter to try, on a fresh model whenever one is needed.

    Attributes:
        adapter: a name in ADAPTERS, or "none".
        encoder: timm model.
        cells: (N, 3, H, W), a patient.
    """

    adapter: str
    encoder: str
    cells: torch.Tensor

    def plain(self) -> nn.Module:
        """The model without adapter."""
        return adapted_model(self.encoder, WHOLE, chunk_size=None).eval()

    def adapted(self) -> nn.Module:
        """The model with an adapter that has moved away from its start."""
        model = adapted_model(self.encoder, self.adapter, chunk_size=None).eval()
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.02 * torch.randn_like(parameter)
        return model

    def answer(self, model: nn.Module) -> torch.Tensor:
        """Logits of two cells."""
        with torch.no_grad():
            return model.eval()(pixel_values=self.cells[None, :2]).logits

    def same(self, first: nn.Module, second: nn.Module) -> bool:
        """Bit by bit."""
        return torch.equal(self.answer(first), self.answer(second))


def get_model(subject: Subject, folder: Path) -> bool:
    plain = subject.plain()
    model = get_peft_model(plain, adapter_config(plain, subject.adapter))
    return isinstance(model, PeftModel) and any(parameter.requires_grad for parameter in model.parameters())


def save_and_load(subject: Subject, folder: Path) -> bool:
    model = subject.adapted()
    model.save_pretrained(str(folder))
    return subject.same(PeftModel.from_pretrained(subject.plain(), str(folder)), model)


def disable(subject: Subject, folder: Path) -> bool:
    model = subject.adapted()
    with model.disable_adapter():
        return subject.same(model, subject.plain())


def merge(subject: Subject, folder: Path) -> bool | str:
    model = subject.adapted()
    expected = subject.answer(model)
    try:
        merged = model.merge_and_unload()
    except ValueError as error:
        return "refused" if "cannot be merged" in str(error) else False
    return torch.allclose(subject.answer(merged), expected, rtol=1e-3, atol=1e-4)


def delete(subject: Subject, folder: Path) -> bool:
    model = subject.adapted()
    expected = subject.answer(model)
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    model.delete_adapter("second")
    return list(model.peft_config) == ["default"] and torch.equal(subject.answer(model), expected)


def unload(subject: Subject, folder: Path) -> bool:
    return subject.adapted().unload().state_dict().keys() == subject.plain().state_dict().keys()


def auto_model(subject: Subject, folder: Path) -> bool:
    plain = subject.plain()
    plain.save_pretrained(folder / "base")
    model = subject.adapted()
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(str(folder / "adapter"))
    return subject.same(AutoModel.from_pretrained(folder / "adapter"), model)


VERBS: dict[str, Callable[[Subject, Path], bool | str]] = {
    "get_peft_model": get_model,
    "save, load": save_and_load,
    "disable": disable,
    "merge": merge,
    "delete": delete,
    "unload": unload,
    "AutoModel": auto_model,
}


def verdicts(subject: Subject) -> list[str]:
    """One word per verb."""
    words = []
    for verb in VERBS.values():
        with tempfile.TemporaryDirectory() as folder:
            try:
                passed = verb(subject, Path(folder))
            except (AdapterError, RuntimeError, ValueError, KeyError, OSError) as error:
                passed = type(error).__name__
        words.append(passed if isinstance(passed, str) else "yes" if passed else "NO")
    return words


def stepper(subject: Subject) -> tuple[nn.Module, Callable[[torch.Tensor], None]]:
    """A model, and a step of its training on cells."""
    model = adapted_model(subject.encoder, subject.adapter, chunk_size=None).train()
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4)

    def step(cells: torch.Tensor) -> None:
        optimizer.zero_grad()
        model(**packed(cells)).loss.backward()
        optimizer.step()

    step(subject.cells[:2])
    return model, step


def saved_bytes(model: nn.Module) -> int:
    """Of the adapter, or of the whole model."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def seconds(step: Callable[[torch.Tensor], None], cells: torch.Tensor) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    step(cells)
    return clock() - start


def row(subject: Subject, yardstick: Callable[[torch.Tensor], None], rounds: int) -> list[str]:
    """Of the table."""
    model, step = stepper(subject)
    peak = peak_bytes(lambda: step(subject.cells), torch.device("cpu"))
    ratios = [seconds(step, subject.cells) / seconds(yardstick, subject.cells) for _ in range(rounds)]
    numbers = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    trained = sum(count for count, is_trained in numbers if is_trained)
    # Trained copies stand beside frozen originals: the share is one of the plain model's parameters.
    total = sum(parameter.numel() for parameter in subject.plain().parameters())
    size = saved_bytes(model)
    words = ["" for _ in VERBS] if subject.adapter == WHOLE else verdicts(subject)
    return [
        subject.adapter if subject.adapter != WHOLE else "whole encoder",
        f"{trained:,}",
        f"{trained / total:.1%}",
        f"{size / 1e6:.2f}",
        f"{statistics.median(ratios):.2f}",
        f"{peak / 1e6:.0f}",
        *words,
    ]


def table(encoder: str, adapters: list[str], options: argparse.Namespace) -> str:
    """Markdown."""
    size = adapted_model(encoder, WHOLE).base_model.encoder.pretrained_cfg["input_size"]
    cells = torch.randn(options.cells, *size, generator=torch.Generator().manual_seed(0))
    _, yardstick = stepper(Subject(WHOLE, encoder, cells))
    heads = ["adapter", "trained", "share", "saved, MB", "step, ratio", "peak, MB", *VERBS]
    rows = [heads, ["---"] * len(heads)]
    rows += [row(Subject(adapter, encoder, cells), yardstick, options.rounds) for adapter in (WHOLE, *adapters)]
    lines = "\n".join(f"| {' | '.join(cell for cell in cells)} |" for cells in rows)
    return f"{encoder}, one patient of {options.cells} cells, float32; the head is trained and saved too\n\n{lines}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="vit_tiny_patch16_224", help="vision transformer of timm")
    parser.add_argument("--cnn", default="resnet18", help="for the adapters that need a convolutional network")
    parser.add_argument("--cells", type=int, default=8, help="of the patient")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    of_transformer = applicable_adapters(adapted_model(options.encoder, WHOLE))
    of_cnn = [name for name in ADAPTERS if name not in of_transformer]
    print(table(options.encoder, of_transformer, options))
    if of_cnn:
        print(f"\n{table(options.cnn, of_cnn, options)}")


if __name__ == "__main__":
    main()
