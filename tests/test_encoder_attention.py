import pytest
import torch
import torch.nn.functional as F

from lymph_hf import encoder_attention
from lymph_hf.encoder_attention import TrainedAttention, trained_attention

NAMES = ("query", "key", "value")


def inputs(dtype: torch.dtype = torch.float32, queries: int = 7, keys: int = 7) -> list[torch.Tensor]:
    """(2, 3, N, 8) each"""
    torch.manual_seed(0)
    return [torch.randn(2, 3, n, 8, dtype=dtype).requires_grad_() for n in (queries, keys, keys)]


@pytest.fixture
def used(monkeypatch) -> list[float]:
    """The scales of the calls that took the fast way."""
    calls, apply = [], encoder_attention._Attention.apply
    monkeypatch.setattr(encoder_attention._Attention, "apply", lambda *args: calls.append(args[3]) or apply(*args))
    return calls


@pytest.mark.parametrize("keys", [7, 4])
def test_gradient_formula(keys):
    assert torch.autograd.gradcheck(
        encoder_attention._Attention.apply, (*inputs(torch.float64, keys=keys), 0.3), fast_mode=True
    )


@pytest.mark.parametrize("cached", [1, 3 * 7 * 7, 10**6])
def test_the_gradient_is_the_same_however_many_images_the_cache_holds(monkeypatch, cached):
    monkeypatch.setattr(encoder_attention, "_CACHED_SCORES", cached)
    query, key, value = inputs(torch.float64)
    F.scaled_dot_product_attention(query, key, value).square().sum().backward()
    again = [
        tensor.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        for tensor in inputs(torch.float64)
    ]
    encoder_attention._Attention.apply(*again, 8**-0.5).square().sum().backward()
    for tensor, reference in zip(again, (query, key, value), strict=True):
        torch.testing.assert_close(tensor.grad, reference.grad)


def test_checkpointed_blocks_and_other_devices_are_left_to_torch():
    network = torch.nn.Sequential(torch.nn.Linear(1, 1))
    assert isinstance(trained_attention(network, torch.device("cpu")), TrainedAttention)
    assert not isinstance(trained_attention(network, torch.device("meta")), TrainedAttention)
    network[0].grad_checkpointing = True
    assert not isinstance(trained_attention(network, torch.device("cpu")), TrainedAttention)


@pytest.mark.parametrize("scale", [None, 0.2])
@pytest.mark.parametrize("autocast", [True, False])
def test_close_to_full_precision(used, scale, autocast):
    exact = inputs()
    expected = F.scaled_dot_product_attention(*exact, scale=scale)
    weights = torch.randn(expected.shape)
    (expected * weights).sum().backward()
    half = inputs() if autocast else [tensor.detach().bfloat16().requires_grad_() for tensor in inputs()]
    with TrainedAttention(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
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
    with TrainedAttention():
        actual = F.scaled_dot_product_attention(*half, **options)
    assert torch.equal(actual, expected)
    assert not used


def test_only_what_gains_takes_the_fast_way(used):
    half = [tensor.detach().bfloat16() for tensor in inputs()]
    with TrainedAttention():
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
