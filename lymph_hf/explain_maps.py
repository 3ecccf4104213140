"""Where inside a cell the evidence lies: signed maps over its pixels, for any encoder.

The evidence of a cell is what it moves in the log-odds of the target label, to first order in its embedding, with all
other cells of the patient kept. A map spreads it over the picture: red places speak for the label, blue ones against
it, in comparison with the patient's average cell. That is what makes maps agree with `explain.Explanation.effects`: a
blank picture in its place is no neutral cell, and may look more tumoral than any.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .encoders import embedding_size
from .explain import PatientHead, check_target

Method = Literal["auto", "integrated", "grad_cam"]

# Steps from the average cell to the picture; 8 are no more faithful.
_STEPS = 3
# Places along a side into which integrated gradients are summed: single pixels are noise.
_PLACES = 14
# Cells of which gradients are taken at once.
_CELLS_AT_ONCE = 16


def cell_maps(
    model: nn.Module,
    pixel_values: Tensor,
    cells: Sequence[int],
    *,
    target: int | None = None,
    clinical: Tensor | None = None,
    cell_embeddings: np.ndarray | None = None,
    method: Method = "auto",
) -> np.ndarray:
    """Where inside some cells of a patient the evidence for a label lies.

    Methods:

    - `"integrated"`: integrated gradients (Sundararajan et al., ICML 2017, arXiv 1703.01365) from the mean picture of
      the patient's cells, summed over places. For every encoder: gradients end in the pixels, so that class,
      register and prompt tokens, through which evidence passes, need no treatment of their own. Three passes.
    - `"grad_cam"`: gradient times feature map, place by place (Selvaraju et al., ICCV 2017, arXiv 1610.02391, in the
      form of Draelos and Carin, arXiv 2011.08891), less the feature map of the mean picture. For encoders that have
      one (CNNs, ConvNeXt, Swin ...). Coarser; one pass.
    - `"auto"`: `"grad_cam"` where the encoder has a feature map, else `"integrated"`.

    Args:
        model: as in `explain.explain_bag`.
        pixel_values: (1, N, 3, H, W), one patient without padding.
        cells: positions of the k cells to map.
        target: as in `explain_bag`.
        clinical: (1, F), standardised; `None` = all missing.
        cell_embeddings: (N, D) of the `Explanation`, which saves encoding all cells again.
        method: see above.

    Returns:
        (k, H, W) float32 in -1..1: above 0 speaks for the target. Each map is scaled by its own largest absolute
        value; one without any evidence, as of a cell that a pooling never looks at, is 0 everywhere.

    Raises:
        ValueError: as `explain_bag`; a cell that is not there, or a method that does not fit the encoder.
    """
    # Whoever answers requests runs the model in inference mode, in which nothing has a gradient.
    with torch.inference_mode(False), torch.enable_grad():
        patient = PatientHead(model, {"pixel_values": pixel_values, "clinical": clinical})
        number = len(patient.cells)
        if wrong := [cell for cell in cells if not 0 <= cell < number]:
            raise ValueError(f"cells {wrong}: expected positions from 0 to {number - 1}.")
        embeddings = patient.encode()[0] if cell_embeddings is None else torch.from_numpy(cell_embeddings)
        directions = _directions(patient, embeddings.to(patient.cells), target)
        reference = _reference(patient.cells)
        encoders = _encoders(patient.model)
        draw = [_METHODS[_chosen(encoder, method, reference)] for encoder in encoders]
        maps = [torch.zeros(0, *reference.shape[1:])]
        for start in range(0, len(cells), _CELLS_AT_ONCE):
            some = torch.tensor(cells[start : start + _CELLS_AT_ONCE])
            pictures = patient.cells[some].clone()  # a clone is no inference tensor
            parts = directions[some].split([embedding_size(encoder) for encoder in encoders], dim=1)
            drawn = [
                _upsampled(one(encoder, pictures, direction, reference), reference.shape[1:])
                for one, encoder, direction in zip(draw, encoders, parts, strict=True)
            ]
            maps.append(_scaled(torch.stack(drawn).sum(dim=0)).cpu())
    return torch.cat(maps).numpy()


def _encoders(model: nn.Module) -> list[nn.Module]:
    """The encoder of a patient model, or those of an ensemble in the order of their embeddings."""
    members = getattr(model, "members", [model])
    encoders = [member.base_model.encoder for member in members]
    return [encoder for encoder in encoders if encoder is not None]  # members may share that of the first


def _directions(patient: PatientHead, embeddings: Tensor, target: int | None) -> Tensor:
    """(N, D): gradient of the log-odds of the target with respect to each cell's embedding."""
    embeddings = embeddings.detach().clone().requires_grad_()
    logits = patient.logits(embeddings)[0]
    target = check_target(target, logits.detach())
    others = torch.cat([logits[:target], logits[target + 1 :]])
    return torch.autograd.grad(logits[target] - others.logsumexp(dim=0), embeddings)[0]


def _reference(cells: Tensor) -> Tensor:
    """(3, H, W): the mean picture; for the only cell of a patient its median colour, as it differs from no other."""
    if len(cells) > 1:
        return cells.float().mean(dim=0).to(cells)
    return cells[0].flatten(1).float().median(dim=1).values.to(cells)[:, None, None].expand_as(cells[0])


def _integrated(encoder: nn.Module, pictures: Tensor, directions: Tensor, reference: Tensor) -> Tensor:
    """(k, h, w)"""
    difference = pictures - reference
    total = torch.zeros_like(pictures)
    for step in range(_STEPS):
        between = (reference + (step + 0.5) / _STEPS * difference).detach().requires_grad_()
        total += torch.autograd.grad((encoder(between) * directions).sum(), between)[0] / _STEPS
    return F.adaptive_avg_pool2d((total * difference).float().sum(dim=1, keepdim=True), _PLACES).squeeze(1)


def _grad_cam(encoder: nn.Module, pictures: Tensor, directions: Tensor, reference: Tensor) -> Tensor:
    """(k, h, w)"""
    with torch.no_grad():
        features = encoder.forward_features(torch.cat([pictures, reference.unsqueeze(0)]))
    features, of_reference = features[:-1].requires_grad_(), features[-1:]
    gradients = torch.autograd.grad((encoder.forward_head(features) * directions).sum(), features)[0]
    channels = 3 if getattr(encoder, "output_fmt", None) == "NHWC" else 1
    return (gradients * (features - of_reference)).sum(dim=channels)


def _upsampled(places: Tensor, size: Sequence[int]) -> Tensor:
    """(k, h, w) -> (k, H, W)"""
    places = places.detach().float().unsqueeze(1)
    return F.interpolate(places, size=tuple(size), mode="bilinear", align_corners=False).squeeze(1)


def _scaled(maps: Tensor) -> Tensor:
    largest = maps.abs().amax(dim=(1, 2), keepdim=True)
    return maps / largest.clamp(min=torch.finfo(maps.dtype).tiny)


def _chosen(encoder: nn.Module, method: Method, reference: Tensor) -> str:
    """The method to use; of those that fit, the first one is the automatic choice."""
    with torch.no_grad():
        features = encoder.forward_features(reference.unsqueeze(0))
    fitting = ["grad_cam", "integrated"] if features.ndim == 4 else ["integrated"]
    if method not in ("auto", *fitting):
        raise ValueError(f"method={method!r}: {type(encoder).__name__} allows {', '.join(fitting)} or auto.")
    return fitting[0] if method == "auto" else method


_METHODS: dict[str, Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]] = {
    "integrated": _integrated,
    "grad_cam": _grad_cam,
}

__all__ = ["Method", "cell_maps"]
