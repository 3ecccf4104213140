import pytest
import torch
import torch.nn.functional as F

from lymph_hf import encoder_gradients
from lymph_hf.encoder_gradients import FasterGradients, faster_gradients

NAMES = ("query", "key", "value")


def inputs(dtype: torch.dtype = torch.float32, queries: int = 7, keys: int = 7) -> list[torch.Tensor]:
    """(2, 3, N, 8) each"""
    torch.manual_seed(0)
    return [torch.randn(2, 3, n, 8, dtype=dtype).requires_grad_() for n in (queries, keys, keys)]


@pytest.fixture
def used(monkeypatch) -> list[float]:
    """The scales of the calls that took the fast way."""
    calls, apply = [], encoder_gradients._Attention.apply
    monkeypatch.setattr(encoder_gradients._Attention, "apply", lambda *args: calls.append(args[3]) or apply(*args))
    return calls


@pytest.mark.parametrize("keys", [7, 4])
def test_gradient_formula(keys):
    assert torch.autograd.gradcheck(
        encoder_gradients._Attention.apply, (*inputs(torch.float64, keys=keys), 0.3), fast_mode=True
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(3, 8), (8, 3), (4, 5), (5, 4)])
def test_gradient_formula_of_a_linear_layer(sizes, bias):
    torch.manual_seed(0)
    wide, narrow = sizes
    shapes = [(2, 3, narrow), (wide, narrow), *[(wide,)] * bias]
    tensors = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    tensors += [] if bias else [None]
    assert torch.autograd.gradcheck(encoder_gradients._Linear.apply, tensors)
    torch.testing.assert_close(encoder_gradients._Linear.apply(*tensors), F.linear(*tensors))


@pytest.mark.parametrize("frozen", ["", "x", "weight", "bias"])
@pytest.mark.parametrize("autocast", [True, False])
def test_a_linear_layer_is_close_to_full_precision(autocast, frozen):
    """Gradients come for what is trained alone, in the precision of what they are gradients of."""
    torch.manual_seed(0)
    values = {"x": torch.randn(2, 40, 6), "weight": torch.randn(16, 6), "bias": torch.randn(16)}
    exact = [values[name].clone().requires_grad_(name != frozen) for name in values]
    half = [tensor.detach().to(torch.float32 if autocast else torch.bfloat16) for tensor in exact]
    half = [tensor.requires_grad_(of.requires_grad) for tensor, of in zip(half, exact, strict=True)]
    expected = F.linear(*exact)
    weights = torch.randn(expected.shape)
    (expected * weights).sum().backward()
    with FasterGradients(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        actual = F.linear(*half)
    assert type(actual.grad_fn).__name__ == "_LinearBackward"
    (actual.float() * weights).sum().backward()
    torch.testing.assert_close(actual.float(), expected, rtol=0.03, atol=0.05)
    for tensor, reference in zip(half, exact, strict=True):
        assert (tensor.grad is None) == (reference.grad is None)
        if tensor.grad is not None:
            assert tensor.grad.dtype == tensor.dtype
            error = (tensor.grad.float() - reference.grad).norm() / reference.grad.norm()
            assert error < 0.01


def test_a_linear_layer_without_a_gradient_is_left_to_torch():
    half = torch.randn(3, 6).bfloat16(), torch.randn(4, 6).bfloat16()
    with FasterGradients():
        assert torch.equal(F.linear(*half), half[0] @ half[1].T)
        exact = F.linear(half[0].float(), half[1].float().requires_grad_())
    assert type(exact.grad_fn).__name__ != "_LinearBackward"


@pytest.mark.parametrize("cached", [1, 3 * 7 * 7, 10**6])
def test_the_gradient_is_the_same_however_many_images_the_cache_holds(monkeypatch, cached):
    monkeypatch.setattr(encoder_gradients, "_CACHED_SCORES", cached)
    query, key, value = inputs(torch.float64)
    F.scaled_dot_product_attention(query, key, value).square().sum().backward()
    again = [
        tensor.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        for tensor in inputs(torch.float64)
    ]
    encoder_gradients._Attention.apply(*again, 8**-0.5).square().sum().backward()
    for tensor, reference in zip(again, (query, key, value), strict=True):
        torch.testing.assert_close(tensor.grad, reference.grad)


def test_checkpointed_blocks_and_other_devices_are_left_to_torch():
    network = torch.nn.Sequential(torch.nn.Linear(1, 1))
    assert isinstance(faster_gradients(network, torch.device("cpu")), FasterGradients)
    assert not isinstance(faster_gradients(network, torch.device("meta")), FasterGradients)
    network[0].grad_checkpointing = True
    assert not isinstance(faster_gradients(network, torch.device("cpu")), FasterGradients)


@pytest.mark.parametrize("scale", [None, 0.2])
@pytest.mark.parametrize("autocast", [True, False])
def test_close_to_full_precision(used, scale, autocast):
    exact = inputs()
    expected = F.scaled_dot_product_attention(*exact, scale=scale)
    weights = torch.randn(expected.shape)
    (expected * weights).sum().backward()
    half = inputs() if autocast else [tensor.detach().bfloat16().requires_grad_() for tensor in inputs()]
    with FasterGradients(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        actual = F.scaled_dot_product_attention(*half, scale=scale)
    (actual.float() * weights).sum().backward()
    assert used == [8**-0.5 if scale is None else scale]
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), expected, rtol=0.02, atol=0.02)
    for name, tensor, reference in zip(NAMES, half, exact, strict=True):
        torch.testing.assert_close(
            tensor.grad.float(), reference.grad, rtol=0.03, atol=0.03, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    "options",
    [
        {"attn_mask": torch.ones(7, 7, dtype=torch.bool)},
        {"is_causal": True},
        {"dropout_p": 0.5},
        {"enable_gqa": True},
    ],
    ids=["mask", "causal", "dropout", "grouped"],
)
def test_options_go_the_way_of_torch(used, options):
    half = [tensor.detach().bfloat16().requires_grad_() for tensor in inputs()]
    torch.manual_seed(1)
    expected = F.scaled_dot_product_attention(*half, **options)
    torch.manual_seed(1)
    with FasterGradients():
        actual = F.scaled_dot_product_attention(*half, **options)
    assert torch.equal(actual, expected)
    assert not used


def test_only_what_gains_takes_the_fast_way(used):
    half = [tensor.detach().bfloat16() for tensor in inputs()]
    with FasterGradients():
        F.scaled_dot_product_attention(*inputs())  # full precision
        F.scaled_dot_product_attention(*half)  # nothing to learn
        half[0].requires_grad_()
        with torch.no_grad():
            F.scaled_dot_product_attention(*half)
        assert not used
        F.scaled_dot_product_attention(*half)
        assert len(used) == 1
    F.scaled_dot_product_attention(*half)
    assert len(used) == 1
