"""The bags of the algorithmic unit tests obey their rules, and their shortcuts fool a naive statistic."""

import pytest
import torch
from script_loader import script
from sklearn.metrics import roc_auc_score

suite = script("mil_unit_tests")

EVERY_TEST = pytest.mark.parametrize("name", suite.TESTS)
SHIFTED = pytest.mark.parametrize("shifted", [False, True])


def draw(name: str, shifted: bool, bags: int = 200):
    return suite.TESTS[name](bags, shifted, torch.Generator().manual_seed(0))


def count(bags, kind: int) -> torch.Tensor:
    return (bags.kinds == kind).sum(dim=1)


def area(labels: torch.Tensor, statistic: torch.Tensor) -> float:
    return roc_auc_score(labels.numpy(), statistic.numpy())


@EVERY_TEST
@SHIFTED
def test_bags_are_well_formed_and_seeded(name, shifted):
    bags, again = draw(name, shifted), draw(name, shifted)
    assert torch.equal(bags.x, again.x)
    assert bags.labels.float().mean() == 0.5
    assert bags.mask.any(dim=1).all()
    assert torch.equal(bags.mask, bags.kinds != suite.PADDING)
    assert bags.x.shape == (*bags.mask.shape, suite.CELL_SIZE)


RULES = {
    "single_concept": lambda a, b, n: a + b > 0,
    "multi_concept": lambda a, b, n: (a > 0) & (b > 0),
    "false_frequency": lambda a, b, n: (a > 0) & (b > 0),
    "share": lambda a, b, n: a / n > 0.5,
}


@EVERY_TEST
@SHIFTED
def test_the_rule_holds_whatever_the_shortcut_does(name, shifted):
    bags = draw(name, shifted)
    a, b = count(bags, suite.CONCEPT_A), count(bags, suite.CONCEPT_B)
    assert torch.equal(RULES[name](a, b, bags.mask.sum(dim=1)), bags.labels == 1)


@pytest.mark.parametrize("name", ["single_concept", "multi_concept"])
def test_absence_of_poison_fools_and_is_reversed(name):
    for shifted, expected in ((False, 1.0), (True, 0.0)):
        bags = draw(name, shifted)
        coldest = bags.x.mean(dim=-1).masked_fill(~bags.mask, torch.inf).amin(dim=1)  # poison lies at -10
        assert area(bags.labels, coldest) == expected
        assert set(count(bags, suite.POISON).tolist()) == {0, 1}


def test_counting_concept_cells_fools_and_is_reversed():
    for shifted, expected in ((False, 1.0), (True, 0.0)):
        bags = draw("false_frequency", shifted)
        assert area(bags.labels, (bags.x.mean(dim=-1) > 1.5).logical_and(bags.mask).sum(dim=1)) == expected


def test_both_concepts_serve_in_negative_bags():
    bags = draw("false_frequency", True)
    negative = bags.labels == 0
    assert (count(bags, suite.CONCEPT_A)[negative] > 0).any()
    assert (count(bags, suite.CONCEPT_B)[negative] > 0).any()


def test_presence_and_extremes_say_nothing_about_the_share():
    bags = draw("share", False)
    top = bags.x.masked_fill(~bags.mask.unsqueeze(-1), -torch.inf).amax(dim=(1, 2))
    assert area(bags.labels, top) == 0.5


def test_maximum_cannot_measure_a_share_but_attention_can():
    assert suite.run_test("share", "max", steps=60, bags=200).verdict == "not learnt"
    assert suite.run_test("share", "gated_attention", steps=60, bags=200).verdict == "pass"


def test_attention_takes_the_poison_and_collecting_evidence_does_not():
    assert suite.run_test("single_concept", "gated_attention", steps=60, bags=200).verdict == "shortcut"
    reference = suite.run_test("single_concept", suite.REFERENCE, steps=100, bags=200)
    assert reference.shifted > 0.75


@pytest.mark.parametrize(
    ("alike", "shifted", "verdict"),
    [(0.95, 0.95, "pass"), (0.95, 0.7, "partly"), (0.95, 0.1, "shortcut"), (0.6, 0.95, "not learnt")],
)
def test_verdicts(alike, shifted, verdict):
    assert suite.Outcome(alike, shifted).verdict == verdict


def test_table_has_a_row_per_pooling_and_a_column_per_test():
    lines = suite.table(["mean"], steps=2, bags=20).splitlines()
    assert len(lines) == 3
    assert lines[2].startswith("| mean | ")
    assert all(line.count("|") == len(suite.TESTS) + 2 for line in lines)
