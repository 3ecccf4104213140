"""The patients of the synthetic cohort: how the two labels differ, and the best score anybody can reach.

Given the label, a patient's cells, age, sex and lymphocyte count are independent. The likelihood ratio of
each is known, so the best possible AUROC (the Bayes classifier's) of one cell, of the clinical values, of all
cells and of everything together is known too, and a model can be judged against it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import gammaln, logsumexp
from scipy.stats import truncnorm
from sklearn.metrics import roc_auc_score

from .painting import CELL_TYPES

Array = np.ndarray

TUMORAL_SHARE = 0.69  # 113 of 163 training patients of the published cohort
CELLS = (16, 198)  # fewest and most cells of a patient there
AGE_RANGE = (18.0, 100.0)  # years
COUNT_RANGE = (2.28, 295.0)  # 10^9 lymphocytes per litre
_MEDIAN_CELLS_AT = 0.56  # the published median, 66, lies here between 16 and 198 on a log scale
_MONTE_CARLO_PATIENTS = 20_000


@dataclass(frozen=True)
class CellMixture:
    """A Dirichlet distribution of the shares of cell types within a patient, in the order of `CELL_TYPES`."""

    name: str
    weight: float  # share of the label's patients
    mean: tuple[float, ...]
    concentration: float  # sum of the Dirichlet parameters: small = patients differ widely

    @property
    def alpha(self) -> Array:
        return self.concentration * np.asarray(self.mean)


@dataclass(frozen=True)
class LabelModel:
    """Everything that depends on the label. Both labels have the same support: no value is ever proof."""

    mixtures: tuple[CellMixture, ...]
    age: tuple[float, float]  # mean and standard deviation in years, truncated to `AGE_RANGE`
    count: tuple[tuple[float, float, float], ...]  # (weight, median, log-scale sd), truncated to `COUNT_RANGE`


# Columns of the means: small_mature, reactive, large_granular, cll_like, prolymphocyte, cleaved, smudge.
LABELS: dict[str, LabelModel] = {
    "reactive": LabelModel(
        mixtures=(
            CellMixture("viral", 0.5, (0.31, 0.34, 0.13, 0.07, 0.04, 0.05, 0.06), 8.0),
            CellMixture("other", 0.5, (0.47, 0.16, 0.13, 0.09, 0.04, 0.06, 0.05), 8.0),
        ),
        age=(50.0, 19.0),
        count=((0.75, 5.4, 0.2), (0.25, 10.0, 0.65)),
    ),
    "tumoral": LabelModel(
        mixtures=(
            CellMixture("chronic_lymphocytic_leukaemia", 0.6, (0.24, 0.06, 0.05, 0.39, 0.08, 0.06, 0.12), 8.0),
            CellMixture("lymphoma", 0.25, (0.26, 0.08, 0.06, 0.12, 0.09, 0.31, 0.08), 8.0),
            CellMixture("large_granular_leukaemia", 0.15, (0.26, 0.10, 0.38, 0.10, 0.04, 0.05, 0.07), 8.0),
        ),
        age=(67.0, 13.5),
        count=((0.35, 6.5, 0.35), (0.65, 20.0, 1.0)),
    ),
}
"""Label models by name; the second label is the positive one."""


@dataclass(frozen=True, eq=False)  # arrays have no single truth value
class Patients:
    """N drawn patients. Missing values are NaN (age, count) or "" (sex)."""

    tumoral: Array  # (N,) bool
    age: Array  # (N,) years, to 0.1
    sex: Array  # (N,) "F" or "M"
    lymphocyte_count: Array  # (N,) 10^9 per litre, to 0.01
    cell_counts: Array  # (N, T) number of cells of each type

    def clinical_evidence(self) -> Array:
        """(N,) log-likelihood ratio, tumoral over reactive, of age and count; missing values say nothing."""
        age = _log_ratio(_age_log_density, self.age)
        count = _log_ratio(_count_log_density, self.lymphocyte_count)
        return np.nan_to_num(age) + np.nan_to_num(count)

    def cell_evidence(self) -> Array:
        """(N,) log-likelihood ratio, tumoral over reactive, of the numbers of cells of each (true) type."""
        return _log_ratio(_cells_log_likelihood, self.cell_counts)

    def auroc(self) -> dict[str, float]:
        """AUROC of the Bayes classifiers on these patients, by the names of `best_auroc`."""
        clinic, images = self.clinical_evidence(), self.cell_evidence()
        shares = self.cell_counts / self.cell_counts.sum(1, keepdims=True)
        scores = {"clinic": clinic, "images": images, "both": clinic + images}
        cell = _cell_auroc(shares[~self.tumoral].mean(0), shares[self.tumoral].mean(0))
        return {"cell": cell} | {name: float(roc_auc_score(self.tumoral, score)) for name, score in scores.items()}


def draw_patients(tumoral: Array, cells: tuple[int, int], missing: float, rng: np.random.Generator) -> Patients:
    """Draw one patient for each entry of the (N,) boolean `tumoral`.

    Args:
        tumoral: labels.
        cells: fewest and most cells of a patient; between them log-normal.
        missing: share of age, sex and count left out, each on its own and whatever the label, in [0, 1).
        rng: source of randomness.
    """
    number = len(tumoral)
    age, count = np.empty(number), np.empty(number)
    shares = np.empty((number, len(CELL_TYPES)))
    for positive, model in enumerate(LABELS.values()):
        rows = np.flatnonzero(tumoral == bool(positive))
        age[rows] = _truncated_normal(*model.age, *AGE_RANGE).rvs(len(rows), random_state=rng)
        count[rows] = _draw_counts(model, len(rows), rng)
        shares[rows] = _draw_shares(model, len(rows), rng)
    sex = rng.choice(["F", "M"], number)
    hidden = rng.random((3, number)) < missing
    return Patients(
        tumoral=tumoral,
        age=np.where(hidden[0], np.nan, age.round(1)),
        sex=np.where(hidden[1], "", sex),
        lymphocyte_count=np.where(hidden[2], np.nan, count.round(2)),
        cell_counts=rng.multinomial(_draw_bag_sizes(number, cells, rng), shares),
    )


def best_auroc(cells: tuple[int, int] = CELLS, missing: float = 0.0) -> dict[str, float]:
    """Best possible AUROC in the population, estimated on 20,000 simulated patients (standard error < 0.003).

    Returns:
        "cell": one random cell of the patient, its true type known (exact, not simulated); "clinic": age, sex
        and lymphocyte count; "images": all cells, their true types known; "both": everything. A model reads
        pictures, not types, so for "images" and "both" these are upper bounds.
    """
    rng = np.random.default_rng(0)  # a property of the generator: the same whatever the cohort's seed
    tumoral = rng.random(_MONTE_CARLO_PATIENTS) < TUMORAL_SHARE
    scores = draw_patients(tumoral, cells, missing, rng).auroc()
    return scores | {"cell": _cell_auroc(_mean_shares(LABELS["reactive"]), _mean_shares(LABELS["tumoral"]))}


def _cell_auroc(reactive: Array, tumoral: Array) -> float:
    """AUROC of one cell's likelihood ratio, where types occur with the given (T,) shares per label."""
    ratio = np.log(_mean_shares(LABELS["tumoral"])) - np.log(_mean_shares(LABELS["reactive"]))
    label = np.repeat([0, 1], len(ratio))
    return float(roc_auc_score(label, np.tile(ratio, 2), sample_weight=np.concatenate([reactive, tumoral])))


def _mean_shares(model: LabelModel) -> Array:
    return np.sum([mixture.weight * np.asarray(mixture.mean) for mixture in model.mixtures], axis=0)


def _log_ratio(log_likelihood: Callable[[Array, LabelModel], Array], values: Array) -> Array:
    reactive, tumoral = (log_likelihood(values, model) for model in LABELS.values())
    return tumoral - reactive


def _truncated_normal(mean: float, sd: float, low: float, high: float):
    return truncnorm((low - mean) / sd, (high - mean) / sd, loc=mean, scale=sd)


def _log_counts(median: float, log_sd: float):
    return _truncated_normal(np.log(median), log_sd, *np.log(COUNT_RANGE))


def _draw_counts(model: LabelModel, number: int, rng: np.random.Generator) -> Array:
    weights, medians, log_sds = np.transpose(model.count)
    part = rng.choice(len(weights), number, p=weights)
    return np.exp(_log_counts(medians[part], log_sds[part]).rvs(number, random_state=rng))


def _draw_shares(model: LabelModel, number: int, rng: np.random.Generator) -> Array:
    part = rng.choice(len(model.mixtures), number, p=[mixture.weight for mixture in model.mixtures])
    gammas = rng.standard_gamma(np.stack([mixture.alpha for mixture in model.mixtures])[part])
    return gammas / gammas.sum(1, keepdims=True)


def _draw_bag_sizes(number: int, cells: tuple[int, int], rng: np.random.Generator) -> Array:
    low, high = np.log(cells)
    sizes = np.exp(rng.normal(low + _MEDIAN_CELLS_AT * (high - low), (high - low) / 4.5, number))
    return sizes.round().astype(int).clip(*cells)


def _age_log_density(age: Array, model: LabelModel) -> Array:
    return _truncated_normal(*model.age, *AGE_RANGE).logpdf(age)


def _count_log_density(count: Array, model: LabelModel) -> Array:
    """Up to the Jacobian of the logarithm, which cancels in the ratio."""
    return _log_mixture([(weight, _log_counts(*part).logpdf(np.log(count))) for weight, *part in model.count])


def _cells_log_likelihood(counts: Array, model: LabelModel) -> Array:
    """Dirichlet-multinomial, up to the multinomial coefficient, which cancels in the ratio."""
    total = counts.sum(1)
    return _log_mixture(
        [
            (
                mixture.weight,
                gammaln(mixture.concentration)
                - gammaln(mixture.concentration + total)
                + (gammaln(mixture.alpha + counts) - gammaln(mixture.alpha)).sum(1),
            )
            for mixture in model.mixtures
        ]
    )


def _log_mixture(parts: Sequence[tuple[float, Array]]) -> Array:
    weights, log_densities = zip(*parts, strict=True)
    return logsumexp(np.stack(log_densities), axis=0, b=np.asarray(weights)[:, None])
