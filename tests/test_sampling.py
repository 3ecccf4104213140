"""The order of examples: complete, seeded, the same for any number of processes."""

from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lymph_hf.sampling import EpochPlan, balanced_weights, class_weights

sizes = st.integers(1, 23)


def indices(batches) -> list[int]:
    """Of the batches that count."""
    return [index for batch in batches if batch.share for _, index in batch.keys]


@given(
    examples=sizes,
    batch_size=sizes,
    micro_batch=st.integers(1, 5),
    processes=st.integers(1, 4),
    epoch=st.integers(0, 3),
)
def test_each_example_is_seen_once_with_the_same_weight(examples, batch_size, micro_batch, processes, epoch):
    plans = [EpochPlan(examples, batch_size, micro_batch, 7, None, processes, p) for p in range(processes)]
    epochs = [list(plan.batches(epoch)) for plan in plans]
    assert len({len(batches) for batches in epochs}) == 1, "all processes meet equally often"
    assert len({tuple(batch.last for batch in batches) for batches in epochs}) == 1
    assert sorted(indices(chain(*epochs))) == list(range(examples))
    assert sum(batch.last for batch in epochs[0]) == plans[0].steps
    shares = np.zeros(plans[0].steps)
    for batches in epochs:
        step = 0
        for batch in batches:
            shares[step] += batch.share
            step += batch.last
    np.testing.assert_allclose(shares, 1)
    assert all(1 <= len(batch.keys) <= micro_batch for batches in epochs for batch in batches)


@given(examples=sizes, batch_size=sizes, first=st.integers(0, 30))
def test_continuing_at_a_step_gives_the_rest_of_the_epoch(examples, batch_size, first):
    plan = EpochPlan(examples, batch_size, seed=3)
    whole, rest = list(plan.batches(1)), list(plan.batches(1, first))
    assert rest == whole[len(whole) - len(rest) :]
    assert sum(batch.last for batch in rest) == max(0, plan.steps - first)


def test_seed_and_epoch_decide_the_order():
    plan = EpochPlan(50, 5, seed=1)
    assert (plan.order(2) == EpochPlan(50, 50, 3, seed=1, processes=2).order(2)).all()
    assert (plan.order(2) != plan.order(3)).any()
    assert (plan.order(2) != EpochPlan(50, 5, seed=2).order(2)).any()


def test_balanced_sampling_draws_classes_equally_often():
    labels = [0] * 10 + [1] * 90
    plan = EpochPlan(100, 10, seed=0, weights=balanced_weights(labels))
    drawn = np.concatenate([plan.order(epoch) for epoch in range(50)])
    assert np.mean(np.array(labels)[drawn]) == pytest.approx(0.5, abs=0.03)


def test_class_weights_have_mean_one_over_the_examples_and_undo_the_imbalance():
    labels = [0] * 3 + [1] * 9
    weights = class_weights(labels, 2)
    assert np.mean([weights[label] for label in labels]) == pytest.approx(1)
    assert 3 * weights[0] == pytest.approx(9 * weights[1])
    with pytest.raises(ValueError, match="every class"):
        class_weights(labels, 3)


@pytest.mark.parametrize("name", ["examples", "batch_size", "micro_batch"])
def test_zero_sizes_are_refused(name):
    with pytest.raises(ValueError, match=name):
        EpochPlan(**{"examples": 1, "batch_size": 1, name: 0})
