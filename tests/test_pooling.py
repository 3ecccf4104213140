"""What must hold for every pooling, and the faults of other libraries that must not come back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mil_cases import CELL_SIZE, NUM_LABELS, POOLER_CASES, make_batch, make_pooler, shuffled
from torch.testing import assert_close

from lymph_hf.pooling import POOLERS, build_pooler, check_bags
from lymph_hf.pooling_base import RealCells
from lymph_hf.pooling_layers import AttentionBlock, MultiHeadAttention

ALL = pytest.mark.parametrize("case", POOLER_CASES)
SIZES = (7, 1, 4, 10, 2)
LABELS = torch.tensor([0, 1, 2, 0, 1])
RAGGED = st.lists(st.integers(1, 9), min_size=1, max_size=4)
EXPORTED = ["max", "instance_logits", "gated_attention", "top_k", "clam_mb", "dsmil", "dtfd", "transmil/landmarks"]
few_examples = settings(max_examples=10, deadline=None, derandomize=True)


# --- the contract


@ALL
def test_shapes_and_weights(case):
    pooler = make_pooler(case)
    x, mask = make_batch(SIZES, extra=2)
    embedding, weights = pooler(x, mask)
    assert embedding.shape == (len(SIZES), pooler.output_size)
    assert weights.shape == mask.shape
    assert embedding.isfinite().all()
    assert (weights[~mask] == 0).all()
    assert (weights >= 0).all()
    if pooler.is_attention:
        assert_close(weights.sum(dim=1), torch.ones(len(SIZES), dtype=weights.dtype))


def test_the_two_poolings_without_attention_say_so():
    assert [name for name in POOLERS if not build_pooler(name, 16).is_attention] == ["sum", "instance_logits"]


@ALL
def test_order_of_cells_does_not_matter(case):
    pooler = make_pooler(case)
    x, mask = make_batch(SIZES)
    embedding, weights = pooler(x, mask)
    moved_x, moved_mask, order = shuffled(x, mask)
    moved_embedding, moved_weights = pooler(moved_x, moved_mask)
    assert_close(moved_embedding, embedding)
    assert_close(moved_weights, weights.gather(1, order))


@ALL
@pytest.mark.parametrize("content", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_padding_does_not_matter(case, content):
    pooler = make_pooler(case)
    x, mask = make_batch(SIZES)
    padded_x, padded_mask = make_batch(SIZES, extra=5)
    padded_x = padded_x.masked_fill(~padded_mask.unsqueeze(-1), content)
    padded_x[:, : x.shape[1]] = torch.where(mask.unsqueeze(-1), x, content)
    embedding, weights = pooler(x, mask)
    padded_embedding, padded_weights = pooler(padded_x, padded_mask)
    assert_close(padded_embedding, embedding)
    assert_close(padded_weights[:, : x.shape[1]], weights)


@ALL
def test_auxiliary_loss_ignores_padding_and_order(case):
    pooler = make_pooler(case)
    x, mask = make_batch(SIZES)
    *_, loss = pooler.pool(x, mask, LABELS)
    moved_x, moved_mask, _ = shuffled(x, mask)
    *_, moved_loss = pooler.pool(moved_x.nan_to_num(1e6), moved_mask, LABELS)
    assert (loss is None) == (moved_loss is None)
    if loss is not None:
        assert loss.shape == ()
        assert_close(moved_loss, loss)


@ALL
@given(sizes=RAGGED, extra=st.integers(0, 4), seed=st.integers(0, 99))
@few_examples
def test_bag_alone_equals_bag_in_batch(case, sizes, extra, seed):
    pooler = make_pooler(case)
    x, mask = make_batch(sizes, extra=extra, seed=seed)
    x, mask, _ = shuffled(x, mask, seed)
    embedding, weights = pooler(x, mask)
    for bag, size in enumerate(sizes):
        alone, alone_weights = pooler(x[bag][mask[bag]].unsqueeze(0), torch.ones(1, size, dtype=torch.bool))
        assert_close(embedding[bag], alone[0])
        assert_close(weights[bag][mask[bag]], alone_weights[0])


@ALL
def test_every_cell_counts(case):
    pooler = make_pooler(case)
    x, mask = make_batch((6,))
    embedding, weights = pooler(x, mask)
    # A cell far below the maximum, or outside the top k, rightly does not count: there the leading cell must.
    selective = case.startswith(("max", "top_k", "instance_logits/max"))
    for cell in [int(weights.argmax())] if selective else range(6):
        changed = x.clone()
        changed[0, cell] = -x[0, cell]
        assert (pooler(changed, mask)[0] - embedding).abs().max() > 1e-6


@ALL
def test_neighbours_do_not_matter(case):
    pooler = make_pooler(case)
    x, mask = make_batch(SIZES)
    embedding, _ = pooler(x, mask)
    x[0, :7] = 100.0
    assert_close(pooler(x, mask)[0][1:], embedding[1:])


@ALL
def test_bag_of_one_cell(case):
    pooler = make_pooler(case).train()
    x, mask = make_batch((1, 1))
    embedding, weights, loss = pooler.pool(x, mask, torch.tensor([0, 2]))
    assert embedding.isfinite().all()
    if pooler.is_attention:
        assert_close(weights, torch.ones_like(weights))
    if loss is not None:
        assert loss.isfinite()


@ALL
def test_gradients_reach_every_parameter_and_are_finite(case):
    pooler = make_pooler(case).train()
    x, mask = make_batch(SIZES, extra=1)
    x.requires_grad_()
    embedding, _, loss = pooler.pool(x, mask, LABELS)
    direction = torch.randn(embedding.shape, dtype=embedding.dtype, generator=torch.Generator().manual_seed(3))
    ((embedding * direction).sum() + (0 if loss is None else loss)).backward()
    for name, parameter in pooler.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).any(), name
    assert (x.grad[~mask] == 0).all()
    assert (x.grad[mask] != 0).any()
    assert x.grad.isfinite().all()


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtypes(case, dtype):
    x, mask = make_batch(SIZES, dtype=dtype)
    embedding, weights, loss = make_pooler(case, dtype=dtype).pool(x, mask, LABELS)
    assert embedding.dtype == dtype
    assert embedding.isfinite().all()
    assert weights.dtype == torch.promote_types(dtype, torch.float32)
    assert loss is None or loss.dtype == torch.promote_types(dtype, torch.float32)


@ALL
def test_autocast_is_close_to_full_precision(case):
    pooler = make_pooler(case, dtype=torch.float32).train()
    x, mask = make_batch(SIZES, dtype=torch.float32)
    torch.manual_seed(5)  # DTFD deals at random in training
    expected, *_ = pooler.pool(x, mask, LABELS)
    torch.manual_seed(5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embedding, weights, loss = pooler.pool(x, mask, LABELS)
    if expected.requires_grad:
        (embedding.float().square().mean() + (0 if loss is None else loss)).backward()
    assert all(p.grad.isfinite().all() for p in pooler.parameters())
    assert weights.dtype == torch.float32
    # Ranking by score may swap two near-equal cells in bfloat16, hence no tighter than the size of a feature.
    assert_close(embedding.float(), expected, atol=0.1 * expected.abs().max().item(), rtol=0)


@ALL
def test_evaluation_draws_no_random_numbers(case):
    pooler = make_pooler(case)
    x, mask = make_batch(SIZES)
    state = torch.get_rng_state()
    first = pooler(x, mask)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, pooler(x, mask), strict=True))


@ALL
def test_same_seed_same_numbers(case):
    x, mask = make_batch(SIZES)
    results = []
    for _ in range(2):
        pooler = make_pooler(case, seed=11).train()
        torch.manual_seed(12)
        results.append(pooler(x, mask)[0])
    assert torch.equal(*results)


@pytest.mark.parametrize(
    "case", ["max", "instance_logits", "gated_attention", "top_k", "clam_mb", "dsmil", "dtfd", "transmil/landmarks"]
)
def test_exported_graph_honours_the_mask(case):
    """The poolings with steps that depend on the size of bag or batch, exported for any size."""
    pooler = make_pooler(case)
    x, mask = make_batch(SIZES)
    full = torch.ones_like(mask)
    any_size = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    shapes = {"x": any_size, "mask": any_size}
    program = torch.export.export(pooler, (x.nan_to_num(0), full), dynamic_shapes=shapes)  # nothing is padded here
    for sizes in (SIZES, (1,), (3, 17)):
        bags = make_batch(sizes)
        for exported, direct in zip(program.module()(*bags), pooler(*bags), strict=True):
            assert_close(exported, direct)


# --- cost follows the cells


def test_packing_round_trip():
    x, mask = make_batch((3, 1, 5), extra=2)
    cells = RealCells(mask)
    packed = cells.pack(x)
    assert torch.equal(packed, x[mask])
    assert torch.equal(cells.pad(packed), x.nan_to_num(0))


def test_nothing_is_moved_where_nothing_is_padded():
    x, mask = make_batch((4, 4))
    cells = RealCells(mask)
    packed = cells.pack(x)
    assert packed.data_ptr() == cells.pad(packed).data_ptr() == x.data_ptr()
    assert torch.equal(cells.pad(packed), x)


@given(sizes=RAGGED, extra=st.integers(0, 3), seed=st.integers(0, 99))
@few_examples
def test_packed_cells_are_taken_and_summed_as_padded_ones(sizes, extra, seed):
    x, mask, _ = shuffled(*make_batch(sizes, extra=extra, seed=seed), seed)
    x = torch.where(mask.unsqueeze(-1), x, 0)
    cells = RealCells(mask)
    packed = cells.pack(x)
    weights = x[..., :3].transpose(1, 2).contiguous()  # (B, 3, N)
    assert_close(cells.weighted_sum(weights, packed), weights @ x)
    assert_close(cells.weighted_sum(weights[:, 0], packed), (weights @ x)[:, 0])
    real = mask.double().argsort(dim=1, descending=True)[:, : min(sizes)]  # as many real positions of each bag
    assert torch.equal(cells.take(packed, real), x.take_along_dim(real.unsqueeze(-1), dim=1))
    every = torch.arange(mask.shape[1]).expand_as(mask)
    assert cells.take(packed, every.unsqueeze(1)).shape == (len(sizes), 1, *x.shape[1:])  # padding too, whatever it is


@ALL
def test_a_bag_learns_the_same_alone_and_padded(case):
    """A bag without padding, a padded one, and one among others each take a path of their own."""
    pooler = make_pooler(case)
    x, mask = make_batch((5, 3), extra=2)
    results = []
    for bags, cells in ((1, 5), (1, 7), (2, 7)):
        leaf = x[:bags, :cells].clone().requires_grad_()
        embedding, weights, loss = pooler.pool(leaf, mask[:bags, :cells], LABELS[:bags])
        loss = 0 if loss is None else bags * loss - (pooler.pool(x[1:2], mask[1:2], LABELS[1:2])[2] if bags == 2 else 0)
        (embedding[0].square().sum() + weights[0].square().sum() + loss).backward()
        results.append(leaf.grad[0, :5])
        assert torch.equal(leaf.detach().nan_to_num(9), x[:bags, :cells].nan_to_num(9))  # nothing is done in place
    assert_close(results[1], results[0])
    assert_close(results[2], results[0])


@pytest.mark.parametrize(
    "case", ["attention", "gated_attention", "top_k", "self_attention", "clam_sb", "clam_mb", "dsmil", "dtfd"]
)
def test_linear_layers_see_no_padding(case):
    pooler = make_pooler(case)
    x, mask = make_batch((2, 9), extra=20)
    most = int(mask.sum())
    for layer in pooler.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[:-1].numel()))
    rows = []
    pooler(x, mask)
    assert 0 < max(rows) <= most


def test_few_queries_read_as_attention_does():
    torch.manual_seed(0)
    attention = MultiHeadAttention(CELL_SIZE, 3).double()
    x, mask = make_batch((4, 9))
    query = torch.randn(2, 5, CELL_SIZE, dtype=torch.float64)
    x = x.nan_to_num(0)
    assert_close(attention.read(query, x, mask)[0], attention(query, x, mask))


# --- wrong input


def test_empty_bag_is_named():
    x, mask = make_batch((3, 2))
    mask[1] = False
    with pytest.raises(ValueError, match="empty bag at index 1"):
        make_pooler("mean")(x, mask)
    with pytest.raises(ValueError, match=r"index 1 \(patient P7\)"):
        check_bags(mask, ["P3", "P7"])
    check_bags(mask[:1], ["P3"])


def test_wrong_input_is_refused():
    pooler = make_pooler("gated_attention")
    x, mask = make_batch((3, 2))
    with pytest.raises(ValueError, match="input_size"):
        pooler(x[..., :5], mask)
    with pytest.raises(ValueError, match="mask must have shape"):
        pooler(x, mask[:, :2])
    with pytest.raises(TypeError, match="bool"):
        pooler(x, mask.float())
    with pytest.raises(TypeError, match="floating point"):
        pooler(mask.unsqueeze(-1).expand(-1, -1, CELL_SIZE).long(), mask)
    with pytest.raises(ValueError, match=r"\[0, 3\)"):
        pooler.pool(x, mask, torch.tensor([0, NUM_LABELS]))
    with pytest.raises(ValueError, match="one per bag"):
        pooler.pool(x, mask, torch.tensor([0]))


def test_unknown_names_list_the_legal_ones():
    with pytest.raises(ValueError, match="gated_attention.*transmil.*'attenton'"):
        build_pooler("attenton", 8)
    with pytest.raises(ValueError, match="no option 'depth'.*landmarks.*width"):
        build_pooler("transmil", 8, depth=3)
    with pytest.raises(ValueError, match="its options are: none"):
        build_pooler("mean", 8, k=3)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("attention", {"hidden_size": 0}),
        ("attention", {"dropout": 1.0}),
        ("top_k", {"k": 1}),
        ("log_sum_exp", {"sharpness": 0.0}),
        ("instance_logits", {"aggregation": "median"}),
        ("clam_sb", {"instance_loss": "hinge"}),
        ("clam_mb", {"auxiliary_weight": -1.0}),
        ("self_attention", {"width": 20, "num_heads": 8}),
        ("transmil", {"landmarks": 0}),
        ("dtfd", {"pseudo_bags": 0}),
        ("mean", {"num_labels": 1}),
    ],
)
def test_options_out_of_range_are_refused(name, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}|width"):
        build_pooler(name, 8, **options)


def test_adding_a_pooling_takes_one_class_and_one_entry(monkeypatch):
    class MedianPooler(POOLERS["mean"]):
        def _pool(self, x, mask, labels):
            _, weights, _ = super()._pool(x, mask, labels)
            return x.masked_fill(~mask.unsqueeze(-1), torch.nan).nanmedian(dim=1).values, weights, None

    monkeypatch.setitem(POOLERS, "median", MedianPooler)
    x, mask = make_batch((3, 5))
    assert_close(build_pooler("median", CELL_SIZE)(x, mask)[0][0], x[0, :3].median(dim=0).values)


# --- faults measured elsewhere


def test_dsmil_never_picks_a_critical_cell_in_the_padding():
    pooler = make_pooler("dsmil")
    x, mask = make_batch((3, 8))
    with torch.no_grad():  # real cells get logits far below those of a zero vector
        pooler.classifier.weight.fill_(-1.0)
    x[0, :3] = x[0, :3].abs() + 1
    embedding, weights = pooler(x, mask)
    alone, alone_weights = pooler(x[:1, :3], mask[:1, :3])
    assert_close(embedding[:1], alone)
    assert_close(weights[:1, :3], alone_weights)


@pytest.mark.parametrize("training", [False, True])
def test_dtfd_pseudo_bags_hold_real_cells_only(training):
    pooler = make_pooler("dtfd").train(training)
    x, mask = make_batch((2, 9), extra=20)
    embedding, weights, loss = pooler.pool(x, mask, torch.tensor([0, 1]))
    assert (weights[~mask] == 0).all()
    assert (weights[mask] > 0).all()
    assert embedding.isfinite().all()
    assert loss.isfinite()


@pytest.mark.parametrize("case", ["transmil", "transmil/landmarks", "dsmil"])
def test_mask_is_not_ignored_when_only_padding_changes(case):
    pooler = make_pooler(case)
    x, mask = make_batch((4, 30))
    outputs = [pooler(torch.where(mask.unsqueeze(-1), x, fill), mask)[0] for fill in (0.0, 3.0, -50.0)]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@ALL
def test_fully_masked_bag_is_an_error_and_spoils_no_neighbour(case):
    pooler = make_pooler(case)
    x, mask = make_batch((4, 3, 5))
    expected, _ = pooler(x[[0, 2]], mask[[0, 2]])
    mask[1] = False
    with pytest.raises(ValueError, match="empty bag at index 1"):
        pooler(x, mask)
    assert_close(pooler(x[[0, 2]], mask[[0, 2]])[0], expected)


@pytest.mark.parametrize("padding", [3.0, -1e4])
def test_valid_queries_never_see_padded_keys(padding):
    """A mask of padding x padding hides pads from pads only; here the layer itself gets the garbage."""
    torch.manual_seed(0)
    block = AttentionBlock(CELL_SIZE, 3).double()
    x, mask = make_batch((4, 9))
    alone = block(x[:1, :4], None)
    assert_close(block(torch.where(mask.unsqueeze(-1), x, padding), mask)[:1, :4], alone)


def test_self_attention_is_not_inert():
    """Predecessor's fault: batch and sequence axes swapped, so each cell attended to itself alone."""
    torch.manual_seed(0)
    attention = MultiHeadAttention(CELL_SIZE, 3).double()
    x, mask = make_batch((5, 5))
    mixed = attention(x, x, mask)
    changed = x.clone()
    changed[0, 4] += 1
    difference = (attention(changed, changed, mask) - mixed).abs().amax(dim=-1)
    assert (difference[0] > 1e-6).all()  # every cell of the patient sees the change
    assert (difference[1] == 0).all()  # no other patient does
    _, weights = attention.read(x, x, mask)
    assert (weights < 0.9).all()


@pytest.mark.parametrize("case", ["clam_sb", "clam_mb", "clam_sb/smooth_svm", "top_k"])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_bag_smaller_than_k_does_not_crash(case, size):
    pooler = make_pooler(case, k=8)
    x, mask = make_batch((size, 20))
    _, weights, loss = pooler.pool(x, mask, torch.tensor([0, 1]))
    assert (weights[0, :size] > 0).all()
    if loss is not None:
        alone = [pooler.pool(x[[b]], mask[[b]], torch.tensor([b]))[2] for b in range(2)]
        assert_close(loss, sum(alone) / 2)


@pytest.mark.parametrize("case", ["clam_sb", "clam_mb", "dsmil", "dtfd", "instance_logits"])
def test_auxiliary_loss_counts_patients_not_cells(case):
    """Predecessor's fault: a loss divided by bag size lets patients with many cells count less."""
    pooler = make_pooler(case)
    x, mask = make_batch((2, 40))
    labels = torch.tensor([0, 1])
    loss = pooler.pool(x, mask, labels)[2]
    alone = [pooler.pool(x[[b]], mask[[b]], labels[[b]])[2] for b in range(2)]
    assert_close(loss, (alone[0] + alone[1]) / 2)


@pytest.mark.parametrize("case", ["clam_sb", "clam_mb", "dsmil", "dtfd", "instance_logits"])
def test_auxiliary_loss_bears_its_weight_and_needs_labels(case):
    x, mask = make_batch(SIZES)
    single, double, none = (
        make_pooler(case, auxiliary_weight=weight).pool(x, mask, LABELS)[2] for weight in (1.0, 2.0, 0.0)
    )
    assert_close(double, 2 * single)
    assert none is None
    assert make_pooler(case).pool(x, mask)[2] is None


def test_dtfd_deals_at_random_in_training_only():
    pooler = make_pooler("dtfd")
    x, mask = make_batch((9, 9))
    torch.manual_seed(0)
    assert torch.equal(pooler(x, mask)[0], pooler(x, mask)[0])
    pooler.train()
    assert not torch.equal(pooler(x, mask)[0], pooler(x, mask)[0])


@pytest.mark.parametrize("case", ["max", "mean", "gated_attention", "dsmil", "perceiver"])
def test_identical_cells_share_their_weight(case):
    x, mask = make_batch((4,))
    x[0, 1] = x[0, 3]
    weights = make_pooler(case)(x, mask)[1][0]
    assert_close(weights[1], weights[3])


@ALL
def test_ten_thousand_cells(case):
    pooler = make_pooler(case, dtype=torch.float32)
    if case.startswith(("self_attention", "transmil")) and case != "transmil/landmarks":
        pytest.skip("exact attention over 10,000 cells takes seconds; the landmarks are tested")
    x, mask = make_batch((10_000,), dtype=torch.float32)
    with torch.no_grad():
        embedding, weights = pooler(x, mask)
    assert embedding.isfinite().all()
    if pooler.is_attention:
        assert_close(weights.sum().item(), 1.0, atol=1e-4, rtol=0)
