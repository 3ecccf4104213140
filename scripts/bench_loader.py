"""Cells per second that pretraining reads, beside plain PIL with torchvision, and beside what its training step takes.

    OMP_NUM_THREADS=1 python scripts/bench_loader.py --data pbc-cells

Batches of one kind after the other take turns in one run, with one thread of a CPU; ratios are medians over rounds.
Without `--data` the cells are painted.
"""

import argparse
import io
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms import v2

from lymph_hf import LymphImageProcessor, LymphMAEConfig, LymphMAEForPreTraining
from lymph_hf.augment import Augmentation
from lymph_hf.bench import clock_of
from lymph_hf.cell_sources import read_cells
from lymph_hf.cells import CellDataset, Cells
from lymph_hf.synthetic import write_synthetic_cohort

ENCODERS = ("vit_tiny_patch16_224", "vit_small_patch16_224")


def plain_view(processor: LymphImageProcessor, *, tensors: bool) -> Callable[[bytes], torch.Tensor]:
    """Bytes -> (3, S, S): the transformations of `Augmentation` one after the other, on PIL images or uint8 tensors."""
    views = Augmentation()
    steps = [
        v2.Resize((processor.size.height, processor.size.width), v2.InterpolationMode.BICUBIC),
        v2.RandomHorizontalFlip(),
        v2.RandomAffine(
            views.rotation,
            translate=(views.translation, views.translation),
            scale=(1 - views.scaling, 1 + views.scaling),
            interpolation=v2.InterpolationMode.BILINEAR,
            fill=240,
        ),
        v2.ColorJitter(views.brightness, views.contrast, views.saturation),
    ]
    steps.insert(0 if tensors else len(steps), v2.ToImage())
    end = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(processor.image_mean, processor.image_std)]
    transform = v2.Compose([*steps, *end])
    return lambda data: transform(Image.open(io.BytesIO(data)).convert("RGB"))


def training_step(encoder: str, images: torch.Tensor) -> Callable[[], None]:
    """A step of the masked autoencoder with the default decoder, in bfloat16."""
    model = LymphMAEForPreTraining(LymphMAEConfig(encoder=encoder, image_size=images.shape[-1])).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def learn() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(images).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return learn


def batches(cells: Cells, size: int) -> dict[str, Callable[[], object]]:
    """What takes turns: each makes, or takes, one batch of all the cells."""
    processor = LymphImageProcessor(size={"height": size, "width": size})
    data = [cells.read(row) for row in range(len(cells))]

    def plain(*, tensors: bool) -> Callable[[], object]:
        view = plain_view(processor, tensors=tensors)
        return lambda: torch.stack([view(image) for image in data])

    def ours(*, preload: bool) -> Callable[[], object]:
        dataset = CellDataset(cells, processor, patches=196, augmentation=Augmentation(), preload=preload)
        return lambda: dataset.__getitems__(range(len(cells)))

    images = torch.randn(len(cells), 3, size, size)
    return {
        "PIL + torchvision v2, images": plain(tensors=False),
        "PIL + torchvision v2, tensors": plain(tensors=True),
        "lymph": ours(preload=False),
        "lymph, preloaded": ours(preload=True),
        **{f"training step, {encoder}": training_step(encoder, images) for encoder in ENCODERS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="cells in any layout that pretraining reads")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    now = clock_of(torch.device("cpu"), 1)
    with tempfile.TemporaryDirectory() as folder:
        data = options.data or Path(folder) / "painted"
        if options.data is None:
            count = -(-options.batch_size // 2)
            write_synthetic_cohort(data, patients=2, cells=(count, count), progress=False)
        cells = read_cells(data, cache_dir=folder)
        spread = torch.linspace(0, len(cells) - 1, options.batch_size).long().tolist()
        turns = batches(cells.select(spread), options.image_size)
        for batch in turns.values():  # warm-up
            batch()
        seconds: dict[str, list[float]] = {name: [] for name in turns}
        for _ in range(options.rounds):
            for name, batch in turns.items():
                start = now()
                batch()
                seconds[name].append(now() - start)
    print(f"{cells.source} at {options.image_size}, batch {options.batch_size}, {options.rounds} alternating rounds")
    plain, *_ = turns
    print(f"{'':38s} {'cells/s':>9s}   beside {plain}, {', '.join(ENCODERS)}")
    for name, times in seconds.items():
        references = [seconds[plain], *(seconds[f"training step, {encoder}"] for encoder in ENCODERS)]
        ratios = (statistics.median(a / b for a, b in zip(slow, times, strict=True)) for slow in references)
        rate = options.batch_size / statistics.median(times)
        print(f"{name:38s} {rate:9.1f}   {'  '.join(f'{ratio:7.2f}' for ratio in ratios)}")


if __name__ == "__main__":
    main()
