"""Effects of cells and clinical values, against plain forward passes without them."""

import ast

import numpy as np
import pytest
import torch
from test_architecture import PACKAGE, imports, layer

from lymph_hf import FUSERS, POOLERS, LymphMILConfig, LymphMILForBagClassification, attach_adapter, explain
from lymph_hf.explain import Explanation, PatientHead, cell_effects, explain_bag
from lymph_hf.modeling_ensemble import LymphMILEnsembleForBagClassification

CELLS = 5


def make_model(**changes) -> LymphMILForBagClassification:
    torch.manual_seed(0)
    settings = {"encoder": "test_vit", "image_size": 32, "pooling_options": None} | changes
    model = LymphMILForBagClassification(LymphMILConfig(**settings)).eval()
    model.classifier.weight.data *= 3  # a new classifier hardly moves
    model.classifier.bias.data.zero_()
    return model


def make_inputs(cells: int = CELLS, *, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {
        "pixel_values": torch.randn(1, cells, 3, 32, 32),
        "bag_mask": torch.ones(1, cells, dtype=torch.bool),
        "clinical": torch.tensor([[0.7, torch.nan, -1.2]]),
    }


def plain(model, inputs, **changes) -> np.ndarray:
    with torch.no_grad():
        return model(**inputs | changes).logits.double().softmax(dim=-1)[0].numpy()


def without(inputs, cell: int) -> dict[str, torch.Tensor]:
    kept = [i for i in range(inputs["pixel_values"].shape[1]) if i != cell]
    return inputs | {name: inputs[name][:, kept] for name in ("pixel_values", "bag_mask")}


def check_effects(model, inputs, explanation: Explanation):
    """Every cell is really taken out of the patient, and the whole model runs."""
    everything = plain(model, inputs)
    np.testing.assert_allclose(explanation.probabilities, everything, atol=1e-6)
    target = explanation.target
    wanted = [everything[target] - plain(model, without(inputs, cell))[target] for cell in range(CELLS)]
    np.testing.assert_allclose(explanation.effects, wanted, atol=2e-6)


@pytest.mark.parametrize("pooling", sorted(POOLERS))
def test_effects_are_those_of_a_forward_pass_without_the_cell_in_every_pooling(pooling):
    model, inputs = make_model(pooling=pooling), make_inputs()
    check_effects(model, inputs, explain_bag(model, inputs))


@pytest.mark.parametrize("fusion", sorted(set(FUSERS) - {"concat"}))
def test_effects_are_those_of_a_forward_pass_without_the_cell_in_every_fusion(fusion):
    features = [] if fusion == "none" else None
    model, inputs = make_model(fusion=fusion, clinical_features=features), make_inputs()
    if fusion == "none":
        del inputs["clinical"]
    explanation = explain_bag(model, inputs)
    check_effects(model, inputs, explanation)
    assert (np.abs(explanation.effects).max() > 1e-7) == (fusion != "clinical_only")


def test_adapters_and_ensembles_are_explained_like_any_model():
    members = [make_model(), make_model(pooling="mean", encoder="test_resnet")]
    adapted = attach_adapter(make_model(), "lora")
    for name, parameter in adapted.named_parameters():
        if ".up." in name:  # zero at the start
            torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(0))
    adapted = adapted.eval()
    ensemble = LymphMILEnsembleForBagClassification.from_members(members)
    inputs = make_inputs()
    assert not np.allclose(plain(adapted, inputs), plain(make_model(), inputs), atol=1e-4), "the adapter does nothing"
    for model in (adapted, ensemble):
        explanation = explain_bag(model, inputs)
        check_effects(model, inputs, explanation)
        assert set(explanation.clinical_effects) == {"age", "sex", "lymphocyte_count"}


def test_clinical_effects_are_those_of_a_missing_value():
    model, inputs = make_model(), make_inputs()
    explanation = explain_bag(model, inputs)
    for column, name in enumerate(model.config.clinical_features):
        clinical = inputs["clinical"].clone()
        clinical[0, column] = torch.nan
        wanted = plain(model, inputs)[1] - plain(model, inputs, clinical=clinical)[1]
        assert explanation.clinical_effects[name] == pytest.approx(wanted, abs=1e-6)
    assert explanation.clinical_effects["sex"] == 0, "what is missing cannot be taken away"
    assert explanation.clinical_effects["age"] != 0
    assert explain_bag(model, {"pixel_values": inputs["pixel_values"]}).clinical_effects["age"] == 0


@pytest.mark.parametrize("effect", ["leave_one_out", "sampled"])
def test_effects_know_neither_order_nor_padding_nor_batches(effect, monkeypatch):
    model, inputs = make_model(), make_inputs()
    first = explain_bag(model, inputs, effect=effect)
    order = [3, 0, 4, 1, 2]
    turned = explain_bag(model, inputs | {"pixel_values": inputs["pixel_values"][:, order]}, effect=effect)
    # The sampled subsets are drawn by position, so the value of a cell keeps their noise.
    np.testing.assert_allclose(turned.effects, first.effects[order], atol=1e-6 if effect == "leave_one_out" else 2e-3)
    padding = torch.full((1, 2, 3, 32, 32), torch.nan)
    padded = {
        "pixel_values": torch.cat([inputs["pixel_values"], padding], dim=1),
        "bag_mask": torch.arange(CELLS + 2)[None] < CELLS,
        "clinical": inputs["clinical"],
    }
    np.testing.assert_allclose(explain_bag(model, padded, effect=effect).effects, first.effects, atol=1e-6)
    monkeypatch.setattr(explain, "_CELLS_AT_ONCE", 7)
    np.testing.assert_allclose(explain_bag(model, inputs, effect=effect).effects, first.effects, atol=1e-6)


def test_sampled_effects_of_cells_that_add_up_are_what_each_adds():
    values = torch.tensor([0.5, -1.0, 0.0, 2.0, 0.25, -0.125], dtype=torch.float64)
    found = explain._sampled(lambda mask: mask.double() @ values, len(values), seed=1)
    torch.testing.assert_close(found, values)


def test_sampled_effects_see_cells_that_stand_in_for_each_other():
    """With two copies of the guilty cell, and the maximum as pooling, none of them is missed when it is left out."""
    values = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)

    def answer(mask):
        return torch.where(mask, values, -torch.inf).max(dim=1).values

    alone = explain._leave_one_out(answer, 4, 0)
    sampled = explain._sampled(answer, 4, 0)
    assert (alone == 0).all()
    assert sampled[:2].min() > 0.3 > 0.1 > sampled[2:].abs().max()


def test_the_target_is_the_positive_label_of_two_and_the_favoured_one_of_more():
    two, inputs = make_model(), make_inputs()
    assert explain_bag(two, inputs).target == 1
    np.testing.assert_allclose(explain_bag(two, inputs, target=0).effects, -explain_bag(two, inputs).effects, atol=1e-9)
    three = make_model(id2label={0: "a", 1: "b", 2: "c"})
    assert explain_bag(three, inputs).target == plain(three, inputs).argmax()
    with pytest.raises(ValueError, match="target=3: expected a label from 0 to 2"):
        explain_bag(three, inputs, target=3)


def test_ranking_puts_the_strongest_first():
    explanation = Explanation(
        np.ones(2) / 2, 1, np.array([0.2, 0.5, 0.3]), np.array([0.1, -0.2, 0.4]), {}, np.ones((3, 2))
    )
    assert explanation.ranking().tolist() == [2, 0, 1]
    assert explanation.ranking("attention").tolist() == [1, 2, 0]
    with pytest.raises(ValueError, match="by='size'"):
        explanation.ranking("size")


def test_a_single_cell_has_no_effect_to_speak_of():
    for effect in ("leave_one_out", "sampled"):
        explanation = explain_bag(make_model(), make_inputs(1), effect=effect)
        assert np.isnan(explanation.effects).all()
        assert explanation.ranking().tolist() == [0]


def test_the_encoder_sees_each_cell_once(monkeypatch):
    model, inputs = make_model(), make_inputs()
    seen = []
    hook = model.model.encoder.register_forward_pre_hook(lambda _, cells: seen.append(len(cells[0])))
    explain_bag(model, inputs)
    hook.remove()
    assert seen == [CELLS]


def test_what_cannot_be_explained_is_refused():
    model, inputs = make_model(), make_inputs()
    with pytest.raises(ValueError, match="expected one patient"):
        explain_bag(model, {"pixel_values": inputs["pixel_values"].expand(2, -1, -1, -1, -1)})
    with pytest.raises(ValueError, match="effect='magic': expected one of leave_one_out, sampled"):
        explain_bag(model, inputs, effect="magic")
    with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
        explain_bag(model.train(), inputs)
    with pytest.raises(ValueError, match="regression"):
        explain_bag(make_model(num_labels=1, id2label={0: "score"}), inputs)


def test_effects_of_embeddings_at_hand_need_no_picture():
    model, inputs = make_model(), make_inputs()
    explanation = explain_bag(model, inputs)
    with torch.no_grad():
        found = cell_effects(
            PatientHead(model, inputs), torch.from_numpy(explanation.cell_embeddings), 1, "leave_one_out"
        )
    np.testing.assert_allclose(found.numpy(), explanation.effects, atol=1e-9)


def test_explanations_need_the_model_path_and_nothing_heavy():
    """They run in a page that has neither pandas nor scikit-learn: see also the test of importing the package."""
    own = {"explain", "explain_maps"}
    used = {name: imports(PACKAGE / f"{name}.py") for name in own}
    assert {layer(name) for name in set.union(*used.values()) - own} == {"model"}
    for name in own:
        nodes = ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text()))
        outside = {n.module if isinstance(n, ast.ImportFrom) else n.names[0].name for n in nodes if is_outside(n)}
        roots = {module.split(".")[0] for module in outside}
        assert roots <= {"collections", "dataclasses", "typing", "numpy", "torch"}, roots


def is_outside(node: ast.AST) -> bool:
    return isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and node.level == 0)
