"""DSMIL: attention around the most critical cell of each label."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .pooling_base import (
    Pooled,
    Pooler,
    RealCells,
    at_least_float32,
    check_at_least,
    check_fraction,
    fill_padding,
    masked_softmax,
)


class DSMILPooler(Pooler):
    """Dual-stream MIL; `(B, N, D)` -> `(B, num_labels * W)`, one embedding per label side by side.

    Li, Li, Eliceiri, "Dual-stream Multiple Instance Learning Network for Whole Slide Image Classification
    with Self-supervised Contrastive Learning", CVPR 2021, arXiv 2011.08939. Stream 1: instance logits `l_i =
    C x_i` and, for each label c, the critical cell `m = argmax_i l_ic` among the real cells. Stream 2:
    queries `q_i = Q(x_i)`, values `v_i = V x_i`, `a_c = softmax_i(q_i . q_m / sqrt(d))`, `z_c = sum_i a_ci
    v_i`. Auxiliary loss: cross-entropy of `max_i l_i`, the only way by which C learns.

    Args:
        input_size: D.
        num_labels: C.
        width: W, >= 1; default 256.
        hidden_size: d, >= 1; default 128 as in the paper.
        dropout: rate on the values' input, in [0, 1); default 0.
        auxiliary_weight: weight >= 0 of the auxiliary loss; default 1 (the paper averages both streams).

    Weights: mean over labels of `a_c` (attention): likeness to the critical cells.
    """

    def __init__(
        self,
        input_size: int,
        *,
        num_labels: int = 2,
        width: int = 256,
        hidden_size: int = 128,
        dropout: float = 0.0,
        auxiliary_weight: float = 1.0,
    ) -> None:
        super().__init__(input_size, num_labels=num_labels)
        check_at_least("width", width, 1)
        check_at_least("hidden_size", hidden_size, 1)
        check_fraction("dropout", dropout)
        check_at_least("auxiliary_weight", auxiliary_weight, 0)
        self.auxiliary_weight = auxiliary_weight
        self.classifier = nn.Linear(input_size, num_labels)
        self.query = nn.Sequential(
            nn.Linear(input_size, hidden_size), nn.ReLU(inplace=True), nn.Linear(hidden_size, hidden_size), nn.Tanh()
        )
        self.dropout = nn.Dropout(dropout)
        self.value = nn.Linear(input_size, width)
        self.output_size = num_labels * width

    def _pool(self, x: Tensor, mask: Tensor, labels: Tensor | None) -> Pooled:
        cells = RealCells(mask)
        packed = cells.pack(x)
        logits = cells.pad(self.classifier(packed))  # (B, N, C)
        highest, critical = fill_padding(logits, mask, -torch.inf).max(dim=1)  # (B, C) both
        queries = self.query(packed)  # (n, d)
        # Cells on the left: the gradients of both uses of the queries then lie alike in memory and add up fast.
        scores = (cells.pad(queries) @ cells.take(queries, critical).mT).mT * queries.shape[-1] ** -0.5  # (B, C, N)
        attention = masked_softmax(scores, mask.unsqueeze(1))
        # V is affine and a label's weights sum to 1: sum_i a_ci V x_i = V sum_i a_ci x_i, of C rows, not N.
        embedding = self.value(cells.weighted_sum(attention, self.dropout(packed))).flatten(1)
        loss = None
        if labels is not None and self.auxiliary_weight > 0:
            loss = self.auxiliary_weight * F.cross_entropy(at_least_float32(highest), labels)
        return embedding, attention.mean(dim=1), loss
