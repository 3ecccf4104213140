"""Peak memory of one end-to-end training step on one patient, by number of cells: every activation kept, and chunks.

    python scripts/bench_memory.py --cells 20 50 100 200 500 2000 --figure memory.png

Each measurement runs in a process of its own. The images themselves are not counted.
"""

import argparse
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from benching import adapted_model, packed, peak_bytes
from torch import nn

from lymph_hf.reporting_style import COLOURS, figure_file

KEPT, CHUNKS = "float32, sub-batches of 16, every activation kept", "bfloat16, chunks of {}"


def measure(options: argparse.Namespace) -> int:
    """Bytes."""
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    keep = options.one == "kept"
    chunk_size = None if keep else options.chunk_size
    model = adapted_model(options.encoder, options.adapter, options.adapter_options, chunk_size=chunk_size).to(device)
    model.train()
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4)
    encoder = model.get_base_model().base_model.encoder
    cells = torch.randn(options.cells[0], *encoder.pretrained_cfg["input_size"], device=device)
    precision = nullcontext() if keep else torch.autocast(device.type, torch.bfloat16)

    def step(cells: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss_of(model, encoder, cells, precision, keep).backward()
        optimizer.step()

    step(cells[:2])  # libraries are loaded, the optimizer's state is there
    return peak_bytes(lambda: step(cells), device)


def loss_of(
    model: nn.Module, encoder: nn.Module, cells: torch.Tensor, precision: AbstractContextManager, keep: bool
) -> torch.Tensor:
    """Of one patient; `keep` is the plain way."""
    patient = packed(cells)
    if keep:
        embeddings = torch.cat([encoder(part) for part in cells.split(16)])
        return model(cell_embeddings=embeddings[None], labels=patient["labels"]).loss
    with precision:
        return model(**patient).loss


def draw(path: Path, peaks: dict[str, dict[int, int]], title: str) -> None:
    """Memory against cells, both axes logarithmic."""
    with figure_file(path, 6.4, 4.2) as figure:
        axes = figure.subplots()
        for colour, (way, of_cells) in zip(COLOURS[1::-1], peaks.items(), strict=True):
            axes.plot(of_cells.keys(), [peak / 1e9 for peak in of_cells.values()], "o-", color=colour, label=way)
        ticks = sorted({cells for of_cells in peaks.values() for cells in of_cells})
        axes.set(xscale="log", yscale="log", xlabel="cells of the patient", ylabel="peak memory of a step, GB")
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        axes.set_yticks([0.1, 0.3, 1, 3, 10], ["0.1", "0.3", "1", "3", "10"])
        axes.grid(axis="y", color="#e6e6e6")
        axes.set_title(title)
        axes.legend()


def report(peaks: dict[str, dict[int, int]]) -> str:
    """Markdown table and the two ratios that count."""
    sizes = sorted({cells for of_cells in peaks.values() for cells in of_cells})
    rows = [f"| peak memory, GB | {' | '.join(map(str, sizes))} cells |", "|---" * (len(sizes) + 1) + "|"]
    for way, of_cells in peaks.items():
        rows.append(f"| {way} | {' | '.join(f'{of_cells[n] / 1e9:.2f}' if n in of_cells else '' for n in sizes)} |")
    kept, chunks = peaks.values()
    common = max(kept.keys() & chunks.keys())
    rows.append(f"\nAt {common} cells chunks take {chunks[common] / kept[common]:.3f} of what keeping all takes.")
    largest = max(chunks)
    rows.append(f"{largest} cells take {chunks[largest] / chunks[common]:.2f} times the memory of {common}.")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="vit_small_patch16_224", help="timm model")
    parser.add_argument("--cells", type=int, nargs="+", default=[20, 50, 84, 200], help="of the patient")
    parser.add_argument("--most-kept", type=int, default=100, help="no larger patient is tried the plain way")
    parser.add_argument("--chunk-size", type=int, default=4, help="cells that pass the encoder at once")
    parser.add_argument("--adapter", default="lora", help="a name in ADAPTERS")
    parser.add_argument("--adapter-options", default='{"rank": 32}', help="JSON")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--figure", type=Path, help="file for the curve")
    parser.add_argument("--one", choices=("kept", "chunks"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(measure(options))
        return
    peaks: dict[str, dict[int, int]] = {KEPT: {}, CHUNKS.format(options.chunk_size): {}}
    for of_cells, one in zip(peaks.values(), ("kept", "chunks"), strict=True):
        for cells in sorted(options.cells):
            if one == "chunks" or cells <= options.most_kept:
                command = [sys.executable, __file__, *sys.argv[1:], "--one", one, "--cells", str(cells)]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                of_cells[cells] = int(output.split()[-1])
    title = f"{options.encoder}, {options.adapter}, {options.device}"
    print(f"{title}\n\n{report(peaks)}")
    if options.figure:
        draw(options.figure, peaks, title)


if __name__ == "__main__":
    main()
