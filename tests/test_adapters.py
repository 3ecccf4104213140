import pickle
import re
import warnings
from copy import deepcopy

import pytest
import timm
import torch
from peft import AutoPeftModel, LoraConfig, PeftModel, convert_to_lora, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoModel

from lymph_hf import POOLERS, LymphMILConfig, LymphMILForBagClassification, LymphMILModel
from lymph_hf.adapter_configs import BottleneckConfig, PartialLoraConfig, PromptConfig
from lymph_hf.adapter_layers import AdapterLayer, ParallelLayer, PartialLowRankLayer, PromptLayer
from lymph_hf.adapter_targets import EncoderParts, head_modules, is_inside
from lymph_hf.adapters import (
    ADAPTERS,
    AdapterError,
    adapter_config,
    applicable_adapters,
    attach_adapter,
    save_adapted,
    trainable_report,
)
from lymph_hf.chunking import activation_bytes, encode_in_chunks

pytestmark = [
    # PEFT asks transformers for an attribute under its old name.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),  # timm's layer norm, when PEFT loads
]

VIT, CNN = "test_vit", "test_resnet"
CASES = {name: (VIT, name, {}) for name in ADAPTERS if name != "residual"} | {
    "lora/qkv": (VIT, "lora", {"targets": "qkv", "dropout": 0.1}),
    "lora/linear": (VIT, "lora", {"targets": "linear"}),
    "bottleneck/mlp": (VIT, "bottleneck", {"after": "mlp", "train_norms": True, "reduction": 4}),
    "lora/conv": (CNN, "lora", {"rank": 2}),
    "dora/conv": (CNN, "dora", {"rank": 2}),
    "bitfit/conv": (CNN, "bitfit", {}),
    "residual": (CNN, "residual", {}),
}
LINEAR = {n for n in CASES if n.split("/")[0] in ("lora", "dora", "rslora", "ia3", "layer_norm", "bitfit", "oft")}
OURS = ("lora", "bitfit", "bottleneck", "adaptformer", "vpt_shallow", "vpt_deep", "residual")


def make_model(encoder: str = VIT, **changes) -> LymphMILForBagClassification:
    torch.manual_seed(0)
    options = {"depth": 2} if encoder == VIT else None
    config = LymphMILConfig(**{"encoder": encoder, "image_size": 32, "encoder_options": options} | changes)
    return LymphMILForBagClassification(config).eval()


def make_bag(cells: int = 3, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "pixel_values": torch.randn(2, cells, 3, 32, 32, generator=generator, dtype=dtype),
        "clinical": torch.randn(2, 3, generator=generator, dtype=dtype),
        "labels": torch.tensor([0, 1]),
    }


def attach(case: str, model: nn.Module | None = None, **kwargs) -> PeftModel:
    encoder, name, options = CASES[case]
    return attach_adapter(make_model(encoder) if model is None else model, name, **options | kwargs)


def disturb(model: nn.Module, seed: int = 3) -> nn.Module:
    """Change every trained number, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def changed_weights(actual: nn.Module, expected: nn.Module) -> set[str]:
    actual, expected = actual.state_dict(), expected.state_dict()
    assert actual.keys() == expected.keys()
    return {name for name, tensor in expected.items() if not torch.equal(actual[name], tensor)}


@torch.no_grad()
def logits(model: nn.Module, **changes) -> torch.Tensor:
    return model.eval()(**make_bag(**changes)).logits


def encoder_of(model: nn.Module) -> nn.Module:
    return EncoderParts(model).encoder


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# Training ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_adapter_and_head_are_trained_and_nothing_else(case):
    model = attach(case).train()
    layers = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    heads = [f"base_model.model.{name}" for name in model.peft_config["default"].modules_to_save]
    assert layers
    for name in trained_names(model):
        assert is_inside(name, layers + heads), name
        assert ".base_layer." not in name.removeprefix("base_model"), name
        assert ".original_module." not in name, name
    encoder_adapter = [name for name in trained_names(model) if is_inside(name, layers)]
    assert encoder_adapter
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # what starts at zero lets gradients through to the rest after the first step
        optimizer.zero_grad()
        model(**make_bag()).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
        optimizer.step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed <= trained_names(model)
    assert set(encoder_adapter) & changed


@pytest.mark.parametrize("case", [case for case in CASES if "vpt" not in case])
def test_training_starts_from_the_encoder_as_it_is(case):
    expected = logits(make_model(CASES[case][0]))
    torch.testing.assert_close(logits(attach(case)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_gradients_in_chunks_are_the_plain_ones(case):
    model = disturb(attach(case, make_model(CASES[case][0]).double()))
    gradients = []
    for chunk_size in (None, 4):
        unwrapped = model.get_base_model()
        unwrapped.config.chunk_size = chunk_size
        model.zero_grad()
        model(**make_bag(5, torch.float64)).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    plain, chunked = gradients
    for name, gradient in plain.items():
        torch.testing.assert_close(chunked[name], gradient, rtol=1e-8, atol=1e-11, msg=name)


def test_dropout_in_adapters_is_repeated_when_chunks_are_recomputed():
    model = make_model(encoder_options={"depth": 2, "drop_path_rate": 0.4}, chunk_size=4).double()
    model = disturb(attach_adapter(model, "bottleneck", dropout=0.5)).train()
    encoder = encoder_of(model)

    def gradients(encode) -> list[torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(5)
        encode(make_bag(4, torch.float64)["pixel_values"].flatten(0, 1)).square().sum().backward()
        return [p.grad.clone() for p in encoder.parameters() if p.requires_grad]

    kept = gradients(lambda cells: torch.cat([encoder(chunk) for chunk in cells.split(4)]))
    for actual, expected in zip(gradients(lambda cells: encode_in_chunks(encoder, cells, 4)), kept, strict=True):
        torch.testing.assert_close(actual, expected)


def test_frozen_leading_blocks_keep_no_activation():
    cells = make_bag()["pixel_values"][0]
    model = make_model(encoder_options={"depth": 6})
    everywhere = activation_bytes(encoder_of(attach_adapter(deepcopy(model), "lora")), cells)
    at_the_end = activation_bytes(encoder_of(attach_adapter(model, "lora", last=1)), cells)
    assert at_the_end < everywhere / 5


@pytest.mark.parametrize("case", ["lora", "adaptformer", "vpt_deep", "bottleneck", "bitfit"])
def test_compiled(case):
    encoder = encoder_of(disturb(attach(case)))
    cells = make_bag()["pixel_values"][0]
    expected = encoder(cells)
    torch._dynamo.reset()
    compiled = torch.compile(encoder, backend="eager", fullgraph=True)(cells)
    torch._dynamo.reset()
    torch.testing.assert_close(compiled, expected)


@pytest.mark.parametrize("case", ["lora", "adaptformer", "vpt_deep", "bottleneck", "bitfit"])
@pytest.mark.parametrize("half", ["autocast", "weights"])
def test_mixed_precision(case, half):
    if half == "weights":
        model = attach(case, make_model().bfloat16())
        assert {p.dtype for n, p in model.named_parameters() if "lymph_" in n} == {torch.float32}
        cells = make_bag(dtype=torch.bfloat16)["pixel_values"][0]
        encoder_of(model)(cells).sum().backward()
    else:
        model = attach(case).train()
        model.get_base_model().config.chunk_size = 2
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**make_bag()).loss
        loss.backward()
    gradients = [p.grad for n, p in model.named_parameters() if "lymph_" in n and p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("half", [False, True])
def test_gradient_checkpointing_of_transformers(half):
    plain = disturb(attach("lora"))
    checkpointed = make_model()
    checkpointed.activation_checkpointing_enable()
    checkpointed = disturb(attach("lora", checkpointed))
    for model in (plain, checkpointed):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            model.eval()(**make_bag()).loss.backward()
    tolerance = {"rtol": 0.05, "atol": 0.01} if half else {}
    for (name, expected), actual in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        if expected.requires_grad:
            torch.testing.assert_close(actual.grad, expected.grad, msg=name, **tolerance)


# PEFT's verbs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_saved_and_loaded_in_every_way(case, tmp_path):
    encoder = CASES[case][0]
    make_model(encoder).save_pretrained(tmp_path / "base")
    base = LymphMILForBagClassification.from_pretrained(tmp_path / "base")
    model = disturb(attach(case, base))
    model.save_pretrained(tmp_path / "adapter")
    assert {"adapter_model.safetensors", "adapter_config.json"} <= {p.name for p in (tmp_path / "adapter").iterdir()}
    small, whole = (
        (tmp_path / f).stat().st_size for f in ("adapter/adapter_model.safetensors", "base/model.safetensors")
    )
    assert small < whole
    expected = logits(model)
    assert not torch.allclose(expected, logits(make_model(encoder)))
    new_base = LymphMILForBagClassification.from_pretrained(tmp_path / "base")
    ways = {
        "PeftModel": PeftModel.from_pretrained(new_base, tmp_path / "adapter"),
        "AutoModel": AutoModel.from_pretrained(tmp_path / "adapter"),
        "AutoPeftModel": AutoPeftModel.from_pretrained(tmp_path / "adapter", import_allowlist=["lymph_hf"]),
    }
    saved = {k.removeprefix("base_model.model."): v for k, v in model.state_dict().items()}
    if "dora" in case:
        del ways["AutoModel"]  # test_magnitudes_of_dora
    for way, loaded in ways.items():
        state = {k.removeprefix("base_model.model."): v for k, v in loaded.state_dict().items()}
        assert state.keys() == saved.keys(), way
        assert all(torch.equal(state[name], tensor) for name, tensor in saved.items()), way
        assert torch.equal(logits(loaded), expected), way


@pytest.mark.parametrize("case", CASES)
def test_several_adapters_switch_disable_delete_unload(case):
    encoder = CASES[case][0]
    plain = make_model(encoder)
    model = disturb(attach(case, make_model(encoder)))
    first = logits(model)
    attach(case, model, adapter_name="second")
    assert torch.equal(logits(model), first)  # the first stays the active one
    trained = trained_names(model)
    model.set_adapter("second")
    assert not trained & trained_names(model)
    disturb(model, seed=4)
    second = logits(model)
    assert not torch.allclose(first, second)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(plain))
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.delete_adapter("second")
    assert torch.equal(logits(model), first)
    whole = [name.removeprefix("model.encoder.") for name in model.peft_config["default"].modules_to_save]
    unloaded = model.unload()  # PEFT leaves what was trained whole
    assert unloaded.state_dict().keys() == plain.state_dict().keys()
    assert not any(isinstance(module, BaseTunerLayer) for module in unloaded.modules())
    assert all(is_inside(name, whole) for name in changed_weights(encoder_of(unloaded), encoder_of(plain)))


@pytest.mark.parametrize("case", CASES)
def test_merging(case):
    model = disturb(attach(case))
    expected = logits(model)
    if case not in LINEAR:
        with pytest.raises(ValueError, match=r"cannot be merged: .+ unload it"):
            model.merge_and_unload()
        with pytest.raises(ValueError, match="cannot be merged"):
            model.merge_adapter()
        return
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unmerge result can be inaccurate")  # IA3 divides by its factors
        model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    merged = model.merge_and_unload(safe_merge=True)
    assert merged.state_dict().keys() == make_model(CASES[case][0]).state_dict().keys()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)


def test_weights_that_are_not_finite_are_not_merged():
    model = attach("bitfit")
    next(p for n, p in model.named_parameters() if "lymph_" in n).data.fill_(torch.inf)
    with pytest.raises(ValueError, match="not finite"):
        model.merge_and_unload(safe_merge=True)


@pytest.mark.parametrize("name", OURS)
def test_verbs_of_transformers(name, tmp_path):
    encoder = CNN if name == "residual" else VIT
    plain, model = make_model(encoder), make_model(encoder)
    model.add_adapter(adapter_config(model, name), "one")
    disturb(model)
    first = logits(model)
    with pytest.warns(UserWarning, match="Already found a `peft_config`"):
        model.add_adapter(adapter_config(model, name), "two")
    assert not torch.equal(logits(model), first)
    model.set_adapter("one")
    assert torch.equal(logits(model), first)
    model.disable_adapters()
    assert torch.equal(logits(model), logits(plain))
    model.save_pretrained(tmp_path)
    fresh = make_model(encoder)
    fresh.load_adapter(str(tmp_path), adapter_name="loaded")
    assert torch.equal(logits(fresh), first)
    fresh.delete_adapter("loaded")
    assert torch.equal(logits(fresh), logits(plain))


def test_magnitudes_of_dora_are_loaded(tmp_path):
    model = disturb(attach("dora"))
    model.save_pretrained(tmp_path)
    fresh = LymphMILForBagClassification(make_model().config).eval()
    fresh.load_state_dict(make_model().state_dict())
    fresh.load_adapter(str(tmp_path))
    assert torch.equal(logits(fresh), logits(model))


def test_enabling_enables_the_head_too():
    model = LymphMILForBagClassification(make_model().config)
    model.add_adapter(adapter_config(model, "lora"))
    disturb(model)
    expected = logits(model)
    model.disable_adapters()
    model.enable_adapters()
    assert torch.equal(logits(model), expected)


def test_frozen_model_and_adapter_in_one_folder(tmp_path):
    model = disturb(attach("adaptformer"))
    expected = logits(model)
    save_adapted(model, tmp_path / "run" / "lymph-mil")
    assert torch.equal(logits(model), expected)  # still whole
    (tmp_path / "run").rename(tmp_path / "moved")
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path / "moved" / "lymph-mil")), expected)


def test_partial_lora_becomes_plain_lora():
    model = disturb(attach("lora", rank=3))
    config, state = convert_to_lora(model, rank=6)
    config.modules_to_save = None
    plain = get_peft_model(make_model(), config)
    set_peft_model_state_dict(plain, state)
    cells = make_bag()["pixel_values"][0]
    torch.testing.assert_close(encoder_of(plain)(cells), encoder_of(model)(cells), rtol=1e-4, atol=1e-4)


def test_a_base_model_takes_adapters_too(tmp_path):
    model = LymphMILModel(make_model().config)
    model = disturb(attach_adapter(model, "vpt_deep")).eval()
    inputs = {"pixel_values": make_bag()["pixel_values"]}
    with torch.no_grad():
        expected = model(**inputs).bag_embedding
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(model.unload(), tmp_path).eval()
        assert torch.equal(loaded(**inputs).bag_embedding, expected)


@pytest.mark.parametrize("case", ["adaptformer", "vpt_shallow"])
def test_copies_and_pickles(case):
    model = disturb(attach(case))
    for copy in (deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(copy), logits(model))
        layer = next(module for module in copy.modules() if isinstance(module, AdapterLayer))
        assert layer is not next(module for module in model.modules() if isinstance(module, AdapterLayer))
        assert not changed_weights(encoder_of(copy.unload()), encoder_of(make_model()))


# The head ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", POOLERS)
def test_every_pooling_is_trained_and_saved_with_the_adapter(pooling, tmp_path):
    model = make_model(pooling=pooling, encoder_options={"depth": 1})
    expected = {n for n, p in model.named_parameters() if not n.startswith("model.encoder")}
    model = attach_adapter(model, "lora", rank=1)
    wrapped = {
        re.sub(r"\.modules_to_save\.default", "", n.removeprefix("base_model.model.")) for n in trained_names(model)
    }
    assert {n for n in wrapped if not n.startswith("model.encoder")} == expected
    disturb(model)
    model.train()(**make_bag()).loss.backward()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model(pooling=pooling, encoder_options={"depth": 1}), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_a_wrapped_pooling_keeps_its_interface():
    model = make_model(pooling="clam_sb")
    width, attention = model.model.pooler.output_size, model.model.pooler.is_attention
    attach_adapter(model, "lora")
    pooler = model.model.pooler
    assert (pooler.output_size, pooler.is_attention) == (width, attention)
    cells = torch.randn(2, 9, model.model.pooler.input_size)
    embedding, weights, loss = pooler.pool(cells, torch.ones(2, 9, dtype=torch.bool), torch.tensor([0, 1]))
    assert embedding.shape == (2, width)
    loss.backward()
    trained = [p for n, p in pooler.named_parameters() if "modules_to_save" in n]
    assert any(p.grad is not None for p in trained)


def test_head_modules_are_told_apart_by_module():
    assert head_modules(make_model()) == ["model.pooler", "model.fuser", "classifier"]
    assert head_modules(make_model(pooling="mean", fusion="none")) == ["classifier"]


# Where an adapter goes -----------------------------------------------------------------------------------------------


def test_lora_reaches_what_it_names():
    model = make_model()
    inside = "model.encoder.blocks"
    assert adapter_config(model, "lora", targets="qv").target_modules == [f"{inside}.{i}.attn.qkv" for i in (0, 1)]
    attention = adapter_config(model, "lora", targets="attention").target_modules
    assert set(attention) == {f"{inside}.{i}.attn.{n}" for i in (0, 1) for n in ("qkv", "proj")}
    linear = adapter_config(model, "lora", targets="linear").target_modules
    assert set(linear) == set(attention) | {f"{inside}.{i}.mlp.{n}" for i in (0, 1) for n in ("fc1", "fc2")}
    assert adapter_config(model, "lora", last=1).target_modules == [f"{inside}.1.attn.qkv"]


def test_partial_lora_leaves_the_keys_alone():
    model = disturb(attach("lora", targets="qv", rank=2))
    layer = next(module for module in model.modules() if isinstance(module, PartialLowRankLayer))
    query, key, value = layer.get_delta_weight("default").chunk(3)
    assert torch.equal(key, torch.zeros_like(key))
    assert torch.linalg.matrix_rank(query) == torch.linalg.matrix_rank(value) == 2
    width = layer.in_features
    assert sum(p.numel() for p in layer.branches.parameters()) == 2 * 2 * 2 * width


def test_bottleneck_formula():
    model = disturb(attach("bottleneck", activation="gelu"))
    block = encoder_of(model).blocks[0]
    x = torch.randn(2, 5, 64)

    def adapted(layer, y):
        f = layer.branches["default"]
        return y + f.up(nn.functional.gelu(f.down(y)))

    after = x + adapted(block.attn, block.attn.base_layer(block.norm1(x)))
    expected = after + adapted(block.mlp, block.mlp.base_layer(block.norm2(after)))
    torch.testing.assert_close(block(x), expected)
    assert block.attn.branches["default"].down.out_features == 64 // 16


def test_adaptformer_reads_the_input_before_the_norm():
    model = disturb(attach("adaptformer"))
    layer = encoder_of(model).blocks[0]
    block, f = layer.base_layer, layer.branches["default"]
    x = torch.randn(2, 5, 64)
    after = x + block.attn(block.norm1(x))
    branch = f.scale * f.up(torch.relu(f.down(after)))
    expected = after + block.mlp(block.norm2(after)) + branch
    torch.testing.assert_close(layer(x), expected)
    assert f.scale.requires_grad
    assert layer._after_attention is None  # nothing outlives the block
    with model.disable_adapter():
        layer(x)
        assert layer._after_attention is None


def reference_prompts(encoder: nn.Module, prompts: dict[int, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """Visual prompt tuning as the paper writes it, block by block, on an encoder without adapters."""
    lead = encoder.num_prefix_tokens
    x = encoder.norm_pre(encoder._pos_embed(encoder.patch_embed(images)))
    count = 0
    for i, block in enumerate(encoder.blocks):
        if i in prompts:  # in place of those of the block before
            tokens = prompts[i].expand(len(x), -1, -1)
            x = torch.cat([x[:, :lead], tokens, x[:, lead + count :]], dim=1)
            count = tokens.shape[1]
        x = block(x)
    return encoder.forward_head(encoder.norm(torch.cat([x[:, :lead], x[:, lead + count :]], dim=1)))


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("encoder", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "test_vit2"])
def test_prompts_as_in_the_paper(encoder, deep):
    model = make_model(encoder, encoder_options={"depth": 3})
    plain = deepcopy(encoder_of(model))
    model = attach_adapter(model, "vpt_deep" if deep else "vpt_shallow", tokens=5).eval()
    layers = {i: block for i, block in enumerate(encoder_of(model).blocks) if isinstance(block, PromptLayer)}
    prompts = {i: layer.branches["default"].tokens for i, layer in layers.items()}
    prompts = {i: tokens for i, tokens in prompts.items() if tokens is not None}
    assert list(prompts) == ([0, 1, 2] if deep else [0])
    images = make_bag()["pixel_values"][0]
    torch.testing.assert_close(encoder_of(model)(images), reference_prompts(plain, prompts, images))


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize(
    ("encoder", "width", "leading"),
    [
        ("vit_tiny_patch16_224", 192, 1),
        ("vit_small_patch16_224", 384, 1),
        ("vit_base_patch16_224", 768, 1),
        ("deit_small_distilled_patch16_224", 384, 2),
        ("vit_small_patch14_reg4_dinov2", 384, 5),
    ],
)
def test_predecessor_fault_3_the_number_of_tokens_is_constant(encoder, width, leading, deep):
    side = 28 if "patch14" in encoder else 32
    model = make_model(encoder, encoder_options={"depth": 2}, image_size=side)
    model = attach_adapter(model, "vpt_deep" if deep else "vpt_shallow", tokens=7)
    encoder = encoder_of(model)
    seen = []
    for block in encoder.blocks:
        block.base_layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    encoder.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    encoder(torch.randn(2, 3, side, side)).square().sum().backward()
    patches = leading + 4
    assert seen == [(2, patches + 7, width)] * 2 + [(2, patches, width)]  # what is pooled never meets a prompt
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if n.endswith("tokens") and p.requires_grad)


def test_deep_and_shallow_prompts_side_by_side():
    model = attach("vpt_deep", tokens=3)
    deep = logits(model)
    attach_adapter(model, "vpt_shallow", adapter_name="shallow", tokens=5)
    model.set_adapter("shallow")
    alone = make_model()
    torch.manual_seed(0)
    layer = encoder_of(model).blocks[0]
    alone = attach_adapter(alone, "vpt_shallow", tokens=5)
    encoder_of(alone).blocks[0].branches["default"].tokens.data.copy_(layer.branches["shallow"].tokens)
    assert torch.equal(logits(model), logits(alone))
    model.set_adapter("default")
    assert torch.equal(logits(model), deep)


# Configurations, names and refusals ----------------------------------------------------------------------------------


def test_by_configuration():
    model = attach_adapter(make_model(), BottleneckConfig(reduction=8, after="mlp"))
    layers = [module for module in encoder_of(model).modules() if isinstance(module, AdapterLayer)]
    assert len(layers) == 2
    assert model.peft_config["default"].modules_to_save == ["model.pooler", "model.fuser", "classifier"]
    model = attach_adapter(make_model(), LoraConfig(target_modules=["fc1"], r=2))
    assert any("fc1.lora_A" in name for name in trained_names(model))
    chosen = attach_adapter(make_model(), PartialLoraConfig(target_modules=["blocks.1.attn.qkv"]))
    assert sum(isinstance(module, PartialLowRankLayer) for module in chosen.modules()) == 1
    with pytest.raises(AdapterError, match="does not apply to"):
        get_peft_model(make_model(), PartialLoraConfig(target_modules=["fc1"]))


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (BottleneckConfig, {"reduction": 0}, "reduction=0: expected at least 1"),
        (BottleneckConfig, {"activation": "swish"}, "'relu', 'gelu', 'silu'"),
        (BottleneckConfig, {"after": "norm"}, "after='norm'"),
        (PromptConfig, {"tokens": 0}, "tokens=0"),
        (PromptConfig, {"dropout": 1.0}, r"\[0, 1\)"),
        (PartialLoraConfig, {"parts": "vq"}, "parts='vq'"),
    ],
)
def test_wrong_configurations(config, options, message):
    with pytest.raises(AdapterError, match=message):
        config(**options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lorra", {}, "expected one of lora, dora"),
        ("lora", {"r": 4}, r"no option r; expected some of: .*rank"),
        ("lora", {"targets": "mlp"}, "targets='mlp': expected one of q, k"),
        ("lora", {"last": 3}, "expected 1 to 2"),
        ("dora", {"targets": "qv"}, 'use targets="qkv"'),
        ("oft", {"block_size": 7}, r"divisor of \[64\]"),
        ("vpt_shallow", {"last": 1}, "shallow"),
        ("residual", {}, "needs a convolutional network .* What applies to it: lora, dora, .*, vpt_deep\\."),
    ],
)
def test_wrong_names_and_options(name, options, message):
    with pytest.raises(AdapterError, match=message):
        attach_adapter(make_model(), name, **options)


def test_what_does_not_apply_is_refused_with_what_does():
    assert applicable_adapters(make_model()) == [name for name in ADAPTERS if name != "residual"]
    assert applicable_adapters(make_model(CNN)) == ["lora", "dora", "rslora", "bitfit", "residual"]
    assert "layer_norm" in applicable_adapters(make_model("test_convnext"))
    with pytest.raises(AdapterError, match="lora, dora, rslora, bitfit, residual"):
        attach_adapter(make_model(CNN), "vpt_deep")


def test_rotary_positions_take_no_prompts_but_other_adapters():
    model = make_model("eva02_tiny_patch14_224", encoder_options={"depth": 2}, image_size=28)
    with pytest.raises(AdapterError, match="rotary"):
        attach_adapter(model, "vpt_deep")
    cells = torch.randn(1, 2, 3, 28, 28)
    for name in ("bottleneck", "adaptformer"):
        adapted = disturb(attach_adapter(deepcopy(model), name))
        assert not torch.allclose(adapted(cells).logits, model(cells).logits)


def test_an_adapter_that_would_do_nothing_is_refused():
    """BEiT multiplies by the weight of its projection without calling the layer."""
    model = make_model("beit_base_patch16_224", encoder_options={"depth": 1, "embed_dim": 48, "num_heads": 2})
    plain = deepcopy(model)
    expected = ["layer_norm", "bitfit", "bottleneck", "adaptformer"]
    assert applicable_adapters(model) == expected
    with pytest.raises(AdapterError, match=rf"never calls blocks\.0\.attn\.qkv.* or one of {', '.join(expected)}\."):
        attach_adapter(model, "lora")
    assert not changed_weights(model, plain)  # left as it was


def test_report():
    model = make_model()
    total = sum(p.numel() for p in model.parameters())
    head = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("model.encoder"))
    lora = 2 * 2 * 2 * 8 * 64
    model = attach_adapter(model, "lora", rank=8)
    share = (head + lora) / (total + lora)
    assert trainable_report(model) == (f"{head + lora:,} of {total + lora:,} parameters are trained ({share:.1%})")
    norms = make_model()
    assert f" of {total:,} parameters" in trainable_report(attach_adapter(norms, "layer_norm"))


def test_the_example_of_the_predecessor():
    """vit_small with LoRA of rank 32 on queries and values: 0.59 M trained numbers in the encoder."""
    encoder = timm.create_model("vit_small_patch16_224", num_classes=0, depth=1)
    model = make_model("vit_small_patch16_224", encoder_options={"depth": 1})
    attach_adapter(model, "lora", rank=32)
    trained = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "encoder" in n)
    assert trained * 12 == 589_824
    assert encoder.embed_dim == 384


def test_a_hook_is_gone_after_unloading():
    model = attach("adaptformer")
    assert isinstance(encoder_of(model).blocks[0], ParallelLayer)
    assert not encoder_of(model.unload()).blocks[0].norm2._forward_pre_hooks
