"""DTFD-MIL: attention within pseudo-bags, then among them."""

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
    check_fraction,
    masked_softmax,
    mean_over_bags,
    weighted_sum,
)


class DTFDPooler(Pooler):
    """Double-tier feature distillation with aggregated features (AFS); `(B, N, D)` -> `(B, W)`.

    Zhang et al., "DTFD-MIL: Double-Tier Feature Distillation Multiple Instance Learning for Histopathology
    Whole Slide Image Classification", CVPR 2022, arXiv 2203.12081. `h_i = relu(E x_i)`; the cells of a bag
    are dealt into M pseudo-bags; tier 1: gated attention within each, `f_m = sum_{i in m} a_mi h_i`; tier 2:
    gated attention among them, `z = sum_m b_m f_m`. Auxiliary loss: cross-entropy of a tier-1 classifier,
    every pseudo-bag bearing its bag's label, averaged over the pseudo-bags of a bag.

    In training the deal is random (torch's global generator). In evaluation it must be deterministic and must
    not depend on the order of cells: cells are ranked by their tier-1 score and dealt in turn, so that every
    pseudo-bag holds its share of high and low ones. A bag of fewer than M cells has one pseudo-bag per cell.
    Scores tied exactly, which bfloat16 makes likely, are dealt in the order of cells.

    Args:
        input_size: D.
        num_labels: width of the tier-1 classifier.
        width: W, >= 1; default 256 (512 in the paper).
        hidden_size: hidden layers of both attentions, >= 1; default 128.
        pseudo_bags: M, >= 1; default 4 (4 or 5 in the paper).
        dropout: rate on h, in [0, 1); default 0.
        auxiliary_weight: weight >= 0 of the tier-1 loss; default 1 as in the paper.

    Weights: `b_m a_mi` (attention).
    """

    def __init__(
        self,
        input_size: int,
        *,
        num_labels: int = 2,
        width: int = 256,
        hidden_size: int = 128,
        pseudo_bags: int = 4,
        dropout: float = 0.0,
        auxiliary_weight: float = 1.0,
    ) -> None:
        super().__init__(input_size, num_labels=num_labels)
        check_at_least("width", width, 1)
        check_at_least("pseudo_bags", pseudo_bags, 1)
        check_fraction("dropout", dropout)
        check_at_least("auxiliary_weight", auxiliary_weight, 0)
        self.pseudo_bags = pseudo_bags
        self.auxiliary_weight = auxiliary_weight
        self.embed = nn.Sequential(nn.Linear(input_size, width), nn.ReLU(inplace=True), nn.Dropout(dropout))
        self.scores = AttentionScores(width, hidden_size)
        self.classifier = nn.Linear(width, num_labels)
        self.bag_scores = AttentionScores(width, hidden_size)
        self.output_size = width

    def _pool(self, x: Tensor, mask: Tensor, labels: Tensor | None) -> Pooled:
        cells = RealCells(mask)
        hidden = self.embed(cells.pack(x))
        scores = cells.pad(self.scores(hidden)).squeeze(-1)  # (B, N)
        member = deal(torch.rand_like(at_least_float32(scores)) if self.training else scores, mask, self.pseudo_bags)
        present = member.any(dim=-1)  # (B, M)
        # An absent pseudo-bag would be a softmax over nothing; it reads the whole bag and is dropped below.
        within = masked_softmax(scores.unsqueeze(1), member | (mask.unsqueeze(1) & ~present.unsqueeze(-1)))  # (B, M, N)
        features = cells.weighted_sum(within, hidden)  # (B, M, W)
        among = masked_softmax(self.bag_scores(features).squeeze(-1), present)  # (B, M)
        weights = (among.unsqueeze(-1) * within).sum(dim=1)  # (B, N)
        loss = None
        if labels is not None and self.auxiliary_weight > 0:
            loss = self.auxiliary_weight * self._tier_one_loss(features, present, labels)
        return weighted_sum(among, features), weights, loss

    def _tier_one_loss(self, features: Tensor, present: Tensor, labels: Tensor) -> Tensor:
        logits = at_least_float32(self.classifier(features))  # (B, M, C)
        targets = labels.unsqueeze(1).expand(-1, self.pseudo_bags)
        return mean_over_bags(F.cross_entropy(logits.transpose(1, 2), targets, reduction="none"), present)


def deal(ranking: Tensor, mask: Tensor, hands: int) -> Tensor:
    """Deal real cells in the order of `ranking (B, N)` to pseudo-bags in turn: members `(B, hands, N)`."""
    order = ranking.detach().masked_fill(~mask, torch.inf).argsort(dim=1)
    turns = torch.arange(order.shape[1], device=order.device) % hands
    hand = torch.empty_like(order).scatter_(1, order, turns.expand_as(order))
    return (hand.unsqueeze(1) == torch.arange(hands, device=hand.device)[:, None]) & mask.unsqueeze(1)
