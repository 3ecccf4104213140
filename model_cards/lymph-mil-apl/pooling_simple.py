"""Poolings without a network between cells: mean, maximum, sum, log-sum-exp, top-k, instance logits."""

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
    fill_padding,
    masked_softmax,
    uniform_weights,
    weighted_sum,
)


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """`(B, N, D)` -> `(B, D)`; half-precision cells are added up in float32, where 10,000 of them fit."""
    return fill_padding(x, mask).sum(dim=1, dtype=torch.promote_types(x.dtype, torch.float32))


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """`(B, N, D)` -> `(B, D)`, the mean over real cells."""
    return masked_sum(x, mask) / mask.sum(dim=1, keepdim=True)


def masked_max(x: Tensor, mask: Tensor) -> Tensor:
    """`(B, N, D)` -> `(B, D)`, the maximum over real cells."""
    return fill_padding(x, mask, -torch.inf).amax(dim=1)


def masked_log_mean_exp(x: Tensor, mask: Tensor, sharpness: float = 1.0) -> Tensor:
    """`1/r log(1/n sum_i exp(r x_i))` over real cells, `(B, N, D)` -> `(B, D)`."""
    x = fill_padding(at_least_float32(x) * sharpness, mask, -torch.inf)
    return (x.logsumexp(dim=1) - mask.sum(dim=1, keepdim=True).log()) / sharpness


AGGREGATIONS = {"mean": masked_mean, "sum": masked_sum, "max": masked_max, "log_sum_exp": masked_log_mean_exp}


class MeanPooler(Pooler):
    """Mean over a bag's real cells: `z = 1/n sum_i x_i`, `(B, N, D)` -> `(B, D)`.

    Weights: 1 / n on each real cell (attention).
    """

    def _pool(self, x: Tensor, mask: Tensor, labels: Tensor | None) -> Pooled:
        return masked_mean(x, mask).to(x.dtype), uniform_weights(mask, x.dtype), None


class SumPooler(Pooler):
    """Sum over a bag's real cells: `z = sum_i x_i`, `(B, N, D)` -> `(B, D)`.

    The embedding grows with the number of cells, which is a shortcut wherever that number depends on how the
    smear was read rather than on the patient.

    Weights: 1 on each real cell (no attention: they sum to n).
    """

    is_attention = False

    def _pool(self, x: Tensor, mask: Tensor, labels: Tensor | None) -> Pooled:
        weights = mask.to(torch.promote_types(x.dtype, torch.float32))
        return masked_sum(x, mask).to(x.dtype), weights, None


class MaxPooler(Pooler):
    """Maximum of each feature over a bag's real cells: `z_d = max_i x_id`, `(B, N, D)` -> `(B, D)`.

    Weights: the share of features that a cell wins, ties shared equally (attention; no gradient).
    """

    def _pool(self, x: Tensor, mask: Tensor, labels: Tensor | None) -> Pooled:
        filled = fill_padding(x, mask, -torch.inf)
        embedding = filled.amax(dim=1)
        return embedding, self._shares(filled.detach(), embedding.detach()), None

    def _shares(self, filled: Tensor, embedding: Tensor) -> Tensor:
        dtype = torch.promote_types(filled.dtype, torch.float32)
        # 0 and 1 in the dtype of the cells: booleans are slow to add up and to convert.
        wins = torch.eq(filled, embedding.unsqueeze(1), out=torch.empty_like(filled))  # (B, N, D)
        per_win = 1 / (wins.sum(dim=1, dtype=dtype) * self.input_size)
        with torch.autocast(filled.device.type, enabled=False):
            return weighted_sum(per_win, wins.to(dtype).mT)


class LogSumExpPooler(Pooler):
    """Log-mean-exp of each feature, a smooth step from mean to maximum; `(B, N, D)` -> `(B, D)`.

    Pinheiro, Collobert, "From Image-level to Pixel-level Labeling with Convolutional Networks", CVPR 2015,
    arXiv 1411.6228: `z_d = 1/r log(1/n sum_i exp(r x_id))`.

    Args:
        input_size: D.
        num_labels: ignored.
        sharpness: r > 0; default 1. Towards 0 it is the mean, towards infinity the maximum.

    Weights: `dz/dx`, i.e. `softmax_i(r x_id)` averaged over features (attention).
    """

    def __init__(self, input_size: int, *, num_labels: int = 2, sharpness: float = 1.0) -> None:
        super().__init__(input_size, num_labels=num_labels)
        if not sharpness > 0:
            raise ValueError(f"sharpness must be positive, got {sharpness}")
        self.sharpness = sharpness

    def _pool(self, x: Tensor, mask: Tensor, labels: Tensor | None) -> Pooled:
        embedding = masked_log_mean_exp(x, mask, self.sharpness)
        weights = masked_softmax(x * self.sharpness, mask.unsqueeze(-1), dim=1).mean(dim=-1)
        return embedding.to(x.dtype), weights, None


class TopKPooler(Pooler):
    """Gated attention restricted to the k highest-scored cells; `(B, N, D)` -> `(B, D)`.

    `s_i` as in gated ABMIL (arXiv 1802.04712), `a = softmax over the k largest s_i`, `z = sum_i a_i x_i`. The
    softmax, where others take the plain mean of the k cells, is what lets the scores learn.

    Args:
        input_size: D.
        num_labels: ignored.
        k: cells kept, >= 2 (one cell alone has weight 1 whatever its score, so nothing would be learnt);
            default 8. A bag with fewer cells keeps them all; cells tied with the k-th are kept too.
        hidden_size: hidden layer of the scores, >= 1; default 128.

    Weights: `a` (attention; 0 on the cells left out).
    """

    def __init__(self, input_size: int, *, num_labels: int = 2, k: int = 8, hidden_size: int = 128) -> None:
        super().__init__(input_size, num_labels=num_labels)
        check_at_least("k", k, 2)
        self.k = k
        self.scores = AttentionScores(input_size, hidden_size)

    def _pool(self, x: Tensor, mask: Tensor, labels: Tensor | None) -> Pooled:
        cells = RealCells(mask)
        packed = cells.pack(x)
        scores = cells.pad(self.scores(packed)).squeeze(-1).masked_fill(~mask, -torch.inf)  # (B, N)
        kth = scores.detach().topk(min(self.k, scores.shape[1]), dim=1).values[:, -1:]  # -inf in smaller bags
        weights = masked_softmax(scores, mask & (scores >= kth))
        return cells.weighted_sum(weights, packed), weights, None


class InstanceLogitsPooler(Pooler):
    """Every cell is classified, and the logits are aggregated; `(B, N, D)` -> `(B, num_labels)`.

    The "instance-space" paradigm (Amores, Artificial Intelligence 201, 2013, doi
    10.1016/j.artint.2013.06.003): `l_i = W x_i + b`, `z = aggregate_i l_i`.

    Args:
        input_size: D.
        num_labels: width of the logits.
        aggregation: "mean" (default), "sum", "max" or "log_sum_exp" (see the poolings of these names).
        auxiliary_weight: weight >= 0 of the cross-entropy of `z` with the label, default 1. It ties the order
            of the logits to the labels, whatever classifier follows, and so gives the weights their meaning.

    Weights: the probability, in (0, 1), that a cell by itself gives to the label that `z` favours: evidence
    *for* the bag's answer, whichever it is (no attention).
    """

    is_attention = False

    def __init__(
        self,
        input_size: int,
        *,
        num_labels: int = 2,
        aggregation: str = "mean",
        auxiliary_weight: float = 1.0,
    ) -> None:
        super().__init__(input_size, num_labels=num_labels)
        check_choice("aggregation", aggregation, sorted(AGGREGATIONS))
        check_at_least("auxiliary_weight", auxiliary_weight, 0)
        self.aggregate = AGGREGATIONS[aggregation]
        self.auxiliary_weight = auxiliary_weight
        self.classifier = nn.Linear(input_size, num_labels)
        self.output_size = num_labels

    def _pool(self, x: Tensor, mask: Tensor, labels: Tensor | None) -> Pooled:
        cells = RealCells(mask)
        logits = cells.pad(self.classifier(cells.pack(x)))  # (B, N, C)
        bag_logits = self.aggregate(logits, mask).to(logits.dtype)  # (B, C)
        favoured = bag_logits.argmax(dim=-1)[:, None, None].expand(-1, logits.shape[1], 1)
        weights = at_least_float32(logits).softmax(dim=-1).gather(2, favoured).squeeze(-1).masked_fill(~mask, 0)
        if labels is None or self.auxiliary_weight == 0:
            return bag_logits, weights, None
        return (
            bag_logits,
            weights,
            self.auxiliary_weight * F.cross_entropy(at_least_float32(bag_logits), labels),
        )
