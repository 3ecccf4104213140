"""The masked autoencoder: the paper's formula, what may reach what, and saving."""

import sys
from unittest import mock

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from script_loader import script
from timm.models import Eva
from timm.models.vision_transformer import Block
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining, ViTMAEConfig, ViTMAEForPreTraining

from lymph_hf import encoder_gradients
from lymph_hf.configuration_mae import LymphMAEConfig
from lymph_hf.modeling_mae import LymphMAEForPreTraining, patchify, sincos_position_embedding, unpatchify

AutoConfig.register("lymph_mae", LymphMAEConfig, exist_ok=True)
AutoModel.register(LymphMAEConfig, LymphMAEForPreTraining, exist_ok=True)
AutoModelForPreTraining.register(LymphMAEConfig, LymphMAEForPreTraining, exist_ok=True)

# One of each kind: class token, register tokens, distillation token, none; averaged tokens; patch 8, 14 and 16.
SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}
ENCODERS = {
    "class token, patch 16": ("test_vit", 64, {}),
    "class and register tokens, patch 14": ("vit_small_patch14_reg4_dinov2", 56, SMALL),
    "distillation token": ("deit_tiny_distilled_patch16_224", 64, SMALL),
    "average of the tokens, patch 8": ("test_vit3", 32, {"patch_size": 8}),
    "no token, attention pooling": ("vit_base_patch16_siglip_224", 64, SMALL),
    "rotary positions, patch 14": ("eva02_tiny_patch14_224", 56, SMALL),
    "rotary positions alone, register tokens": ("vit_small_patch16_dinov3", 64, SMALL),
    "learnt rotary positions": ("vit_small_patch16_rope_mixed_ape_224", 64, SMALL),
    "rotary positions, any size, no class token": (
        "vit_medium_patch16_rope_reg1_gap_256",
        64,
        SMALL | {"dynamic_img_size": True},
    ),
    "norm before the blocks, no bias": ("vit_base_patch16_clip_224", 64, SMALL),
    "position of the patches alone, any size": ("deit3_small_patch16_224", 64, SMALL | {"dynamic_img_size": True}),
}


@pytest.fixture(params=ENCODERS.values(), ids=ENCODERS)
def model(request) -> LymphMAEForPreTraining:
    name, size, options = request.param
    return tiny(encoder=name, image_size=size, encoder_options=options)


def tiny(**changes) -> LymphMAEForPreTraining:
    torch.manual_seed(0)
    values = {"encoder": "test_vit", "image_size": 64, "decoder_depth": 2, "decoder_width": 32, "decoder_heads": 4}
    return LymphMAEForPreTraining(LymphMAEConfig(**(values | changes))).eval()


def images_for(model: LymphMAEForPreTraining, n: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    side = model.encoder.patch_embed.img_size[0]
    return torch.randn(n, 3, side, side, generator=generator), torch.rand(n, model.num_patches, generator=generator)


# The formula ------------------------------------------------------------------------------------------------


def copy_weights(theirs: ViTMAEForPreTraining, ours: LymphMAEForPreTraining):
    """Every tensor of transformers' model into ours; their three projections are one here."""
    source = theirs.state_dict()
    state = {
        "encoder.cls_token": source["vit.embeddings.cls_token"],
        "encoder.pos_embed": source["vit.embeddings.position_embeddings"],
        "decoder.mask_token": source["decoder.mask_token"],
        "decoder.pos_embed": source["decoder.decoder_pos_embed"][0, 1:],
    }
    layers = {
        "encoder.patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
        "encoder.norm": "vit.layernorm",
        "decoder.embed": "decoder.decoder_embed",
        "decoder.norm": "decoder.decoder_norm",
        "decoder.head": "decoder.decoder_pred",
    }
    for block, place, number in [("encoder.blocks", "vit.layers", 6), ("decoder.blocks", "decoder.decoder_layers", 2)]:
        for i in range(number):
            own = {
                "norm1": "layernorm_before",
                "norm2": "layernorm_after",
                "attn.proj": "attention.o_proj",
                "mlp.fc1": "mlp.fc1",
                "mlp.fc2": "mlp.fc2",
            }
            layers |= {f"{block}.{i}.{name}": f"{place}.{i}.{other}" for name, other in own.items()}
            for kind in ("weight", "bias"):
                parts = [source[f"{place}.{i}.attention.{letter}_proj.{kind}"] for letter in "qkv"]
                state[f"{block}.{i}.attn.qkv.{kind}"] = torch.cat(parts)
    for name, other in layers.items():
        state |= {f"{name}.{kind}": source[f"{other}.{kind}"] for kind in ("weight", "bias")}
    ours.load_state_dict(state, strict=True)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_the_loss_equals_that_of_transformers_vitmae(norm_pix_loss):
    torch.manual_seed(3)
    theirs = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=64,
            num_hidden_layers=6,
            num_attention_heads=2,
            intermediate_size=192,
            image_size=64,
            decoder_hidden_size=32,
            decoder_num_hidden_layers=2,
            decoder_num_attention_heads=4,
            decoder_intermediate_size=128,
            layer_norm_eps=1e-6,
            norm_pix_loss=norm_pix_loss,
        )
    ).eval()
    for parameter in theirs.parameters():  # biases and tokens that start at zero would prove nothing
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    theirs.decoder.decoder_pos_embed.data[:, 0] = 0.0  # the class token of the decoder has no position, as published
    ours = tiny(norm_pix_loss=norm_pix_loss)
    copy_weights(theirs, ours)
    images, noise = images_for(ours, n=4)
    expected, output = theirs(images, noise=noise), ours(images, noise=noise)
    assert output.loss.item() == pytest.approx(expected.loss.item(), abs=1e-5)
    assert torch.equal(output.mask, expected.mask.bool())
    rows = torch.arange(4)[:, None]
    assert torch.allclose(output.prediction, expected.logits[rows, output.ids_predicted], atol=1e-5)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_the_loss_is_the_mean_square_over_decoded_patches(norm_pix_loss):
    model = tiny(norm_pix_loss=norm_pix_loss, decoded_share=0.5)
    images, noise = images_for(model)
    output = model(images, noise=noise)
    errors = []
    for b, image in enumerate(images):
        for m, patch in enumerate(output.ids_predicted[b].tolist()):
            row, column = divmod(patch, 4)
            pixels = image[:, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16].permute(1, 2, 0).flatten()
            if norm_pix_loss:
                pixels = (pixels - pixels.mean()) / (pixels.var() + 1e-6).sqrt()
            errors.append((output.prediction[b, m] - pixels).square().mean())
    assert output.loss.item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-5)


def test_positions_are_sines_and_cosines_of_column_and_row():
    table = sincos_position_embedding(3, 8)
    for patch in range(9):
        row, column = divmod(patch, 3)
        expected = []
        for place in (column, row):
            angles = [place / 10_000 ** (i / 2) for i in range(2)]
            expected += [torch.tensor(a).sin() for a in angles] + [torch.tensor(a).cos() for a in angles]
        assert torch.allclose(table[patch], torch.stack(expected), atol=1e-6)


def test_patches_go_back_to_the_picture():
    images = torch.randn(2, 3, 24, 24)
    patches = patchify(images, 8)
    assert patches.shape == (2, 9, 192)
    assert torch.equal(patches[1, 5], images[1, :, 8:16, 16:24].permute(1, 2, 0).flatten())
    assert torch.equal(unpatchify(patches, 8), images)


# What reaches what ------------------------------------------------------------------------------------------


def test_with_nothing_hidden_the_encoder_is_timms_own(model):
    images, _ = images_for(model)
    every = torch.arange(model.num_patches).expand(len(images), -1)
    expected = model.encoder.fc_norm(model.encoder.forward_features(images))
    assert torch.allclose(model._encode(patchify(images, model._patch), every), expected, atol=1e-5)


class Kept(torch.nn.Module):
    """In place of timm's `patch_drop`: keeps the patches named, and tells which where it is asked."""

    def __init__(self, encoder: torch.nn.Module, kept: torch.Tensor):
        super().__init__()
        self.prefix, self.kept, self.tells = encoder.num_prefix_tokens, kept, isinstance(encoder, Eva)

    def forward(self, x: torch.Tensor):
        rows = torch.arange(len(x))[:, None]
        x = torch.cat([x[:, : self.prefix], x[:, self.prefix :][rows, self.kept]], dim=1)
        return (x, self.kept) if self.tells else x


def plain_loss(model: LymphMAEForPreTraining, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The loss, with every patch embedded and every token passed through every block."""
    ids = noise.argsort(dim=1)
    count = model(images, noise=noise).ids_keep.shape[1]
    rows, kept, hidden = torch.arange(len(ids))[:, None], ids[:, :count], ids[:, count:]
    encoder, decoder = model.encoder, model.decoder
    with mock.patch.object(encoder, "patch_drop", Kept(encoder, kept)):
        latent = encoder.fc_norm(encoder.forward_features(images))
    prefix, tokens = decoder.embed(latent).split([encoder.num_prefix_tokens, count], dim=1)
    every = [prefix, tokens + decoder.pos_embed[kept], decoder.mask_token + decoder.pos_embed[hidden]]
    x = torch.cat(every, dim=1)
    for block in decoder.blocks:
        x = Block.forward(block, x)
    prediction = decoder.head(decoder.norm(x[:, -hidden.shape[1] :]))
    target = patchify(images, encoder.patch_embed.patch_size[0])[rows, hidden]
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    return (prediction - target).square().mean()


def gradients(model: LymphMAEForPreTraining, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


def errors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: float((found[name] - tensor).norm() / tensor.norm()) for name, tensor in expected.items()}


def test_what_is_not_computed_changes_neither_loss_nor_gradients(model):
    model.train()
    images, noise = images_for(model)
    loss, expected = model(images, noise=noise).loss, plain_loss(model, images, noise)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    found, expected = gradients(model, loss), gradients(model, expected)
    assert not {name: error for name, error in errors(found, expected).items() if error > 1e-4}


def test_bfloat16_has_the_fast_gradient_of_attention_and_is_close(monkeypatch):
    model = tiny().train()
    images, noise = images_for(model)
    loss = model(images, noise=noise).loss
    exact = gradients(model, loss)
    calls, apply = [], encoder_gradients._Attention.apply
    monkeypatch.setattr(encoder_gradients._Attention, "apply", lambda *args: calls.append(args) or apply(*args))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(images, noise=noise).loss
    assert len(calls) == len(model.encoder.blocks) + len(model.decoder.blocks)
    assert rounded.item() == pytest.approx(loss.item(), rel=0.02)
    assert not {name: error for name, error in errors(gradients(model, rounded), exact).items() if error > 0.05}


def test_a_few_steps_lower_the_loss(model):
    images, noise = images_for(model)
    optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(5):
        loss = model(images, noise=noise).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("kind", ["class token, patch 16", "learnt rotary positions"])
def test_gradient_checkpointing_changes_nothing(kind, autocast):
    name, size, options = ENCODERS[kind]
    model = tiny(encoder=name, image_size=size, encoder_options=options).train()
    images, noise = images_for(model)

    def weight_gradient() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(images, noise=noise).loss
        return torch.autograd.grad(loss, model.encoder.patch_embed.proj.weight)[0]

    plain = weight_gradient()
    model.activation_checkpointing_enable()
    assert model.encoder.grad_checkpointing
    assert model.decoder.grad_checkpointing
    assert torch.allclose(plain, weight_gradient(), atol=1e-3 if autocast else 1e-6)


def test_hidden_patches_reach_the_target_only(model):
    images, noise = images_for(model)
    output = model(images, noise=noise)
    hidden = unpatchify(output.mask[..., None].expand(-1, -1, 3 * model._patch**2).float(), model._patch).bool()
    changed = model(torch.where(hidden, images + torch.randn_like(images), images), noise=noise)
    assert torch.equal(changed.prediction, output.prediction), "the encoder saw a hidden patch"
    assert changed.loss != output.loss
    seen = model(torch.where(hidden, images, images + 1.0), noise=noise)
    assert not torch.allclose(seen.prediction, output.prediction)


def test_an_image_alone_equals_itself_in_a_batch(model):
    images, noise = images_for(model)
    together = model(images, noise=noise).prediction
    alone = model(images[1:2], noise=noise[1:2]).prediction
    assert torch.allclose(together[1:2], alone, atol=1e-5)


def test_gradients_reach_every_trainable_parameter(model):
    images, noise = images_for(model)
    model.train()(images, noise=noise).loss.backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not without


@pytest.mark.parametrize("mask_ratio", [0.3, 0.75, 0.99])
def test_each_image_has_its_own_mask_of_the_same_size(mask_ratio):
    model = tiny(mask_ratio=mask_ratio)
    images = torch.randn(6, 3, 64, 64)
    output = model(images)
    visible = max(1, int(16 * (1 - mask_ratio)))
    assert (output.mask.sum(dim=1) == 16 - visible).all()
    assert len({tuple(row.tolist()) for row in output.mask}) > 1
    for row in range(6):
        kept, predicted = set(output.ids_keep[row].tolist()), set(output.ids_predicted[row].tolist())
        assert kept == set(torch.nonzero(~output.mask[row]).flatten().tolist())
        assert predicted == set(range(16)) - kept


def test_a_share_of_the_hidden_patches_is_decoded():
    model = tiny(decoded_share=0.25)
    images, noise = images_for(model)
    output = model(images, noise=noise)
    assert output.prediction.shape == (3, 3, 768)  # of 12 hidden ones
    assert output.mask.gather(1, output.ids_predicted).all()


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_a_perfect_prediction_reconstructs_the_picture(norm_pix_loss):
    model = tiny(norm_pix_loss=norm_pix_loss)
    images, noise = images_for(model)
    output = model(images, noise=noise)
    patches = patchify(images, 16)
    target = patches.gather(1, output.ids_predicted[..., None].expand(-1, -1, 768))
    if norm_pix_loss:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    output.prediction = target
    assert torch.allclose(model.reconstruct(images, output), images, atol=1e-5)
    visible = patchify(model.visible(images, output), 16)
    assert torch.equal(visible, patches * ~output.mask[..., None])


# Saving, names and refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("auto", [AutoModelForPreTraining, AutoModel])
def test_save_and_reload_is_equal_to_the_bit(auto, tmp_path):
    model = tiny(pretraining={"split_sha256": "abc", "cells": 7})
    model.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path)
    assert type(again) is LymphMAEForPreTraining
    assert again.config.pretraining == {"split_sha256": "abc", "cells": 7}
    state, other = model.state_dict(), again.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in state.items())
    images, noise = images_for(model)
    assert torch.allclose(model(images, noise=noise).loss, again(images, noise=noise).loss)


@pytest.mark.parametrize("name", ["test_resnet", "vit_small_r26_s32_224"])
def test_an_encoder_whose_patches_mix_is_refused(name):
    with pytest.raises(ValueError, match=r"plain timm vision transformer.*vit_"):
        tiny(encoder=name)


@pytest.mark.parametrize("option", ["pos_drop_rate", "patch_drop_rate"])
def test_an_encoder_that_hides_by_itself_is_refused(option):
    with pytest.raises(ValueError, match=rf"{option}.*hides patches by itself"):
        tiny(encoder_options={option: 0.1})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mask_ratio", 0.0),
        ("mask_ratio", 1.0),
        ("decoded_share", 0.0),
        ("decoder_depth", 0),
        ("decoder_width", 30),
        ("decoder_width", 36),
        ("image_size", 8),
    ],
)
def test_values_out_of_range_are_refused(field, value):
    with pytest.raises(StrictDataclassError, match=f"{field}={value}"):
        LymphMAEConfig(**({"decoder_heads": 8} | {field: value}))


def test_a_misspelt_option_is_refused():
    with pytest.raises(ValueError, match="did you mean 'mask_ratio'"):
        LymphMAEConfig(mask_ration=0.5)


def test_inputs_of_another_shape_are_refused():
    model = tiny()
    with pytest.raises(ValueError, match=r"\(B, 3, 64, 64\), got \(2, 3, 32, 32\)"):
        model(torch.zeros(2, 3, 32, 32))
    with pytest.raises(ValueError, match=r"noise must be \(2, 16\).*\(2, 4\)"):
        model(torch.zeros(2, 3, 64, 64), noise=torch.zeros(2, 4))


def test_the_benchmark_runs(monkeypatch, capsys):
    bench = script("bench_mae")
    sizes = "--width 192 --image-size 32 --batch-size 2 --rounds 1 --decoder-depth 1 --decoder-width 32"
    monkeypatch.setattr(sys, "argv", ["bench_mae.py", *sizes.split()])
    monkeypatch.setattr(bench, "matrix_rate", lambda *_: 1e12)
    bench.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert "ratio 1.00" in lines[1]
