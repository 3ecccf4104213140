"""Memory and time of one end-to-end training step on one patient, in chunks against the usual ways.

    python scripts/bench_adapters.py --threads 2

Each way runs in a process of its own, so that its peak is its own: on a CPU the largest resident memory above that
before the step (Linux), on a GPU the largest allocation. The yardstick is sub-batches with every activation kept.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from lymph_hf import LymphMILConfig, LymphMILForBagClassification
from lymph_hf.adapters import attach_adapter, trainable_report
from lymph_hf.chunking import encode_in_chunks

Encode = Callable[[nn.Module, Tensor], Tensor]
BASELINE = "sub-batches of 16, all kept"


def in_chunks(chunk_size: int | str) -> Encode:
    return lambda encoder, cells: encode_in_chunks(encoder, cells, chunk_size)


def checkpointed_blocks(encoder: nn.Module, cells: Tensor) -> Tensor:
    encoder.set_grad_checkpointing(True)
    return encoder(cells)


WAYS: dict[str, Encode] = {
    BASELINE: lambda encoder, cells: torch.cat([encoder(chunk) for chunk in cells.split(16)]),
    "all at once": lambda encoder, cells: encoder(cells),
    "gradient checkpointing": checkpointed_blocks,
    "chunks of 16": in_chunks(16),
    "chunks of 4": in_chunks(4),
    "chunks, auto": in_chunks("auto"),
}


def measure(way: str, options: argparse.Namespace) -> dict[str, float]:
    """Seconds and bytes of one step."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    config = LymphMILConfig(encoder=options.encoder, fusion="clinical_query")
    model = attach_adapter(LymphMILForBagClassification(config), options.adapter, **json.loads(options.adapter_options))
    model = model.to(device).train()
    encoder = model.get_base_model().base_model.encoder
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    cells = torch.randn(options.cells, *encoder.pretrained_cfg["input_size"], device=device)
    bag = {"clinical": torch.randn(1, 3, device=device), "labels": torch.tensor([1], device=device)}
    precision = torch.autocast(device.type, torch.bfloat16) if options.bf16 else nullcontext()

    def step(cells: Tensor) -> None:
        optimizer.zero_grad()
        with precision:
            embeddings = WAYS[way](encoder, cells)
            loss = model(cell_embeddings=embeddings[None].float(), **bag).loss
        loss.backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    step(cells[:2])  # libraries are loaded, the optimizer's state is there
    before = resident() if device.type == "cpu" else torch.cuda.memory_allocated()
    start, processor_start = time.perf_counter(), time.process_time()
    step(cells)
    seconds, processor_seconds = time.perf_counter() - start, time.process_time() - processor_start
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    return {
        "seconds": seconds,
        "processor_seconds": processor_seconds,
        "bytes": peak - before,
        "report": trainable_report(model),
    }


def resident() -> int:
    """Bytes of memory that the process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def table(results: dict[str, dict[str, float]]) -> str:
    """Markdown; in brackets over the baseline. CPU seconds do not mind what else the machine is doing."""
    rows = ["| way | peak memory | seconds | CPU seconds |", "|---|---|---|---|"]
    for way, result in results.items():
        memory, seconds, processor = (
            f"{result[key] / unit:.{digits}f} ({result[key] / results[BASELINE][key]:.2f})"
            for key, unit, digits in (("bytes", 1e9, 2), ("seconds", 1, 1), ("processor_seconds", 1, 1))
        )
        rows.append(f"| {way} | {memory} | {seconds} | {processor} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="vit_small_patch16_224", help="timm model")
    parser.add_argument("--cells", type=int, default=84, help="cells of the patient")
    parser.add_argument("--adapter", default="lora", help="a name in ADAPTERS")
    parser.add_argument("--adapter-options", default='{"rank": 32}', help="JSON")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    parser.add_argument("--way", choices=WAYS, help="only this one, as JSON")
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options.way, options)))
        return
    # Otherwise glibc keeps what was freed, in pieces, and the peak would show its leftovers.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    results = {}
    for way in WAYS:
        command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
        output = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True).stdout
        results[way] = json.loads(output.splitlines()[-1])
    print(f"{options.encoder}, {options.adapter} {options.adapter_options}, one patient of {options.cells} cells,")
    print(f"{options.device}, {options.threads} threads, torch {torch.__version__}; {results[BASELINE]['report']}\n")
    print(table(results))


if __name__ == "__main__":
    main()
