"""Only whole safetensors are loaded; what is wrong is said with the name of the file and what to do."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForPreTraining

from lymph_hf import LymphMAEConfig, LymphMAEForPreTraining, LymphMILConfig, LymphMILForBagClassification
from lymph_hf.adapters import attach_adapter

INPUTS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(1, 2, 3, 32, 32)}
ARCHITECTURE = ["LymphMILForBagClassification"]
ADVICE = r"Pickled weights \(\.bin, \.pt\) are not read"


def make(**changes) -> LymphMILForBagClassification:
    torch.manual_seed(0)
    return LymphMILForBagClassification(LymphMILConfig(encoder="test_vit", image_size=32, **changes)).eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**INPUTS).logits


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture
def adapter(folder, tmp_path) -> Path:
    """An adapter beside its base, with a threshold of its own."""
    model = attach_adapter(make(decision_threshold=0.3), "lora", rank=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * parameter.requires_grad
    place = tmp_path / "adapter"
    model.save_pretrained(place)
    config = model.base_model.model.config
    config.architectures = ARCHITECTURE
    config.save_pretrained(place)
    settings = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(folder)}))
    return place


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def break_header(path):
    content = path.read_bytes()
    path.write_bytes(content[:12] + b"????" + content[16:])


def empty(path):
    path.write_bytes(b"")


def html(path):
    path.write_text("<html>Log in first</html>")


@pytest.mark.parametrize("damage", [truncate, break_header, empty, html])
@pytest.mark.parametrize("load", [AutoModel.from_pretrained, LymphMILForBagClassification.from_pretrained])
def test_damaged_weights_are_named_with_what_to_do(folder, damage, load):
    damage(folder / "model.safetensors")
    with pytest.raises(OSError, match=r"model\.safetensors: damaged or incomplete.*force_download=True.*SHA-256"):
        load(folder)


def test_the_damaged_shard_is_the_one_that_is_named(tmp_path):
    make().save_pretrained(tmp_path, max_shard_size="500KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    truncate(shards[1])
    with pytest.raises(OSError, match=shards[1].name):
        AutoModel.from_pretrained(tmp_path)


def test_pickles_are_refused_whatever_is_asked(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="use_safetensors=False: pickled weights are not read"):
        AutoModel.from_pretrained(folder, use_safetensors=False)
    (folder / "model.safetensors").unlink()
    for given in ({}, {"use_safetensors": None}, {"use_safetensors": True}):
        with pytest.raises(OSError, match=rf"holds no model\.safetensors\. {ADVICE}"):
            AutoModel.from_pretrained(folder, **given)


def test_an_adapter_has_its_own_configuration_on_its_base(adapter, folder):
    assert AutoModel.from_pretrained(folder).config.decision_threshold == 0.5
    model = make(decision_threshold=0.3)
    model.load_adapter(str(adapter))
    for load in (AutoModel.from_pretrained, LymphMILForBagClassification.from_pretrained):
        found = load(adapter)
        assert found.config.decision_threshold == 0.3
        assert torch.equal(logits(found), logits(model))
        assert not torch.equal(logits(found), logits(make()))


def test_a_configuration_that_is_given_stays(adapter):
    config = LymphMILConfig(encoder="test_vit", image_size=32, decision_threshold=0.9, architectures=ARCHITECTURE)
    assert AutoModel.from_pretrained(adapter, config=config).config.decision_threshold == 0.9


def test_damaged_and_pickled_adapters_are_refused(adapter):
    weights = adapter / "adapter_model.safetensors"
    torch.save(load_file(weights), adapter / "adapter_model.bin")
    truncate(weights)
    with pytest.raises(OSError, match=r"adapter_model\.safetensors: damaged"):
        AutoModel.from_pretrained(adapter)
    weights.unlink()
    with pytest.raises(OSError, match=rf"holds no adapter_model\.safetensors\. {ADVICE}"):
        AutoModel.from_pretrained(adapter)


def test_an_adapter_that_names_no_base_says_so(adapter):
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": None}))
    with pytest.raises(OSError, match="names no base_model_name_or_path"):
        LymphMILForBagClassification.from_pretrained(adapter)


def test_the_masked_autoencoder_is_as_strict(tmp_path):
    config = LymphMAEConfig(encoder="test_vit", image_size=32, decoder_depth=1, decoder_width=32, decoder_heads=4)
    LymphMAEForPreTraining(config).save_pretrained(tmp_path)
    assert AutoModelForPreTraining.from_pretrained(tmp_path).num_patches == 4
    truncate(tmp_path / "model.safetensors")
    with pytest.raises(OSError, match="damaged or incomplete"):
        AutoModelForPreTraining.from_pretrained(tmp_path)


def test_errors_of_another_kind_stay_what_they_are(folder):
    with pytest.raises(OSError, match="no/such-place|such-place"):
        AutoModel.from_pretrained(folder / "no" / "such-place")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        LymphMILForBagClassification.from_pretrained(folder, num_labels=5)
