"""The contract every pooling obeys, and the masking helpers that keep padding out of a bag.

A bag is a set of cells: `x (B, N, D)` holds B bags padded to N cells, `mask (B, N)` is True where a cell is
real. What stands in the padding must never matter, not even NaN, hence cells are *selected* (masked_fill),
never multiplied by the mask: 0 * NaN is NaN.
"""

import inspect
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")

Pooled = tuple[Tensor, Tensor, Tensor | None]  # embedding (B, output_size), weights (B, N), auxiliary loss


class Pooler(nn.Module):
    """A permutation-invariant map from a bag of cells to one vector, with a weight for each cell.

    Subclasses implement `_pool`; callers use `forward` or, where the auxiliary loss is wanted, `pool`.

    Attributes:
        output_size: width of the bag embedding.
        is_attention: True when the weights are >= 0 and sum to 1 over each bag's real cells; otherwise they
            are instance scores, described by the class. Weights are exactly 0 on padding in both cases.

    Args:
        input_size: width D of a cell's embedding, >= 1.
        num_labels: number of labels, >= 2. Poolings without class-wise parts ignore it.
    """

    is_attention: bool = True

    def __init__(self, input_size: int, *, num_labels: int = 2) -> None:
        super().__init__()
        check_at_least("input_size", input_size, 1)
        check_at_least("num_labels", num_labels, 2)
        self.input_size = input_size
        self.num_labels = num_labels
        self.output_size = input_size

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Pool without labels: cells, mask -> embedding `(B, output_size)`, weights `(B, N)`."""
        embedding, weights, _ = self.pool(x, mask)
        return embedding, weights

    def pool(self, x: Tensor, mask: Tensor, labels: Tensor | None = None) -> Pooled:
        """Pool, and with labels also compute the auxiliary loss of the methods that have one.

        Args:
            x: cells `(B, N, D)`, floating point; anything may stand in the padding.
            mask: `(B, N)` bool, True = a real cell.
            labels: `(B,)` integer labels in `[0, num_labels)`, or None at inference.

        Returns:
            embedding `(B, output_size)`, weights `(B, N)` (at least float32), and the auxiliary loss: a
            scalar already multiplied by its weight and averaged over bags (each patient counts once, whatever
            the number of cells), or None.

        Raises:
            TypeError: `mask` is not bool or `x` is not floating point.
            ValueError: shapes or labels that do not fit, or an empty bag.
        """
        self._check(x, mask, labels)
        return self._pool(x, mask, labels)

    def _pool(self, x: Tensor, mask: Tensor, labels: Tensor | None) -> Pooled:
        """The method itself; every bag holds at least one cell.

        Anything may stand in the padding of `x`: take the cells by `RealCells` or `fill_padding`.
        """
        raise NotImplementedError

    def _check(self, x: Tensor, mask: Tensor, labels: Tensor | None) -> None:
        if x.ndim != 3 or x.shape[2] != self.input_size:
            raise ValueError(
                f"{type(self).__name__} expects cells of shape (bags, cells, {self.input_size}), "
                f"got {tuple(x.shape)}: "
                "input_size must equal the width of the encoder's embedding"
            )
        if not x.is_floating_point():
            raise TypeError(f"cells must be floating point, got {x.dtype}")
        if mask.shape != x.shape[:2]:
            raise ValueError(f"mask must have shape {tuple(x.shape[:2])} like the cells, got {tuple(mask.shape)}")
        check_bags(mask)
        if labels is not None:
            self._check_labels(labels, bags=x.shape[0])

    def _check_labels(self, labels: Tensor, bags: int) -> None:
        if labels.shape != (bags,) or labels.is_floating_point():
            raise ValueError(
                f"labels must be integers of shape ({bags},), one per bag, got {labels.dtype} {tuple(labels.shape)}"
            )
        if not is_traced() and not bool(((labels >= 0) & (labels < self.num_labels)).all()):
            raise ValueError(f"labels must lie in [0, {self.num_labels}), got {labels.tolist()}: check num_labels")


def is_traced() -> bool:
    """True while torch.compile, torch.export or a tracer records: *values* cannot be checked then."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def check_bags(mask: Tensor, names: Sequence[str] | None = None) -> None:
    """Refuse empty bags: a softmax over nothing is NaN, and a made-up answer for a patient is worse.

    Args:
        mask: `(B, N)` bool, True = a real cell.
        names: the bags' patient identifiers, for the message; None names them by index.

    Raises:
        TypeError: `mask` is not bool.
        ValueError: it is not two-dimensional, holds no bag, or a bag has no real cell.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool (True = a real cell), got {mask.dtype}: convert it with mask.bool()")
    if mask.ndim != 2 or mask.shape[0] == 0:
        raise ValueError(f"mask must have shape (bags, cells) with at least one bag, got {tuple(mask.shape)}")
    if is_traced():
        return
    filled = mask.any(dim=1)
    if not filled.all():
        empty = (~filled).nonzero().flatten().tolist()
        who = ", ".join(f"{index} (patient {names[index]})" if names else str(index) for index in empty)
        raise ValueError(f"empty bag at index {who}: the mask holds no real cell; leave such patients out of the batch")


def fill_padding(x: Tensor, mask: Tensor, value: float = 0.0) -> Tensor:
    """Cells `(B, N, D)` with `value` on padding, whatever stood there, NaN and infinity included."""
    if is_traced():
        return x.masked_fill(~mask.unsqueeze(-1), value)
    if is_unpadded(mask):
        return x
    padding = (~mask).flatten().nonzero().squeeze(1)  # a mask broadcast over D takes twice as long
    return x.flatten(0, 1).index_fill(0, padding, value).unflatten(0, mask.shape)


def is_unpadded(mask: Tensor) -> bool:
    """True when all cells are known to be real, so that masking can be skipped (never while tracing)."""
    return not is_traced() and bool(mask.all())


class RealCells:
    """The real cells of a batch side by side, for layers that look at one cell at a time.

    Such layers then cost what the cells cost, whatever the padding. Nothing is moved where nothing is padded,
    nor while tracing, when the number of cells is not known: n is then B N, and `x` is viewed as `(n, D)`.

    Args:
        mask: `(B, N)` bool, True = a real cell.

    Attributes:
        mask: as given.
        index: where the real cells stand in the flattened batch `(n,)`, or None where nothing is moved.
    """

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        moved = not (is_traced() or is_unpadded(mask))
        self.index = mask.flatten().nonzero().squeeze(1) if moved else None

    @cached_property
    def counts(self) -> list[int]:
        """Real cells of each bag."""
        return self.mask.sum(dim=1).tolist()

    def pack(self, x: Tensor) -> Tensor:
        """Padded `(B, N, D)` -> real cells `(n, D)`, bag by bag; where padding has to stay, it is 0."""
        if self.index is None:
            return fill_padding(x, self.mask).flatten(0, 1)
        return x.flatten(0, 1).index_select(0, self.index)

    def pad(self, cells: Tensor) -> Tensor:
        """Real cells `(n, ...)` -> padded `(B, N, ...)`, 0 on padding wherever it was left out."""
        if self.index is not None:
            padded = cells.new_zeros(self.mask.numel(), *cells.shape[1:])
            cells = padded.index_add_(0, self.index, cells)  # faster than index_copy_
        return cells.unflatten(0, self.mask.shape)

    def take(self, cells: Tensor, positions: Tensor) -> Tensor:
        """Those of the real cells `(n, D)` at `positions (B, ...)` in their bags -> `(B, ..., D)`.

        At a position of padding some real cell is taken, which the caller must not count.
        """
        bags, length = self.mask.shape
        starts = torch.arange(bags, device=positions.device) * length
        rows = positions.flatten() + starts.repeat_interleave(positions.numel() // bags)
        if self.index is not None:
            rows = (self.mask.flatten().cumsum(0) - 1).clamp(min=0)[rows]
        return cells.index_select(0, rows).unflatten(0, positions.shape)

    def weighted_sum(self, weights: Tensor, cells: Tensor) -> Tensor:
        """Weights `(B, N)` or `(B, K, N)`, real cells `(n, D)` -> `(B, D)` or `(B, K, D)`, see `weighted_sum`."""
        if is_traced() or self.index is not None or len(self.mask) > 1:
            return weighted_sum(weights, self.pad(cells))
        # As a plain product its gradient is no view, and others are added to it in place: 10,000 cells are large.
        rows = weights.flatten(0, -2).to(cells.dtype)  # (1, N) or (K, N)
        return (rows @ cells).unflatten(0, weights.shape[:-1])


def masked_softmax(scores: Tensor, mask: Tensor, dim: int = -1) -> Tensor:
    """Softmax over the real cells, in at least float32: exactly 0 on padding, sum 1 over `dim`.

    `mask` broadcasts against `scores`. In bfloat16 a softmax over thousands of cells loses its sum.
    """
    scores = at_least_float32(scores).masked_fill(~mask, -torch.inf)
    return scores.softmax(dim)


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or unchanged where it is wider."""
    return x if x.dtype == torch.float64 else x.float()


def weighted_sum(weights: Tensor, x: Tensor) -> Tensor:
    """Weights `(B, N)` or `(B, K, N)`, cells `(B, N, D)` -> `(B, D)` or `(B, K, D)`, in the dtype of `x`."""
    if weights.ndim == 2:
        return weighted_sum(weights.unsqueeze(1), x).squeeze(1)
    return weights.to(x.dtype) @ x


def uniform_weights(mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`(B, N)`: 1 / n on each of a bag's n real cells, 0 on padding."""
    dtype = torch.promote_types(dtype, torch.float32)
    return mask.to(dtype) / mask.sum(dim=1, keepdim=True)


def mean_over_bags(losses: Tensor, counts: Tensor) -> Tensor:
    """Mean over bags of each bag's mean, so that a patient with many cells weighs no more than another.

    Args:
        losses: `(B, M)`.
        counts: `(B, M)` bool, which losses count; at least one in each bag.
    """
    return (losses.masked_fill(~counts, 0).sum(dim=1) / counts.sum(dim=1)).mean()


def check_at_least(name: str, value: float, low: float) -> None:
    """Raise ValueError unless `value >= low`."""
    if not value >= low:
        raise ValueError(f"{name} must be at least {low}, got {value}")


def check_fraction(name: str, value: float) -> None:
    """Raise ValueError unless `0 <= value < 1`, the range of a dropout rate."""
    if not 0 <= value < 1:
        raise ValueError(f"{name} must lie in [0, 1), got {value}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def build_by_name(
    registry: Mapping[str, type[T]],
    kind: str,
    name: str,
    given: Mapping[str, Any],
    options: Mapping[str, Any],
) -> T:
    """Build `registry[name](**given, **options)`, refusing names and options that do not exist.

    Args:
        registry: the classes by name.
        kind: what they are, for the messages ("pooling", "fusion").
        name: key of the registry.
        given: arguments the model supplies, which are therefore no options.
        options: the user's own options.

    Raises:
        ValueError: unknown name or option; the message lists the legal ones.
    """
    check_choice(kind, name, sorted(registry))
    legal = [option for option in option_names(registry[name]) if option not in given]
    unknown = sorted(set(options) - set(legal))
    if unknown:
        raise ValueError(
            f"{kind} {name!r} has no option {', '.join(map(repr, unknown))}; "
            f"its options are: {', '.join(legal) or 'none'}"
        )
    return registry[name](**given, **options)


def option_names(cls: type) -> list[str]:
    """Parameters of a class's constructor, following `**options` up to the base classes that take them."""
    names: dict[str, None] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(base.__init__).parameters.values())[1:]
        names |= {p.name: None for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD}
        if all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters):
            break
    return list(names)
