"""Cell encoders: any timm model, one image in, one vector out."""

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from timm.data import resolve_data_config
from torch import nn

from .configuration_lymph import LymphMILConfig

logger = logging.getLogger(__name__)


def encoder_data_config(config: LymphMILConfig) -> dict:
    """What timm says the encoder expects.

    Returns:
        A dictionary with `input_size` (channels, height, width), `mean`, `std` and `interpolation`.

    Raises:
        ValueError: timm knows no model of that name.
    """
    pretrained_cfg = timm.get_pretrained_cfg(_known(config.encoder)).to_dict()
    data_config = resolve_data_config(pretrained_cfg=pretrained_cfg)
    if config.image_size is not None:
        data_config["input_size"] = (3, config.image_size, config.image_size)
    return data_config


def build_encoder(config: LymphMILConfig) -> nn.Module:
    """The timm model without classifier and with random weights: (N, 3, H, W) -> (N, D).

    Weights are loaded afterwards (`load_encoder_weights`), never here: transformers builds models on the meta
    device and would overwrite them.

    Raises:
        ValueError: timm knows no model of that name.
    """
    options = dict(config.encoder_options or {})
    if timm.get_pretrained_cfg(_known(config.encoder)).fixed_input_size:
        # Transformers with a fixed grid of positions are built for the size; other networks take any size.
        options.setdefault("img_size", config.image_size)
    return timm.create_model(config.encoder, pretrained=False, num_classes=0, **options)


def embedding_size(encoder: nn.Module) -> int:
    """Width D of the vectors that the encoder gives."""
    return encoder.head_hidden_size


def encode_cells(encoder: nn.Module, cells: torch.Tensor, chunk_size: int | None = None) -> torch.Tensor:
    """Pass cells through the encoder, at most `chunk_size` at once.

    Args:
        encoder: from `build_encoder`.
        cells: (N, 3, H, W), normalised by the image processor.
        chunk_size: bounds the working memory of inference; `None` means all at once.

    Returns:
        (N, D)
    """
    if chunk_size is None or len(cells) <= chunk_size:
        return encoder(cells)
    return torch.cat([encoder(chunk) for chunk in cells.split(chunk_size)])


@dataclass(frozen=True)
class WeightReport:
    """Which tensors of an encoder a weight source filled.

    Attributes:
        source: where the weights come from.
        matched: names that were loaded, the resized ones included.
        resized: names loaded after interpolation to another input size.
        missing: names of the encoder that the source lacks or holds in another shape.
        unexpected: names in the source that the encoder lacks, such as a classifier.
        share: fraction of the encoder's numbers that were loaded, in [0, 1].
    """

    source: str
    matched: tuple[str, ...]
    resized: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    share: float

    def summary(self) -> str:
        """One line for a log, and one more for every group of names that is not empty."""
        lines = [f"Encoder weights from {self.source}: {self.share:.1%} of the encoder's numbers loaded."]
        for kind in ("resized", "missing", "unexpected"):
            if names := getattr(self, kind):
                lines.append(f"  {kind}: {_first(names)}")
        return "\n".join(lines)


def load_encoder_weights(encoder: nn.Module, source: str | Path, *, minimum_share: float = 0.9) -> WeightReport:
    """Fill an encoder with weights, and tell what was filled.

    Args:
        encoder: from `build_encoder`; changed in place, and only when enough matches.
        source: `"timm"` for the weights that timm publishes for this model, or a file or folder of weights:
            `.safetensors` (of timm, of this package, ...) or a foreign `.pt`, `.pth`, `.bin` of plain tensors.
        minimum_share: refuse when a smaller fraction of the encoder's numbers is found in the source.

    Raises:
        FileNotFoundError: the path does not exist, or the folder holds no weights.
        ValueError: the file is a pickle of more than tensors, or too little of it matches.
        ConnectionError: timm's weights cannot be fetched.
    """
    tensors = _published_tensors(encoder) if str(source) == "timm" else read_tensors(Path(source))
    target = encoder.state_dict()
    tensors = _strip_best_prefix(tensors, target)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    tensors = _convert(tensors, encoder)
    fitting = {n: t for n, t in tensors.items() if n in target and t.shape == target[n].shape}
    found = sum(target[name].numel() for name in fitting)
    report = WeightReport(
        source=str(source),
        matched=tuple(fitting),
        resized=tuple(n for n in fitting if n in shapes and shapes[n] != target[n].shape),
        missing=tuple(n for n in target if n not in fitting),
        unexpected=tuple(n for n in tensors if n not in target),
        share=found / max(1, sum(tensor.numel() for tensor in target.values())),
    )
    if report.share < minimum_share:
        raise ValueError(
            f"{source}: only {report.share:.1%} of the encoder's numbers are in it, expected at least "
            f"{minimum_share:.0%}. Is it another architecture? Missing: {_first(report.missing)}; "
            f"unexpected: {_first(report.unexpected)}."
        )
    encoder.load_state_dict(fitting, strict=False)
    return report


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Named tensors of a weight file, or of the one weight file in a folder.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: a pickle that holds more than tensors; it is not executed.
    """
    path = _weight_file(path)
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path}: not a file of plain tensors, refused because reading it could run foreign code "
            f"({type(error).__name__}). Ask its author for safetensors, or convert it where you trust it."
        ) from error
    return _tensor_table(content, path)


def _known(name: str) -> str:
    if timm.is_model(name):
        return name
    near = timm.list_models(f"*{name.split('.')[0].split('_')[0]}*")[:5]
    raise ValueError(f"encoder={name!r}: timm {timm.__version__} has no such model. Near: {', '.join(near) or 'none'}.")


def _published_tensors(encoder: nn.Module) -> dict[str, torch.Tensor]:
    cfg = encoder.pretrained_cfg
    name = ".".join(filter(None, (cfg["architecture"], cfg.get("tag"))))
    try:
        return timm.create_model(name, pretrained=True, num_classes=0).state_dict()
    except Exception as error:
        raise ConnectionError(
            f"The weights timm publishes for {name} could not be loaded ({type(error).__name__}: {error}). "
            "Check the connection, or give a local file with --encoder-weights FILE."
        ) from error


def _weight_file(path: Path) -> Path:
    if path.is_file():
        return path
    for pattern in ("*.safetensors", "*.pth", "*.pt", "*.bin"):
        if files := sorted(path.glob(pattern)):
            return files[0]
    raise FileNotFoundError(
        f"{path}: no weights there. Expected a .safetensors, .pth, .pt or .bin file, or its folder."
    )


def _tensor_table(content, path: Path) -> dict[str, torch.Tensor]:
    """The largest table of tensors in a checkpoint: authors keep it under `teacher`, `model`, `state_dict` ..."""
    tables = [content, *(v for v in content.values() if isinstance(v, Mapping))] if isinstance(content, Mapping) else []
    tables = [{n: t for n, t in table.items() if isinstance(t, torch.Tensor)} for table in tables]
    best = max(tables, key=len, default={})
    if not best:
        raise ValueError(f"{path}: holds no named tensors.")
    return best


def _strip_best_prefix(tensors: dict[str, torch.Tensor], target: Mapping) -> dict[str, torch.Tensor]:
    """Drop the wrapper's name (`backbone.`, `model.encoder.` ...) under which most names match the encoder's."""
    prefixes = {""} | {
        ".".join(parts[:i]) + "." for parts in (n.split(".") for n in tensors) for i in range(1, len(parts))
    }

    def matches(prefix: str) -> int:
        return sum(name.startswith(prefix) and name[len(prefix) :] in target for name in tensors)

    best = max(sorted(prefixes, key=len), key=matches)
    return {n.removeprefix(best): t for n, t in tensors.items()}


def _convert(tensors: dict[str, torch.Tensor], encoder: nn.Module) -> dict[str, torch.Tensor]:
    """timm's own conversion of published layouts and of position embeddings to another input size."""
    convert = getattr(sys.modules[type(encoder).__module__], "checkpoint_filter_fn", None)
    return tensors if convert is None else dict(convert(tensors, encoder))


def _first(names, most: int = 4) -> str:
    listed = ", ".join(names[:most]) or "none"
    return f"{listed} and {len(names) - most} more" if len(names) > most else listed


__all__ = [
    "WeightReport",
    "build_encoder",
    "embedding_size",
    "encode_cells",
    "encoder_data_config",
    "load_encoder_weights",
    "read_tensors",
]
