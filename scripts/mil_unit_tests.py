"""Algorithmic unit tests for the poolings: does a method learn the rule of the bags, or a shortcut beside it?

Three tests follow Raff & Holt, "Reproducibility in Multiple Instance Learning: A Case For Algorithmic Unit
Tests", NeurIPS 2023, arXiv 2310.17867. Each trains on bags in which a shortcut agrees with the label, and is
judged on bags in which the same rule holds and the shortcut is reversed:

- single_concept: positive = at least one concept cell. Shortcut: a "poison" cell in every negative bag; later
  in every positive bag. A method that reads poison as evidence *against* breaks the standard MIL assumption.
- multi_concept: positive = both concepts; negative bags hold one of them. Shortcut: poison, as above.
- false_frequency: positive = both concepts, one cell each; negative = one concept, one cell; later some forty
  cells of it. Shortcut: counting concept cells.

A fourth test is ours, and asks for the opposite ability, which blood smears need:

- share: positive = most cells are of the concept, negative = few are, and presence says nothing. Later
  the bags are larger. Shortcut: the number of concept cells in place of their share.

The cells are Gaussian; an instance network of two layers comes before each pooling. `two-score maximum`, the
bag's least of two maxima of instance scores, is no pooling of the package: it shows what a model that can
only collect evidence *for* a label does here.

    python scripts/mil_unit_tests.py --poolings gated_attention transmil
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F

from lymph_hf.pooling import POOLERS, build_pooler

CELL_SIZE = 16
BACKGROUND, CONCEPT_A, CONCEPT_B, POISON, PADDING = 0, 1, 2, 3, 4
REFERENCE = "two-score maximum"
LEARNT = 0.9  # area under the ROC curve from which a rule counts as learnt

# Mean and standard deviation of each feature, by kind of cell (padding is never looked at).
EXACT = torch.tensor([[0.0, 0.0], [2.0, 0.0], [3.0, 0.0], [-10.0, 0.1], [0.0, 0.0]])
FAINT = torch.tensor([[0.0, 1.0], [0.0, 3.0], [1.0, 1.0], [-10.0, 0.1], [0.0, 0.0]])
CLEAR = torch.tensor([[0.0, 1.0], [2.0, 0.1], [3.0, 0.1], [-10.0, 0.1], [0.0, 0.0]])


@dataclass(frozen=True)
class Bags:
    """Cells `x (B, N, CELL_SIZE)`, `mask (B, N)`, `labels (B,)` in {0, 1}, each cell's kind `(B, N)`."""

    x: Tensor
    mask: Tensor
    labels: Tensor
    kinds: Tensor

    def take(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cells, mask and labels of some bags."""
        return self.x[index], self.mask[index], self.labels[index]


def bags_of(counts: Tensor, labels: Tensor, kinds: Tensor, generator: torch.Generator) -> Bags:
    """Bags with `counts (B, 4)` cells of each kind, drawn from the table `kinds` of means and deviations."""
    ends = counts.cumsum(dim=1)  # (B, 4)
    position = torch.arange(int(ends[:, -1].max()))
    kind = (position[None, :, None] >= ends[:, None, :]).sum(dim=-1)  # (B, N)
    mean, deviation = kinds[kind].unbind(-1)
    noise = torch.randn(*kind.shape, CELL_SIZE, generator=generator)
    return Bags(mean.unsqueeze(-1) + deviation.unsqueeze(-1) * noise, kind != PADDING, labels, kind)


def integers(low: int, high: int, size: int, generator: torch.Generator) -> Tensor:
    """`size` integers from `low` to `high`, both included."""
    return torch.randint(low, high + 1, (size,), generator=generator)


def balanced_labels(bags: int) -> Tensor:
    """0, 1, 0, 1 ..."""
    return torch.arange(bags) % 2


def single_concept(bags: int, shifted: bool, generator: torch.Generator) -> Bags:
    """1 to 3 concept cells (of either spread) in positive bags, among 10 others; poison by `shifted`."""
    labels = balanced_labels(bags)
    concept = integers(1, 3, bags, generator) * labels
    of_a = (torch.rand(bags, generator=generator) * (concept + 1)).long()
    poison = (labels == int(shifted)).long()
    counts = torch.stack([torch.full((bags,), 10), of_a, concept - of_a, poison], dim=1)
    return bags_of(counts, labels, FAINT, generator)


def one_of_two(bags: int, generator: torch.Generator) -> Tensor:
    """`(B, 2)`: a 1 for one of the concepts, a 0 for the other."""
    return F.one_hot(integers(0, 1, bags, generator), 2)


def multi_concept(bags: int, shifted: bool, generator: torch.Generator) -> Bags:
    """1 to 3 cells of each concept in positive bags, one of one concept in negative; poison by `shifted`."""
    labels = balanced_labels(bags)
    both = integers(1, 3, bags, generator).unsqueeze(1).expand(-1, 2)
    concepts = torch.where(labels.unsqueeze(1) == 1, both, one_of_two(bags, generator))
    poison = (labels == int(shifted)).long()
    counts = torch.cat([integers(1, 9, bags, generator).unsqueeze(1), concepts, poison.unsqueeze(1)], dim=1)
    return bags_of(counts, labels, CLEAR, generator)


def false_frequency(bags: int, shifted: bool, generator: torch.Generator) -> Bags:
    """Positive: one cell of each concept; negative: one cell of one of them, or 35 to 44 if `shifted`."""
    labels = balanced_labels(bags)
    often = integers(35, 44, bags, generator) if shifted else torch.ones(bags, dtype=torch.long)
    concepts = torch.where(
        labels.unsqueeze(1) == 1,
        torch.ones(bags, 2, dtype=torch.long),
        one_of_two(bags, generator) * often[:, None],
    )
    none = torch.zeros(bags, 1, dtype=torch.long)
    counts = torch.cat([integers(1, 9, bags, generator).unsqueeze(1), concepts, none], dim=1)
    return bags_of(counts, labels, CLEAR, generator)


def share(bags: int, shifted: bool, generator: torch.Generator) -> Bags:
    """60 to 80 % concept cells in positive bags, 20 to 40 % in negative; 10 to 20 cells, 40 to 60 if
    `shifted`.

    Cells of a kind are identical, for the extremes of scattered ones tell how many there are.
    """
    labels = balanced_labels(bags)
    cells = integers(40, 60, bags, generator) if shifted else integers(10, 20, bags, generator)
    fraction = 0.2 + 0.4 * labels + 0.2 * torch.rand(bags, generator=generator)
    concept = (cells * fraction).round().long()
    none = torch.zeros_like(cells)
    return bags_of(torch.stack([cells - concept, concept, none, none], dim=1), labels, EXACT, generator)


TESTS: dict[str, Callable[[int, bool, torch.Generator], Bags]] = {
    "single_concept": single_concept,
    "multi_concept": multi_concept,
    "false_frequency": false_frequency,
    "share": share,
}


class PooledClassifier(nn.Module):
    """Instance network, pooling, classifier; returns logits `(B, 2)` and the auxiliary loss or None.

    The classifier is linear, as in the package's models, unless it has a hidden layer.
    """

    def __init__(self, pooling: str, hidden_size: int = 0, size: int = 32) -> None:
        super().__init__()
        self.instance = instance_network(size)
        narrow = {} if not takes(pooling, "width") else {"width": size}
        self.pooler = build_pooler(pooling, size, num_labels=2, **narrow)
        width = self.pooler.output_size
        hidden = [nn.Linear(width, hidden_size), nn.GELU()] if hidden_size else []
        self.classifier = nn.Sequential(*hidden, nn.Linear(hidden_size or width, 2))

    def forward(self, x: Tensor, mask: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        embedding, _, loss = self.pooler.pool(self.instance(x), mask, labels)
        return self.classifier(embedding), loss


class TwoScoreMaximum(nn.Module):
    """`min_c max_i s_c(x_i)` for two scores, the minimum smoothed: cells can only be evidence *for*."""

    def __init__(self, size: int = 32) -> None:
        super().__init__()
        self.scores = nn.Sequential(instance_network(size), nn.Linear(size, 2))

    def forward(self, x: Tensor, mask: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        scores = self.scores(x).masked_fill(~mask.unsqueeze(-1), -torch.inf).amax(dim=1)  # (B, 2)
        scores = -(-scores).logsumexp(dim=-1)
        return torch.stack([torch.zeros_like(scores), scores], dim=1), None


def instance_network(size: int) -> nn.Module:
    return nn.Sequential(nn.Linear(CELL_SIZE, size), nn.GELU(), nn.Linear(size, size), nn.GELU())


def takes(pooling: str, option: str) -> bool:
    """Whether a pooling has an option."""
    try:
        build_pooler(pooling, 8, **{option: 8})
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class Outcome:
    """Areas under the ROC curve on new bags as in training, and on bags with the shortcut reversed."""

    alike: float
    shifted: float

    @property
    def verdict(self) -> str:
        """pass: the rule was learnt; shortcut: worse than chance once it is reversed; partly; not learnt."""
        if self.alike < LEARNT:
            return "not learnt"
        if self.shifted >= LEARNT:
            return "pass"
        return "shortcut" if self.shifted < 0.5 else "partly"

    def __str__(self) -> str:
        return f"{self.verdict} ({self.alike:.2f}, {self.shifted:.2f})"


def run_test(
    name: str, pooling: str, *, hidden_size: int = 0, steps: int = 250, bags: int = 400, seed: int = 0
) -> Outcome:
    """Train one pooling on one test.

    Args:
        name: key of TESTS.
        pooling: key of POOLERS, or REFERENCE.
        hidden_size: hidden layer of the classifier; 0 = linear.
        steps: Adam steps of 50 bags.
        bags: training bags; half as many are drawn for each of the two evaluations.
        seed: of the bags, the weights and the batches.
    """
    generator = torch.Generator().manual_seed(seed)
    train = TESTS[name](bags, False, generator)
    torch.manual_seed(seed)
    if pooling == REFERENCE:  # hard maxima get stuck: the best of a few starts, judged by the training loss
        model = min(
            (fit(TwoScoreMaximum(), train, steps, generator, 1e-2) for _ in range(5)),
            key=lambda pair: pair[1],
        )[0]
    else:
        model, _ = fit(PooledClassifier(pooling, hidden_size), train, steps, generator)
    model.eval()
    return Outcome(*(area_under_curve(model, TESTS[name](bags // 2, shifted, generator)) for shifted in (False, True)))


def fit(
    model: nn.Module, train: Bags, steps: int, generator: torch.Generator, rate: float = 3e-3
) -> tuple[nn.Module, float]:
    """Cross-entropy and auxiliary loss, Adam with a one-cycle learning rate; the model and its final loss."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps)
    for _ in range(steps):
        x, mask, labels = train.take(torch.randint(len(train.labels), (50,), generator=generator))
        logits, auxiliary = model(x, mask, labels)
        loss = F.cross_entropy(logits, labels) + (0 if auxiliary is None else auxiliary)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return model, float(F.cross_entropy(model(train.x, train.mask)[0], train.labels))


@torch.no_grad()
def area_under_curve(model: nn.Module, bags: Bags) -> float:
    logits, _ = model(bags.x, bags.mask)
    return float(roc_auc_score(bags.labels.numpy(), (logits[:, 1] - logits[:, 0]).numpy()))


def table(poolings: Sequence[str], **settings: int) -> str:
    """A markdown table of the outcomes, row per pooling, column per test; settings as in `run_test`."""
    lines = ["| pooling | " + " | ".join(TESTS) + " |", "|---" * (len(TESTS) + 1) + "|"]
    for pooling in poolings:
        outcomes = [str(run_test(name, pooling, **settings)) for name in TESTS]
        lines.append(f"| {pooling} | " + " | ".join(outcomes) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--poolings", nargs="+", choices=[*POOLERS, REFERENCE], default=[*POOLERS, REFERENCE], metavar="NAME",
        help="poolings to test (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--hidden-size", type=int, default=0, help="hidden layer of the classifier (default: 0, linear)"
    )
    parser.add_argument("--steps", type=int, default=250, help="training steps of 50 bags (default: 250)")
    parser.add_argument("--bags", type=int, default=400, help="training bags (default: 400)")
    parser.add_argument("--seed", type=int, default=0, help="seed of bags, weights and batches (default: 0)")
    settings = vars(parser.parse_args())
    print(table(settings.pop("poolings"), **settings))
    print("\nEach field: verdict (area under the ROC curve on bags as in training, with the shortcut reversed).")


if __name__ == "__main__":
    main()
