"""Attention-based MIL pooling (ABMIL), plain and gated."""

from torch import Tensor, nn

from .pooling_base import Pooled, Pooler, RealCells, check_at_least, check_fraction, masked_softmax


class AttentionScores(nn.Module):
    """Unnormalised attention `(..., D)` -> `(..., branches)`, gated or not.

    Plain: `s_i = w tanh(V x_i)`; gated: `s_i = w (tanh(V x_i) * sigmoid(U x_i))`. V and U are one matrix
    product. See `AttentionPooler` for the source.

    Args:
        input_size: D.
        hidden_size: rows of V (and U), >= 1.
        branches: number of independent score vectors w.
        gated: with U or without.
        dropout: rate on the hidden layer, in [0, 1).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int = 128,
        *,
        branches: int = 1,
        gated: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_at_least("hidden_size", hidden_size, 1)
        check_fraction("dropout", dropout)
        self.gated = gated
        self.hidden = nn.Linear(input_size, 2 * hidden_size if gated else hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.score = nn.Linear(hidden_size, branches, bias=False)  # a softmax would ignore a bias

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.hidden(x)
        if self.gated:
            value, gate = hidden.chunk(2, dim=-1)
            hidden = value.tanh() * gate.sigmoid()
        else:
            hidden = hidden.tanh()
        return self.score(self.dropout(hidden))


class AttentionPooler(Pooler):
    """ABMIL: a learnt convex combination of the cells.

    Ilse, Tomczak, Welling, "Attention-based Deep Multiple Instance Learning", ICML 2018, arXiv 1802.04712:
    `a = softmax_i(w tanh(V x_i))`, `z = sum_i a_i x_i`; `(B, N, D)` -> `(B, D)`.

    Args:
        input_size: D.
        num_labels: ignored.
        hidden_size: rows of V, >= 1; default 128 as in the paper.
        dropout: rate on the hidden layer, in [0, 1); default 0.

    Weights: `a` (attention).
    """

    gated = False

    def __init__(self, input_size: int, *, num_labels: int = 2, hidden_size: int = 128, dropout: float = 0.0) -> None:
        super().__init__(input_size, num_labels=num_labels)
        self.scores = AttentionScores(input_size, hidden_size, gated=self.gated, dropout=dropout)

    def _pool(self, x: Tensor, mask: Tensor, labels: Tensor | None) -> Pooled:
        cells = RealCells(mask)
        packed = cells.pack(x)
        weights = masked_softmax(cells.pad(self.scores(packed)).squeeze(-1), mask)
        return cells.weighted_sum(weights, packed), weights, None


class GatedAttentionPooler(AttentionPooler):
    """Gated ABMIL: the tanh layer is near-linear around 0, a sigmoid gate adds the missing non-linearity.

    Ilse, Tomczak, Welling, ICML 2018, arXiv 1802.04712, equation 9:
    `a = softmax_i(w (tanh(V x_i) * sigmoid(U x_i)))`, `z = sum_i a_i x_i`; `(B, N, D)` -> `(B, D)`.
    Options and weights as in `AttentionPooler`.
    """

    gated = True
