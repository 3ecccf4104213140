"""Judging rankings of cells: a perfect one is told from a random one, and a random one is not told from chance."""

import numpy as np
import pandas as pd
import pytest
import torch

from lymph_hf import LymphMILConfig, LymphMILForBagClassification
from lymph_hf.explain_quality import (
    RANKINGS,
    SCORES,
    JudgementError,
    curve_shares,
    guilty_types,
    judge_patient,
    judgement_intervals,
    judgement_table,
    ranking_curves,
    type_scores,
)
from lymph_hf.metrics import Bootstrap


def make_answer(evidence: np.ndarray):
    """A model that says how much evidence the mean cell has."""

    def answer(mask: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-(mask @ evidence) / mask.sum(axis=1)))

    return answer


def test_the_perfect_ranking_beats_random_ones_and_the_reverse_loses():
    rng = np.random.default_rng(0)
    evidence = rng.normal(size=30)
    answer, best = make_answer(evidence), np.argsort(-evidence)
    deletion, insertion = ranking_curves(answer, best)
    worst = ranking_curves(answer, best[::-1])
    for _ in range(50):
        random = ranking_curves(answer, rng.permutation(30))
        assert deletion.mean() < random[0].mean() < worst[0].mean()
        assert insertion.mean() > random[1].mean() > worst[1].mean()
    everything = answer(np.ones((1, 30), dtype=bool))[0]
    assert deletion[0] == insertion[-1] == everything
    assert (np.diff(deletion) < 0).all()


@pytest.mark.parametrize("cells", [1, 2, 7, 10, 198])
def test_curves_take_and_give_the_stated_shares_and_never_leave_a_patient_without_cells(cells):
    ranking = np.random.default_rng(1).permutation(cells)
    seen = []

    def answer(mask):
        seen.append(mask)
        return mask.sum(axis=1).astype(float)

    deletion, insertion = ranking_curves(answer, ranking)
    taken, given = curve_shares()
    np.testing.assert_array_equal(deletion, np.maximum(cells - np.round(taken * cells), 1))
    np.testing.assert_array_equal(insertion, np.maximum(np.round(given * cells), 1))
    for row, left in zip(seen[0][:10], deletion, strict=True):
        assert set(np.flatnonzero(row)) == set(ranking[cells - int(left) :])


def rows_of(scores_of_patient) -> pd.DataFrame:
    rng = np.random.default_rng(2)
    rows = []
    for patient in range(60):
        guilty = (rng.random(rng.integers(16, 60)) < 0.4).astype(float)
        rows.append({"patient_id": patient, "ranking": "it", **type_scores(scores_of_patient(guilty, rng), guilty)})
    return pd.DataFrame(rows).assign(deletion=0.0, insertion=0.0)


def test_the_interval_of_a_random_ranking_contains_chance_and_of_a_good_one_does_not():
    random = judgement_intervals(rows_of(lambda guilty, rng: rng.random(len(guilty))), Bootstrap(500))["it"]
    assert random["auroc"].low < 0.5 < random["auroc"].high
    assert random["precision"].low < random["share"].value < random["precision"].high
    good = judgement_intervals(rows_of(lambda guilty, rng: guilty + rng.normal(size=len(guilty))), Bootstrap(500))["it"]
    assert good["auroc"].low > 0.6
    assert good["precision"].low > good["share"].value + 0.1


def test_scores_by_hand():
    scores = np.array([0.9, 0.8, 0.1, 0.7, 0.2, 0.6, 0.5, np.nan])
    guilty = np.array([1, 0, 0, 1, 0, np.nan, 1, 1])
    # Known cells: 0.9 g, 0.8, 0.7 g, 0.5 g, 0.2, 0.1; of the 9 pairs 0.7 and 0.5 lose to 0.8.
    assert type_scores(scores, guilty) == pytest.approx({"auroc": 7 / 9, "precision": 3 / 5, "share": 3 / 6})
    for one_kind in (np.ones(8), np.zeros(8), np.full(8, np.nan)):
        assert all(np.isnan(value) for value in type_scores(scores, one_kind).values())


def test_means_are_over_the_patients_that_have_the_score():
    rows = pd.DataFrame(
        {"patient_id": [1, 2, 3], "ranking": "it", "auroc": [0.6, np.nan, 0.8]}
        | {name: [0.1, 0.2, 0.6] for name in SCORES[1:]}
    )
    found = judgement_intervals(rows, Bootstrap(200))["it"]
    assert found["auroc"].value == pytest.approx(0.7)
    assert found["deletion"].value == pytest.approx(0.3)
    assert found["auroc"].dropped < 0.2, "draws of patient 2 alone"
    nobody = judgement_intervals(rows.assign(auroc=np.nan), Bootstrap(50))["it"]["auroc"]
    assert str(nobody) == "undefined"


def test_a_patient_of_a_model_is_judged_by_every_ranking():
    torch.manual_seed(0)
    model = LymphMILForBagClassification(LymphMILConfig(encoder="test_vit", image_size=32)).eval()
    model.classifier.weight.data *= 5
    inputs = {"pixel_values": torch.randn(1, 12, 3, 32, 32)}
    judged = judge_patient(model, inputs, np.arange(12) % 2.0, seed=3)
    assert set(judged.rows) == set(RANKINGS)
    assert judged.rows["leave_one_out"]["deletion"] > 0
    assert judged.rows["leave_one_out"]["insertion"] > 0
    assert set(judged.deletion) == {*RANKINGS, "random"}
    again = judge_patient(model, inputs, np.arange(12) % 2.0, seed=3)
    assert judged.rows == again.rows
    # What is left at the start and given at the end is the patient as it is.
    with torch.no_grad():
        answer = model(**inputs).logits.softmax(-1)[0, 1].item()
    for name in judged.deletion:
        assert judged.deletion[name][0] == pytest.approx(answer, abs=1e-5)
        assert judged.insertion[name][-1] == pytest.approx(answer, abs=1e-5)


def test_types_are_named_by_whole_words():
    types = ["Promyelocyte", "Blast, no lineage spec", "Blast, variant", "Erythroblast", "Lymphocyte", "cll_like"]
    assert guilty_types(types, ["promyelocyte", "blast"]) == {types[0], types[1], types[2]}
    with pytest.raises(JudgementError, match="--positive cll: no such cell type. The table has: Blast"):
        guilty_types(types, ["blast", "cll"])
    with pytest.raises(JudgementError, match="expected some of the types"):
        guilty_types(types, [])


def test_the_table_says_score_and_chance():
    rows = rows_of(lambda guilty, rng: guilty + rng.normal(size=len(guilty)))
    text = judgement_table(judgement_intervals(rows, Bootstrap(50)))
    assert "precision@5" in text.splitlines()[0]
    assert text.splitlines()[1].startswith("it ")
