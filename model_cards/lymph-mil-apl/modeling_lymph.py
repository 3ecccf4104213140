"""Patient models: encoder -> pooling and fusion -> classifier."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from .configuration_lymph import LymphMILConfig
from .encoder_standardizer import CellStandardizer
from .encoders import build_encoder, embedding_size, encode_cells
from .fusion import build_fuser
from .modeling_adapters import AdapterLoading
from .modeling_loading import CheckedLoading
from .pooling import build_pooler, check_bags


@dataclass
class LymphMILModelOutput(ModelOutput):
    """What `LymphMILModel` returns.

    Attributes:
        bag_embedding: (B, E), the patient.
        attentions: (B, N), the weight of each cell, 0 on padding; sums to 1 where the pooling is an attention.
        cell_embeddings: (B, N, D), as the encoder gives them; zeros on padding.
        auxiliary_loss: scalar, the pooling's own loss (CLAM, DSMIL, DTFD ...) when labels were given.
    """

    bag_embedding: torch.FloatTensor | None = None
    attentions: torch.FloatTensor | None = None
    cell_embeddings: torch.FloatTensor | None = None
    auxiliary_loss: torch.FloatTensor | None = None


@dataclass
class LymphMILOutput(ModelOutput):
    """What `LymphMILForBagClassification` returns.

    Attributes:
        loss: scalar, when `labels` were given; the pooling's auxiliary loss included.
        logits: (B, num_labels), calibrated when the configuration holds a calibration.
        attentions: (B, N), the weight of each cell, 0 on padding.
        bag_embedding: (B, E), the patient.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    attentions: torch.FloatTensor | None = None
    bag_embedding: torch.FloatTensor | None = None


def _is_loaded(tensor: torch.Tensor) -> bool:
    return getattr(tensor, "_is_hf_initialized", False)


class LymphMILPreTrainedModel(CheckedLoading, AdapterLoading, PreTrainedModel):
    """Loading, saving and initialisation shared by the patient models."""

    config: LymphMILConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _no_split_modules = ["Block"]

    def _keep_own_initialisation(self):
        """Networks of timm and our heads initialise themselves; `post_init` must not do it again its own way.

        On the meta device, where `from_pretrained` builds models, nothing is initialised yet: there `_init_weights`
        has to run, if only for the buffers that no checkpoint holds.
        """
        if not any(parameter.is_meta for parameter in self.parameters()):
            for module in self.modules():
                module._is_hf_initialized = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Initialise what a checkpoint lacks, by each module's own scheme; what was loaded stays, bit for bit."""
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if all(_is_loaded(tensor) for tensor in own):
            return
        # transformers guards the functions of torch.nn.init only, and modules also write in other ways.
        loaded = [
            (tensor, tensor.clone()) for tensor in (*module.parameters(), *module.buffers()) if _is_loaded(tensor)
        ]
        for parameter in module.parameters(recurse=False):
            nn.init.trunc_normal_(parameter, std=0.02)  # for tokens, which no scheme covers and memory left undefined
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        else:
            super()._init_weights(module)
        for tensor, value in loaded:
            tensor.copy_(value)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func=None, every_n_layers: int = 1
    ):
        """Switch on timm's own checkpointing of the encoder, which knows neither another function nor a stride."""
        self.base_model.encoder.set_grad_checkpointing(enable)


class LymphMILModel(LymphMILPreTrainedModel):
    """A bag of cells and clinical values -> one embedding per patient.

    Args:
        config: names of the encoder, pooling and fusion with their options.
    """

    def __init__(self, config: LymphMILConfig):
        super().__init__(config)
        self.encoder = build_encoder(config)
        width = embedding_size(self.encoder)
        self.standardizer = CellStandardizer(width) if config.standardize_cells else None
        # A regression model has one output but poolings with class-wise parts need at least two classes.
        labels = max(2, config.num_labels)
        self.pooler = build_pooler(config.pooling, width, num_labels=labels, **(config.pooling_options or {}))
        self.fuser = build_fuser(
            config.fusion,
            width,
            self.pooler.output_size,
            len(config.clinical_features),
            **(config.fusion_options or {}),
        )
        if not self.fuser.uses_pool:
            self.pooler = None  # a fusion that reads the cells itself leaves nothing to pool, nor to train there
        self._keep_own_initialisation()
        self.post_init()

    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        bag_mask: torch.BoolTensor | None = None,
        clinical: torch.FloatTensor | None = None,
        bag_offsets: torch.LongTensor | None = None,
        cell_embeddings: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
    ) -> LymphMILModelOutput:
        r"""
        Args:
            pixel_values: (B, N, 3, H, W) with `bag_mask`, or packed cells (T, 3, H, W) with `bag_offsets`.
            bag_mask: (B, N), True = a real cell; `None` when every cell is real.
            clinical: (B, F) standardised by the processor, NaN = missing; `None` = all missing.
            bag_offsets: (B + 1,) rising from 0 to T: patient b owns the packed cells `offsets[b]:offsets[b + 1]`.
            cell_embeddings: (B, N, D) from the encoder, in place of `pixel_values`.
            labels: (B,), used by poolings that have a loss of their own.

        Raises:
            ValueError: a patient without cells, or inputs that do not fit together.
        """
        if cell_embeddings is None:
            cell_embeddings, bag_mask = self.encode_bags(pixel_values, bag_mask, bag_offsets)
        else:
            bag_mask = _mask_of(cell_embeddings, bag_mask)
        # The mean has no parameters, and an encoder may have been taken out: then the embeddings keep their precision.
        own = (parameter.dtype for parameter in self.parameters())
        cell_embeddings = cell_embeddings.to(next(own, cell_embeddings.dtype))
        cells = cell_embeddings if self.standardizer is None else self.standardizer(cell_embeddings)
        auxiliary_losses = []

        def pool(x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            embedding, weights, auxiliary_loss = self.pooler.pool(x, mask, labels)
            if auxiliary_loss is not None:
                auxiliary_losses.append(auxiliary_loss)
            return embedding, weights

        is_attention = self.pooler is None or self.pooler.is_attention
        with _without_autocast(cell_embeddings):
            bag_embedding, attentions = self.fuser(cells, bag_mask, clinical, pool, is_attention=is_attention)
        return LymphMILModelOutput(
            bag_embedding=bag_embedding,
            attentions=attentions,
            cell_embeddings=cell_embeddings,
            auxiliary_loss=sum(auxiliary_losses) if auxiliary_losses else None,
        )

    def encode_bags(self, pixel_values, bag_mask=None, bag_offsets=None) -> tuple[torch.Tensor, torch.Tensor]:
        """Only real cells pass the encoder: padding costs nothing and cannot leak. -> (B, N, D), (B, N)"""
        cells, bag_mask = _real_cells(pixel_values, bag_mask, bag_offsets)
        check_bags(bag_mask)
        embeddings = encode_cells(self.encoder, cells.to(self.dtype), self.config.chunk_size)  # (T, D)
        padded = embeddings.new_zeros(*bag_mask.shape, embeddings.shape[-1])
        padded[bag_mask] = embeddings
        return padded, bag_mask


class LymphMILForBagClassification(LymphMILPreTrainedModel):
    """Patient classifier, such as reactive against tumoral lymphocytosis.

    Example:

    ```python
    >>> import torch
    >>> from lymph_hf import LymphMILConfig, LymphMILForBagClassification

    >>> model = LymphMILForBagClassification(LymphMILConfig(encoder="test_vit", image_size=32)).eval()
    >>> output = model(torch.randn(2, 5, 3, 32, 32), labels=torch.tensor([0, 1]))
    >>> output.logits.shape, output.attentions.shape
    (torch.Size([2, 2]), torch.Size([2, 5]))

    ```
    """

    def __init__(self, config: LymphMILConfig):
        super().__init__(config)
        self.model = LymphMILModel(config)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(self.model.fuser.output_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        bag_mask: torch.BoolTensor | None = None,
        clinical: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        bag_offsets: torch.LongTensor | None = None,
        cell_embeddings: torch.FloatTensor | None = None,
    ) -> LymphMILOutput:
        r"""
        Inputs as in `LymphMILModel`.

        Args:
            labels: (B,) in 0..num_labels-1, or real numbers when the model has a single output (regression).
        """
        outputs = self.model(
            pixel_values,
            bag_mask,
            clinical,
            bag_offsets=bag_offsets,
            cell_embeddings=cell_embeddings,
            labels=labels if self.config.num_labels > 1 else None,
        )
        with _without_autocast(outputs.bag_embedding):
            logits = calibrated(self.classifier(self.dropout(outputs.bag_embedding)), self.config.calibration)
        return LymphMILOutput(
            loss=None if labels is None else self._loss(logits, labels, outputs.auxiliary_loss),
            logits=logits,
            attentions=outputs.attentions,
            bag_embedding=outputs.bag_embedding,
        )

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor, auxiliary_loss: torch.Tensor | None) -> torch.Tensor:
        if self.config.num_labels == 1:
            loss = F.mse_loss(logits.float(), labels.float().reshape(logits.shape))
        else:
            # The mean over patients, not torch's weighted mean: that one divides by the weights it finds in the
            # batch, so with one patient per batch the class weights would cancel out.
            losses = F.cross_entropy(
                logits.float(), labels, reduction="none", label_smoothing=self.config.label_smoothing
            )
            if self.config.class_weights is not None:
                losses = losses * losses.new_tensor(self.config.class_weights)[labels]
            loss = losses.mean()
        return loss if auxiliary_loss is None else loss + auxiliary_loss


def _without_autocast(tensor: torch.Tensor) -> torch.autocast:
    """Mixed precision is for the encoder: what follows costs next to nothing, and logits in bfloat16 would tie."""
    return torch.autocast(tensor.device.type, enabled=False)


def calibrated(logits: torch.Tensor, calibration: dict | None) -> torch.Tensor:
    """(B, C) -> (B, C): temperature or Platt scaling by what a configuration holds; see `LymphMILConfig`."""
    if calibration is None:
        return logits
    if calibration["method"] == "temperature":
        return logits / calibration["temperature"]
    odds = calibration["slope"] * (logits[:, 1] - logits[:, 0]) + calibration["intercept"]
    return torch.stack([-odds / 2, odds / 2], dim=-1)


def _real_cells(pixel_values, bag_mask, bag_offsets) -> tuple[torch.Tensor, torch.Tensor]:
    """Either form of input -> the real cells in a row (T, 3, H, W), and which bag and place they fill (B, N)."""
    if pixel_values is None:
        raise ValueError("Give pixel_values (from the image processor) or cell_embeddings.")
    if bag_offsets is not None:
        if bag_mask is not None:
            raise ValueError("Give bag_offsets with packed cells or bag_mask with padded ones, not both.")
        return pixel_values, _mask_of_offsets(bag_offsets, pixel_values)
    if pixel_values.ndim != 5:
        raise ValueError(
            f"pixel_values must be (patients, cells, 3, height, width), got {tuple(pixel_values.shape)}. "
            "Use the image processor, or pass bag_offsets with packed cells."
        )
    bag_mask = _mask_of(pixel_values, bag_mask)
    return pixel_values[bag_mask], bag_mask


def _mask_of(bags: torch.Tensor, bag_mask: torch.Tensor | None) -> torch.Tensor:
    """(B, N) as booleans; every cell is real where no mask is given."""
    if bag_mask is None:
        return torch.ones(bags.shape[:2], dtype=torch.bool, device=bags.device)
    if bag_mask.shape != bags.shape[:2]:
        raise ValueError(f"bag_mask is {tuple(bag_mask.shape)}, expected {tuple(bags.shape[:2])} (patients, cells).")
    return bag_mask.bool()


def _mask_of_offsets(bag_offsets: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """(B + 1,) -> (B, N), N the largest bag."""
    sizes = bag_offsets.diff()
    if cells.ndim != 4 or bag_offsets[0] != 0 or bag_offsets[-1] != len(cells) or (sizes < 0).any():
        raise ValueError(
            f"Packed pixel_values must be (T, 3, H, W) with bag_offsets rising from 0 to T; got "
            f"{tuple(cells.shape)} and offsets {bag_offsets.tolist()}."
        )
    return torch.arange(int(sizes.max()), device=sizes.device) < sizes[:, None]


__all__ = ["LymphMILForBagClassification", "LymphMILModel", "LymphMILPreTrainedModel"]
