"""The configuration refuses what cannot work, and comes back from disk as it was."""

import math

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from lymph_hf import LymphMILConfig

REFUSED = {
    "dropout": [-0.1, 1.0, math.nan, "0.1"],
    "label_smoothing": [-0.1, 1.0],
    "decision_threshold": [-0.01, 1.01, math.nan],
    "chunk_size": [0, -1, 2.5, "all", True],
    "image_size": [0, 15, "224", 224.0],
    "class_weights": [[1.0], [1.0, 0.0], [1.0, -1.0], [1.0, math.inf], [1.0, math.nan]],
    "clinical_features": [["age", "age"], "age"],
    "encoder": ["", "hf-hub:owner/name", "timm/vit_tiny_patch16_224", "local-dir:folder", None],
    "encoder_options": [[1]],
    "num_labels": [0],
    "calibration": [
        {},
        {"method": "isotonic"},
        {"method": "temperature"},
        {"method": "temperature", "temperature": 0.0},
        {"method": "platt", "slope": -1.0, "intercept": 0.0},
        {"method": "platt", "slope": 1.0},
    ],
    "conformal": [{}, {"quantiles": [0.1]}],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values])
def test_a_value_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(StrictDataclassError, match=name):
        LymphMILConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dropout", 0),
        ("label_smoothing", 0.999),
        ("decision_threshold", 1),
        ("decision_threshold", 0),
        ("chunk_size", None),
        ("chunk_size", 1),
        ("chunk_size", "auto"),
        ("image_size", 16),
        ("class_weights", (1, 2.5)),
        ("clinical_features", []),
    ],
)
def test_the_ends_of_the_ranges_are_legal(name, value):
    kept = getattr(LymphMILConfig(**{name: value}), name)
    assert kept == (list(value) if isinstance(value, tuple) else value)


def test_a_refusal_names_the_value_and_the_legal_range():
    with pytest.raises(StrictDataclassError, match=r"dropout=1\.5: expected a number in \[0, 1\)"):
        LymphMILConfig(dropout=1.5)
    with pytest.raises(StrictDataclassError, match=r"class_weights=\[1\.0, 2\.0\]: expected 3 positive numbers"):
        LymphMILConfig(num_labels=3, class_weights=[1.0, 2.0])
    with pytest.raises(StrictDataclassError, match="resolve_encoder"):
        LymphMILConfig(encoder="hf-hub:owner/name")


@pytest.mark.parametrize("misspelt", ["poling", "pooling_option", "encoders", "num_label", "class_weight", "chunksize"])
def test_a_misspelt_key_is_refused(misspelt):
    with pytest.raises(ValueError, match=f"{misspelt}.*did you mean"):
        LymphMILConfig(**{misspelt: 1})


def test_a_key_that_resembles_none_is_kept(tmp_path):
    """Other tools may leave theirs in a configuration on the Hub."""
    LymphMILConfig(stain="May-Grünwald Giemsa").save_pretrained(tmp_path)
    assert LymphMILConfig.from_pretrained(tmp_path).stain == "May-Grünwald Giemsa"


def test_round_trip(tmp_path):
    config = LymphMILConfig(
        encoder="test_vit",
        encoder_options={"drop_path_rate": 0.1},
        image_size=32,
        pooling="clam_sb",
        pooling_options={"k": 3},
        fusion="film",
        fusion_options={"clinical_size": 8},
        clinical_features=("sex", "age"),
        dropout=0.3,
        chunk_size="auto",
        class_weights=(1, 2.5, 0.3),
        label_smoothing=0.1,
        decision_threshold=0.1 + 0.2,
        id2label={0: "a", 1: "b", 2: "c"},
    )
    config.save_pretrained(tmp_path)
    reloaded = AutoConfig.from_pretrained(tmp_path)
    assert type(reloaded) is LymphMILConfig
    for name in LymphMILConfig.__annotations__:
        assert getattr(reloaded, name) == getattr(config, name), name
    assert reloaded.id2label == config.id2label
    assert reloaded.label2id == config.label2id == {"a": 0, "b": 1, "c": 2}
    assert reloaded.clinical_features == ["sex", "age"]


def test_the_defaults_are_the_documented_ones():
    config = LymphMILConfig()
    assert config.clinical_features == ["age", "sex", "lymphocyte_count"]
    assert (config.num_labels, config.chunk_size, config.decision_threshold) == (2, "auto", 0.5)
    assert config.label2id == {"LABEL_0": 0, "LABEL_1": 1}


def test_label_names_follow_from_either_direction():
    names = {0: "reactive", 1: "tumoral"}
    numbers = {"reactive": 0, "tumoral": 1}
    assert LymphMILConfig(id2label=names).label2id == numbers
    assert LymphMILConfig(label2id=numbers).id2label == names


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        ({"id2label": {0: "reactive", 1: "tumoral"}, "label2id": {"tumoral": 0, "reactive": 1}}, "inverse of id2label"),
        ({"id2label": {0: "same", 1: "same"}}, "each name once"),
        ({"id2label": {0: "reactive", 2: "tumoral"}}, "keys 0 to 1"),
        ({"label2id": {"reactive": 1, "tumoral": 2}}, "keys 0 to 1"),
    ],
)
def test_labels_that_lead_to_no_or_to_another_number_are_refused(names, complaint):
    with pytest.raises(StrictDataclassError, match=complaint):
        LymphMILConfig(**names)


def test_lists_of_the_caller_are_not_shared():
    features = ["age"]
    config = LymphMILConfig(clinical_features=features)
    features.append("sex")
    assert config.clinical_features == ["age"]
    assert LymphMILConfig().clinical_features is not LymphMILConfig().clinical_features
