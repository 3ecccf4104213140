"""Random views of a bag of cells, for training."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

# ITU-R BT.601 luma, the usual grey of an RGB image.
_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Augmentation:
    """Each cell is moved on its own; the stain is changed alike for all cells of a patient.

    A cell has no upright position, so any rotation is as likely as another. A smear is stained as a whole: colours
    that changed from cell to cell would hide a difference between cells that is real. What moves into the picture
    from outside gets the smear's own background colour, never black, which no smear shows.

    Attributes:
        flip: mirror half of the cells.
        rotation: largest angle in degrees, 0 to 180.
        translation: largest shift as a share of the side, 0 to 1.
        scaling: largest relative change of size, 0 to 1.
        brightness, contrast, saturation: largest relative change, 0 to 1.
    """

    flip: bool = True
    rotation: float = 180.0
    translation: float = 0.05
    scaling: float = 0.1
    brightness: float = 0.1
    contrast: float = 0.15
    saturation: float = 0.15

    def __call__(self, cells: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """(N, 3, H, W) of 0..255, uint8 or float -> float32 of 0..255.

        Args:
            cells: all of one patient.
            generator: decides everything random.
        """
        cells = cells.float()
        background = smear_background(cells).view(1, 3, 1, 1)
        grid = F.affine_grid(self._transforms(len(cells), generator), list(cells.shape), align_corners=False)
        # Zero stands for the background, so what the sampler adds outside the picture is background too.
        cells = F.grid_sample(cells - background, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        return self._stain(cells + background, generator)

    def _transforms(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """(N, 2, 3) affine maps from the new picture's coordinates to the old one's."""
        angle = _symmetric((n,), math.radians(self.rotation), generator)
        size = 1 + _symmetric((n,), self.scaling, generator)
        shift = 2 * _symmetric((n, 2), self.translation, generator)  # coordinates run from -1 to 1
        mirror = torch.ones(n)
        if self.flip:
            mirror -= 2 * (torch.rand(n, generator=generator) < 0.5)
        cos, sin = angle.cos() / size, angle.sin() / size
        rows = [
            torch.stack([mirror * cos, -sin, shift[:, 0]], -1),
            torch.stack([mirror * sin, cos, shift[:, 1]], -1),
        ]
        return torch.stack(rows, dim=1)

    def _stain(self, cells: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """One colour map for the whole patient: saturation, then contrast, then brightness."""
        brightness, contrast, saturation = (
            1 + _symmetric((1,), amount, generator) for amount in (self.brightness, self.contrast, self.saturation)
        )
        grey = torch.einsum("nchw,c->nhw", cells, torch.tensor(_LUMA)).unsqueeze(1)
        middle = cells.mean(dim=(0, 2, 3)).view(1, 3, 1, 1)
        cells = torch.lerp(grey, cells, saturation)
        return cells.mul_(contrast * brightness).add_((1 - contrast) * brightness * middle).clamp_(0, 255)


def smear_background(cells: torch.Tensor) -> torch.Tensor:
    """Colour (3,) of the empty smear: the median of the brightest quarter of all border pixels of the bag.

    The border shows background and parts of red cells; the background is the brighter of the two.

    Args:
        cells: (N, 3, H, W), all of one patient.
    """
    border = torch.cat([cells[..., 0, :], cells[..., -1, :], cells[..., 0], cells[..., -1]], dim=-1)
    pixels = border.float().transpose(1, 2).reshape(-1, 3)
    luma = pixels @ torch.tensor(_LUMA)
    brightest = pixels[luma.argsort(descending=True)[: max(1, len(pixels) // 4)]]
    return brightest.median(dim=0).values


def _symmetric(shape: tuple[int, ...], most: float, generator: torch.Generator) -> torch.Tensor:
    """Uniform numbers between -most and most."""
    return (2 * torch.rand(shape, generator=generator) - 1) * most
