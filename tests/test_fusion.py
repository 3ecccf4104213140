"""What must hold for every fusion behind every pooling, above all where clinical values are missing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mil_cases import (
    CELL_SIZE,
    FUSER_CASES,
    NUM_CLINICAL,
    POOLER_CASES,
    make_batch,
    make_fuser,
    make_pooler,
    shuffled,
)
from torch.testing import assert_close

from lymph_hf.fusion import FUSERS, ClinicalEmbedding, build_fuser, renormalised
from lymph_hf.pooling import POOLERS

nan = torch.nan
SIZES = (5, 1, 8)
EVERY_PAIR = pytest.mark.parametrize("pooling", POOLER_CASES)
FUSION = pytest.mark.parametrize("fusion", FUSER_CASES)
CLINICAL_FUSION = pytest.mark.parametrize("fusion", [case for case in FUSER_CASES if case != "none"])


def clinical_values(bags: int = len(SIZES), seed: int = 4) -> torch.Tensor:
    return torch.randn(bags, NUM_CLINICAL, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def train_missing(fuser: torch.nn.Module) -> None:
    """Give the missing-value weights, zero at first, a value as after training."""
    with torch.no_grad():
        fuser.embed.missing.normal_(generator=torch.Generator().manual_seed(5))


def model(pooling: str, fusion: str):
    pooler = make_pooler(pooling)
    fuser = make_fuser(fusion, pooler)

    def forward(x, mask, clinical):
        return fuser(x, mask, clinical, pooler, is_attention=pooler.is_attention)

    return forward, pooler, fuser


# --- every pooling x every fusion


@EVERY_PAIR
@FUSION
def test_pooling_and_fusion_together(pooling, fusion):
    forward, pooler, fuser = model(pooling, fusion)
    x, mask = make_batch(SIZES, extra=1)
    clinical = clinical_values()
    clinical[1, 0] = nan
    fused, weights = forward(x, mask, clinical)

    assert fused.shape == (len(SIZES), fuser.output_size)
    assert weights.shape == mask.shape
    assert fused.isfinite().all()
    assert (weights[~mask] == 0).all()
    assert (weights >= 0).all()
    if pooler.is_attention or not fuser.uses_pool:
        assert_close(weights.sum(dim=1), torch.ones(len(SIZES), dtype=weights.dtype))

    moved_x, moved_mask, order = shuffled(x, mask)
    moved, moved_weights = forward(moved_x.nan_to_num(-7.0), moved_mask, clinical)  # order, content of padding
    assert_close(moved, fused)
    assert_close(moved_weights, weights.gather(1, order))

    for bag, size in enumerate(SIZES):  # amount of padding, neighbours
        alone, alone_weights = forward(x[[bag], :size], mask[[bag], :size], clinical[[bag]])
        assert_close(alone[0], fused[bag])
        assert_close(alone_weights[0], weights[bag, :size])

    changed = clinical.clone()
    changed[0] += 1
    difference = (forward(x, mask, changed)[0] - fused).abs().amax(dim=1)
    assert (difference[1:] == 0).all()  # one patient's clinical values never change another's output
    # Joining as one more element, they may lose every maximum; everywhere else they must count.
    if not (fusion == "clinical_token" and pooling.startswith(("max", "top_k", "instance_logits/max"))):
        assert (difference[0] > 1e-6) == fuser.uses_clinical


@EVERY_PAIR
@FUSION
def test_gradients_reach_every_parameter_without_nan(pooling, fusion):
    _, pooler, fuser = model(pooling, fusion)
    losses = []

    def pool(cells, real):
        embedding, weights, loss = pooler.pool(cells, real, torch.tensor([0, 1, 2]))
        losses.append(embedding.new_zeros(()) if loss is None else loss)
        return embedding, weights

    x, mask = make_batch(SIZES, extra=1)
    x.requires_grad_()
    clinical = clinical_values()
    clinical[1] = nan
    clinical[2, 1] = nan
    fused, _ = fuser(x, mask, clinical, pool, is_attention=pooler.is_attention)
    direction = torch.randn(fused.shape, dtype=fused.dtype, generator=torch.Generator().manual_seed(3))
    ((fused * direction).sum() + sum(losses)).backward()
    assert x.grad is None or x.grad.isfinite().all()
    used = [fuser, pooler] if fuser.uses_pool else [fuser]
    assert bool(losses) == fuser.uses_pool
    for name, parameter in (pair for module in used for pair in module.named_parameters()):
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # The token may lose every maximum, and then nothing of it is learnt from this batch.
        if not (fusion == "clinical_token" and pooling.startswith(("max", "top_k", "instance_logits/max"))):
            assert (parameter.grad != 0).any(), name


# --- missing values


@CLINICAL_FUSION
def test_missing_differs_from_present(fusion):
    forward, _, fuser = model("gated_attention", fusion)
    x, mask = make_batch(SIZES)
    present = clinical_values()
    for column in range(NUM_CLINICAL):
        missing = present.clone()
        missing[:, column] = nan
        assert ((forward(x, mask, missing)[0] - forward(x, mask, present)[0]).abs().amax(dim=1) > 1e-6).all()


@CLINICAL_FUSION
@pytest.mark.parametrize("trained", [False, True])
def test_none_is_all_missing(fusion, trained):
    forward, _, fuser = model("gated_attention", fusion)
    if trained:
        train_missing(fuser)
    x, mask = make_batch(SIZES)
    fused, weights = forward(x, mask, None)
    assert fused.isfinite().all()
    assert_close((fused, weights), forward(x, mask, torch.full((len(SIZES), NUM_CLINICAL), nan)))


@CLINICAL_FUSION
@given(gaps=st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=3, max_size=3))
@settings(max_examples=10, deadline=None, derandomize=True)
def test_any_pattern_of_gaps_stays_within_its_patient(fusion, gaps):
    forward, _, fuser = model("gated_attention", fusion)
    train_missing(fuser)
    x, mask = make_batch(SIZES)
    full = clinical_values()
    clinical = full.masked_fill(torch.tensor(gaps), nan)
    fused, _ = forward(x, mask, clinical)
    assert fused.isfinite().all()
    complete = [not any(row) for row in gaps]
    assert_close(fused[complete], forward(x, mask, full)[0][complete])


def test_never_missing_in_training_reads_as_the_training_mean_later():
    embed = ClinicalEmbedding(3, 8)
    assert_close(embed(torch.tensor([[0.5, nan, -1.0]])), embed(torch.tensor([[0.5, 0.0, -1.0]])))


def test_missing_weights_learn_only_from_gaps():
    embed = ClinicalEmbedding(3, 8, hidden_size=4)
    embed(torch.tensor([[0.5, nan, -1.0]])).square().sum().backward()
    assert (embed.missing.grad[[0, 2]] == 0).all()
    assert (embed.missing.grad[1] != 0).any()
    assert embed.value.weight.grad.isfinite().all()


def test_embedding_formula():
    torch.manual_seed(0)
    embed = ClinicalEmbedding(2, 3).double()
    torch.nn.init.normal_(embed.missing)
    w, b, m = embed.value.weight, embed.value.bias, embed.missing
    assert_close(embed(torch.tensor([[2.0, nan]], dtype=torch.float64))[0], 2 * w[:, 0] + b + m[1])


# --- single fusions


def test_experts_without_clinical_values_trust_the_images():
    forward, pooler, fuser = model("mean", "mixture_of_experts")
    train_missing(fuser)
    x, mask = make_batch(SIZES)
    clinical = clinical_values()
    clinical[0] = nan
    clinical[1, :2] = nan
    embedding, _ = pooler(x, mask)
    gate = fuser.gate(embedding, clinical)
    assert gate[0] == 1
    assert ((gate[1:] > 0) & (gate[1:] < 1)).all()
    fused, _ = forward(x, mask, clinical)
    assert_close(fused[0], fuser.image_expert(embedding[0]))
    clinic = fuser.clinical_expert(fuser.embed(clinical).relu())
    assert_close(fused[2], gate[2] * fuser.image_expert(embedding[2]) + (1 - gate[2]) * clinic[2])


def test_clinical_only_ignores_the_images():
    forward, _, _ = model("gated_attention", "clinical_only")
    x, mask = make_batch(SIZES)
    clinical = clinical_values()
    fused, weights = forward(x, mask, clinical)
    assert torch.equal(fused, forward(x * 5, mask, clinical)[0])
    assert_close(weights[0, :5], torch.full((5,), 0.2, dtype=weights.dtype))


def test_no_fusion_ignores_the_clinical_values():
    forward, pooler, _ = model("gated_attention", "none")
    x, mask = make_batch(SIZES)
    assert_close(forward(x, mask, clinical_values()), pooler(x, mask))
    assert_close(forward(x, mask, None), pooler(x, mask))


def test_query_fusion_does_not_call_the_pooling_and_changes_its_weights_with_the_patient():
    _, pooler, fuser = model("mean", "clinical_query")

    def never(x, mask):
        raise AssertionError("called")

    x, mask = make_batch((6,))
    one = fuser(x, mask, clinical_values(1), never)[1]
    other = fuser(x, mask, clinical_values(1, seed=9), never)[1]
    assert (one - other).abs().max() > 1e-6


def test_film_formula():
    forward, pooler, fuser = model("mean", "film")
    x, mask = make_batch(SIZES)
    clinical = clinical_values()
    z, _ = pooler(x, mask)
    hidden = torch.relu(fuser.embed(clinical))
    out = hidden @ fuser.modulate.weight.T + fuser.modulate.bias
    assert_close(forward(x, mask, clinical)[0], z + out[:, :CELL_SIZE] * z + out[:, CELL_SIZE:])


def test_token_joins_the_mean():
    forward, _, fuser = model("mean", "clinical_token")
    x, mask = make_batch((4,))
    clinical = clinical_values(1)
    fused, weights = forward(x, mask, clinical)
    assert_close(fused[0], (x[0].sum(dim=0) + fuser.embed(clinical)[0]) / 5)
    assert_close(weights[0], torch.full((4,), 0.25, dtype=weights.dtype))


def test_token_leaves_scores_of_other_poolings_alone():
    forward, _, _ = model("sum", "clinical_token")
    x, mask = make_batch((4,))
    assert_close(forward(x, mask, None)[1][0], torch.ones(4, dtype=torch.float64))


def test_weights_are_uniform_where_the_token_took_all():
    mask = torch.tensor([[True, True, False], [True, True, True]])
    weights = renormalised(torch.tensor([[0.0, 0.0, 0.0], [0.1, 0.3, 0.0]]), mask)
    assert_close(weights, torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.75, 0.0]]))


# --- wrong input


@FUSION
def test_empty_bag_is_an_error_even_where_a_token_would_fill_it(fusion):
    forward, _, _ = model("gated_attention", fusion)
    x, mask = make_batch((3, 2))
    mask[1] = False
    with pytest.raises(ValueError, match="empty bag at index 1"):
        forward(x, mask, clinical_values(2))


@pytest.mark.parametrize("fusion", [name for name, cls in FUSERS.items() if cls.uses_clinical])
def test_no_clinical_variable(fusion):
    with pytest.raises(ValueError, match='num_clinical=0.*choose fusion "none"'):
        build_fuser(fusion, CELL_SIZE, CELL_SIZE, 0)


def test_no_clinical_variable_is_fine_without_fusion():
    x, mask = make_batch((3,))
    build_fuser("none", CELL_SIZE, CELL_SIZE, 0)(x, mask, None, make_pooler("mean"))


def test_wrong_clinical_values_are_refused():
    forward, _, _ = model("mean", "concat")
    x, mask = make_batch(SIZES)
    with pytest.raises(ValueError, match=r"shape \(3, 3\).*got \(3, 2\)"):
        forward(x, mask, clinical_values()[:, :2])
    infinite = clinical_values()
    infinite[2, 1] = torch.inf
    with pytest.raises(ValueError, match=r"clinical\[2, 1\] is infinite"):
        forward(x, mask, infinite)


def test_unknown_names_list_the_legal_ones():
    with pytest.raises(ValueError, match="clinical_query.*'late'"):
        build_fuser("late", 8, 8, 3)
    with pytest.raises(ValueError, match="no option 'depth'.*clinical_size, clinical_hidden_size"):
        build_fuser("concat", 8, 8, 3, depth=1)
    with pytest.raises(ValueError, match="gate_size"):
        build_fuser("mixture_of_experts", 8, 8, 3, gate_size=0)


def test_every_case_is_covered():
    assert {name for name, _ in FUSER_CASES.values()} == set(FUSERS)
    assert {name for name, _ in POOLER_CASES.values()} == set(POOLERS)
