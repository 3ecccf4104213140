"""Random views keep the cell, the smear's background, and the patient's common stain."""

import math

import pytest
import torch
import torch.nn.functional as F

from lymph_hf.augment import Augmentation, smear_background

STILL = {"flip": False, "rotation": 0.0, "translation": 0.0, "scaling": 0.0}
PLAIN = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0}
SMEAR = torch.tensor([255.0, 232.0, 201.0])


def smear(n: int = 6, size: int = 32) -> torch.Tensor:
    """Dark discs on the smear's background, a red cell cut by the border."""
    cells = SMEAR.view(1, 3, 1, 1).repeat(n, 1, size, size)
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    disc = ((rows - size / 2) ** 2 + (columns - size / 3) ** 2) < (size / 5) ** 2
    cells[:, :, disc] = torch.tensor([90.0, 60.0, 140.0]).view(1, 3, 1)
    cells[:, :, :5, : size // 3] = torch.tensor([190.0, 150.0, 150.0]).view(1, 3, 1, 1)
    return cells.to(torch.uint8)


def views(seed=0, cells=None, **options):
    cells = smear() if cells is None else cells
    return Augmentation(**options)(cells, torch.Generator().manual_seed(seed))


def test_nothing_random_changes_nothing():
    torch.testing.assert_close(views(**STILL, **PLAIN), smear().float(), atol=1e-3, rtol=0)


def test_the_background_is_the_smears_own_colour():
    torch.testing.assert_close(smear_background(smear()), SMEAR)


def test_what_enters_from_outside_is_background_never_black():
    out = views(**PLAIN, rotation=180.0, translation=0.3)
    corners = out[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.min() > 140, "a corner is background or the red cell, both bright"
    assert (out.amin(dim=(1, 2, 3)) > 50).all()


def test_a_rotation_by_itself_keeps_the_amount_of_cell():
    out = views(**PLAIN, flip=True, rotation=180.0, translation=0.0, scaling=0.0)
    dark = (out[:, 0] < 140).float().mean(dim=(1, 2))
    torch.testing.assert_close(
        dark, torch.full_like(dark, float((smear()[0, 0] < 140).float().mean())), atol=0.02, rtol=0
    )


def plainly(cells: torch.Tensor, seed: int) -> torch.Tensor:
    """The default views of a patient, one step after the other."""
    n, generator = len(cells), torch.Generator().manual_seed(seed)

    def draw(most: float, *shape: int) -> torch.Tensor:
        return (2 * torch.rand(shape, generator=generator) - 1) * most

    angle, size, shift = draw(math.pi, n), 1 + draw(0.1, n), 2 * draw(0.05, n, 2)
    mirror = torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0)
    brightness, contrast, saturation = (1 + float(draw(most, 1)) for most in (0.1, 0.15, 0.15))
    cos, sin = angle.cos() / size, angle.sin() / size
    maps = torch.stack([mirror * cos, -sin, shift[:, 0], mirror * sin, cos, shift[:, 1]], dim=1).view(n, 2, 3)
    background = smear_background(cells).view(1, 3, 1, 1)
    grid = F.affine_grid(maps, list(cells.shape), align_corners=False)
    moved = F.grid_sample(cells.float() - background, grid, align_corners=False) + background
    grey = (0.299 * moved[:, 0] + 0.587 * moved[:, 1] + 0.114 * moved[:, 2])[:, None]
    middle = moved.mean(dim=(0, 2, 3)).view(1, 3, 1, 1)
    coloured = grey + saturation * (moved - grey)
    return (brightness * (middle + contrast * (coloured - middle))).clamp(0, 255)


@pytest.mark.parametrize("n", [1, 20])
def test_views_are_warp_saturation_contrast_and_brightness_in_turn(n):
    cells = torch.randint(0, 256, (n, 3, 24, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(views(7, cells), plainly(cells, 7), atol=0.01, rtol=0)


def test_patients_together_are_each_by_itself():
    cells = torch.stack([smear(5), smear(5).flip(1), 255 - smear(5)])
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    together = Augmentation().of_patients(cells, generators)
    for seed, patient in enumerate(together):
        torch.testing.assert_close(patient, views(seed, cells[seed]), atol=1e-3, rtol=0)
    after = [torch.rand(1, generator=generator) for generator in generators]
    assert len(set(map(float, after))) == 3


def test_each_cell_moves_on_its_own_but_the_stain_changes_alike():
    moved = views(**PLAIN)
    assert not torch.equal(moved[0], moved[1])
    stained = views(**STILL)
    for cell in stained[1:]:
        torch.testing.assert_close(cell, stained[0])
    assert not torch.allclose(stained[0], smear()[0].float(), atol=1)


def test_the_generator_decides_everything():
    assert torch.equal(views(3), views(3))
    assert not torch.equal(views(3), views(4))


def test_the_shape_of_a_flip_is_a_mirror():
    torch.manual_seed(0)
    out = views(**PLAIN, flip=True, rotation=0.0, translation=0.0, scaling=0.0, cells=smear(40))
    original = smear(1)[0].float()
    kinds = [
        "same"
        if torch.allclose(cell, original, atol=0.1)
        else "mirror"
        if torch.allclose(cell, original.flip(-1), atol=0.1)
        else ""
        for cell in out
    ]
    assert set(kinds) == {"same", "mirror"}
    assert kinds.count("mirror") == pytest.approx(20, abs=10)
