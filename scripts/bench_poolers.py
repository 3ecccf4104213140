"""Poolings beside torchmil's classes of the same sizes: time and memory of a training step, as ratios.

Both libraries run in turns in one process, on the same bags and with the same widths; a ratio above 1 means that
ours is faster or smaller: of times, the median over rounds of the ratio within a round, so that a busy moment of
the machine falls on both. Memory is what a forward pass keeps for the backward pass. Needs
`pip install '.[bench]'`; without torchmil only our own figures are printed.

What differs: torchmil has one logit and binary cross-entropy, ours two logits and cross-entropy. Its mean and maximum
are layers, to which the classifier of its models is added; they give no weights of the cells, and a NaN in the padding
spoils its mean: ours gives weights, selects the cells and checks the bags, which small bags feel. Its CLAM has the
smooth SVM and out-of-class losses, and so has ours here. Its DSMIL attends to one critical cell, ours to one for each
of two labels; its values pass a ReLU, ours are linear, which lets us project after summing (with `nonlinear_v=False`
torchmil projects no values at all, which is another model). Its DTFD has plain attention; it gets the gated class of
torchmil here, as the paper and ours have. Its TransMIL convolves the cells on a grid (PPEG), has no MLP and takes no
mask; ours has an MLP and no PPEG. The MLP of its self-attention is made as wide as ours (twice the width, not four
times). With 8 bags, of 16 to 64 cells, ours computes its cell-wise layers for real cells only, torchmil for all.

    python scripts/bench_poolers.py
    python scripts/bench_poolers.py --rounds 20 --threads 1
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from lymph_hf.pooling import POOLERS, build_pooler

try:
    import torchmil.models as torchmil
    from torchmil.nn import AttentionPool, MaxPool, MeanPool
except ImportError:
    torchmil = None

WIDTH = 384
SETTINGS = {"8 x 64": (8, 64), "1 x 10,000": (1, 10_000)}
Step = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def embed(width: int) -> nn.Module:
    """The projection that our pooling holds and torchmil takes as feature extractor."""
    return nn.Sequential(nn.Linear(WIDTH, width), nn.ReLU())


def gated_dtfd() -> nn.Module:
    """torchmil's DTFD with the gated attention of the paper in both tiers."""
    model = torchmil.DTFDMIL((WIDTH,), att_dim=128, n_groups=8, distill_mode="afs", feat_ext=embed(256))
    model.attention_pool = AttentionPool(256, 128, gated=True)
    model.u_attention_pool = AttentionPool(256, 128, gated=True)
    return model


def self_attention() -> nn.Module:
    """torchmil's transformer with an MLP of our width in its block."""
    model = torchmil.TransformerABMIL((WIDTH,), transf_att_dim=512, transf_n_heads=8, pool_gated=True)
    (layer,) = model.transformer_encoder.layers
    layer.mlp_module = nn.Sequential(nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, 512))
    return model


class SimplePool(nn.Module):
    """torchmil's mean or max pooling with the linear classifier and the loss of its models."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.pool = pool
        self.classifier = nn.Linear(WIDTH, 1)

    def compute_loss(self, labels: torch.Tensor, x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, dict]:
        logits = self.classifier(self.pool(x, mask)).squeeze(-1)
        return logits, {"loss": F.binary_cross_entropy_with_logits(logits, labels.float())}


def pairs() -> dict[str, tuple[dict, Callable[[], nn.Module] | None]]:
    """Our options, and the class of torchmil with the same sizes where there is one."""
    shape = (WIDTH,)
    found: dict[str, tuple[dict, Callable[[], nn.Module] | None]] = {name: ({}, None) for name in POOLERS}
    if torchmil is not None:
        found |= {
            "mean": ({}, lambda: SimplePool(MeanPool())),
            "max": ({}, lambda: SimplePool(MaxPool())),
            "attention": ({}, lambda: torchmil.ABMIL(shape, att_dim=128)),
            "gated_attention": ({}, lambda: torchmil.ABMIL(shape, att_dim=128, gated=True)),
            "self_attention": (
                {"width": 512, "num_heads": 8},
                self_attention,
            ),
            "clam_sb": (
                {"width": 256, "hidden_size": 128, "k": 10, "instance_loss": "smooth_svm", "out_of_class": True},
                lambda: torchmil.CLAM_SB(shape, att_dim=128, gated=True, k_sample=10, feat_ext=embed(256)),
            ),
            "dsmil": (
                {"width": 384, "hidden_size": 128},
                lambda: torchmil.DSMIL(shape, att_dim=128, nonlinear_q=True, nonlinear_v=True),
            ),
            "dtfd": (
                {"width": 256, "hidden_size": 128, "pseudo_bags": 8},
                gated_dtfd,
            ),
            "transmil": (
                {"width": 512, "num_heads": 4, "num_layers": 2},
                lambda: torchmil.TransMIL(shape, att_dim=512, n_heads=4, n_layers=2, n_landmarks=256),
            ),
        }
    return found


def our_step(name: str, options: dict) -> tuple[nn.Module, Step]:
    """Pooling, linear classifier, cross-entropy and auxiliary loss."""
    pooler = build_pooler(name, WIDTH, num_labels=2, **options)
    model = nn.ModuleList([pooler, nn.Linear(pooler.output_size, 2)])

    def step(x: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        embedding, _, auxiliary = pooler.pool(x, mask, labels)
        loss = F.cross_entropy(model[1](embedding), labels)
        return loss if auxiliary is None else loss + auxiliary

    return model, step


def their_step(model: nn.Module) -> Step:
    """torchmil's own loss; TransMIL takes no mask."""

    def step(x: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        masked = () if type(model).__name__ == "TransMIL" else (mask,)
        _, losses = model.compute_loss(labels, x, *masked)
        return sum(loss.mean() for loss in losses.values())

    return step


def seconds(model: nn.Module, step: Step, batch: tuple[torch.Tensor, ...]) -> float:
    """Time of one forward and backward pass."""
    model.zero_grad(set_to_none=True)
    start = time.perf_counter()
    step(*batch).backward()
    return time.perf_counter() - start


def kept_bytes(model: nn.Module, step: Step, batch: tuple[torch.Tensor, ...]) -> int:
    """Bytes that the forward pass keeps for the backward pass, parameters and input aside."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *batch)}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = step(*batch)
    loss.backward()
    return sum(kept.values())


def make_batch(bags: int, cells: int) -> tuple[torch.Tensor, ...]:
    """Random bags; where there are several, each has another size, so that masks matter."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.linspace(cells // 4, cells, bags).long() if bags > 1 else torch.tensor([cells])
    mask = torch.arange(cells) < sizes[:, None]
    x = torch.randn(bags, cells, WIDTH, generator=generator) * mask[..., None]
    return x, mask, torch.arange(bags) % 2


def compare(name: str, batch: tuple[torch.Tensor, ...], rounds: int) -> dict[str, float]:
    """Median times and memory of ours and, where it exists, theirs; measured in turns."""
    options, make_theirs = pairs()[name]
    torch.manual_seed(0)
    steps = {"ours": our_step(name, options)}
    if make_theirs is not None:
        theirs = make_theirs()
        steps["theirs"] = (theirs, their_step(theirs))
    times: dict[str, list[float]] = {who: [] for who in steps}
    for round_number in range(rounds + 2):
        order = list(steps.items())
        for who, (model, step) in reversed(order) if round_number % 2 else order:
            elapsed = seconds(model, step, batch)
            if round_number >= 2:  # the first rounds warm up
                times[who].append(elapsed)
    row = {who: statistics.median(values) for who, values in times.items()}
    if "theirs" in row:
        row["faster"] = statistics.median(
            theirs / ours for ours, theirs in zip(times["ours"], times["theirs"], strict=True)
        )
    return row | {f"{who} kept": kept_bytes(model, step, batch) for who, (model, step) in steps.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each (default 9)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument("--poolings", nargs="+", choices=list(POOLERS), default=list(POOLERS), metavar="NAME")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print("| bags x cells | pooling | ours, ms | torchmil / ours: time | kept by ours, MB | torchmil / ours: memory |")
    print("|---|---|---|---|---|---|")
    ratios = []
    for title, size in SETTINGS.items():
        batch = make_batch(*size)
        for name in arguments.poolings:
            row = compare(name, batch, arguments.rounds)
            faster = smaller = ""
            if "theirs" in row:
                ratios.append(row["faster"])
                faster, smaller = f"{ratios[-1]:.2f}", f"{row['theirs kept'] / row['ours kept']:.2f}"
            kept = row["ours kept"] / 2**20
            print(f"| {title} | {name} | {1000 * row['ours']:.1f} | {faster} | {kept:.1f} | {smaller} |", flush=True)
    if ratios:
        print(f"\nmedian ratio of times {statistics.median(ratios):.2f}, smallest {min(ratios):.2f}")


if __name__ == "__main__":
    main()
