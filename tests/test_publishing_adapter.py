"""An adapter goes to the Hub alone, on a base that is found there or published first, and comes back bit for bit."""

import ast
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hub_server import client_environment
from huggingface_hub import CommitOperationAdd, HfApi
from peft import PeftModel
from PIL import Image
from publishing_cases import FACTS, WRITER, options, publish_as, run_examples, sent
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from lymph_hf import LymphMILForBagClassification, recipes
from lymph_hf.golden import answer_problems, golden_answers, golden_cells
from lymph_hf.hub_push import PublishError
from lymph_hf.publishing import publish

CARD = replace(FACTS, evaluation_data=None, base_model="org/frozen")


@pytest.fixture(scope="module")
def adapted_run(tiny_options, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapted") / "run"
    recipes.train(*tiny_options(folder, adapter="lora", adapter_options='{"rank": 2}', epochs=1))
    return folder


def logits_and_threshold(model, source, **local):
    inputs = AutoImageProcessor.from_pretrained(source, **local)(golden_cells(), {"age": 71, "sex": "F"})
    with torch.no_grad():
        return model.eval()(**inputs).logits[0].tolist(), model.config.decision_threshold


def load_by_auto(source, local_files_only=False, **pinned):
    model = AutoModel.from_pretrained(source, local_files_only=local_files_only, **pinned)
    return logits_and_threshold(model, source, local_files_only=local_files_only)


def load_by_class(source):
    return logits_and_threshold(LymphMILForBagClassification.from_pretrained(source), source)


def load_by_peft(base, adapter):
    model = AutoModel.from_pretrained(base, config=AutoConfig.from_pretrained(adapter))
    return logits_and_threshold(PeftModel.from_pretrained(model, adapter), adapter)


def push_file(repo, path, content):
    operation = [CommitOperationAdd(path, content)]
    return HfApi(token=WRITER).create_commit(repo, operation, commit_message="someone changes it").oid


def test_an_adapter_comes_back_bit_for_bit_in_every_way_of_loading(hub, client, adapted_run):
    client.call(publish_as, WRITER, sent(adapted_run, repo="org/adapter"), CARD)
    files = hub.repo("org/adapter").files
    assert {"adapter_config.json", "adapter_model.safetensors", "config.json", "golden.json"} <= files.keys()
    assert "model.safetensors" not in files and not any(name.endswith(".py") for name in files)
    named = json.loads(files["adapter_config.json"])
    assert (named["base_model_name_or_path"], named["revision"]) == ("org/frozen", hub.repo("org/frozen").refs["main"])
    expected = load_by_auto(adapted_run / "lymph-mil")
    assert expected[1] != 0.5, "the run froze a threshold of its own"
    assert client.call(load_by_auto, "org/adapter") == expected
    assert client.call(load_by_auto, "org/adapter", adapter_kwargs={"revision": "v1"}) == expected
    assert client.call(load_by_class, "org/adapter") == expected
    assert client.call(load_by_peft, "org/frozen", "org/adapter") == expected
    hub.forget()
    assert client.call(load_by_auto, "org/adapter", local_files_only=True) == expected
    assert hub.requests == []


def test_the_base_is_pinned_and_its_untrained_head_is_not_the_adapters(hub, client, adapted_run):
    base = replace(CARD, base_model="org/pinned-base")
    client.call(publish_as, WRITER, sent(adapted_run, repo="org/on-pinned"), base)
    weights = load_file(adapted_run / "lymph-mil" / "model.safetensors")
    published = hub.repo("org/pinned-base").files
    assert json.loads(published["config.json"])["decision_threshold"] == 0.5
    assert "modeling_lymph.py" in published
    spoilt = {name: tensor + 1 for name, tensor in weights.items()}
    path = adapted_run.parent / "spoilt.safetensors"
    save_file(spoilt, path, metadata={"format": "pt"})
    client.call(push_file, "org/pinned-base", "model.safetensors", path.read_bytes())
    assert client.call(load_by_auto, "org/on-pinned") == load_by_auto(adapted_run / "lymph-mil")


def test_a_base_that_is_there_is_used_and_another_one_refused(hub, client, adapted_run, trained_run, tmp_path):
    card = replace(CARD, base_model="org/shared-base")
    client.call(publish_as, WRITER, sent(adapted_run, repo="org/first"), card)
    commit = hub.repo("org/shared-base").refs["main"]
    # Another training on the same frozen encoder: its untrained head was another one.
    other = Path(shutil.copytree(adapted_run, tmp_path / "other"))
    weights = load_file(other / "lymph-mil" / "model.safetensors")
    weights["classifier.weight"] += 1
    save_file(weights, other / "lymph-mil" / "model.safetensors", metadata={"format": "pt"})
    client.call(publish_as, WRITER, sent(other, repo="org/second"), card)
    assert hub.repo("org/shared-base").refs["main"] == commit
    assert client.call(load_by_auto, "org/second") == load_by_auto(other / "lymph-mil")
    weights["model.encoder.norm.bias"] += 1
    save_file(weights, other / "lymph-mil" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PublishError, match="not the frozen weights that the adapter was trained on"):
        client.call(publish_as, WRITER, sent(other, repo="org/third"), card)
    assert ("model", "org/third") not in hub.repos


def test_an_interrupted_push_is_repeated(hub, client, adapted_run):
    card, wanted = replace(CARD, base_model="org/late-base"), sent(adapted_run, repo="org/late")
    hub.fail("POST", "/org/late/commit/", status=500)
    with pytest.raises(PublishError, match="the Hub fails"):
        client.call(publish_as, WRITER, wanted, card)
    assert set(hub.repo("org/late").files) == {".gitattributes"}
    client.call(publish_as, WRITER, wanted, card)
    assert hub.repo("org/late-base").titles == ["initial commit", "Publish the frozen base of adapters"]
    assert client.call(publish_as, WRITER, wanted, card) == hub.repo("org/late").tags["v1"]


def test_the_examples_of_the_card_run_and_golden_answers_hold(hub, client, adapted_run, tmp_path):
    client.call(publish_as, WRITER, sent(adapted_run, repo="org/explained"), CARD)
    (tmp_path / "patient").mkdir()
    for i in range(3):
        Image.new("RGB", (40, 40), (200, 40 * i, 120)).save(tmp_path / "patient" / f"cell-{i}.png")
    first, second = client.call(run_examples, "org/explained", tmp_path)
    label, said = first.splitlines()[0].split(maxsplit=1)
    assert label in ("reactive", "tumoral")
    assert ast.literal_eval(said) == pytest.approx(ast.literal_eval(second), abs=2e-3)
    assert "base_model: org/frozen" in hub.repo("org/explained").files["README.md"].decode()
    stored = json.loads(hub.repo("org/explained").files["golden.json"])
    assert client.call(golden_drift, "org/explained", stored) == []
    examples = client.call(run_examples, "org/frozen", tmp_path)
    assert examples == [""], "the card of the base shows how to load its adapter"


def golden_drift(repo, stored):
    return answer_problems(
        stored, golden_answers(AutoModel.from_pretrained(repo), AutoImageProcessor.from_pretrained(repo))
    )


def test_a_dry_run_lists_the_base_and_asks_nobody(hub, adapted_run, caplog):
    caplog.set_level("INFO")
    done = publish(options(adapted_run), CARD)
    assert hub.requests == []
    assert set(done.files) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "config.json",
        "golden.json",
        "preprocessor_config.json",
        "validation.png",
    }
    base = next(note for note in done.notes if note.startswith("Base"))
    assert "org/frozen" in base and "model.safetensors" in base and "modeling_lymph.py" in base


def test_an_adapter_without_a_base_is_refused(adapted_run):
    with pytest.raises(PublishError, match="--base-model"):
        publish(options(adapted_run), replace(CARD, base_model=None))
    with pytest.raises(PublishError, match="repository of its own"):
        publish(options(adapted_run, repo="org/frozen"), CARD)
    with pytest.raises(PublishError, match="fits its base to the bit"):
        publish(options(adapted_run, dtype="float16"), CARD)


# Where the package is missing ---------------------------------------------------------------------------------

STRANGER = """
import sys
sys.modules["lymph_hf"] = None  # import lymph_hf fails
import re
from huggingface_hub import ModelCard
from transformers import AutoModel
source = sys.argv[1]
if source.endswith("own-method"):
    AutoModel.from_pretrained(source, trust_remote_code=True)
exec(re.findall(r"```python\\n(.*?)```", ModelCard.load(source).text, flags=re.DOTALL)[-1])
print(config.decision_threshold, type(model.get_base_model()).__module__)
"""


def ask_stranger(hub, repo, folder):
    environment = client_environment(hub, str(folder / "home"))
    command = [sys.executable, "-c", STRANGER, repo]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)


def test_a_method_of_peft_loads_with_the_code_of_its_base(hub, client, tiny_options, tmp_path):
    """The base stands at another version, and its newest code is broken: the commit that was named is what runs."""
    run = tmp_path / "run"
    recipes.train(*tiny_options(run, adapter="lora", adapter_options='{"rank": 2, "targets": "qkv"}', epochs=1))
    card = replace(CARD, base_model="org/base-with-code")
    client.call(publish_as, WRITER, sent(run, repo="org/plain-lora"), card)
    client.call(publish_as, WRITER, sent(run, repo="org/plain-lora-again", tag="v2"), card)
    pinned = json.loads(hub.repo("org/plain-lora-again").files["adapter_config.json"])["revision"]
    client.call(push_file, "org/base-with-code", "modeling_lymph.py", b"raise SystemError('not the code I read')")
    (tmp_path / "patient").mkdir()
    for number, cell in enumerate(golden_cells()):
        cell.save(tmp_path / "patient" / f"{number}.png")
    done = ask_stranger(hub, "org/plain-lora-again", tmp_path)
    assert done.returncode == 0, done.stderr
    said, found = done.stdout.strip().splitlines()
    threshold, module = found.split()
    assert module.startswith("transformers_modules.") and pinned in module
    assert float(threshold) == load_by_auto(run / "lymph-mil")[1] != 0.5
    first, second = client.call(run_examples, "org/plain-lora-again", tmp_path)
    assert second.strip() == said
    assert ast.literal_eval(first.splitlines()[0].split(maxsplit=1)[1]) == pytest.approx(
        ast.literal_eval(said), abs=2e-3
    )


def test_a_method_of_the_package_says_that_it_needs_the_package(hub, client, tiny_options, tmp_path):
    run = tmp_path / "run"
    recipes.train(*tiny_options(run, adapter="bottleneck", epochs=1))
    client.call(publish_as, WRITER, sent(run, repo="org/own-method"), replace(CARD, base_model="org/own-base"))
    card = hub.repo("org/own-method").files["README.md"].decode()
    assert "which PEFT alone does not know" in card and "trust_remote_code" not in card
    done = ask_stranger(hub, "org/own-method", tmp_path)
    assert done.returncode != 0
    assert "org/own-method is an adapter of the method LYMPH_BOTTLENECK, which PEFT alone does not know" in done.stderr
    assert "pip install lymph-hf" in done.stderr.splitlines()[-1]
