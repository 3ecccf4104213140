"""Bags of very different size in one batch: time of a training step beside the number of cells that are real.

The whole model (encoder, gated attention, classifier; forward and backward) takes the same batch in three ways:
"packed", cells side by side with `bag_offsets`; "masked", bags padded to the largest with `bag_mask`; and "padded",
where every position passes the encoder, padding too, as libraries without packing do. The ways alternate in one run
and give the same logits, which is checked. If cells alone cost, the ratio of times is that of positions to cells.

    python scripts/bench_ragged.py
    python scripts/bench_ragged.py --sizes 16 198 --encoder resnet10t --rounds 5
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from lymph_hf.configuration_lymph import LymphMILConfig
from lymph_hf.encoders import encode_cells
from lymph_hf.modeling_lymph import LymphMILForBagClassification

SIZES = (16, 23, 34, 48, 66, 91, 134, 198)  # cells per patient
Way = Callable[[], torch.Tensor]


def ways(model: LymphMILForBagClassification, sizes: list[int], image_size: int) -> dict[str, Way]:
    """The same batch of random images in three ways, each a function -> logits `(B, 2)`."""
    cells = torch.randn(sum(sizes), 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    mask = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]  # (B, N)
    bags = cells.new_zeros(*mask.shape, *cells.shape[1:])
    bags[mask] = cells

    def padded() -> torch.Tensor:
        embeddings = encode_cells(model.model.encoder, bags.flatten(0, 1), model.config.chunk_size)
        return model(cell_embeddings=embeddings.unflatten(0, mask.shape), bag_mask=mask).logits

    return {
        "packed": lambda: model(cells, bag_offsets=offsets).logits,
        "masked": lambda: model(bags, bag_mask=mask).logits,
        "padded": padded,
    }


def seconds(model: LymphMILForBagClassification, way: Way) -> float:
    """Time of one forward and backward pass."""
    model.zero_grad(set_to_none=True)
    start = time.perf_counter()
    way().logsumexp(dim=1).sum().backward()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="cells of each patient")
    parser.add_argument("--encoder", default="test_vit", help="a timm model (default test_vit)")
    parser.add_argument("--image-size", type=int, default=64, help="pixels (default 64)")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each way (default 5)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = LymphMILConfig(encoder=options.encoder, image_size=options.image_size, fusion="none", dropout=0.0)
    model = LymphMILForBagClassification(config).eval()  # evaluation keeps batch norm from mixing cells with padding
    runs = ways(model, options.sizes, options.image_size)
    expected = runs["packed"]()
    for way in runs.values():
        torch.testing.assert_close(way(), expected, atol=1e-5, rtol=1e-4)

    for way in runs.values():  # warms up
        seconds(model, way)
    rounds = [{name: seconds(model, way) for name, way in runs.items()} for _ in range(options.rounds)]
    cells, positions = sum(options.sizes), len(options.sizes) * max(options.sizes)
    print(f"{len(options.sizes)} patients, {min(options.sizes)} to {max(options.sizes)} cells; {options.encoder}\n")
    print("| way | cells through the encoder | ms | padded / way: time | padded / way: cells |")
    print("|---|---|---|---|---|")
    for name in runs:
        encoded = positions if name == "padded" else cells
        median = 1000 * statistics.median(times[name] for times in rounds)
        faster = statistics.median(times["padded"] / times[name] for times in rounds)
        print(f"| {name} | {encoded} | {median:.0f} | {faster:.2f} | {positions / encoded:.2f} |")


if __name__ == "__main__":
    main()
