"""Are explanations right? Rankings of cells judged by what the model answers without them, and by experts' cell types.

Two questions that a good-looking gallery does not answer:

- Is the ranking true to the *model*? Taking the first cells away should lower P(target) sooner than taking random
  ones (deletion), and they alone should raise it sooner (insertion; Petsiuk et al., BMVC 2018, arXiv 1806.07421).
- Is it true to the *disease*? Cells of the guilty types should stand before the others.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from .explain import PatientHead, cell_effects, explain_bag
from .metrics import Bootstrap, Interval

RANKINGS = ("leave_one_out", "sampled", "attention")
"""Ways to rank the cells: two effects (see `explain.explain_bag`), and the pooling's weights."""

SCORES = ("auroc", "precision", "share", "deletion", "insertion")
"""Columns of a judgement.

- `auroc`: of the ranking against the guilty types; 0.5 is chance. NaN for patients without guilty or other cells.
- `precision`: share of guilty cells among the first `FIRST`, to be compared with `share`, that among all cells.
- `deletion`, `insertion`: area between the curve of the ranking and that of random rankings, above 0 where the
  ranking is the better one; 0 for patients of a single cell.
"""

FIRST = 5
_SHARES = np.arange(10) / 10
_RANDOM_RANKINGS = 20


class JudgementError(ValueError):
    """The cell types do not fit the patients; the message says what to change."""


@dataclass(frozen=True, eq=False)
class PatientJudgement:
    """How good the rankings of one patient's cells are.

    Attributes:
        rows: ranking -> score (see `SCORES`).
        deletion, insertion: ranking, and "random", -> P(target) at each share of `curve_shares()`, (10,).
    """

    rows: dict[str, dict[str, float]]
    deletion: dict[str, np.ndarray]
    insertion: dict[str, np.ndarray]


def curve_shares() -> tuple[np.ndarray, np.ndarray]:
    """(10,) shares of the cells that are taken away (0 to 0.9), and that are given (0.1 to 1)."""
    return _SHARES, _SHARES + 0.1


def judge_patient(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    guilty: np.ndarray,
    *,
    target: int | None = None,
    seed: int = 0,
) -> PatientJudgement:
    """Judge every ranking of one patient's cells.

    Args:
        model, inputs, target: as in `explain.explain_bag`.
        guilty: (N,) 1 = of a type that speaks for the target, 0 = of another, NaN = of unknown type.
        seed: of the random rankings and the sampled effect.
    """
    patient = PatientHead(model, inputs)
    explanation = explain_bag(model, inputs, target=target)
    embeddings = torch.from_numpy(explanation.cell_embeddings).to(patient.cells)
    with torch.no_grad():
        sampled = cell_effects(patient, embeddings, explanation.target, "sampled", seed).cpu().numpy()
    scores = dict(zip(RANKINGS, (explanation.effects, sampled, explanation.attentions), strict=True))
    scores = {name: of_cells for name, of_cells in scores.items() if of_cells is not None}

    def answer(mask: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            probabilities = patient.probabilities(embeddings, torch.from_numpy(mask).to(embeddings.device))
        return probabilities[:, explanation.target].cpu().numpy()

    curves = _curves(answer, {name: np.argsort(-of_cells, kind="stable") for name, of_cells in scores.items()}, seed)
    rows = {name: type_scores(of_cells, guilty) | _areas(curves, name) for name, of_cells in scores.items()}
    return PatientJudgement(rows, *({name: curve[i] for name, curve in curves.items()} for i in (0, 1)))


def ranking_curves(answer: Callable[[np.ndarray], np.ndarray], ranking: np.ndarray) -> np.ndarray:
    """What the model answers when cells go, or come, in the order of a ranking.

    Args:
        answer: (B, N) bool, the cells of B imagined patients -> (B,).
        ranking: (N,) positions, strongest first.

    Returns:
        (2, 10): deletion and insertion, at the shares of `curve_shares`; at least one cell is always there.
    """
    number = len(ranking)
    place = np.empty(number, dtype=int)
    place[ranking] = np.arange(number)
    without, only = (np.round(shares * number) for shares in curve_shares())
    left = place >= np.minimum(without, number - 1)[:, None]
    given = place < np.maximum(only, 1)[:, None]
    return answer(np.concatenate([left, given])).reshape(2, -1)


def type_scores(scores: np.ndarray, guilty: np.ndarray) -> dict[str, float]:
    """`auroc`, `precision` and `share` of one patient: scores (N,) against 1 = guilty, 0 = not, NaN = unknown (N,)."""
    known = ~np.isnan(guilty) & ~np.isnan(scores)
    scores, guilty = scores[known], guilty[known]
    if len(guilty) == 0 or guilty.min() == guilty.max():
        return dict.fromkeys(("auroc", "precision", "share"), float("nan"))
    first = np.argsort(-scores, kind="stable")[:FIRST]
    return {
        "auroc": float(roc_auc_score(guilty, scores)),
        "precision": float(guilty[first].mean()),
        "share": float(guilty.mean()),
    }


def judgement_intervals(rows: pd.DataFrame, bootstrap: Bootstrap | None = None) -> dict[str, dict[str, Interval]]:
    """Mean of each score over the patients that have one, with a bootstrap interval over patients.

    Args:
        rows: `patient_id`, `ranking` and a column for each of `SCORES`.

    Returns:
        ranking -> score -> interval
    """
    bootstrap = bootstrap or Bootstrap()
    found = {}
    for ranking, own in rows.groupby("ranking", sort=False):
        values = own[list(SCORES)].to_numpy()  # (n, S)
        found[ranking] = bootstrap.intervals(_means(values), len(values))
    return found


def _means(values: np.ndarray) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    defined = ~np.isnan(values)
    filled = np.where(defined, values, 0)

    def statistics(weights: np.ndarray) -> dict[str, np.ndarray]:
        with np.errstate(invalid="ignore"):  # 0 / 0 where no patient drawn has the score
            means = (weights @ filled) / (weights @ defined)
        return dict(zip(SCORES, means.T, strict=True))

    return statistics


def judgement_table(intervals: Mapping[str, Mapping[str, Interval]]) -> str:
    """A text table of `judgement_intervals`."""
    titles = {"auroc": "AUROC", "precision": f"precision@{FIRST}", "share": "chance"}
    lines = [f"{'ranking':<14}" + "".join(f"{titles.get(score, score):>26}" for score in SCORES)]
    for ranking, scores in intervals.items():
        cells = (f"{scores[s].value:.3f}" if s == "share" else str(scores[s]) for s in SCORES)
        lines.append(f"{ranking:<14}" + "".join(f"{cell:>26}" for cell in cells))
    return "\n".join(lines)


def guilty_types(types: Iterable[str], positive: Sequence[str]) -> set[str]:
    """The cell types that contain one of the names as whole words, whatever the case.

    Raises:
        JudgementError: a name that is in no type, or names that are in all.
    """
    types = sorted(set(types))
    found = {name: {kind for kind in types if re.search(rf"\b{re.escape(name)}\b", kind, re.I)} for name in positive}
    listed = "; ".join(types)
    if unknown := [name for name, kinds in found.items() if not kinds]:
        raise JudgementError(f"--positive {' '.join(unknown)}: no such cell type. The table has: {listed}.")
    guilty = set().union(*found.values())
    if len(guilty) in (0, len(types)):
        raise JudgementError(f"--positive {' '.join(positive)}: expected some of the types, not all: {listed}.")
    return guilty


def _curves(
    answer: Callable[[np.ndarray], np.ndarray], rankings: Mapping[str, np.ndarray], seed: int
) -> dict[str, np.ndarray]:
    """Ranking, and "random", -> (2, 10)."""
    number = len(next(iter(rankings.values())))
    rng = np.random.default_rng(seed)
    drawn = [ranking_curves(answer, rng.permutation(number)) for _ in range(_RANDOM_RANKINGS)]
    curves = {name: ranking_curves(answer, ranking) for name, ranking in rankings.items()}
    return curves | {"random": np.mean(drawn, axis=0)}


def _areas(curves: Mapping[str, np.ndarray], name: str) -> dict[str, float]:
    deletion, insertion = (curves[name] - curves["random"]).mean(axis=1)
    return {"deletion": -float(deletion), "insertion": float(insertion)}


__all__ = [
    "FIRST",
    "RANKINGS",
    "SCORES",
    "JudgementError",
    "PatientJudgement",
    "curve_shares",
    "guilty_types",
    "judge_patient",
    "judgement_intervals",
    "judgement_table",
    "ranking_curves",
    "type_scores",
]
