"""Predictions to score, and bootstrap resamples to loop over, shared by the tests of the metrics."""

import numpy as np

from lymph_hf.metrics import bootstrap_weights


def binary_cohort(n, seed, decimals=None):
    """Labels and overlapping probabilities of class 1; few decimals make ties."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % 3 > 0).astype(int)
    probabilities = np.clip(rng.normal(0.35 + 0.3 * labels, 0.25), 0, 1)
    return labels, probabilities if decimals is None else probabilities.round(decimals)


def multiclass_cohort(n, classes, seed):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % classes)
    probabilities = rng.dirichlet(np.ones(classes), n) + 0.4 * np.eye(classes)[labels]
    return labels, probabilities / probabilities.sum(axis=1, keepdims=True)


def resampled_rows(n, resamples, seed):
    """The rows of each bootstrap resample, one index array per resample."""
    weights = np.concatenate(list(bootstrap_weights(n, resamples, seed)))
    return [np.repeat(np.arange(n), row.astype(int)) for row in weights]


def loop_interval(statistic, labels, probabilities, bootstrap):
    """Percentile bounds of a plain statistic, by a loop over the same resamples."""
    rows = resampled_rows(len(labels), bootstrap.resamples, bootstrap.seed)
    draws = [statistic(labels[r], probabilities[r]) for r in rows]
    return np.nanquantile(draws, [(1 - bootstrap.level) / 2, (1 + bootstrap.level) / 2])
