"""Maps inside cells: planted evidence is found where it is, with the right sign, whatever the encoder."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lymph_hf import LymphMILConfig, LymphMILForBagClassification, attach_adapter
from lymph_hf.explain import explain_bag
from lymph_hf.explain_maps import cell_maps
from lymph_hf.modeling_ensemble import LymphMILEnsembleForBagClassification

SIZE = 128
# Neither on the diagonal nor in the middle: a map that is turned or mirrored misses it.
BLOB = (slice(32, 64), slice(64, 96))


def make_pictures(cells: int = 5) -> torch.Tensor:
    """(1, N, 3, H, W), each cell with noise of its own on the same texture; cell 0 has the blob."""
    torch.manual_seed(0)
    texture = F.interpolate(torch.randn(1, 3, 16, 16), size=(SIZE, SIZE), mode="bilinear")
    pictures = texture + 0.05 * torch.randn(1, cells, 3, SIZE, SIZE)
    pictures[0, 0, :, *BLOB] += 2.5
    return pictures


def make_model(
    encoder: str = "test_vit", *, adapter: str | None = None, pooling: str = "mean", **options
) -> torch.nn.Module:
    """A model that calls a patient positive for what the blob does to an embedding, and for nothing else."""
    torch.manual_seed(0)
    config = LymphMILConfig(
        encoder=encoder,
        encoder_options=options or None,
        image_size=SIZE,
        pooling=pooling,
        fusion="none",
        clinical_features=[],
    )
    model = LymphMILForBagClassification(config)
    adapted = model if adapter is None else attach_adapter(model, adapter)
    model.eval()
    with torch.no_grad():
        with_blob, *others = model.base_model(make_pictures()).cell_embeddings[0]
        direction = with_blob - torch.stack(others).mean(dim=0)
    classifier = model.classifier if adapter is None else model.classifier.modules_to_save["default"]
    classifier.weight.data = torch.stack([-direction, direction]) / direction.norm()
    return adapted.eval()


MODELS = {
    "class token": {"encoder": "test_vit"},
    "class token and registers": {"encoder": "test_vit", "reg_tokens": 4},
    "mean of tokens": {"encoder": "test_vit2"},
    "attention pooling of tokens": {"encoder": "test_vit3"},
    "deep prompts": {"encoder": "test_vit", "adapter": "vpt_deep"},
    "ResNet": {"encoder": "test_resnet"},
    "ConvNeXt": {"encoder": "test_convnext"},
    "channels last": {"encoder": "test_mambaout"},
}
CASES = [(name, "integrated") for name in MODELS]
CASES += [(name, "grad_cam") for name in ("ResNet", "ConvNeXt", "channels last")]


@pytest.mark.parametrize(("name", "method"), CASES)
def test_planted_evidence_is_found_with_its_sign(name, method):
    model, pictures = make_model(**MODELS[name]), make_pictures()
    assert explain_bag(model, {"pixel_values": pictures}).ranking()[0] == 0
    for target, sign in ((1, 1), (0, -1)):
        (found,) = sign * cell_maps(model, pictures, [0], target=target, method=method)
        assert found.shape == (SIZE, SIZE)
        assert found.sum() > 0
        assert np.abs(found).max() == pytest.approx(1)
        row, column = np.unravel_index(found.argmax(), found.shape)
        assert BLOB[0].start <= row < BLOB[0].stop and BLOB[1].start <= column < BLOB[1].stop
        inside = found[BLOB].clip(min=0).sum() / found.clip(min=0).sum()
        assert inside > {"integrated": 0.5, "grad_cam": 0.2}[method], "the blob covers 1/16 of the picture"


def test_cells_without_the_evidence_speak_against_it():
    """Compared with the patient's average cell, which has a fifth of the blob, they lack it there."""
    found = cell_maps(make_model(), make_pictures(), [1, 2], method="integrated")
    assert (found[:, *BLOB].sum(axis=(1, 2)) < 0).all()


def test_maps_are_the_same_with_embeddings_at_hand_in_inference_mode_and_in_any_company():
    model, pictures = make_model(), make_pictures()
    every = cell_maps(model, pictures, [0, 1, 2, 3, 4])
    with torch.inference_mode():
        inputs = {"pixel_values": pictures.clone()}
        explanation = explain_bag(model, inputs)
        some = cell_maps(model, inputs["pixel_values"], [3, 0], cell_embeddings=explanation.cell_embeddings)
    np.testing.assert_allclose(some, every[[3, 0]], atol=1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert cell_maps(model, pictures, []).shape == (0, SIZE, SIZE)


def test_an_ensemble_is_mapped_through_all_its_encoders():
    members = [make_model("test_vit"), make_model("test_resnet")]
    ensemble = LymphMILEnsembleForBagClassification.from_members(members)
    (found,) = cell_maps(ensemble, make_pictures(), [0])
    assert found[BLOB].mean() > 3 * np.abs(found).mean()


def test_members_with_one_encoder_are_mapped_through_it_once():
    member, pictures = make_model(pooling="gated_attention"), make_pictures()
    ensemble = LymphMILEnsembleForBagClassification.from_members([member, member])
    np.testing.assert_allclose(cell_maps(ensemble, pictures, [0]), cell_maps(member, pictures, [0]), atol=1e-3)


def test_a_cell_that_the_pooling_never_looks_at_has_an_empty_map():
    config = LymphMILConfig(
        encoder="test_vit",
        image_size=SIZE,
        pooling="top_k",
        pooling_options={"k": 2},
        fusion="none",
        clinical_features=[],
    )
    torch.manual_seed(0)
    model, pictures = LymphMILForBagClassification(config).eval(), make_pictures()
    weights = explain_bag(model, {"pixel_values": pictures}).attentions
    maps = cell_maps(model, pictures, range(5))
    assert ((np.abs(maps).max(axis=(1, 2)) > 0) == (weights > 0)).all()


def test_the_only_cell_of_a_patient_has_a_map():
    (found,) = cell_maps(make_model(), make_pictures(1), [0])
    assert np.abs(found).max() == pytest.approx(1)


def test_what_is_not_there_or_does_not_fit_is_refused():
    model, pictures = make_model(), make_pictures()
    with pytest.raises(ValueError, match=r"cells \[5, -1\]: expected positions from 0 to 4"):
        cell_maps(model, pictures, [5, -1, 0])
    with pytest.raises(ValueError, match="VisionTransformer allows integrated or auto"):
        cell_maps(model, pictures, [0], method="grad_cam")
