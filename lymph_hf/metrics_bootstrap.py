"""Confidence intervals by the bootstrap over patients, for any statistic of weighted patients.

A statistic is a function of weights (R, n), the number of times each of n patients was drawn in each of R
resamples, to one array (R,) per name. All resamples of a block are so computed at once, and the value itself is
the same function at weights of 1.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Literal, TypeVar

import numpy as np
from scipy.special import ndtr, ndtri

from .metrics_checks import Floats, check_share

Name = TypeVar("Name", bound=Hashable)
Statistics = Callable[[Floats], Mapping[Name, Floats]]

# Largest (resamples, patients) block of weights held at once: 32 MB of float64.
_BLOCK_ELEMENTS = 4_000_000


@dataclass(frozen=True)
class Interval:
    """A score with its confidence interval.

    `dropped` is the share of resamples, 0 to 1, in which the score was undefined and which the bounds
    therefore leave out. `value`, `low` and `high` are NaN where they are undefined.
    """

    value: float
    low: float
    high: float
    level: float = 0.95
    dropped: float = 0.0

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "undefined"
        bounds = "undefined" if math.isnan(self.low) else f"{self.low:.3f} to {self.high:.3f}"
        return f"{self.value:.3f} ({bounds})"

    def as_dict(self) -> dict[str, float | None]:
        """The fields for strict JSON: NaN becomes None."""
        return {name: None if math.isnan(field) else field for name, field in asdict(self).items()}


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made: whole patients are drawn with replacement.

    Attributes:
        resamples: number of resamples, at least 1. 2,000 hold the ends of a 95 % interval to about its third digit.
        level: nominal coverage, strictly between 0 and 1.
        seed: same seed, same number of patients, same draws.
        method: `percentile` takes the quantiles of the resampled scores; `bca` moves them for bias and skewness,
            with the jackknife over patients (Efron, JASA 82:171, 1987). BCa bounds are NaN where the correction is
            not defined, that is when every resample lies on one side of the value.

    Raises:
        ValueError: resamples below 1, level outside (0, 1), unknown method.
    """

    resamples: int = 2000
    level: float = 0.95
    seed: int = 0
    method: Literal["percentile", "bca"] = "percentile"

    def __post_init__(self) -> None:
        if self.method not in ("percentile", "bca"):
            raise ValueError(f"method must be 'percentile' or 'bca', got {self.method!r}")
        if self.resamples < 1:
            raise ValueError(f"resamples must be at least 1, got {self.resamples}")
        check_share("level", self.level)

    def weights(self, patients: int) -> Iterator[Floats]:
        """The resamples: see `bootstrap_weights`."""
        return bootstrap_weights(patients, self.resamples, self.seed)

    def draws(self, statistics: Statistics[Name], patients: int) -> dict[Name, Floats]:
        """Each statistic in every resample, (resamples,)."""
        return _over_blocks(statistics, self.weights(patients))

    def intervals(
        self, statistics: Statistics[Name], patients: int, draws: Mapping[Name, Floats] | None = None
    ) -> dict[Name, Interval]:
        """The value and the interval of each statistic of `patients` patients.

        Args:
            statistics: weights (R, n) -> name -> (R,), NaN where undefined. Each row stands for itself.
            patients: n.
            draws: what `draws` returned for them, if it is at hand.
        """
        values = {name: float(value[0]) for name, value in statistics(np.ones((1, patients))).items()}
        draws = self.draws(statistics, patients) if draws is None else draws
        if self.method == "percentile":
            return {name: self.interval(values[name], draws[name]) for name in values}
        left_out = _over_blocks(statistics, _jackknife_weights(patients))
        return {
            name: self.interval(value, draws[name], _bca(self.level, value, draws[name], left_out[name]))
            for name, value in values.items()
        }

    def interval(self, value: float, draws: Floats, quantiles: tuple[float, float] | None = None) -> Interval:
        """The interval from the resampled values, (R,); by default between their central quantiles."""
        quantiles = central(self.level) if quantiles is None else quantiles
        defined = draws[~np.isnan(draws)]
        dropped = 1.0 - len(defined) / len(draws)
        if len(defined) == 0 or np.isnan(quantiles).any():
            return Interval(value, math.nan, math.nan, self.level, dropped)
        low, high = np.quantile(defined, quantiles)
        return Interval(value, float(low), float(high), self.level, dropped)


def bootstrap_weights(patients: int, resamples: int, seed: int) -> Iterator[Floats]:
    """How often each patient is drawn in each resample: blocks (r, n) of whole numbers, rows summing to n.

    The blocks bound the memory, and hold `resamples` rows together; the draws do not depend on where they are
    cut.
    """
    generator = np.random.default_rng(seed)
    for rows in _block_rows(resamples, patients):
        drawn = generator.integers(0, max(patients, 1), size=(rows, patients))
        cells = drawn + patients * np.arange(rows)[:, None]
        counts = np.bincount(cells.ravel(), minlength=rows * patients)
        yield counts.reshape(rows, patients).astype(float)


def central(level: float) -> tuple[float, float]:
    """The two quantiles with the share `level` between them and equal shares outside."""
    return (1 - level) / 2, (1 + level) / 2


def _jackknife_weights(patients: int) -> Iterator[Floats]:
    """Weights that leave out one patient at a time, in blocks of rows; one block without rows for no patient."""
    if patients == 0:
        yield np.empty((0, 0))
    start = 0
    for rows in _block_rows(patients, patients):
        yield 1.0 - np.eye(rows, patients, k=start)
        start += rows


def _block_rows(total: int, patients: int) -> Iterator[int]:
    rows = max(1, _BLOCK_ELEMENTS // max(patients, 1))
    for start in range(0, total, rows):
        yield min(rows, total - start)


def _over_blocks(statistics: Statistics[Name], blocks: Iterable[Floats]) -> dict[Name, Floats]:
    parts = [statistics(weights) for weights in blocks]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _bca(level: float, value: float, draws: Floats, left_out: Floats) -> tuple[float, float]:
    """The two quantiles of the draws that the bias-corrected and accelerated interval reads (Efron 1987)."""
    draws, left_out = draws[~np.isnan(draws)], left_out[~np.isnan(left_out)]
    if len(draws) == 0 or len(left_out) == 0:
        return math.nan, math.nan
    share_below = ((draws < value).mean() + (draws <= value).mean()) / 2
    if share_below in (0.0, 1.0):
        return math.nan, math.nan
    bias = ndtri(share_below)
    influence = left_out.mean() - left_out
    spread = (influence**2).sum() ** 1.5
    # Without any influence the score is constant, and so are its draws: no skewness to correct.
    acceleration = (influence**3).sum() / (6 * spread) if spread > 0 else 0.0
    shifted = bias + ndtri(np.array(central(level)))
    low, high = ndtr(bias + shifted / (1 - acceleration * shifted))
    return float(low), float(high)
