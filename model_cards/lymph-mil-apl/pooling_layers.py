"""Multi-head attention among the cells of a bag, exact and by Nystrom landmarks."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .pooling_base import (
    RealCells,
    at_least_float32,
    check_at_least,
    check_fraction,
    is_unpadded,
    masked_softmax,
    weighted_sum,
)


class MultiHeadAttention(nn.Module):
    """Scaled dot-product attention of queries `(B, Q, W)` over a context `(B, N, W)` -> `(B, Q, W)`.

    Keys and values have no bias: a softmax ignores the key's, and the value's is one with the output's, so
    neither could be learnt.

    Args:
        size: W, divisible by `num_heads`.
        num_heads: >= 1.

    Raises:
        ValueError: W is not a multiple of `num_heads`.
    """

    def __init__(self, size: int, num_heads: int) -> None:
        super().__init__()
        check_at_least("num_heads", num_heads, 1)
        if size % num_heads:
            raise ValueError(f"width {size} is not divisible by num_heads {num_heads}: change one of them")
        self.num_heads = num_heads
        self.query = nn.Linear(size, size)
        self.key_value = nn.Linear(size, 2 * size, bias=False)
        self.out = nn.Linear(size, size)

    def project(self, query: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `(B, heads, Q, d)`, keys and values `(B, heads, N, d)`."""
        q = self.query(query).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.key_value(context).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def merge(self, heads: Tensor) -> Tensor:
        """`(B, heads, Q, d)` -> `(B, Q, W)`."""
        return self.out(heads.transpose(1, 2).flatten(-2))

    def forward(self, query: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """Exact attention; `mask (B, N)` over the context, None = all real. Memory is linear in N."""
        q, k, v = self.project(query, context)
        return self.merge(F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask(mask)))

    def among(self, packed: Tensor, cells: RealCells) -> Tensor:
        """Exact attention of the cells of a bag to each other, as they come from and go to `cells.pack`.

        Bags of different size are taken one by one: without padding and mask, each at the cost of its own cells.
        """
        if cells.index is None:
            padded = cells.pad(packed)
            return self(padded, padded, cells.mask).flatten(0, 1)
        query, key_value = self.query(packed), self.key_value(packed)  # (n, W), (n, 2 W)
        bags = zip(query.split(cells.counts), key_value.split(cells.counts), strict=True)
        return self.out(torch.cat([self._within_bag(*bag) for bag in bags]))

    def _within_bag(self, query: Tensor, key_value: Tensor) -> Tensor:
        """Of one bag: `(n, W)`, `(n, 2 W)` -> `(n, W)`."""
        q = query.unflatten(-1, (1, self.num_heads, -1)).permute(1, 2, 0, 3)  # (1, heads, n, d)
        k, v = key_value.unflatten(-1, (2, self.num_heads, -1)).permute(1, 2, 0, 3).split(1)
        return F.scaled_dot_product_attention(q, k, v).squeeze(0).transpose(0, 1).flatten(1)

    def read(self, query: Tensor, context: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward` for a *few* queries, with their attention, mean over heads, `(B, Q, N)`.

        `q . K c_i = K' q . c_i` and `sum_i a_i V c_i = V sum_i a_i c_i`: the projections are taken of the few
        queries and sums rather than of the N elements, which is less work while heads x Q < W.
        """
        key, value = self.key_value.weight.unflatten(0, (2, self.num_heads, -1))  # (heads, d, W) both
        q = self.query(query).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, Q, d)
        asked = (q @ key * q.shape[-1] ** -0.5).flatten(1, 2)  # (B, heads * Q, W)
        attention = masked_softmax(asked @ context.transpose(1, 2), mask.unsqueeze(1))
        read = weighted_sum(attention, context).unflatten(1, (self.num_heads, -1))  # (B, heads, Q, W)
        return self.merge(read @ value.mT), attention.unflatten(1, (self.num_heads, -1)).mean(dim=1)


class AttentionBlock(nn.Module):
    """Pre-norm transformer block: `x + MHA(LN x, LN c)`, then `x + MLP(LN x)`; `(B, Q, W)` -> `(B, Q, W)`.

    The context c is x itself (self-attention) or, with `cross`, other elements under a norm of their own.

    Args:
        size: W.
        num_heads: see `MultiHeadAttention`.
        cross: whether the context is given.
        expansion: hidden width of the MLP over W, >= 1; default 2.
        dropout: rate on both residual branches, in [0, 1); default 0.
    """

    def __init__(
        self, size: int, num_heads: int, *, cross: bool = False, expansion: int = 2, dropout: float = 0.0
    ) -> None:
        super().__init__()
        check_fraction("dropout", dropout)
        self.norm = nn.LayerNorm(size)
        self.norm_context = nn.LayerNorm(size) if cross else None
        self.attention = MultiHeadAttention(size, num_heads)
        self.norm_mlp = nn.LayerNorm(size)
        self.mlp = nn.Sequential(nn.Linear(size, expansion * size), nn.GELU(), nn.Linear(expansion * size, size))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None, context: Tensor | None = None) -> Tensor:
        """`mask (B, N)` tells the real elements of the context, None = all."""
        normed = self.norm(x)
        context = normed if self.norm_context is None else self.norm_context(context)
        return self._finish(x, self.attention(normed, context, mask))

    def among(self, packed: Tensor, cells: RealCells) -> Tensor:
        """Self-attention within each bag, of cells as they come from and go to `cells.pack`."""
        return self._finish(packed, self.attention.among(self.norm(packed), cells))

    def read(self, x: Tensor, mask: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-attention of a few queries, with its weights `(B, Q, N)` averaged over heads."""
        attended, weights = self.attention.read(self.norm(x), self.norm_context(context), mask)
        return self._finish(x, attended), weights

    def attend_by_landmarks(self, x: Tensor, mask: Tensor, landmarks: int) -> Tensor:
        """Self-attention of linear cost, see `landmark_attention`; `x[:, 0]` is a class token."""
        normed = self.norm(x)
        q, k, v = self.attention.project(normed, normed)
        return self._finish(x, self.attention.merge(landmark_attention(q, k, v, mask, landmarks)))

    def _finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.dropout(attended)
        return x + self.dropout(self.mlp(self.norm_mlp(x)))


class LearntTokens(nn.Module):
    """Learnt elements shared by all bags, `batch -> (batch, count, size)`; started small and different."""

    def __init__(self, count: int, size: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(1, count, size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.tokens, std=0.02)

    def forward(self, batch: int) -> Tensor:
        return self.tokens.expand(batch, -1, -1)


def key_mask(mask: Tensor | None) -> Tensor | None:
    """`(B, N)` -> `(B, 1, 1, N)`: hides padded *keys* from every query, and nothing else.

    A mask of padded queries x padded keys would let valid queries see the padding. None where nothing is
    padded: the kernels without a mask are faster.
    """
    return None if mask is None or is_unpadded(mask) else mask[:, None, None, :]


def landmark_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, landmarks: int) -> Tensor:
    """Nystrom approximation of attention with order-free landmarks, `(B, heads, N, d)` -> `(B, heads, N, d)`.

    Xiong et al., "Nystromformer", AAAI 2021, arXiv 2102.03902: with landmark queries and keys Q~, K~,
    `softmax(Q K~') pinv(softmax(Q~ K~')) softmax(Q~ K') V`. The paper averages *neighbouring* elements into a
    landmark; cells have no order, so here they are first ranked by the class token's attention to them, which
    keeps the result independent of the order of cells. The class token (element 0) is a landmark of its own.
    A bag with at most `landmarks` cells has each cell as a landmark and is computed exactly.
    """
    ranking = class_token_scores(q, k)
    average = F.pad(landmark_averages(ranking, mask[:, 1:], landmarks), (1, 0, 1, 0))  # (B, 1 + landmarks, N)
    average[:, 0, 0] = 1
    used = (average.sum(dim=-1) > 0)[:, None, None, :]
    average = average.unsqueeze(1).to(q.dtype)
    q_marks, k_marks, v_marks = average @ q, average @ k, average @ v  # (B, heads, 1 + landmarks, d)

    kernel = masked_softmax(q_marks @ k_marks.transpose(-1, -2) * q.shape[-1] ** -0.5, used)
    read = F.scaled_dot_product_attention(q_marks, k, v, attn_mask=key_mask(mask))
    with torch.autocast(q.device.type, enabled=False):  # an inverse in bfloat16 is no inverse
        values = (pseudo_inverse(kernel) @ read.to(kernel.dtype)).to(v.dtype)
    is_small = mask.sum(dim=1) <= landmarks + 1
    values = torch.where(is_small[:, None, None, None], v_marks, values)
    return F.scaled_dot_product_attention(q, k_marks, values, attn_mask=used)


def class_token_scores(q: Tensor, k: Tensor) -> Tensor:
    """Mean over heads of the class token's scores for the cells after it, `(B, N - 1)`, without gradient.

    In float32 at least: bfloat16 makes ties, and a tie is broken by the order of cells.
    """
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        scores = at_least_float32(q[:, :, :1]) @ at_least_float32(k[:, :, 1:]).transpose(-1, -2)
        return scores.mean(dim=1).squeeze(1)


def landmark_averages(ranking: Tensor, mask: Tensor, landmarks: int) -> Tensor:
    """Rows that average cells of neighbouring rank: `ranking (B, N)` -> `(B, landmarks, N)`.

    The n real cells of a bag are cut, in the order of `ranking`, into min(n, landmarks) runs of near-equal
    length; rows beyond that and columns of padding are 0.
    """
    counts = mask.sum(dim=1, keepdim=True)
    rank = ranking.masked_fill(~mask, torch.inf).argsort(dim=1).argsort(dim=1)
    run = rank * counts.clamp(max=landmarks) // counts.clamp(min=1)
    member = (run.unsqueeze(1) == torch.arange(landmarks, device=run.device)[:, None]) & mask.unsqueeze(1)
    return member / member.sum(dim=-1, keepdim=True).clamp(min=1)


def pseudo_inverse(matrix: Tensor, iterations: int = 6) -> Tensor:
    """Moore-Penrose inverse of softmax matrices `(..., M, M)` by products only, in at least float32.

    Third-order iteration of Razavi et al. 2014, as in arXiv 2102.03902, equation 11; 6 steps as there.
    """
    matrix = at_least_float32(matrix)
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    # Per-matrix norms: a norm taken over the batch would make a bag depend on its neighbours.
    scale = matrix.abs().sum(dim=-1).amax(dim=-1) * matrix.abs().sum(dim=-2).amax(dim=-1)
    inverse = matrix.transpose(-1, -2) / scale[..., None, None]
    for _ in range(iterations):
        product = matrix @ inverse
        inverse = 0.25 * inverse @ (13 * identity - product @ (15 * identity - product @ (7 * identity - product)))
    return inverse
