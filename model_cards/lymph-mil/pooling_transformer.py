"""Poolings in which cells attend to each other or to learnt queries."""

from typing import Any

import torch
from torch import Tensor, nn

from .pooling_attention import AttentionScores
from .pooling_base import (
    Pooled,
    Pooler,
    RealCells,
    check_at_least,
    check_choice,
    masked_softmax,
    uniform_weights,
)
from .pooling_layers import AttentionBlock, LearntTokens


class TransformerPooler(Pooler):
    """Common to the transformer poolings: projection of the cells to a width W, and a norm at the end.

    Args:
        input_size: D.
        num_labels: ignored.
        width: W, a multiple of `num_heads`; default 256.
        num_heads: attention heads, >= 1; default 8.
        num_layers: see each class, >= 1.
        dropout: rate on the residual branches, in [0, 1); default 0.
    """

    def __init__(
        self,
        input_size: int,
        *,
        num_labels: int = 2,
        width: int = 256,
        num_heads: int = 8,
        num_layers: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(input_size, num_labels=num_labels)
        check_at_least("num_layers", num_layers, 1)
        self.width = width
        self.num_heads = num_heads
        self.dropout = dropout
        self.embed = nn.Linear(input_size, width)
        self.norm = nn.LayerNorm(width)
        self.output_size = width

    def block(self, *, cross: bool = False) -> AttentionBlock:
        """A transformer block of this pooling's width, heads and dropout."""
        return AttentionBlock(self.width, self.num_heads, cross=cross, dropout=self.dropout)


class SelfAttentionPooler(TransformerPooler):
    """Self-attention across the cells of a patient, then a weighted mean; `(B, N, D)` -> `(B, W)`.

    Vaswani et al., "Attention Is All You Need", NeurIPS 2017, arXiv 1706.03762, with the norm first (Xiong et
    al., ICML 2020, arXiv 2002.04745) and no positions: `h = blocks(E x)`, `z = sum_i a_i LN(h_i)`.

    Args:
        input_size, num_labels, width, num_heads, dropout: as in `TransformerPooler`.
        num_layers: self-attention blocks, >= 1; default 1.
        aggregation: "attention" (default; gated attention over the contextualised cells) or "mean".

    Weights: `a` (attention): over cells that have already seen each other, so a cell's weight is that of its
    position in the patient's set, not of its own content alone.
    """

    def __init__(self, input_size: int, *, num_layers: int = 1, aggregation: str = "attention", **options: Any) -> None:
        super().__init__(input_size, num_layers=num_layers, **options)
        check_choice("aggregation", aggregation, ("attention", "mean"))
        self.blocks = nn.ModuleList(self.block() for _ in range(num_layers))
        self.scores = AttentionScores(self.width) if aggregation == "attention" else None

    def _pool(self, x: Tensor, mask: Tensor, labels: Tensor | None) -> Pooled:
        cells = RealCells(mask)
        packed = self.embed(cells.pack(x))
        for block in self.blocks:
            packed = block.among(packed, cells)
        packed = self.norm(packed)
        if self.scores is None:
            weights = uniform_weights(mask, packed.dtype)
        else:
            weights = masked_softmax(cells.pad(self.scores(packed)).squeeze(-1), mask)
        return cells.weighted_sum(weights, packed), weights, None


class TransMILPooler(TransformerPooler):
    """Transformer with a class token, Nystrom attention for large bags; `(B, N, D)` -> `(B, W)`.

    Shao et al., "TransMIL: Transformer based Correlated Multiple Instance Learning for Whole Slide Image
    Classification", NeurIPS 2021, arXiv 2106.00908: `t_1 .. t_L = blocks([class; relu(E x)])`, `z =
    LN(class_L)`.

    Differences from the paper, on purpose. Its PPEG lays the cells on a square grid and convolves them, and
    its landmarks average neighbours in a list: both make the answer depend on the order of cells, which means
    nothing for single-cell images. Here there is no PPEG, and landmarks are ordered by content (see
    `landmark_attention`). In the last layer only the class token is computed, exactly, over the cells:
    nothing else of that layer is used.

    Args:
        input_size, num_labels, num_heads, dropout: as in `TransformerPooler`.
        width: W; default 256 (512 in the paper).
        num_layers: blocks, >= 1, the last being the class token's; default 2 as in the paper.
        landmarks: Nystrom landmarks, >= 1; default 256 (half the width in the paper). Bags of at most that
            many cells are computed exactly. None = always exact, with time quadratic in N.

    Weights: the class token's attention over the cells in the last layer, mean over heads (attention).
    """

    def __init__(self, input_size: int, *, num_layers: int = 2, landmarks: int | None = 256, **options: Any) -> None:
        super().__init__(input_size, num_layers=num_layers, **options)
        if landmarks is not None:
            check_at_least("landmarks", landmarks, 1)
        self.landmarks = landmarks
        self.token = LearntTokens(1, self.width)
        self.blocks = nn.ModuleList(self.block() for _ in range(num_layers - 1))
        self.reader = self.block(cross=True)

    def _pool(self, x: Tensor, mask: Tensor, labels: Tensor | None) -> Pooled:
        cells = RealCells(mask)
        embedded = cells.pad(self.embed(cells.pack(x)).relu_())
        hidden = torch.cat([self.token(x.shape[0]), embedded], dim=1)  # (B, 1 + N, W)
        hidden = self._contextualise(hidden, torch.cat([mask.new_ones(mask.shape[0], 1), mask], dim=1))
        token, weights = self.reader.read(hidden[:, :1], mask, hidden[:, 1:])
        return self.norm(token).squeeze(1), weights.squeeze(1), None

    def _contextualise(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Class token and cells `(B, 1 + N, W)` through the blocks."""
        if not self._is_exact(cells=mask.shape[1] - 1):
            for block in self.blocks:
                hidden = block.attend_by_landmarks(hidden, mask, self.landmarks)
            return hidden
        elements = RealCells(mask)
        hidden = elements.pack(hidden)
        for block in self.blocks:
            hidden = block.among(hidden, elements)
        return elements.pad(hidden)

    def _is_exact(self, cells: int) -> bool:
        """Whether exact attention serves: landmarks give the same in small bags, at more cost.

        An exported graph has one path for bags of any size, hence landmarks whenever there are any.
        """
        if self.landmarks is None or torch.compiler.is_exporting():
            return self.landmarks is None
        return cells <= self.landmarks


class SetTransformerPooler(TransformerPooler):
    """Induced self-attention, then attention from learnt seeds; `(B, N, D)` -> `(B, num_seeds * W)`.

    Lee et al., "Set Transformer", ICML 2019, arXiv 1810.00825: `ISAB(X) = MAB(X, MAB(I, X))` with M learnt
    inducing points I, which costs M N rather than N N; `PMA(Z) = MAB(S, Z)` with learnt seeds S. The blocks
    here put the norm first.

    Args:
        input_size, num_labels, width, num_heads, dropout: as in `TransformerPooler`.
        num_layers: ISABs, >= 1; default 2.
        num_inducing: M, >= 1; default 32.
        num_seeds: rows of S, >= 1; default 1.

    Weights: the seeds' attention over the cells, mean over heads and seeds (attention).
    """

    def __init__(
        self,
        input_size: int,
        *,
        num_layers: int = 2,
        num_inducing: int = 32,
        num_seeds: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(input_size, num_layers=num_layers, **options)
        check_at_least("num_inducing", num_inducing, 1)
        check_at_least("num_seeds", num_seeds, 1)
        self.inducing = nn.ModuleList(LearntTokens(num_inducing, self.width) for _ in range(num_layers))
        self.gather = nn.ModuleList(self.block(cross=True) for _ in range(num_layers))
        self.spread = nn.ModuleList(self.block(cross=True) for _ in range(num_layers))
        self.seeds = LearntTokens(num_seeds, self.width)
        self.reader = self.block(cross=True)
        self.output_size = num_seeds * self.width

    def _pool(self, x: Tensor, mask: Tensor, labels: Tensor | None) -> Pooled:
        cells = RealCells(mask)
        hidden = cells.pad(self.embed(cells.pack(x)))  # (B, N, W)
        for points, gather, spread in zip(self.inducing, self.gather, self.spread, strict=True):
            summary = gather(points(x.shape[0]), mask, hidden)  # (B, M, W)
            hidden = spread(hidden, None, summary)
        seeds, weights = self.reader.read(self.seeds(x.shape[0]), mask, hidden)
        return self.norm(seeds).flatten(1), weights.mean(dim=1), None


class PerceiverPooler(TransformerPooler):
    """Learnt latents read the cells once, then attend to each other; `(B, N, D)` -> `(B, W)`.

    Jaegle et al., "Perceiver: General Perception with Iterative Attention", ICML 2021, arXiv 2103.03206:
    `l = MAB(latents, E x)`, `l = blocks(l)`, `z = mean over latents of LN(l)`.

    Args:
        input_size, num_labels, width, num_heads, dropout: as in `TransformerPooler`.
        num_layers: self-attention blocks among the latents, >= 1; default 2.
        num_latents: >= 1; default 16.

    Weights: the latents' attention over the cells, mean over heads and latents (attention).
    """

    def __init__(self, input_size: int, *, num_layers: int = 2, num_latents: int = 16, **options: Any) -> None:
        super().__init__(input_size, num_layers=num_layers, **options)
        check_at_least("num_latents", num_latents, 1)
        self.latents = LearntTokens(num_latents, self.width)
        self.reader = self.block(cross=True)
        self.blocks = nn.ModuleList(self.block() for _ in range(num_layers))

    def _pool(self, x: Tensor, mask: Tensor, labels: Tensor | None) -> Pooled:
        cells = RealCells(mask)
        hidden = cells.pad(self.embed(cells.pack(x)))  # (B, N, W)
        latents, weights = self.reader.read(self.latents(x.shape[0]), mask, hidden)
        for block in self.blocks:
            latents = block(latents, None)
        return self.norm(latents).mean(dim=1), weights.mean(dim=1), None
