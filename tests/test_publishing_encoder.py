"""A pretrained encoder on the Hub: timm loads it by name, and nothing tells what single image it has seen."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from hub_server import card_problems as hub_problems
from huggingface_hub import ModelCard
from PIL import Image
from publishing_cases import FACTS, WRITER, options, publish_as, run_examples, sent
from safetensors.torch import load_file
from timm.data import create_transform, resolve_data_config
from transformers import AutoModel, AutoModelForPreTraining

from lymph_hf import LymphMILConfig
from lymph_hf.card_encoder import training_command
from lymph_hf.card_patterns import CardError
from lymph_hf.encoder_weights import load_first_weights
from lymph_hf.encoders import build_encoder, resolve_encoder
from lymph_hf.golden import golden_cells, golden_problems
from lymph_hf.hub_push import PublishError
from lymph_hf.metrics import Interval
from lymph_hf.options_pretrain import PretrainOptions
from lymph_hf.pretraining import pretrain
from lymph_hf.probing import RECORD
from lymph_hf.publishing import publish
from lymph_hf.runs import RunError

PROBE = {
    "how": "cells that runs/mae/encoder has not seen, against the 40 it has",
    "cells": 20,
    "balanced_accuracy": dict.fromkeys(("knn", "linear"), Interval(0.8, 0.7, 0.9, 0.95, 0.0).as_dict()),
    "recall": {"knn": {"lymphocyte": 0.8, "monocyte": 0.8}},
}


@pytest.fixture(scope="module")
def mae_run(cohort_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pretraining") / "mae"
    settings = {"encoder": "test_vit", "image_size": 32, "decoder_depth": 1, "decoder_width": 32, "decoder_heads": 4}
    settings |= {"epochs": 1, "batch_size": 16, "micro_batch": 16, "tracker": "none", "cpu": True, "figure_every": 0}
    pretrain(PretrainOptions(data=[str(cohort_folder)], split="none", output=str(folder), **settings))
    return folder


def embeddings(name):
    encoder = timm.create_model(name, pretrained=True, num_classes=0).eval()
    transform = create_transform(**resolve_data_config(model=encoder))
    with torch.no_grad():
        return encoder(torch.stack([transform(cell) for cell in golden_cells()])).tolist()


def first_filter(name):
    """Of the encoder that `lymph train --encoder NAME` starts from."""
    choice = resolve_encoder(name)
    encoder = build_encoder(LymphMILConfig(encoder=choice.name, encoder_options=choice.options_with({}), image_size=32))
    load_first_weights(encoder, choice.weights)
    return encoder.patch_embed.proj.weight[0].tolist()


def reconstruction_loss(source, **place):
    model = AutoModelForPreTraining.from_pretrained(source, **place).eval()
    patches = model.num_patches
    with torch.no_grad():
        pixels = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
        return type(model).__name__, model(pixels, noise=torch.arange(patches).flip(0)[None].float()).loss.item()


def test_timm_and_transformers_load_what_was_pretrained(hub, client, mae_run, tmp_path):
    client.call(publish_as, WRITER, sent(mae_run, repo="org/lymph-mae-vit-tiny"))
    files = hub.repo("org/lymph-mae-vit-tiny").files
    whole = {f"lymph-mae/{name}" for name in ("config.json", "model.safetensors", "preprocessor_config.json")}
    own = {"README.md", "config.json", "golden.json", "history.png", "model.safetensors"}
    assert files.keys() == {".gitattributes"} | own | whole
    assert client.call(embeddings, "hf-hub:org/lymph-mae-vit-tiny") == embeddings(f"local-dir:{mae_run}/encoder")
    assert client.call(first_filter, "hf-hub:org/lymph-mae-vit-tiny@v1") == first_filter(f"local-dir:{mae_run}/encoder")
    found = client.call(reconstruction_loss, "org/lymph-mae-vit-tiny", subfolder="lymph-mae")
    assert found == reconstruction_loss(mae_run / "lymph-mae")
    Image.new("RGB", (40, 40), "purple").save(tmp_path / "cell.png")
    assert client.call(run_examples, "org/lymph-mae-vit-tiny", tmp_path) == ["(1, 64)\n", "LymphMAEForPreTraining\n"]


def test_an_encoder_that_learnt_types_brings_its_classifier(cohort_folder, tmp_path):
    settings = {"encoder": "test_resnet", "image_size": 32, "objective": "cell-type", "split": "none", "probe_cells": 0}
    settings |= {"epochs": 1, "batch_size": 16, "micro_batch": 16, "tracker": "none", "cpu": True}
    pretrain(PretrainOptions(data=[str(cohort_folder)], output=str(tmp_path / "run"), **settings))
    done = publish(options(tmp_path / "run", output=str(tmp_path / "kept"), dtype="bfloat16"), FACTS)
    assert {"model.safetensors", "classifier/config.json", "classifier/model.safetensors"} <= done.files.keys()
    types = AutoModel.from_pretrained(tmp_path / "kept", subfolder="classifier")
    assert types.dtype == torch.float32 and "smudge" in types.config.id2label.values()
    weights = load_file(tmp_path / "kept" / "model.safetensors")
    assert weights["conv1.0.weight"].dtype == torch.bfloat16
    assert weights["conv1.1.running_var"].dtype == torch.float32, "statistics of a norm"
    card = (tmp_path / "kept" / "README.md").read_text()
    assert "classification of cells by their type" in card and 'subfolder="classifier"' in card


def test_no_digest_of_an_image_and_no_name_of_a_folder_leaves(mae_run, tmp_path):
    publish(options(mae_run, output=str(tmp_path / "kept")), FACTS)
    record = json.loads((mae_run / RECORD).read_text())
    texts = "".join(path.read_text() for path in (tmp_path / "kept").rglob("*") if path.suffix in (".json", ".md"))
    assert record["fingerprint"] in texts
    assert not any(digest in texts for digest in record["digests"])
    assert record["data"] == ["painted"] and '"data"' not in texts
    assert golden_problems(tmp_path / "kept") == []


def test_a_digest_that_slipped_in_is_noticed(mae_run, tmp_path):
    run = Path(shutil.copytree(mae_run, tmp_path / "run"))
    record = json.loads((run / RECORD).read_text())
    config = json.loads((run / "lymph-mae" / "config.json").read_text())
    config["pretraining"]["seen"] = record["digests"][:1]
    (run / "lymph-mae" / "config.json").write_text(json.dumps(config))
    with pytest.raises(PublishError, match=r"lymph-mae/config\.json: holds digests of images"):
        publish(options(run), FACTS)


def test_the_card_tells_data_probe_and_command(mae_run, tmp_path):
    (tmp_path / "probe.json").write_text(json.dumps(PROBE))
    facts = replace(FACTS, training_data="Cells of the atlas of X, CC BY 4.0, by its authors.", license="cc-by-4.0")
    publish(options(mae_run, output=str(tmp_path / "kept"), probe=[str(tmp_path / "probe.json")]), facts)
    card = (tmp_path / "kept" / "README.md").read_text()
    assert "license: cc-by-4.0" in card and "pipeline_tag: image-feature-extraction" in card
    assert "Cells of the atlas of X, CC BY 4.0, by its authors." in card
    assert (
        "| weights | knn | linear |" in card
        and "| these weights | 0.800 (0.700 to 0.900) | 0.800" in card
        and "lymphocyte, monocyte" in card
    )
    assert "cells that the pretraining had not seen" in card and "runs/mae" not in card
    assert "![Loss by epoch](history.png)" in card
    assert "--encoder test_vit --image-size 32" in card and "--epochs 1" in card
    assert str(mae_run) not in card and "painted" not in card.split("```bash")[1].split("```")[0]
    with pytest.raises(CardError, match="--acquisition"):
        publish(options(mae_run), replace(FACTS, acquisition=None))


def test_probes_of_other_weights_and_patient_models_stand_beside(mae_run, trained_run, tmp_path):
    paths = []
    for number, source in enumerate(("runs/mae/encoder", None, "timm")):
        paths.append(str(tmp_path / f"probe-{number}.json"))
        value = Interval(0.9 - number / 10, 0.5, 0.95, 0.95, 0.0).as_dict()
        probe = PROBE | {"data": "cells", "encoder": "test_vit", "encoder_weights": source}
        Path(paths[-1]).write_text(json.dumps(probe | {"balanced_accuracy": {"knn": value}}))
    run = Path(shutil.copytree(trained_run, tmp_path / "run"))
    shutil.copyfile(run / "validation.json", run / "metrics.json")
    facts = replace(FACTS, downstream=[f"attention, these weights={run}", f"attention, random weights={trained_run}"])
    wanted = options(mae_run, output=str(tmp_path / "kept"), probe=paths)
    publish(wanted, facts)
    card = (tmp_path / "kept" / "README.md").read_text()
    rows = card.split("| weights | knn |\n|---|---|\n")[1].splitlines()
    names = ("these weights", "random weights", timm.get_pretrained_cfg("test_vit").hf_hub_id)
    for row, name, value in zip(rows, names, ("0.900", "0.800", "0.700"), strict=False):
        assert row == f"| {name} | {value} (0.500 to 0.950) |"
    patients = json.loads((run / "metrics.json").read_text())
    auroc = f"{patients['scores']['auroc']['value']:.3f}"
    assert f"| attention, these weights | {patients['n']} held-out patients | {auroc}" in card
    assert f"| attention, random weights | {patients['n']} validation patients | {auroc}" in card
    (result,) = ModelCard(card).data.eval_results
    assert (result.metric_value, result.dataset_config, result.metric_args["n"]) == (0.9, "knn probe", 20)
    assert hub_problems(card, "model") == ([], [])
    Path(paths[1]).write_text(Path(paths[1]).read_text().replace('"cells": 20', '"cells": 21'))
    with pytest.raises(CardError, match="differ in cells"):
        publish(wanted, FACTS)
    with pytest.raises(CardError, match="expected NAME=RUN"):
        publish(options(mae_run), replace(FACTS, downstream=["nothing"]))


def test_halved_weights_load_in_full_everywhere(mae_run, tmp_path):
    publish(options(mae_run, output=str(tmp_path / "kept"), dtype="float16"), FACTS)
    kept = tmp_path / "kept"
    stored, trained = (load_file(path / "model.safetensors") for path in (kept, mae_run / "encoder"))
    assert {tensor.dtype for tensor in stored.values() if tensor.ndim > 1} == {torch.float16}
    assert stored.keys() == trained.keys()
    for name in (f"local-dir:{kept}", f"local-dir:{mae_run}/encoder"):
        assert timm.create_model(name, pretrained=True).patch_embed.proj.weight.dtype == torch.float32
    found, expected = (torch.tensor(embeddings(f"local-dir:{path}")) for path in (kept, mae_run / "encoder"))
    assert 0 < (found - expected).abs().max() < 5e-3
    filled = build_encoder(LymphMILConfig(encoder="test_vit", image_size=32))
    load_first_weights(filled, str(kept))
    assert filled.patch_embed.proj.weight.equal(stored["patch_embed.proj.weight"].float())
    losses = [reconstruction_loss(path / "lymph-mae")[1] for path in (kept, mae_run)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-2)
    assert AutoModelForPreTraining.from_pretrained(kept / "lymph-mae").dtype == torch.float32
    assert golden_problems(kept) == []
    assert "safetensors, float16 (norms and biases in float32)" in (kept / "README.md").read_text()


def test_the_command_holds_what_differs_from_the_defaults():
    assert training_command({"epochs": 100, "seed": 3, "output": "/somewhere", "split": "my.json"}) == (
        "lymph pretrain --data CELLS --output RUN --seed 3 --split SPLIT"
    )
    assert training_command({"encoder_weights": "timm"}).endswith("--encoder-weights timm")
    assert training_command({"encoder_weights": "private/weights.pt"}).endswith("--encoder-weights WEIGHTS")


def test_an_unfinished_pretraining_is_refused(mae_run, tmp_path):
    run = Path(shutil.copytree(mae_run, tmp_path / "run"))
    record = json.loads((run / RECORD).read_text())
    del record["epochs"]
    (run / RECORD).write_text(json.dumps(record))
    with pytest.raises(RunError, match="has not finished"):
        publish(options(run), FACTS)
