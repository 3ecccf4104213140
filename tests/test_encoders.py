"""Any timm model is an encoder, and its weights come from wherever and however they were published."""

import argparse
import os
import pickle

import pytest
import timm
import torch
from safetensors.torch import save_file
from script_loader import script
from timm.layers import resample_abs_pos_embed
from timm.models import save_for_hf
from torch import nn
from torch.testing import assert_close
from transformers import AutoModel

from lymph_hf import LymphImageProcessor, LymphMILConfig, LymphMILForBagClassification, LymphMILModel
from lymph_hf.encoder_weights import load_encoder_weights, read_tensors
from lymph_hf.encoders import build_encoder, embedding_size, encode_cells, encoder_data_config, resolve_encoder

SMALL_DINO = {"embed_dim": 32, "depth": 2, "num_heads": 2}
# Every family in its real architecture, made small by options and by the size of its images.
FAMILIES = {
    "test_vit": ({}, 32),
    "test_vit2": ({}, 32),
    "test_vit3": ({}, 32),
    "test_vit4": ({}, 32),
    "test_vit_relpos": ({}, 32),
    "test_resnet": ({}, 32),
    "test_efficientnet": ({}, 32),
    "test_convnext": ({}, 32),
    "test_nfnet": ({}, 32),
    "vit_small_patch8_224.dino": (SMALL_DINO, 32),
    "vit_small_patch14_dinov2": (SMALL_DINO, 28),
    "vit_small_patch14_reg4_dinov2": (SMALL_DINO, 28),
    "vit_tiny_patch16_dinov3_qkvb": ({"depth": 1}, 32),
    "eva02_tiny_patch14_224": ({"depth": 1}, 28),
    "deit_tiny_distilled_patch16_224": ({"depth": 1}, 32),
    "flexivit_small": (SMALL_DINO, 32),
    "vit_xsmall_patch16_clip_224.tinyclip_yfcc15m": (SMALL_DINO, 32),
    "swin_tiny_patch4_window7_224": ({"depths": [1, 1, 1, 1], "embed_dim": 24}, 64),
    "swinv2_tiny_window8_256": ({"depths": [2, 1, 1, 1], "embed_dim": 24}, 64),  # its second block is shifted
    "beit_base_patch16_224": (SMALL_DINO, 32),
    "mobilenetv3_small_050": ({}, 32),
}
PUBLISHED = script("readme_tables").ENCODERS  # one of each family, shown in the README


def make_config(encoder: str = "test_vit", image_size: int | None = 32, **options) -> LymphMILConfig:
    return LymphMILConfig(
        encoder=encoder, image_size=image_size, encoder_options=options or None, pooling="mean", fusion="none"
    )


def images(config: LymphMILConfig, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, *encoder_data_config(config)["input_size"], generator=generator)


def perturbed(module: nn.Module) -> nn.Module:
    """Weights and statistics that no initialisation gives, so that a part that is initialised again is noticed."""
    generator = torch.Generator().manual_seed(0)
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=generator)
            tensor.mul_(1 + 0.1 * noise) if tensor.ndim > 1 else tensor.add_(0.05 * noise)  # deep networks stay finite
    return module.eval()


def states_equal(first: nn.Module, second: nn.Module) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


# --- any timm model


def check_encoder(config: LymphMILConfig, folder) -> None:
    """Builds, tells its width, and comes back from disk with the same weights and the same output."""
    model = perturbed(LymphMILModel(config))
    batch = images(config)
    with torch.no_grad():
        expected = model.encoder(batch)
    assert expected.shape == (2, embedding_size(model.encoder))
    assert expected.isfinite().all() and not torch.equal(expected[0], expected[1])
    model.save_pretrained(folder)
    reloaded, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert states_equal(reloaded, model)
    with torch.no_grad():
        assert_close(reloaded.eval().encoder(batch), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_builds_and_reloads(name, tmp_path):
    options, size = FAMILIES[name]
    check_encoder(make_config(name, size, **options), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_architecture_builds_and_reloads_at_its_own_and_another_size(name, tmp_path):
    published = timm.get_pretrained_cfg(name)
    config = make_config(name, None)
    data_config = encoder_data_config(config)
    for key in ("input_size", "mean", "std", "interpolation"):
        assert data_config[key] == getattr(published, key)
    check_encoder(config, tmp_path)
    patch = getattr(getattr(build_encoder(config), "patch_embed", None), "patch_size", (32,))[0]
    other = 224 if published.input_size[-1] > 300 else 8 * patch if patch > 4 else 192
    with torch.no_grad():
        encoder = build_encoder(make_config(name, other)).eval()
        assert encoder(torch.randn(1, 3, other, other)).shape == (1, embedding_size(encoder))


def test_what_the_encoder_expects_of_an_image_is_what_timm_says():
    data_config = encoder_data_config(make_config("test_resnet", None))
    published = timm.get_pretrained_cfg("test_resnet")
    for key in ("input_size", "mean", "std", "interpolation"):
        assert data_config[key] == getattr(published, key)
    assert encoder_data_config(make_config("test_resnet", 96))["input_size"] == (3, 96, 96)
    tagged, other_tag = "vit_small_patch16_224.dino", "vit_small_patch16_224.augreg_in21k"
    assert encoder_data_config(make_config(tagged))["mean"] != encoder_data_config(make_config(other_tag))["mean"]


def test_chunks_do_not_change_the_encoding():
    encoder = build_encoder(make_config()).eval()
    cells = images(make_config(), 7)
    with torch.no_grad():
        for chunk_size in (1, 3, 7, 99, None):
            assert_close(encode_cells(encoder, cells, chunk_size), encoder(cells))


def test_building_draws_nothing_more_than_the_encoder():
    """The size is tried without touching the random numbers that seed the weights."""
    torch.manual_seed(0)
    expected = timm.create_model("test_vit", num_classes=0, img_size=48)
    after = torch.rand(1)
    torch.manual_seed(0)
    encoder = build_encoder(make_config(image_size=48))
    assert torch.equal(torch.rand(1), after)
    assert states_equal(encoder, expected)


@pytest.mark.parametrize(
    ("name", "size", "complaint"),
    [
        ("test_vit", 40, "patches of 16 pixels and would drop the last 8. Choose 32 or 48"),
        ("vit_small_patch14_dinov2", 32, "Choose 28 or 42"),
        ("vit_small_patch32_224", 16, "Choose 32 or"),
        ("test_maxvit", 100, "test_maxvit cannot take it .* Its own size is 160"),
        ("levit_128s", 100, "levit_128s cannot take it .* Its own size is 224"),
    ],
)
def test_a_size_that_the_architecture_cannot_take_is_refused(name, size, complaint):
    with pytest.raises(ValueError, match=f"image_size={size}: .*{complaint}"):
        build_encoder(make_config(name, size))


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("vit_tinny_patch16_224", "no such model. Near: vit_tiny_patch16_224"),
        ("resnet19", "no such model. Near: .*resnet18"),
        ("vit_tiny_patch16_224.nonsense", r"\(nonsense\).* Published: vit_tiny_patch16_224\.augreg"),
    ],
)
def test_an_unknown_name_is_refused_with_near_ones(name, complaint):
    with pytest.raises(ValueError, match=f"encoder='{name}'.*{complaint}"):
        build_encoder(make_config(name, None))
    with pytest.raises(ValueError, match=complaint):
        encoder_data_config(make_config(name, None))


def test_an_unknown_option_is_refused_by_name():
    with pytest.raises(ValueError, match="encoder='test_vit' cannot be built with .*stem_width"):
        build_encoder(make_config(stem_width=3))


# --- where an encoder is published


@pytest.fixture
def bloom(tmp_path):
    """A folder as timm publishes it: a small DINOv2 made for 56 pixels, with its own mean, and the model."""
    torch.manual_seed(0)
    model = perturbed(timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=56, **SMALL_DINO))
    folder = tmp_path / "bloom"
    save_for_hf(model, folder, model_config={"pretrained_cfg": {"mean": (0.7, 0.6, 0.75)}}, safe_serialization=True)
    return folder, model


def test_a_model_from_a_folder_becomes_one_that_needs_the_folder_no_more(bloom, tmp_path):
    folder, published = bloom
    choice = resolve_encoder(f"local-dir:{folder}")
    assert choice.name == "vit_small_patch14_dinov2"
    assert choice.weights == f"local-dir:{folder}"
    config = LymphMILConfig(encoder=choice.name, encoder_options=choice.options)
    model = LymphMILForBagClassification(config)
    assert load_encoder_weights(model.model.encoder, choice.weights).share == 1
    processor = LymphImageProcessor.from_config(config)
    assert processor.size["height"] == 56
    assert tuple(processor.image_mean) == (0.7, 0.6, 0.75)
    assert tuple(processor.image_std) == timm.get_pretrained_cfg("vit_small_patch14_dinov2").std
    model.save_pretrained(tmp_path / "model")
    folder.rename(tmp_path / "gone")
    reloaded = AutoModel.from_pretrained(tmp_path / "model").eval()
    assert str(tmp_path) not in (tmp_path / "model" / "config.json").read_text()
    batch = images(config)
    with torch.no_grad():
        assert_close(reloaded.model.encoder(batch), published(batch))


def test_another_image_size_goes_before_the_published_one(bloom):
    folder, _ = bloom
    choice = resolve_encoder(f"local-dir:{folder}")
    config = LymphMILConfig(encoder=choice.name, encoder_options=choice.options, image_size=28)
    assert encoder_data_config(config)["input_size"] == (3, 28, 28)
    encoder = build_encoder(config).eval()
    report = load_encoder_weights(encoder, choice.weights)
    assert (report.resized, report.share) == (("pos_embed",), 1)
    assert encoder(images(config)).shape == (2, 32)


def test_a_plain_name_stays_as_it_is():
    choice = resolve_encoder("vit_small_patch16_224.dino")
    assert (choice.name, choice.options, choice.weights) == ("vit_small_patch16_224.dino", {}, None)
    assert resolve_encoder("timm/vit_small_patch16_224.dino") == choice


@pytest.mark.parametrize(
    ("name", "error", "complaint"),
    [
        ("hf-hub:nobody/nothing", ConnectionError, "nobody/nothing could not be fetched"),
        ("local-dir:nowhere", FileNotFoundError, "nowhere"),
        ("owner/name", ValueError, "hf-hub:owner/name"),
        ("ftp:owner/name", ValueError, "ftp"),
        ("vit_tinny", ValueError, "Near: vit_tiny"),
    ],
)
def test_an_encoder_that_is_not_there_is_refused(name, error, complaint):
    with pytest.raises(error, match=complaint):
        resolve_encoder(name)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ('{"model_type": "bert"}', "not a timm model"),
        ('{"architecture": "no_such_net", "pretrained_cfg": {}}', "not a timm model"),
        ('{"architecture": "test_vit", "pretrained_cfg": {"input_size": [4, 32, 32]}}', "4 channels"),
        ("{", "not a timm model"),
    ],
)
def test_a_folder_of_something_else_is_refused(config, complaint, tmp_path):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=complaint):
        resolve_encoder(f"local-dir:{tmp_path}")


# --- weight layouts. `state` is what the encoder must hold afterwards, `other` is a copy that must not be taken.


@pytest.fixture
def encoder() -> nn.Module:
    torch.manual_seed(1)
    return build_encoder(make_config("vit_small_patch14_dinov2", 56, **SMALL_DINO)).eval()


def random_state(encoder: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in encoder.state_dict().items()}


def under(prefix: str, state: dict) -> dict:
    return {prefix + name: tensor for name, tensor in state.items()}


HEAD = {"mlp.0.weight": torch.randn(8, 32), "last_layer.weight": torch.randn(5, 8)}
OPTIMISER = {"state": {0: {"exp_avg": torch.randn(4)}}, "param_groups": [{"lr": 0.1}]}
LAYOUTS = {
    "plain": lambda state, other: state,
    "data parallel": lambda state, other: under("module.", state),
    "with a classifier": lambda state, other: state | {"head.weight": torch.randn(5, 32), "head.bias": torch.randn(5)},
    "timm training": lambda state, other: {
        "epoch": 3,
        "arch": "vit",
        "state_dict": other,
        "state_dict_ema": state,
        "optimizer": OPTIMISER,
        "args": argparse.Namespace(lr=0.1),
        "metric": 71.2,
    },
    "DINO": lambda state, other: {
        "student": under("module.backbone.", other) | under("module.head.", HEAD),
        "teacher": under("backbone.", state) | under("head.", HEAD),
        "optimizer": OPTIMISER,
        "epoch": 100,
    },
    "DINO the other way round": lambda state, other: {
        "teacher": under("module.backbone.", state),
        "student": under("backbone.", other),
    },
    "DinoBloom": lambda state, other: {
        "teacher": under("backbone.", state | {"mask_token": torch.zeros(1, 32)})
        | under("dino_head.", HEAD)
        | under("ibot_head.", HEAD)
    },
    "DINOv2": lambda state, other: state | {"mask_token": torch.zeros(1, 32)},
    "open_clip": lambda state, other: under("visual.trunk.", state) | {"logit_scale": torch.ones(())},
    "lightning": lambda state, other: {"state_dict": under("model.net.", state), "global_step": 7},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_layouts_fill_the_whole_encoder(layout, encoder, tmp_path):
    state, other = random_state(encoder, 1), random_state(encoder, 2)
    torch.save(LAYOUTS[layout](state, other), tmp_path / "weights.pth")
    before = encoder(images(make_config(image_size=56)))
    report = load_encoder_weights(encoder, tmp_path / "weights.pth")
    assert (report.share, report.missing, report.resized) == (1.0, (), ())
    assert set(report.matched) == set(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in encoder.state_dict().items())
    assert not torch.allclose(encoder(images(make_config(image_size=56))), before)
    assert all(name not in state for name in report.unexpected)


def test_what_is_not_used_is_reported(encoder, tmp_path):
    torch.save(LAYOUTS["DinoBloom"](random_state(encoder, 1), {}), tmp_path / "DinoBloom-S.pth")
    report = load_encoder_weights(encoder, tmp_path / "DinoBloom-S.pth")
    assert "teacher.dino_head.mlp.0.weight" in report.unexpected
    assert "teacher.ibot_head.last_layer.weight" in report.unexpected
    lines = report.summary().splitlines()
    assert lines[0].endswith("DinoBloom-S.pth (teacher.backbone.*): 100.0% of the encoder's numbers loaded.")
    assert lines[1].startswith("  unexpected: ")


def test_a_teacher_larger_than_its_student_is_not_taken_for_it(encoder, tmp_path):
    """Names alone match both; shapes tell them apart."""
    large = build_encoder(make_config("vit_small_patch14_dinov2", 56, embed_dim=64, depth=3, num_heads=2))
    state = random_state(encoder, 1)
    torch.save({"teacher": random_state(large, 2), "student": state}, tmp_path / "weights.pt")
    assert load_encoder_weights(encoder, tmp_path / "weights.pt").share == 1
    assert torch.equal(encoder.state_dict()["norm.weight"], state["norm.weight"])


def test_registers_of_dinov2_are_converted(tmp_path):
    """DINOv2 adds a position to its class token and none to its registers; timm stores the sum."""
    encoder = build_encoder(make_config("vit_small_patch14_reg4_dinov2", 56, **SMALL_DINO))
    state = random_state(encoder, 1)
    position = torch.randn(1, 1, 32)
    published = {name: tensor for name, tensor in state.items() if name not in ("reg_token", "cls_token", "pos_embed")}
    published |= {"mask_token": torch.zeros(1, 32), "register_tokens": state["reg_token"]}
    published |= {"cls_token": state["cls_token"] - position, "pos_embed": torch.cat([position, state["pos_embed"]], 1)}
    torch.save(published, tmp_path / "dinov2_vits14_reg4_pretrain.pth")
    assert load_encoder_weights(encoder, tmp_path / "dinov2_vits14_reg4_pretrain.pth").share == 1
    for name, tensor in encoder.state_dict().items():
        assert_close(tensor, state[name])


def test_positions_are_interpolated_to_another_image_size(tmp_path):
    """DinoBloom's 257 positions at 224 pixels, taken at 56."""
    source = build_encoder(make_config("vit_small_patch14_dinov2", 224, **SMALL_DINO))
    encoder = build_encoder(make_config("vit_small_patch14_dinov2", 56, **SMALL_DINO)).eval()
    state = random_state(source, 1)
    assert state["pos_embed"].shape == (1, 257, 32)
    torch.save(LAYOUTS["DinoBloom"](state, {}), tmp_path / "weights.pth")
    report = load_encoder_weights(encoder, tmp_path / "weights.pth")
    assert (report.share, report.missing, report.resized) == (1.0, (), ("pos_embed",))
    assert "resized: pos_embed" in report.summary()
    expected = resample_abs_pos_embed(state["pos_embed"], new_size=(4, 4), num_prefix_tokens=1)
    assert_close(encoder.state_dict()["pos_embed"], expected)


def masked_autoencoder(encoder: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """A masked autoencoder with patches, positions and norm of its own around the blocks of a whole timm model."""
    trained, unused = random_state(encoder, seed), random_state(encoder, seed + 1)
    blocks = {name.removeprefix("blocks."): tensor for name, tensor in trained.items() if name.startswith("blocks.")}
    patches = trained["pos_embed"].shape[1] - 1
    own = {"cls_token": trained["cls_token"], "pos_embedding": trained["pos_embed"][0, 1:, None, :]}
    own |= {f"patchify.{name}": trained[f"patch_embed.proj.{name}"] for name in ("weight", "bias")}
    own |= {f"layer_norm.{name}": trained[f"norm.{name}"] for name in ("weight", "bias")}
    own |= under("transformer.", blocks) | under("model.", unused) | under("model.blocks.", blocks)
    decoder = {"mask_token": torch.randn(1, 1, 32), "pos_embedding": torch.randn(patches + 1, 1, 32)}
    return under("encoder.", own) | under("decoder.", decoder | under("transformer.", blocks))


def test_fault_2_weights_of_a_masked_autoencoder_reach_the_encoder(tmp_path):
    """They were set on a wrapper, whose output stayed that of the weights it had before.

    Here the checkpoint also holds a whole timm model under plain names, of which the autoencoder used the blocks only:
    loading that one would match every name and still give another network than was trained.
    """
    encoder = build_encoder(make_config(image_size=64)).eval()
    weights = masked_autoencoder(encoder, seed=3)
    save_file({name: tensor.contiguous().clone() for name, tensor in weights.items()}, tmp_path / "mae.safetensors")
    batch = images(make_config(image_size=64))
    with torch.no_grad():
        before = encoder(batch)
        report = load_encoder_weights(encoder, tmp_path / "mae.safetensors")
        after = encoder(batch)
        patches = nn.functional.conv2d(batch, weights["encoder.patchify.weight"], weights["encoder.patchify.bias"], 16)
        tokens = patches.flatten(2).transpose(1, 2) + weights["encoder.pos_embedding"].transpose(0, 1)
        tokens = torch.cat([weights["encoder.cls_token"].expand(2, 1, -1), tokens], dim=1)
        norm = (weights["encoder.layer_norm.weight"], weights["encoder.layer_norm.bias"])
        expected = nn.functional.layer_norm(encoder.blocks(tokens), tokens.shape[-1:], *norm, encoder.norm.eps)[:, 0]
    assert (report.share, report.missing) == (1.0, ())
    assert not torch.allclose(after, before)
    assert_close(after, expected)


def test_fault_2_nothing_stays_as_it_was_when_everything_is_reported_loaded(encoder, tmp_path):
    """Two encoders that start apart are one after loading, in every tensor and in their output."""
    torch.manual_seed(2)
    second = build_encoder(make_config("vit_small_patch14_dinov2", 56, **SMALL_DINO)).eval()
    batch = images(make_config(image_size=56))
    assert not torch.allclose(encoder(batch), second(batch))
    torch.save({"teacher": under("backbone.", random_state(encoder, 1))}, tmp_path / "weights.pth")
    for either in (encoder, second):
        assert load_encoder_weights(either, tmp_path / "weights.pth").share == 1
    assert states_equal(encoder, second)
    assert torch.equal(encoder(batch), second(batch))


@pytest.mark.parametrize("shards", [False, True])
def test_the_encoder_of_a_trained_model_is_found_in_its_folder(shards, tmp_path):
    torch.manual_seed(0)
    model = perturbed(LymphMILForBagClassification(make_config()))
    model.save_pretrained(tmp_path, max_shard_size="300KB" if shards else "1GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == shards
    encoder = build_encoder(make_config())
    report = load_encoder_weights(encoder, tmp_path)
    assert (report.share, report.missing) == (1.0, ())
    assert "classifier.weight" in report.unexpected
    assert states_equal(encoder, model.model.encoder)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext", "swin_tiny_patch4_window7_224"])
def test_statistics_of_other_architectures_are_loaded_too(name, tmp_path):
    options = {"depths": [1, 1, 1, 1], "embed_dim": 24} if name.startswith("swin") else {}
    config = make_config(name, 64, **options)
    source = perturbed(build_encoder(config))
    save_file({f"backbone.{name}": tensor for name, tensor in source.state_dict().items()}, tmp_path / "a.safetensors")
    encoder = build_encoder(config).eval()
    report = load_encoder_weights(encoder, tmp_path)
    assert (report.share, report.missing, report.unexpected) == (1.0, (), ())
    assert states_equal(encoder, source)


# --- refusals


def test_another_architecture_is_refused_and_nothing_is_changed(encoder, tmp_path):
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "resnet.pth")
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    with pytest.raises(ValueError, match=r"resnet\.pth.*: only 0\.\d% .* at least 90%.*Missing: cls_token"):
        load_encoder_weights(encoder, tmp_path / "resnet.pth")
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


def test_a_part_is_refused_unless_it_is_asked_for(encoder, tmp_path):
    state = {name: tensor for name, tensor in random_state(encoder, 1).items() if not name.startswith("blocks.1.")}
    torch.save(state, tmp_path / "half.pth")
    with pytest.raises(ValueError, match="Is it another architecture"):
        load_encoder_weights(encoder, tmp_path / "half.pth")
    report = load_encoder_weights(encoder, tmp_path / "half.pth", minimum_share=0.3)
    assert 0.3 < report.share < 0.9
    assert all(name.startswith("blocks.1.") for name in report.missing) and report.missing
    assert "missing: blocks.1." in report.summary()


def test_a_diverged_checkpoint_is_refused(encoder, tmp_path):
    state = random_state(encoder, 1)
    state["norm.weight"][3] = torch.nan
    torch.save(state, tmp_path / "diverged.pth")
    with pytest.raises(ValueError, match="not finite: norm.weight"):
        load_encoder_weights(encoder, tmp_path / "diverged.pth")


class Malicious:
    """Unpickling makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_foreign_pickle_is_not_executed(encoder, tmp_path):
    trace = tmp_path / "executed"
    torch.save({"teacher": random_state(encoder, 1), "extra": Malicious(trace)}, tmp_path / "weights.pth")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Malicious(trace)))
    for name in ("weights.pth", "plain.pt"):
        with pytest.raises(ValueError, match=f"{name}: not a file of plain tensors, refused.*safetensors"):
            load_encoder_weights(encoder, tmp_path / name)
    assert not trace.exists()
    torch.load(tmp_path / "weights.pth", weights_only=False)
    assert trace.exists(), "the trap of this test does not work"


def test_a_whole_pickled_model_is_refused(encoder, tmp_path):
    torch.save(encoder, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="refused"):
        load_encoder_weights(encoder, tmp_path / "model.pth")


def test_files_that_are_missing_empty_or_several_are_refused(encoder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights there"):
        load_encoder_weights(encoder, tmp_path / "nowhere.pth")
    with pytest.raises(FileNotFoundError, match="no weights there"):
        load_encoder_weights(encoder, tmp_path)
    torch.save({"epoch": 3}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="no named tensors"):
        load_encoder_weights(encoder, tmp_path)
    torch.save(random_state(encoder, 1), tmp_path / "b.pth")
    with pytest.raises(ValueError, match=r"which of a\.pth, b\.pth\?"):
        load_encoder_weights(encoder, tmp_path)
    save_file(random_state(encoder, 1), tmp_path / "model.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert load_encoder_weights(encoder, tmp_path).share == 1


def test_nested_tables_have_dotted_names(tmp_path):
    torch.save(
        {"a": {"b": {"c": torch.ones(1)}}, "d": torch.ones(2), "e": 3, "f": {0: torch.ones(3)}}, tmp_path / "x.pt"
    )
    assert {name: len(tensor) for name, tensor in read_tensors(tmp_path / "x.pt").items()} == {"a.b.c": 1, "d": 2}


@pytest.mark.parametrize("source", ["timm", "hf-hub:nobody/nothing"])
def test_weights_that_cannot_be_fetched_are_an_error(source, encoder):
    with pytest.raises(ConnectionError, match="could not be loaded"):
        load_encoder_weights(encoder, source)
