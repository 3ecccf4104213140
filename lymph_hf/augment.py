"""Random views of a bag of cells, for training."""

import math
from collections.abc import Sequence
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
        return self.of_patients(cells[None], [generator])[0]

    def of_patients(
        self, cells: torch.Tensor, generators: Sequence[torch.Generator], *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Patients of as many cells each, each of them as by itself: (P, N, 3, H, W) -> the same in float32.

        Args:
            out: contiguous, float32, of the shape of `cells`: where the result goes, in place of a new tensor.
        """
        patients, n, _, height, width = cells.shape
        draws = torch.stack([torch.rand(5 * n + 3, generator=generator) for generator in generators])
        of_cells, of_stain = draws.split([5 * n, 3], dim=1)
        grid = _sampling_grid(self._transforms(of_cells), height, width)
        out = torch.empty(cells.shape) if out is None else out
        background = smear_background(cells)[..., None]  # (P, 3, 1)
        # Zero stands for the background, so what the sampler adds outside the picture is background too.
        torch.sub(cells, background[:, None, ..., None], out=out)
        moved = F.grid_sample(out.flatten(0, 1), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        middle = moved.view(patients, n, 3, -1).mean(dim=(1, 3))[..., None] + background
        colours, offset = (part.repeat_interleave(n, dim=0) for part in self._stain(of_stain, background, middle))
        # The cells as they were are not needed any more: new memory would cost more than the arithmetic.
        torch.baddbmm(offset, colours, moved.flatten(2), out=out.view(patients * n, 3, -1))
        return out.clamp_(0, 255)

    def _transforms(self, draws: torch.Tensor) -> torch.Tensor:
        """(P, 5 N) numbers of 0..1 -> (P * N, 2, 3) affine maps from the new picture's coordinates to the old one's."""
        angle, size, *shift, mirror = draws.split(draws.shape[1] // 5, dim=1)
        angle = math.radians(self.rotation) * _symmetric(angle)
        size = 1 + self.scaling * _symmetric(size)
        # Coordinates run from -1 to 1.
        shift = 2 * self.translation * _symmetric(torch.cat(shift, dim=1))
        x, y = shift.unflatten(1, (-1, 2)).unbind(dim=2)
        mirror = 1 - 2 * (mirror < 0.5).float() if self.flip else torch.ones_like(mirror)
        cos, sin = angle.cos() / size, angle.sin() / size
        rows = [torch.stack([mirror * cos, -sin, x], -1), torch.stack([mirror * sin, cos, y], -1)]
        return torch.stack(rows, dim=2).flatten(0, 1)

    def _stain(
        self, draws: torch.Tensor, background: torch.Tensor, middle: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One colour map for a whole patient: saturation, then contrast around the mean colour, then brightness.

        Args:
            draws: (P, 3) numbers of 0..1.
            background, middle: (P, 3, 1), colour of the empty smear and mean colour.

        Returns:
            (P, 3, 3) and (P, 3, 1): the new colour is the one times the difference from the background, plus the other.
        """
        amounts = torch.tensor([self.brightness, self.contrast, self.saturation])
        brightness, contrast, saturation = (1 + amounts * _symmetric(draws))[..., None, None].unbind(dim=1)
        grey = torch.tensor(_LUMA).expand(3, 3)
        colours = brightness * contrast * torch.lerp(grey, torch.eye(3), saturation)
        return colours, colours @ background + brightness * (1 - contrast) * middle


def smear_background(cells: torch.Tensor) -> torch.Tensor:
    """Colour of the empty smear: the median of the brightest quarter of all border pixels of the bag.

    The border shows background and parts of red cells; the background is the brighter of the two.

    Args:
        cells: (..., N, 3, H, W), all of one patient, or of several.

    Returns:
        (..., 3)
    """
    border = torch.cat([cells[..., 0, :], cells[..., -1, :], cells[..., 0], cells[..., -1]], dim=-1)
    pixels = border.transpose(-3, -2).flatten(-2).float()  # (..., 3, pixels)
    luma = torch.tensor(_LUMA) @ pixels
    brightest = luma.topk(max(1, luma.shape[-1] // 4), sorted=False).indices
    return pixels.gather(-1, brightest[..., None, :].expand(*pixels.shape[:-1], -1)).median(dim=-1).values


def _sampling_grid(transforms: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """What `affine_grid` makes of (N, 2, 3) maps, in a quarter of its time: (N, H, W, 2)."""
    rows, columns = ((2 * torch.arange(side) + 1) / side - 1 for side in (height, width))
    of_column, of_row, shift = transforms.split(1, dim=-1)  # (N, 2, 1) each
    parts = (of_column * columns)[:, :, None] + (of_row * rows + shift)[..., None]  # (N, 2, H, W)
    return parts.permute(0, 2, 3, 1)


def _symmetric(draws: torch.Tensor) -> torch.Tensor:
    """Numbers of 0..1 -> of -1..1"""
    return 2 * draws - 1
