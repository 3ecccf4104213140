"""CLAM: attention pooling whose most and least attended cells also learn to be told apart."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .pooling_attention import AttentionScores
from .pooling_base import (
    Pooled,
    Pooler,
    RealCells,
    at_least_float32,
    check_at_least,
    check_choice,
    check_fraction,
    masked_softmax,
    mean_over_bags,
)


class ClamSinglePooler(Pooler):
    """CLAM with a single attention branch; `(B, N, D)` -> `(B, W)`.

    Lu et al., "Data-efficient and weakly supervised computational pathology on whole-slide images", Nature
    Biomedical Engineering 5, 2021, doi 10.1038/s41551-020-00682-w, arXiv 2004.09666: `h_i = relu(E x_i)`,
    `a = softmax_i(gated attention of h_i)`, `z = sum_i a_i h_i`. Auxiliary loss, given the label c of a bag:
    the k most attended cells are pseudo-positives and the k least attended pseudo-negatives of a two-way
    classifier that belongs to c.

    Args:
        input_size: D.
        num_labels: number of instance classifiers.
        width: W, >= 1; default 256 (512 in the paper).
        hidden_size: hidden layer of the attention, >= 1; default 128.
        dropout: rate on h and on the attention's hidden layer, in [0, 1); default 0.
        k: cells in each of the two groups, >= 1; default 8. In a bag of n < 2k cells they shrink to the upper
            and the lower half (the middle cell is a positive), so the groups never overlap.
        instance_loss: "cross_entropy" (default) or "smooth_svm" (the paper's; Berrada, Zisserman, Kumar, ICLR
            2018, arXiv 1802.07595, for the top 1, margin and temperature 1; the two differ by that margin
            only).
        out_of_class: also teach the other labels' classifiers that the k most attended cells are none of
            theirs; for labels that exclude each other within a bag. Default False.
        auxiliary_weight: weight >= 0 of the instance loss; default 0.3 (the paper weighs 0.7 bag to 0.3
            instance).

    Weights: `a` (attention).
    """

    branch_per_label = False

    def __init__(
        self,
        input_size: int,
        *,
        num_labels: int = 2,
        width: int = 256,
        hidden_size: int = 128,
        dropout: float = 0.0,
        k: int = 8,
        instance_loss: str = "cross_entropy",
        out_of_class: bool = False,
        auxiliary_weight: float = 0.3,
    ) -> None:
        super().__init__(input_size, num_labels=num_labels)
        check_at_least("k", k, 1)
        check_choice("instance_loss", instance_loss, ("cross_entropy", "smooth_svm"))
        check_at_least("auxiliary_weight", auxiliary_weight, 0)
        check_fraction("dropout", dropout)
        branches = num_labels if self.branch_per_label else 1
        self.k = k
        self.margin = 1.0 if instance_loss == "smooth_svm" else 0.0
        self.out_of_class = out_of_class
        self.auxiliary_weight = auxiliary_weight
        self.embed = nn.Sequential(nn.Linear(input_size, width), nn.ReLU(inplace=True), nn.Dropout(dropout))
        self.scores = AttentionScores(width, hidden_size, branches=branches, dropout=dropout)
        self.instance_classifiers = nn.Linear(width, 2 * num_labels)
        self.output_size = branches * width

    def _pool(self, x: Tensor, mask: Tensor, labels: Tensor | None) -> Pooled:
        cells = RealCells(mask)
        hidden = self.embed(cells.pack(x))
        scores = cells.pad(self.scores(hidden)).transpose(1, 2)  # (B, branches, N)
        attention = masked_softmax(scores, mask.unsqueeze(1))
        embedding = cells.weighted_sum(attention, hidden).flatten(1)
        loss = None
        if labels is not None and self.auxiliary_weight > 0:
            loss = self.auxiliary_weight * self._instance_loss(hidden, scores, cells, labels)
        return embedding, attention.mean(dim=1), loss

    def _instance_loss(self, hidden: Tensor, scores: Tensor, cells: RealCells, labels: Tensor) -> Tensor:
        """Mean over bags of each bag's mean over its pseudo-labelled cells."""
        mask = cells.mask
        counts = mask.sum(dim=1, keepdim=True)  # (B, 1)
        scores = scores.detach().expand(-1, self.num_labels, -1)  # (B, C, N); the groups carry no gradient
        in_class = F.one_hot(labels, self.num_labels).bool().unsqueeze(-1)  # (B, C, 1)

        highest, is_top = extreme_cells(scores, mask, self.k, counts - counts // 2)
        lowest, is_bottom = extreme_cells(-scores, mask, self.k, counts // 2)
        target = torch.cat([in_class.expand_as(highest).long(), torch.zeros_like(lowest)], dim=-1)
        used = torch.cat([is_top & (in_class | self.out_of_class), is_bottom & in_class], dim=-1)
        loss = self._cell_loss(cells.take(hidden, torch.cat([highest, lowest], dim=-1)), target)  # (B, C, 2k)
        return mean_over_bags(loss.flatten(1), used.flatten(1))

    def _cell_loss(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Loss of classifier c on its cells `hidden (B, C, k, W)` with `target (B, C, k)` -> `(B, C, k)`."""
        logits = self.instance_classifiers(hidden).unflatten(-1, (-1, 2))  # (B, C, k, C, 2)
        own = torch.arange(self.num_labels, device=hidden.device)
        logits = at_least_float32(logits[:, own, :, own]).transpose(0, 1)  # (B, C, k, 2)
        logits = logits + self.margin * (1 - F.one_hot(target, 2))
        # Cross-entropy of logits whose wrong side is raised by the margin is the smooth SVM.
        return F.cross_entropy(logits.movedim(-1, 1), target, reduction="none")


class ClamMultiPooler(ClamSinglePooler):
    """CLAM with one attention branch per label; `(B, N, D)` -> `(B, num_labels * W)`, side by side.

    Source and options as in `ClamSinglePooler`; label c takes its pseudo-labels from its own branch.

    Weights: mean over branches (attention).
    """

    branch_per_label = True


def extreme_cells(scores: Tensor, mask: Tensor, k: int, limit: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the k highest-scored real cells and which of them count, both `(B, C, k)`.

    Args:
        scores: `(B, C, N)`.
        mask: `(B, N)`.
        k: how many; fewer in bags padded to less than k.
        limit: `(B, 1)`, the most that count in each bag.
    """
    k = min(k, scores.shape[-1])
    cells = scores.masked_fill(~mask.unsqueeze(1), -torch.inf).topk(k, dim=-1).indices
    counts = torch.arange(k, device=scores.device) < limit  # (B, k)
    return cells, counts.unsqueeze(1).expand_as(cells)
