"""Masked autoencoder around a timm vision transformer: learns to see cells from their pictures alone."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, apply_keep_indices_nlc
from timm.models import Eva, VisionTransformer, checkpoint_seq
from timm.models.vision_transformer import Block
from torch import nn
from transformers.modeling_outputs import ModelOutput

from .configuration_mae import LymphMAEConfig
from .encoder_gradients import faster_gradients
from .encoders import build_encoder
from .modeling_lymph import LymphMILPreTrainedModel


@dataclass
class LymphMAEOutput(ModelOutput):
    """What `LymphMAEForPreTraining` returns. B images of L patches, K of them visible, M decoded.

    Attributes:
        loss: scalar, mean squared error over the decoded patches.
        prediction: (B, M, P * P * 3), standardised within each patch where `norm_pix_loss` is set.
        mask: (B, L), True = hidden from the encoder.
        ids_keep: (B, K), the visible patches, in the order in which the encoder saw them.
        ids_predicted: (B, M), the patch that each prediction is of.
    """

    loss: torch.FloatTensor | None = None
    prediction: torch.FloatTensor | None = None
    mask: torch.BoolTensor | None = None
    ids_keep: torch.LongTensor | None = None
    ids_predicted: torch.LongTensor | None = None


class LastBlock(Block):
    """A transformer block of which only the last tokens are wanted: the others serve as keys and values alone."""

    def forward(self, x: torch.Tensor, wanted: int) -> torch.Tensor:
        """(B, N, W) -> (B, wanted, W)"""
        attention = self.attn
        size = attention.attn_dim
        (of_query, of_others), (query_bias, other_bias) = (
            tensor.tensor_split([size]) for tensor in (attention.qkv.weight, attention.qkv.bias)
        )
        normed = self.norm1(x)
        query = F.linear(normed[:, -wanted:], of_query, query_bias)
        others = F.linear(normed, of_others, other_bias)
        heads = (
            t.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for t in (query, *others.split(size, dim=-1))
        )
        mixed = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)  # (B, wanted, W)
        x = x[:, -wanted:] + attention.proj(mixed)
        return x + self.mlp(self.norm2(x))


class MAEDecoder(nn.Module):
    """Latents of the visible patches -> pixels of hidden ones.

    Its tokens stay in the order prefix, visible, hidden, each with the embedding of its own position: attention
    does not care about order, so nothing has to be sorted back, and only hidden patches pass the output layer.
    """

    def __init__(self, config: LymphMAEConfig, encoder: VisionTransformer | Eva):
        super().__init__()
        width = config.decoder_width
        self.prefix_tokens = encoder.num_prefix_tokens
        self.embed = nn.Linear(encoder.embed_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("pos_embed", sincos_position_embedding(encoder.patch_embed.grid_size[0], width))
        kinds = [*[Block] * (config.decoder_depth - 1), LastBlock]
        self.blocks = nn.ModuleList(kind(width, config.decoder_heads, qkv_bias=True) for kind in kinds)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, 3 * encoder.patch_embed.patch_size[0] ** 2)
        self.grad_checkpointing = False
        self.apply(_xavier)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, latent: torch.Tensor, ids_keep: torch.Tensor, ids_predicted: torch.Tensor) -> torch.Tensor:
        """(B, prefix + K, D), (B, K), (B, M) -> (B, M, P * P * 3)"""
        prefix, visible = self.embed(latent).tensor_split([self.prefix_tokens], dim=1)
        visible = visible + self.pos_embed[ids_keep]
        hidden = self.mask_token + self.pos_embed[ids_predicted]
        x = torch.cat([prefix, visible, hidden.to(visible.dtype)], dim=1)  # (B, prefix + K + M, W)
        *blocks, last = self.blocks
        blocks.append(partial(last, wanted=ids_predicted.shape[1]))
        return self.head(self.norm(_pass(blocks, x, checkpointed=self.grad_checkpointing and self.training)))


class LymphMAEForPreTraining(LymphMILPreTrainedModel):
    """Masked autoencoder (He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022).

    The encoder sees a random quarter of the patches; a light decoder predicts the others. Only `encoder` is kept
    afterwards: `timm.models.save_for_hf(model.encoder, ...)` writes it for timm and `--encoder-weights`.

    Raises:
        ValueError: the encoder is no plain vision transformer, or its patches do not fill the image.

    Example:

    ```python
    >>> import torch
    >>> from lymph_hf import LymphMAEConfig, LymphMAEForPreTraining

    >>> model = LymphMAEForPreTraining(LymphMAEConfig(encoder="test_vit", image_size=32))
    >>> model(torch.randn(2, 3, 32, 32)).prediction.shape
    torch.Size([2, 3, 768])

    ```
    """

    config: LymphMAEConfig

    def __init__(self, config: LymphMAEConfig):
        super().__init__(config)
        self.encoder = build_encoder(config)
        _check_encoder(self.encoder, config)
        _initialise_encoder(self.encoder)
        self.decoder = MAEDecoder(config, self.encoder)
        self._keep_own_initialisation()
        self.post_init()

    @property
    def num_patches(self) -> int:
        """L, the patches of an image."""
        return self.encoder.patch_embed.num_patches

    def forward(
        self, pixel_values: torch.FloatTensor | None = None, noise: torch.FloatTensor | None = None
    ) -> LymphMAEOutput:
        r"""
        Args:
            pixel_values: (B, 3, S, S), normalised by the image processor.
            noise: (B, L), decides the masks: the patches with the smallest numbers stay visible. `None` draws it on
                the device of the images.

        Raises:
            ValueError: images or noise of another shape.
        """
        noise = self._checked(pixel_values, noise)
        ids = noise.argsort(dim=1)
        keep = max(1, int(self.num_patches * (1 - self.config.mask_ratio)))
        decoded = max(1, round(self.config.decoded_share * (self.num_patches - keep)))
        ids_keep, ids_predicted = ids[:, :keep], ids[:, keep : keep + decoded]
        patches = patchify(pixel_values, self._patch)
        with faster_gradients(self, pixel_values.device):
            prediction = self.decoder(self._encode(patches, ids_keep), ids_keep, ids_predicted)
        target = _gather(patches, ids_predicted).float()
        if self.config.norm_pix_loss:
            mean, std = _patch_statistics(target)
            target = (target - mean) / std
        return LymphMAEOutput(
            # Every image has as many decoded patches, so the plain mean is the mean over images, too.
            loss=(prediction.float() - target).square().mean(),
            prediction=prediction,
            mask=torch.ones_like(noise, dtype=torch.bool).scatter(1, ids_keep, False),
            ids_keep=ids_keep,
            ids_predicted=ids_predicted,
        )

    @torch.no_grad()
    def reconstruct(self, pixel_values: torch.Tensor, output: LymphMAEOutput) -> torch.Tensor:
        """The predicted picture: visible patches as they are, decoded ones as predicted.

        Where `norm_pix_loss` is set, a prediction says nothing of its patch's mean and contrast: both are taken
        from the true patch.

        Args:
            pixel_values: (B, 3, S, S), what `output` was computed from.
            output: of `forward`.

        Returns:
            (B, 3, S, S); a hidden patch that was not decoded is 0, the mean colour.
        """
        patches = patchify(pixel_values, self._patch).float()  # (B, L, P * P * 3)
        predicted = output.prediction.float()
        if self.config.norm_pix_loss:
            mean, std = _patch_statistics(_gather(patches, output.ids_predicted))
            predicted = predicted * std + mean
        patches = patches.masked_fill(output.mask[..., None], 0.0)
        patches = patches.scatter(1, _expanded(output.ids_predicted, predicted), predicted)
        return unpatchify(patches, self._patch)

    @torch.no_grad()
    def visible(self, pixel_values: torch.Tensor, output: LymphMAEOutput) -> torch.Tensor:
        """(B, 3, S, S): what the encoder saw, hidden patches 0."""
        patches = patchify(pixel_values, self._patch).masked_fill(output.mask[..., None], 0.0)
        return unpatchify(patches, self._patch)

    @property
    def _patch(self) -> int:
        return self.encoder.patch_embed.patch_size[0]

    def _encode(self, patches: torch.Tensor, ids_keep: torch.Tensor) -> torch.Tensor:
        """(B, L, P * P * 3), (B, K) -> (B, prefix + K, D)"""
        encoder = self.encoder
        # The convolution steps from patch to patch: a linear map of each, so that hidden ones need not be embedded.
        embed = encoder.patch_embed
        weight = embed.proj.weight.permute(0, 2, 3, 1).flatten(1)
        tokens = embed.norm(F.linear(_gather(patches, ids_keep), weight, embed.proj.bias))
        positions, rotations = self._positions()
        prefix, positions = positions.tensor_split([encoder.num_prefix_tokens], dim=1)
        # `embedding`: the gradient of an index would be summed by several threads in an order of their own.
        tokens = tokens + F.embedding(ids_keep, positions[0])
        x = torch.cat([prefix.expand(len(tokens), -1, -1), tokens], dim=1)
        blocks = encoder.blocks if rotations is None else self._rotated_blocks(rotations, ids_keep)
        x = _pass(blocks, encoder.norm_pre(x), checkpointed=encoder.grad_checkpointing and self.training)
        # A network that averages its tokens has its last norm after the average; one of the two is the identity.
        return encoder.fc_norm(encoder.norm(x))

    def _positions(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(1, prefix + L, D), the tokens of a picture without content; and rotary positions of the patches, if any."""
        encoder = self.encoder
        shape = encoder.patch_embed.grid_size if encoder.dynamic_img_size else (self.num_patches,)
        found = encoder._pos_embed(encoder.patch_embed.proj.weight.new_zeros(1, *shape, encoder.embed_dim))
        return found if isinstance(encoder, Eva) else (found, None)

    def _rotated_blocks(self, rotations: torch.Tensor, ids_keep: torch.Tensor) -> list[Callable]:
        """The blocks with the rotary positions of the visible patches: (L, R), or learnt ones (depth, heads, L, R)."""
        blocks = self.encoder.blocks
        kept = apply_keep_indices_nlc(ids_keep, rotations, ids_keep)  # (B, K, R) or (B, depth, heads, K, R)
        of_blocks = kept.unbind(dim=1) if self.encoder.rope_mixed else [kept[:, None]] * len(blocks)
        return [partial(block, rope=rotation) for block, rotation in zip(blocks, of_blocks, strict=True)]

    def _checked(self, pixel_values: torch.Tensor | None, noise: torch.Tensor | None) -> torch.Tensor:
        expected = (3, *self.encoder.patch_embed.img_size)
        if pixel_values is None or pixel_values.shape[1:] != expected:
            shape = None if pixel_values is None else tuple(pixel_values.shape)
            raise ValueError(f"pixel_values must be (B, {', '.join(map(str, expected))}), got {shape}.")
        shape = (len(pixel_values), self.num_patches)
        if noise is None:
            return torch.rand(shape, device=pixel_values.device)
        if noise.shape != shape:
            raise ValueError(f"noise must be {shape}, one number per image and patch; got {tuple(noise.shape)}.")
        return noise

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func=None, every_n_layers: int = 1
    ):
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, every_n_layers)
        self.decoder.grad_checkpointing = enable


def patchify(images: torch.Tensor, patch: int) -> torch.Tensor:
    """(B, 3, S, S) -> (B, L, P * P * 3): patches row by row, pixels row by row, channels last."""
    b, channels, side, _ = images.shape
    grid = side // patch
    images = images.reshape(b, channels, grid, patch, grid, patch)
    return images.permute(0, 2, 4, 3, 5, 1).reshape(b, grid * grid, patch * patch * channels)


def unpatchify(patches: torch.Tensor, patch: int) -> torch.Tensor:
    """The inverse of `patchify`: (B, L, P * P * 3) -> (B, 3, S, S)"""
    b, length, values = patches.shape
    grid = round(length**0.5)
    patches = patches.reshape(b, grid, grid, patch, patch, values // patch**2)
    return patches.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, grid * patch, grid * patch)


def sincos_position_embedding(grid: int, width: int) -> torch.Tensor:
    """(grid * grid, width): sines and cosines of column and row (Vaswani et al. 2017, in two dimensions).

    Args:
        grid: patches along a side.
        width: a multiple of 4.
    """
    frequencies = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies  # (grid, width / 4)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, width / 2)
    columns, rows = axis.repeat(grid, 1), axis.repeat_interleave(grid, dim=0)
    return torch.cat([columns, rows], dim=1).float()


def _pass(blocks: Iterable[Callable], x: torch.Tensor, *, checkpointed: bool) -> torch.Tensor:
    if checkpointed:
        return checkpoint_seq(tuple(blocks), x)
    for block in blocks:
        x = block(x)
    return x


def _gather(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """(B, L, D), (B, K) -> (B, K, D)"""
    return x.gather(1, _expanded(ids, x))


def _expanded(ids: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return ids[..., None].expand(-1, -1, like.shape[-1])


def _patch_statistics(patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of each patch, over its pixels and channels together: (..., V) -> (..., 1) twice."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + 1e-6).sqrt()


def _check_encoder(encoder: nn.Module, config: LymphMAEConfig):
    plain = isinstance(encoder, VisionTransformer | Eva) and isinstance(encoder.patch_embed, PatchEmbed)
    if not plain:
        raise ValueError(
            f"encoder={config.encoder!r}: a masked autoencoder needs a plain timm vision transformer (patches that "
            f"are embedded one by one), got {type(encoder).__name__}. Take a vit_*, deit_* or eva* model."
        )
    if encoder.pos_drop.p or getattr(encoder.patch_drop, "prob", 0.0):
        raise ValueError(
            f"encoder_options={config.encoder_options}: a masked autoencoder hides patches by itself. Leave "
            "pos_drop_rate and patch_drop_rate out."
        )
    height, width = encoder.patch_embed.img_size
    patch = encoder.patch_embed.patch_size[0]
    if height != width or height % patch:
        raise ValueError(f"image_size={(height, width)}: expected a square, its side a multiple of the patch {patch}.")


def _initialise_encoder(encoder: VisionTransformer | Eva):
    """As in the paper: positions start as sines and cosines, the patch embedding as a linear layer does."""
    nn.init.xavier_uniform_(encoder.patch_embed.proj.weight.view(encoder.embed_dim, -1))
    if encoder.pos_embed is not None and encoder.embed_dim % 4 == 0:
        with torch.no_grad():
            positions = sincos_position_embedding(encoder.patch_embed.grid_size[0], encoder.embed_dim)
            encoder.pos_embed.zero_()[:, -len(positions) :] = positions.to(encoder.pos_embed)
    if encoder.attn_pool is not None:
        # Reads the tokens of whole pictures only: nothing here can train it.
        encoder.attn_pool.requires_grad_(False)


def _xavier(module: nn.Module):
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


__all__ = ["LymphMAEConfig", "LymphMAEForPreTraining", "LymphMAEOutput"]
