"""How the clinical values (age, sex, lymphocyte count) meet the images of a patient.

Every fusion takes the cells, the clinical vector (NaN = missing) and the pooling as a callable, because some
join the clinical values before the cells are pooled and some after.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .pooling_base import build_by_name, check_at_least, check_bags, fill_padding, is_traced, uniform_weights
from .pooling_layers import AttentionBlock

Fused = tuple[Tensor, Tensor]  # fused vector (B, output_size), weights (B, N)
Pool = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class ClinicalEmbedding(nn.Module):
    """Standardised clinical values with gaps `(B, F)` -> `(B, E)`; NaN = missing.

    `e = W where(missing, 0, x) + b + M missing`. M starts at zero: a value that was never missing in training
    is then read as the training mean (0 after standardisation) when it is missing later, and a value that was
    sometimes missing may learn what its absence says.

    Args:
        num_clinical: F, >= 1.
        size: E, >= 1.
        hidden_size: width of a hidden layer with GELU between the values and E; None (default) = linear,
            which is enough for a handful of variables and little data.
    """

    def __init__(self, num_clinical: int, size: int, hidden_size: int | None = None) -> None:
        super().__init__()
        check_at_least("num_clinical", num_clinical, 1)
        check_at_least("size", size, 1)
        first = size if hidden_size is None else hidden_size
        check_at_least("hidden_size", first, 1)
        self.value = nn.Linear(num_clinical, first)
        self.missing = nn.Parameter(torch.empty(num_clinical, first))
        self.out = nn.Identity() if hidden_size is None else nn.Sequential(nn.GELU(), nn.Linear(first, size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.missing)

    def forward(self, clinical: Tensor) -> Tensor:
        missing = clinical.isnan()
        dtype = self.value.weight.dtype
        values = clinical.masked_fill(missing, 0).to(dtype)
        return self.out(self.value(values) + missing.to(dtype) @ self.missing)


class Fuser(nn.Module):
    """Base of the fusions: checks its input, completes absent clinical values, calls `_fuse`.

    Attributes:
        output_size: width of the fused vector.
        uses_clinical: whether the clinical values can change the output.
        uses_pool: whether the pooling is called at all; where not, its parameters get no gradient.

    Args:
        input_size: width D of the cells.
        embedding_size: width E of the pooler's output.
        num_clinical: number F of clinical variables; fusions that use them need at least one.
    """

    uses_clinical: bool = True
    uses_pool: bool = True

    def __init__(self, input_size: int, embedding_size: int, num_clinical: int) -> None:
        super().__init__()
        check_at_least("input_size", input_size, 1)
        check_at_least("embedding_size", embedding_size, 1)
        if self.uses_clinical and num_clinical < 1:
            raise ValueError(
                f"{type(self).__name__} needs a clinical variable, got num_clinical={num_clinical}: "
                'name the variables, or choose fusion "none"'
            )
        self.input_size = input_size
        self.num_clinical = num_clinical
        self.output_size = embedding_size

    def forward(
        self, x: Tensor, mask: Tensor, clinical: Tensor | None, pool: Pool, *, is_attention: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Fuse a batch of bags with their clinical values.

        Args:
            x: cells `(B, N, D)`.
            mask: `(B, N)` bool, True = a real cell.
            clinical: standardised values `(B, F)`, NaN = missing; None = all missing.
            pool: cells and mask -> embedding `(B, E)` and weights `(B, N)`, e.g. a `Pooler`.
            is_attention: the pooler's attribute of that name; only "clinical_token" asks.

        Returns:
            the fused vector `(B, output_size)` and one weight per cell `(B, N)`, 0 on padding.

        Raises:
            ValueError: shapes that do not fit, an empty bag, or an infinite clinical value.
        """
        check_bags(mask)
        return self._fuse(x, mask, self._complete(x, clinical), pool, is_attention)

    def _fuse(self, x: Tensor, mask: Tensor, clinical: Tensor, pool: Pool, is_attention: bool) -> Fused:
        raise NotImplementedError

    def _complete(self, x: Tensor, clinical: Tensor | None) -> Tensor:
        expected = (x.shape[0], self.num_clinical)
        if clinical is None:
            return x.new_full(expected, torch.nan)
        if clinical.shape != expected:
            raise ValueError(
                f"clinical must have shape {expected} (bags, num_clinical), got {tuple(clinical.shape)}: "
                "give one column per variable in the order of the configuration, NaN where missing"
            )
        if not is_traced() and bool(clinical.isinf().any()):
            row, column = clinical.isinf().nonzero()[0].tolist()
            raise ValueError(f"clinical[{row}, {column}] is infinite: mark missing values as NaN")
        return clinical


class NoFusion(Fuser):
    """Images only: the clinical values are not looked at. Weights are the pooler's."""

    uses_clinical = False

    def _fuse(self, x: Tensor, mask: Tensor, clinical: Tensor, pool: Pool, is_attention: bool) -> Fused:
        return pool(x, mask)

    def _complete(self, x: Tensor, clinical: Tensor | None) -> Tensor:
        return x.new_empty(x.shape[0], 0)


class ClinicalFuser(Fuser):
    """Base of the fusions that embed the clinical values.

    Args:
        input_size, embedding_size, num_clinical: as in `Fuser`.
        clinical_size: width of the clinical embedding, >= 1; fixed by fusions in which it must fit another
            width.
        clinical_hidden_size: hidden layer of the clinical embedding, >= 1; None (default) = linear.
    """

    def __init__(
        self,
        input_size: int,
        embedding_size: int,
        num_clinical: int,
        *,
        clinical_size: int = 32,
        clinical_hidden_size: int | None = None,
    ) -> None:
        super().__init__(input_size, embedding_size, num_clinical)
        self.embed = ClinicalEmbedding(num_clinical, clinical_size, clinical_hidden_size)
        self.clinical_size = clinical_size


class ConcatFusion(ClinicalFuser):
    """Late fusion: `[z ; e(clinical)]`, `(B, E + clinical_size)`. Options as in `ClinicalFuser`.

    Weights: the pooler's.
    """

    def __init__(self, input_size: int, embedding_size: int, num_clinical: int, **options: Any) -> None:
        super().__init__(input_size, embedding_size, num_clinical, **options)
        self.output_size = embedding_size + self.clinical_size

    def _fuse(self, x: Tensor, mask: Tensor, clinical: Tensor, pool: Pool, is_attention: bool) -> Fused:
        embedding, weights = pool(x, mask)
        return torch.cat([embedding, self.embed(clinical)], dim=-1), weights


class ClinicalTokenFusion(Fuser):
    """Early fusion: the embedded clinical values join the cells as one more element; `(B, E)`.

    `z = pool([e(clinical), x_1 .. x_n])`.

    Args:
        input_size, embedding_size, num_clinical: as in `Fuser`.
        clinical_hidden_size: see `ClinicalFuser`.
        self_attention: let cells and clinical element attend to each other before the pooling, so that it
            matters also in poolings that treat elements one by one. Default False.
        num_heads: heads of that attention, >= 1, a divisor of `input_size`; default 2.

    Weights: the pooler's without the clinical element; where they are attention, rescaled to sum to 1 over
    the cells (uniform where the clinical element took all).
    """

    def __init__(
        self,
        input_size: int,
        embedding_size: int,
        num_clinical: int,
        *,
        clinical_hidden_size: int | None = None,
        self_attention: bool = False,
        num_heads: int = 2,
    ) -> None:
        super().__init__(input_size, embedding_size, num_clinical)
        self.embed = ClinicalEmbedding(num_clinical, input_size, clinical_hidden_size)
        self.block = AttentionBlock(input_size, num_heads) if self_attention else None

    def _fuse(self, x: Tensor, mask: Tensor, clinical: Tensor, pool: Pool, is_attention: bool) -> Fused:
        token = self.embed(clinical).unsqueeze(1).to(x.dtype)
        elements = torch.cat([token, fill_padding(x, mask)], dim=1)  # (B, 1 + N, D)
        real = torch.cat([mask.new_ones(mask.shape[0], 1), mask], dim=1)
        if self.block is not None:
            elements = self.block(elements, real)
        embedding, weights = pool(elements, real)
        weights = weights[:, 1:]
        return embedding, renormalised(weights, mask) if is_attention else weights


class ClinicalQueryFusion(Fuser):
    """The clinical values ask, the cells answer: cross-attention in place of the pooling; `(B, width)`.

    `z = MAB(e(clinical), E x)`: a multi-head attention (Vaswani et al., NeurIPS 2017, arXiv 1706.03762) with
    the embedded clinical values as its one query and the cells as keys and values. The pooler is not called.

    Args:
        input_size, embedding_size, num_clinical: as in `Fuser`.
        clinical_hidden_size: see `ClinicalFuser`.
        width: width of query and output, a multiple of `num_heads`; default 256.
        num_heads: >= 1; default 8.

    Weights: the query's attention, mean over heads (attention).
    """

    uses_pool = False

    def __init__(
        self,
        input_size: int,
        embedding_size: int,
        num_clinical: int,
        *,
        clinical_hidden_size: int | None = None,
        width: int = 256,
        num_heads: int = 8,
    ) -> None:
        super().__init__(input_size, embedding_size, num_clinical)
        self.embed = ClinicalEmbedding(num_clinical, width, clinical_hidden_size)
        self.embed_cells = nn.Linear(input_size, width)
        self.block = AttentionBlock(width, num_heads, cross=True)
        self.norm = nn.LayerNorm(width)
        self.output_size = width

    def _fuse(self, x: Tensor, mask: Tensor, clinical: Tensor, pool: Pool, is_attention: bool) -> Fused:
        query = self.embed(clinical).unsqueeze(1)  # (B, 1, W)
        answer, weights = self.block.read(query, mask, self.embed_cells(fill_padding(x, mask)))
        return self.norm(answer).squeeze(1), weights.squeeze(1)


class FiLMFusion(ClinicalFuser):
    """Feature-wise linear modulation of the pooled images by the clinical values; `(B, E)`.

    Perez et al., "FiLM: Visual Reasoning with a General Conditioning Layer", AAAI 2018, arXiv 1709.07871:
    `(1 + g) * z + b` with `[g, b] = A relu(e(clinical))`. Options as in `ClinicalFuser`.

    Weights: the pooler's.
    """

    def __init__(self, input_size: int, embedding_size: int, num_clinical: int, **options: Any) -> None:
        super().__init__(input_size, embedding_size, num_clinical, **options)
        self.modulate = nn.Linear(self.clinical_size, 2 * embedding_size)

    def _fuse(self, x: Tensor, mask: Tensor, clinical: Tensor, pool: Pool, is_attention: bool) -> Fused:
        embedding, weights = pool(x, mask)
        scale, shift = self.modulate(self.embed(clinical).relu()).chunk(2, dim=-1)
        return (1 + scale) * embedding + shift, weights


class MixtureOfExpertsFusion(ClinicalFuser):
    """An image expert, a clinical expert, and a gate that decides per patient whom to trust; `(B, width)`.

    After Sahasrabudhe et al., "Deep Multi-Instance Learning Using Multi-Modal Data for Diagnosis of
    Lymphocytosis", IEEE Journal of Biomedical and Health Informatics 25(6), 2021, hal-03032875:
    `g u + (1 - g) v` with `u = U z`, `v = V relu(e(clinical))`, `g = sigmoid(w tanh(G [z ; e(clinical)]))`.
    Under a linear classifier this is the same mixture of the experts' logits. A patient without any clinical
    value is left to the image expert: g = 1.

    Args:
        input_size, embedding_size, num_clinical, clinical_size, clinical_hidden_size: as in `ClinicalFuser`.
        width: width of the experts' output, >= 1; default 128.
        gate_size: hidden layer of the gate, >= 1; default 64.

    Weights: the pooler's.
    """

    def __init__(
        self,
        input_size: int,
        embedding_size: int,
        num_clinical: int,
        *,
        width: int = 128,
        gate_size: int = 64,
        **options: Any,
    ) -> None:
        super().__init__(input_size, embedding_size, num_clinical, **options)
        check_at_least("width", width, 1)
        check_at_least("gate_size", gate_size, 1)
        self.image_expert = nn.Linear(embedding_size, width)
        self.clinical_expert = nn.Linear(self.clinical_size, width)
        self.gate_network = nn.Sequential(
            nn.Linear(embedding_size + self.clinical_size, gate_size), nn.Tanh(), nn.Linear(gate_size, 1)
        )
        self.output_size = width

    def gate(self, embedding: Tensor, clinical: Tensor) -> Tensor:
        """The image expert's share `(B, 1)` in [0, 1], from pooled images `(B, E)` and raw `(B, F)`."""
        both = torch.cat([embedding, self.embed(clinical)], dim=-1)
        return self.gate_network(both).sigmoid().masked_fill(clinical.isnan().all(dim=1, keepdim=True), 1)

    def _fuse(self, x: Tensor, mask: Tensor, clinical: Tensor, pool: Pool, is_attention: bool) -> Fused:
        embedding, weights = pool(x, mask)
        gate = self.gate(embedding, clinical)
        clinic = self.clinical_expert(self.embed(clinical).relu())
        return gate * self.image_expert(embedding) + (1 - gate) * clinic, weights


class ClinicalOnlyFusion(ClinicalFuser):
    """Ablation: the images do not count; `e(clinical)`, `(B, clinical_size)`. The pooler is not called.

    Options as in `ClinicalFuser`. Weights: uniform over the cells (attention).
    """

    uses_pool = False

    def __init__(self, input_size: int, embedding_size: int, num_clinical: int, **options: Any) -> None:
        super().__init__(input_size, embedding_size, num_clinical, **options)
        self.output_size = self.clinical_size

    def _fuse(self, x: Tensor, mask: Tensor, clinical: Tensor, pool: Pool, is_attention: bool) -> Fused:
        return self.embed(clinical), uniform_weights(mask, x.dtype)


def renormalised(weights: Tensor, mask: Tensor) -> Tensor:
    """Attention `(B, N)` over part of the elements, rescaled to sum 1; uniform where nothing is left."""
    total = weights.sum(dim=1, keepdim=True)
    nothing = total < torch.finfo(weights.dtype).tiny
    return torch.where(nothing, uniform_weights(mask, weights.dtype), weights / total.masked_fill(nothing, 1))


FUSERS: dict[str, type[Fuser]] = {
    "none": NoFusion,
    "concat": ConcatFusion,
    "clinical_token": ClinicalTokenFusion,
    "clinical_query": ClinicalQueryFusion,
    "film": FiLMFusion,
    "mixture_of_experts": MixtureOfExpertsFusion,
    "clinical_only": ClinicalOnlyFusion,
}


def build_fuser(name: str, input_size: int, embedding_size: int, num_clinical: int, **options: Any) -> Fuser:
    """The fusion called `name`.

    Raises:
        ValueError: unknown name or option (the message lists the legal ones), an option out of its range, or
            a fusion that needs clinical variables where there are none.

    >>> build_fuser("concat", 384, 384, 3, clinical_size=16).output_size
    400
    """
    given = {"input_size": input_size, "embedding_size": embedding_size, "num_clinical": num_clinical}
    return build_by_name(FUSERS, "fusion", name, given, options)
