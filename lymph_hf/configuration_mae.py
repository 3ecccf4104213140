"""Configuration of the masked autoencoder that pretrains cell encoders."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .configuration_lymph import expect, refuse_misspelt


@strict
class LymphMAEConfig(PreTrainedConfig):
    r"""
    Everything needed to rebuild a masked autoencoder (He et al., CVPR 2022, arXiv:2111.06377).

    Args:
        encoder (`str`, defaults to `"vit_tiny_patch16_224"`):
            A timm vision transformer of the plain family (`timm.models.VisionTransformer`) or with rotary positions
            (`timm.models.Eva`: EVA-02, DINOv3 ...), any patch size, with or without class, register and
            distillation tokens.
        encoder_options (`dict`, *optional*): Further arguments of `timm.create_model`.
        image_size (`int`, *optional*):
            Side of the square input in pixels, a multiple of the patch. `None` takes timm's size for the encoder.
        mask_ratio (`float`, defaults to 0.75): Share of the patches that the encoder does not see, in (0, 1).
        decoded_share (`float`, defaults to 1.0):
            Share of the hidden patches that are decoded and scored, in (0, 1], drawn anew for each image. Less is
            faster at little cost (the partial reconstruction of CrossMAE, Fu et al., arXiv:2401.14391).
        decoder_depth (`int`, defaults to 4): Transformer blocks of the decoder, at least 1.
        decoder_width (`int`, defaults to 256): Width of the decoder, a multiple of 4 and of `decoder_heads`.
        decoder_heads (`int`, defaults to 8): Attention heads of the decoder.
        norm_pix_loss (`bool`, defaults to `True`):
            Predict pixels standardised within each patch, which makes better features; `False` predicts them as
            they are, which makes nicer pictures.
        pretraining (`dict`, *optional*):
            What the weights were trained on: data, number of cells, hash of the split whose evaluation patients
            were left out. `None` for weights that were never trained.

    Raises:
        StrictDataclassError: a value of the wrong type or out of range; the message names it and the legal range.
        ValueError: an unknown key that is a near miss of a known one.

    Example:

    ```python
    >>> from lymph_hf import LymphMAEConfig, LymphMAEForPreTraining

    >>> model = LymphMAEForPreTraining(LymphMAEConfig(encoder="vit_small_patch16_224", decoder_depth=8))
    ```
    """

    model_type = "lymph_mae"

    encoder: str = "vit_tiny_patch16_224"
    encoder_options: dict[str, Any] | None = None
    image_size: int | None = None
    mask_ratio: float | int = 0.75
    decoded_share: float | int = 1.0
    decoder_depth: int = 4
    decoder_width: int = 256
    decoder_heads: int = 8
    norm_pix_loss: bool = True
    pretraining: dict[str, Any] | None = None

    def __post_init__(self, **kwargs):
        refuse_misspelt(kwargs, set(self.__dataclass_fields__))
        super().__post_init__(**kwargs)

    def validate_ranges(self):
        """Refuse numbers outside their legal range."""
        expect(0 < self.mask_ratio < 1, "mask_ratio", self.mask_ratio, "a number between 0 and 1")
        expect(0 < self.decoded_share <= 1, "decoded_share", self.decoded_share, "a number in (0, 1]")
        for name in ("decoder_depth", "decoder_heads"):
            expect(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        divisible = self.decoder_width % 4 == 0 and self.decoder_width % max(1, self.decoder_heads) == 0
        expect(
            divisible and self.decoder_width > 0,
            "decoder_width",
            self.decoder_width,
            f"a multiple of 4 and of decoder_heads={self.decoder_heads}",
        )
        expect(self.image_size is None or self.image_size >= 16, "image_size", self.image_size, "at least 16, or None")


__all__ = ["LymphMAEConfig"]
