"""Several patient models as one: the mean of what each would have said by itself."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from lymph_hf import (
    ClinicalStandardizer,
    LymphImageProcessor,
    LymphMILConfig,
    LymphMILEnsembleConfig,
    LymphMILEnsembleForBagClassification,
    LymphMILForBagClassification,
)
from lymph_hf.explain import explain_bag
from lymph_hf.modeling_ensemble import EnsembleError
from lymph_hf.publishing_code import export_with_code

# Two patients, of which one lacks values; the second member was trained where nobody's sex was known.
PATIENTS = [{"age": 41, "sex": None, "lymphocyte_count": 12.5}, {"age": None, "sex": "M", "lymphocyte_count": None}]
STANDARDIZERS = [
    ClinicalStandardizer(mean=(50.0, 0.5, 1.0), std=(10.0, 0.5, 1.5)),
    ClinicalStandardizer(features=("age", "lymphocyte_count"), mean=(61.0, 2.0), std=(17.0, 0.7)),
    ClinicalStandardizer(mean=(58.0, 0.3, 2.2), std=(9.0, 0.45, 0.9)),
]
COMMON = ClinicalStandardizer(mean=(56.0, 0.4, 1.7), std=(13.0, 0.48, 1.1))


def make_member(number: int, **changes) -> LymphMILForBagClassification:
    torch.manual_seed(number)
    values = {"encoder": "test_vit", "image_size": 32, "id2label": {0: "reactive", 1: "tumoral"}}
    values |= {"pooling": ["gated_attention", "mean", "transmil"][number]}
    values |= {"calibration": {"method": "platt", "slope": 1.0 + number, "intercept": -0.3}}
    values |= {"clinical_features": list(STANDARDIZERS[number].features)}
    return LymphMILForBagClassification(LymphMILConfig(**values | changes)).eval()


@pytest.fixture(scope="module")
def members():
    return [make_member(number) for number in range(3)]


@pytest.fixture(scope="module")
def ensemble(members):
    return LymphMILEnsembleForBagClassification.from_members(members, STANDARDIZERS, COMMON)


@pytest.fixture(scope="module")
def bags() -> dict[str, torch.Tensor]:
    """Two patients of five and three cells."""
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    return {"pixel_values": torch.randn(2, 5, 3, 32, 32, generator=torch.Generator().manual_seed(0)), "bag_mask": mask}


@torch.no_grad()
def mean_of_members(members, bags) -> torch.Tensor:
    """(B, C): each member fed through its own standardiser."""
    answers = [
        member(**bags, clinical=standardizer.transform(PATIENTS)).logits.softmax(-1)
        for member, standardizer in zip(members, STANDARDIZERS, strict=True)
    ]
    return sum(answers) / len(answers)


@torch.no_grad()
def test_it_says_what_its_members_say_on_average(ensemble, members, bags):
    output = ensemble(**bags, clinical=COMMON.transform(PATIENTS), labels=torch.tensor([0, 1]))
    expected = mean_of_members(members, bags)
    torch.testing.assert_close(output.logits.softmax(-1), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(output.logits.exp(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(output.loss, -(expected[0, 0].log() + expected[1, 1].log()) / 2)
    torch.testing.assert_close(output.attentions.sum(-1), torch.ones(2))
    assert (output.attentions[1, 3:] == 0).all()
    assert output.bag_embedding.shape[1] == sum(member.classifier.in_features for member in members)


@torch.no_grad()
def test_all_clinical_values_may_be_missing(ensemble, members, bags):
    without = [member(**bags).logits.softmax(-1) for member in members]
    torch.testing.assert_close(ensemble(**bags).logits.softmax(-1), sum(without) / 3, atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_calibration_of_its_own_comes_after_the_mean(members, bags):
    ensemble = LymphMILEnsembleForBagClassification.from_members(members, STANDARDIZERS, COMMON)
    ensemble.config.calibration = {"method": "platt", "slope": 0.5, "intercept": 1.0}
    found = ensemble(**bags, clinical=COMMON.transform(PATIENTS)).logits.softmax(-1)
    expected = (0.5 * mean_of_members(members, bags)[:, 1].logit() + 1.0).sigmoid()
    torch.testing.assert_close(found[:, 1], expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_packed_cells_and_embeddings_give_the_same_answer(ensemble, bags):
    clinical = COMMON.transform(PATIENTS)
    expected = ensemble(**bags, clinical=clinical)
    packed = ensemble(bags["pixel_values"][bags["bag_mask"]], bag_offsets=torch.tensor([0, 5, 8]), clinical=clinical)
    torch.testing.assert_close(packed.logits, expected.logits)
    again = ensemble(cell_embeddings=expected.cell_embeddings, bag_mask=bags["bag_mask"], clinical=clinical)
    torch.testing.assert_close(again.logits, expected.logits)
    with pytest.raises(ValueError, match="3 encoder"):
        ensemble(cell_embeddings=expected.cell_embeddings[..., 1:], bag_mask=bags["bag_mask"])
    with pytest.raises(ValueError, match="column for each"):
        ensemble(**bags, clinical=clinical[:, :2])


@torch.no_grad()
def test_one_encoder_is_stored_and_run_once(bags):
    members = [make_member(number) for number in range(3)]
    for member in members[1:]:
        member.model.encoder.load_state_dict(members[0].model.encoder.state_dict())
    ensemble = LymphMILEnsembleForBagClassification.from_members(members, STANDARDIZERS, COMMON)
    assert ensemble.config.shared_encoder
    encoders = {name.split(".")[1] for name in ensemble.state_dict() if ".encoder." in name}
    assert encoders == {"0"}
    calls = []
    ensemble.members[0].model.encoder.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    found = ensemble(**bags, clinical=COMMON.transform(PATIENTS))
    assert calls == [8], "the eight real cells, once"
    torch.testing.assert_close(found.logits.exp(), mean_of_members(members, bags), atol=1e-6, rtol=0)
    members[2].model.encoder.cls_token.data[0, 0, 0] += 1e-6
    other = LymphMILEnsembleForBagClassification.from_members(members, STANDARDIZERS, COMMON)
    assert not other.config.shared_encoder, "bit for bit"


@pytest.mark.parametrize("shared", [False, True])
@torch.no_grad()
def test_it_reloads_bit_for_bit(bags, tmp_path, shared):
    members = [make_member(number) for number in (0, 2)]
    if shared:
        members[1].model.encoder.load_state_dict(members[0].model.encoder.state_dict())
    standardizers = [STANDARDIZERS[0], STANDARDIZERS[2]]
    ensemble = LymphMILEnsembleForBagClassification.from_members(members, standardizers, COMMON)
    ensemble.config.decision_threshold = 0.37
    ensemble.config.conformal = {"coverage": 0.9, "quantiles": [0.4, None], "calibrated_on": [12, 3]}
    ensemble.save_pretrained(tmp_path)
    LymphImageProcessor.from_config(members[0].config, COMMON).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    again = AutoModel.from_pretrained(tmp_path)
    assert isinstance(again, LymphMILEnsembleForBagClassification)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), LymphMILEnsembleConfig)
    assert AutoImageProcessor.from_pretrained(tmp_path).standardizer == COMMON
    assert again.state_dict().keys() == ensemble.state_dict().keys()
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in ensemble.state_dict().items())
    clinical = COMMON.transform(PATIENTS)
    torch.testing.assert_close(again(**bags, clinical=clinical).logits, ensemble(**bags, clinical=clinical).logits)
    assert again.config.decision_threshold == 0.37
    assert again.config.prediction_set([0.7, 0.3]) == ["reactive", "tumoral"]
    assert (again.config.num_labels, again.config.image_size) == (2, 32)
    assert again.config.clinical_features == ["age", "sex", "lymphocyte_count"]
    assert again.config.label2id == {"reactive": 0, "tumoral": 1}


def test_nothing_of_where_members_came_from_is_saved(members, tmp_path):
    members[0].save_pretrained(tmp_path / "secret-place")
    loaded = [AutoModel.from_pretrained(tmp_path / "secret-place"), members[2]]
    LymphMILEnsembleForBagClassification.from_members(
        loaded, [STANDARDIZERS[0], STANDARDIZERS[2]], COMMON
    ).save_pretrained(tmp_path / "ensemble")
    assert "secret-place" not in (tmp_path / "ensemble" / "config.json").read_text()


def test_its_answers_can_be_explained(ensemble, bags):
    inputs = {name: tensor[1:] for name, tensor in bags.items()} | {"clinical": COMMON.transform(PATIENTS)[1:]}
    explanation = explain_bag(ensemble, inputs)
    assert explanation.effects.shape == explanation.attentions.shape == (3,)
    assert explanation.clinical_effects["age"] == 0.0, "it is missing"
    assert explanation.clinical_effects["sex"] != 0.0


def test_its_code_goes_along(ensemble, members, tmp_path):
    export_with_code(ensemble, LymphImageProcessor.from_config(members[0].config, COMMON), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_ensemble.LymphMILEnsembleForBagClassification"
    names = {path.name for path in tmp_path.glob("*.py")}
    assert {"modeling_ensemble.py", "modeling_lymph.py", "configuration_ensemble.py", "processing_lymph.py"} <= names


def test_gradients_reach_every_member(bags):
    members = [make_member(number, calibration=None) for number in (0, 2)]
    ensemble = LymphMILEnsembleForBagClassification.from_members(members, [STANDARDIZERS[0], STANDARDIZERS[2]], COMMON)
    ensemble(**bags, clinical=COMMON.transform(PATIENTS), labels=torch.tensor([0, 1])).loss.backward()
    for member in ensemble.members:
        assert member.classifier.weight.grad.abs().sum() > 0
        assert member.model.encoder.patch_embed.proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id2label": {0: "tumoral", 1: "reactive"}}, "id2label"),
        ({"image_size": 48}, "image_size"),
    ],
)
def test_members_that_do_not_fit_are_refused(members, changes, message):
    with pytest.raises(EnsembleError, match=message):
        LymphMILEnsembleForBagClassification.from_members([members[0], make_member(2, **changes)], None, COMMON)


def test_missing_parts_are_refused(members):
    build = LymphMILEnsembleForBagClassification.from_members
    with pytest.raises(EnsembleError, match="at least two"):
        build(members[:1], STANDARDIZERS[:1], COMMON)
    with pytest.raises(EnsembleError, match=r"lacks \['sex'\]"):
        build(members, STANDARDIZERS, STANDARDIZERS[1])
    with pytest.raises(EnsembleError, match="give the standardizer"):
        build(members)
    with pytest.raises(EnsembleError, match="2 standardizers for 3"):
        build(members, STANDARDIZERS[:2], COMMON)
    with pytest.raises(EnsembleError, match="its model"):
        build(members, STANDARDIZERS[::-1][1:] + STANDARDIZERS[:1], COMMON)
    with pytest.raises(ValueError, match="no members"):
        LymphMILEnsembleForBagClassification(LymphMILEnsembleConfig())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decision_threshold": 1.5}, "decision_threshold"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"clinical_maps": [{"age": [1.0, 0.0]}]}, "one a member"),
        ({"clinical_maps": [{}, {}]}, "scale, shift"),
        ({"calibration": {"method": "isotonic"}}, "calibration"),
        ({"id2label": {0: "a", 1: "b"}}, "id2label of member 1"),
        ({"decision_treshold": 0.4}, "did you mean 'decision_threshold'"),
    ],
)
def test_impossible_configurations_are_refused(changes, message):
    member = LymphMILConfig(encoder="test_vit", image_size=32, clinical_features=["age"]).to_dict()
    values = {"members": [member, member], "clinical_features": ["age"]} | changes
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        LymphMILEnsembleConfig(**values)
