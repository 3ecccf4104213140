"""The Hub round trips of users, with the real client over HTTP: publish, load, trust."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import client_environment
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, pipeline

from lymph_hf import ClinicalStandardizer, LymphImageProcessor, LymphMILConfig, LymphMILForBagClassification
from lymph_hf.pipeline_lymph import TASK
from lymph_hf.publishing_code import export_with_code

WRITER = "hf_writer"
WEIGHTS = bytes(range(256)) * 800


# The server itself: what it accepts and refuses, as seen by the real client -----------------------------------


def push_files(repo_id, files, *, repo_type="model", token=WRITER, private=None, **options):
    api = HfApi(token=token)
    sdk = {"space_sdk": "gradio"} if repo_type == "space" else {}
    api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True, **sdk)
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    commit = api.create_commit(repo_id, operations, commit_message="add files", repo_type=repo_type, **options)
    return commit.oid


def fetch(repo_id, path, *, token=None, **options):
    with open(hf_hub_download(repo_id, path, token=token, **options), "rb") as file:
        return file.read()


def fetch_all(repo_id, **options):
    folder = Path(snapshot_download(repo_id, **options))
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def info_of(repo_id, **options):
    info = HfApi().model_info(repo_id, **options)
    return info.sha, info.private, sorted(sibling.rfilename for sibling in info.siblings)


def tag_head(repo_id, tag):
    HfApi(token=WRITER).create_tag(repo_id, tag=tag)


def tree_of(repo_id, **options):
    return {entry.path: type(entry).__name__ for entry in HfApi().list_repo_tree(repo_id, **options)}


@pytest.mark.parametrize("repo_type", ["model", "dataset", "space"])
def test_files_of_every_kind_of_repository_come_back_unchanged(hub, client, repo_type):
    files = {"a.txt": b"text", "deep/er/w.safetensors": WEIGHTS, "empty.txt": b""}
    oid = client.call(push_files, "org/kinds", files, repo_type=repo_type)
    assert hub.repo("org/kinds", repo_type).refs["main"] == oid
    found = client.call(fetch_all, "org/kinds", repo_type=repo_type)
    found.pop(".gitattributes")
    assert found == files
    assert len(hub.seen("PUT", "/lfs/")) == (1 if repo_type == "model" else 0), "the same content is sent once"


def test_large_files_are_checked_by_hash_and_fetched_without_the_token(hub, client):
    client.call(push_files, "org/private-lfs", {"w.safetensors": WEIGHTS}, private=True)
    assert hub.repo("org/private-lfs").private
    assert hashlib.sha256(WEIGHTS).hexdigest() in hub.objects
    assert client.call(fetch, "org/private-lfs", "w.safetensors", token="hf_reader") == WEIGHTS
    assert {token for _, path, token in hub.requests if path.startswith("/cdn/")} == {""}


def test_revisions_pin_what_is_loaded(hub, client):
    first = client.call(push_files, "org/revisions", {"a.txt": b"one"})
    client.call(tag_head, "org/revisions", "v1")
    client.call(push_files, "org/revisions", {"a.txt": b"two"})
    assert client.call(fetch, "org/revisions", "a.txt") == b"two"
    assert client.call(fetch, "org/revisions", "a.txt", revision="v1") == b"one"
    assert client.call(fetch, "org/revisions", "a.txt", revision=first) == b"one"
    with pytest.raises(RevisionNotFoundError):
        client.call(fetch, "org/revisions", "a.txt", revision="v9")


def test_an_unchanged_push_makes_no_commit_and_a_stale_one_is_refused(hub, client):
    oid = client.call(push_files, "org/again", {"a.txt": b"one"})
    assert client.call(push_files, "org/again", {"a.txt": b"one"}) == oid
    client.call(push_files, "org/again", {"a.txt": b"two"})
    with pytest.raises(HfHubHTTPError, match="412"):
        client.call(push_files, "org/again", {"a.txt": b"three"}, parent_commit=oid)


def test_listings_tell_files_from_folders(hub, client):
    client.call(push_files, "org/listing", {"a.txt": b"a", "d/b.txt": b"b", "d/e/c.txt": b"c"})
    files, folders = {"a.txt", "d/b.txt", "d/e/c.txt", ".gitattributes"}, {"d", "d/e"}
    tree = client.call(tree_of, "org/listing", recursive=True)
    assert tree == dict.fromkeys(files, "RepoFile") | dict.fromkeys(folders, "RepoFolder")
    assert client.call(tree_of, "org/listing", path_in_repo="d") == {"d/b.txt": "RepoFile", "d/e": "RepoFolder"}
    assert client.call(info_of, "org/listing")[1:] == (False, sorted(files))


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ((fetch, "org/absent", "a.txt"), RepositoryNotFoundError),
        ((fetch, "org/secret", "a.txt"), RepositoryNotFoundError),
        ((fetch, "org/open", "b.txt"), EntryNotFoundError),
        ((info_of, "org/secret"), RepositoryNotFoundError),
    ],
    ids=["absent", "private without token", "no such file", "info of private"],
)
def test_what_is_not_there_or_private_is_refused_as_by_the_hub(hub, client, call, error):
    client.call(push_files, "org/open", {"a.txt": b"a"})
    client.call(push_files, "org/secret", {"a.txt": b"a"}, private=True)
    with pytest.raises(error):
        client.call(*call)


def test_tokens_say_who_may_read_and_write(hub, client):
    client.call(push_files, "org/tokens", {"a.txt": b"a"}, private=True)
    assert client.call(fetch, "org/tokens", "a.txt", token="hf_reader") == b"a"
    with pytest.raises(RepositoryNotFoundError):
        client.call(info_of, "org/tokens", token="hf_stranger")
    with pytest.raises(HfHubHTTPError, match="403"):
        client.call(push_files, "org/tokens", {"a.txt": b"b"}, token="hf_reader")
    with pytest.raises(HfHubHTTPError, match="401"):
        client.call(push_files, "org/tokens", {"a.txt": b"b"}, token="hf_wrong")
    assert hub.repo("org/tokens").files["a.txt"] == b"a"


def test_a_download_that_breaks_off_is_resumed_where_it_stopped(hub, client):
    client.call(push_files, "org/broken-download", {"w.safetensors": WEIGHTS[::-1]})
    hub.forget()
    hub.fail("GET", "/cdn/", cut=5000)
    assert client.call(fetch, "org/broken-download", "w.safetensors") == WEIGHTS[::-1]
    assert len(hub.seen("GET", "/cdn/")) == 2


def test_a_card_with_bad_metadata_is_refused_before_anything_is_sent(hub, client):
    bad = b"---\nlicense: [1, 2]\nmodel-index:\n- name: x\n---\n# Card\n"
    with pytest.raises(ValueError, match=r"license.*\n.*model-index"):
        client.call(push_files, "org/bad-card", {"README.md": bad, "w.safetensors": WEIGHTS + b"x"})
    assert not hub.seen("PUT")
    assert hub.repo("org/bad-card").titles == ["initial commit"]


def test_downloads_are_found_again_without_the_network(hub, client):
    client.call(push_files, "org/cached", {"a.txt": b"a"})
    assert client.call(fetch, "org/cached", "a.txt") == b"a"
    hub.forget()
    assert client.call(fetch, "org/cached", "a.txt", local_files_only=True) == b"a"
    assert hub.requests == []
    with pytest.raises(LocalEntryNotFoundError):
        client.call(fetch, "org/cached", "b.txt", local_files_only=True)


# Models -------------------------------------------------------------------------------------------------------

LABELS = {0: "reactive", 1: "tumoral"}
CLINICAL = {"age": 71, "sex": "F", "lymphocyte_count": 14.2}


def small_model(seed=0, **options):
    torch.manual_seed(seed)
    settings = {"encoder": "test_vit", "image_size": 32, "id2label": LABELS, "decision_threshold": 0.3}
    return LymphMILForBagClassification(LymphMILConfig(**settings | options)).eval()


def small_processor(model):
    standardizer = ClinicalStandardizer(mean=(50.0, 0.4, 2.5))
    return LymphImageProcessor.from_config(model.config, standardizer)


def cells(number=4):
    colours = torch.Generator().manual_seed(7)
    sizes = [(48, 48), (40, 56)]
    return [
        Image.new("RGB", sizes[i % 2], tuple(torch.randint(0, 255, (3,), generator=colours).tolist()))
        for i in range(number)
    ]


def logits_of(model, processor):
    with torch.no_grad():
        return model(**processor(cells(), CLINICAL).to(model.dtype)).logits[0].float().tolist()


def push_model(repo_id, seed=0, **options):
    model = small_model(seed)
    model.push_to_hub(repo_id, token=WRITER, **options)
    small_processor(model).push_to_hub(repo_id, token=WRITER)
    return HfApi().model_info(repo_id, token=WRITER).sha, logits_of(model, small_processor(model))


def load(repo_id, **options):
    """What a user with the package sees."""
    hub_options = {name: options[name] for name in ("revision", "token", "local_files_only") if name in options}
    model = AutoModel.from_pretrained(repo_id, **options).eval()
    processor = AutoImageProcessor.from_pretrained(repo_id, **hub_options)
    return {
        "classes": (type(model).__module__, type(model).__name__, type(processor).__name__),
        "labels": model.config.id2label,
        "threshold": model.config.decision_threshold,
        "dtype": str(model.dtype),
        "devices": sorted({str(p.device) for p in model.parameters()}),
        "logits": logits_of(model, processor),
    }


def test_a_pushed_model_loads_by_its_name_with_labels_threshold_and_processor(hub, client):
    _, logits = client.call(push_model, "org/plain")
    found = client.call(load, "org/plain")
    assert found["classes"] == (
        "lymph_hf.modeling_lymph",
        "LymphMILForBagClassification",
        "LymphImageProcessor",
    )
    assert found["labels"] == LABELS
    assert found["threshold"] == 0.3
    assert found["logits"] == pytest.approx(logits, abs=1e-6)
    names = set(hub.repo("org/plain").files)
    assert names == {".gitattributes", "README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
    hub.forget()
    assert client.call(load, "org/plain", local_files_only=True)["logits"] == found["logits"]
    assert hub.requests == [], "a reload from the cache asks nobody"


def test_a_revision_pins_the_weights(client):
    first, logits = client.call(push_model, "org/pinned", seed=1)
    second, others = client.call(push_model, "org/pinned", seed=2)
    assert first != second
    assert client.call(load, "org/pinned")["logits"] == pytest.approx(others, abs=1e-6)
    assert client.call(load, "org/pinned", revision=first)["logits"] == pytest.approx(logits, abs=1e-6)


def test_sharded_weights_come_back_whole(hub, client):
    _, logits = client.call(push_model, "org/sharded", max_shard_size="500KB")
    shards = [name for name in hub.repo("org/sharded").files if name.endswith(".safetensors")]
    assert len(shards) > 1
    assert "model.safetensors.index.json" in hub.repo("org/sharded").files
    assert client.call(load, "org/sharded")["logits"] == pytest.approx(logits, abs=1e-6)


@pytest.mark.parametrize("device_map", [None, "cpu", "auto"])
def test_half_precision_and_device_maps(client, device_map):
    client.call(push_model, "org/half")
    full = client.call(load, "org/half")["logits"]
    found = client.call(load, "org/half", dtype=torch.bfloat16, device_map=device_map)
    assert found["dtype"] == "torch.bfloat16"
    assert found["devices"] == ["cpu"] or device_map == "auto"
    assert found["logits"] == pytest.approx(full, abs=0.05)


def test_a_private_model_needs_a_token(client):
    client.call(push_model, "org/private-model", private=True)
    with pytest.raises(OSError, match="not a valid model identifier|private"):
        client.call(load, "org/private-model")
    assert client.call(load, "org/private-model", token="hf_reader")["labels"] == LABELS


def push_with_code(repo_id, folder):
    model = small_model(3)
    export_with_code(model, small_processor(model), folder)
    api = HfApi(token=WRITER)
    api.create_repo(repo_id)
    oid = api.upload_folder(repo_id=repo_id, folder_path=folder).oid
    return oid, logits_of(model, small_processor(model))


# Without our package: what it prints is compared here.
STRANGER = """
import json, sys
sys.modules["lymph_hf"] = None  # import lymph_hf fails
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoProcessor
source, revision, images, clinical = json.loads(sys.argv[1])
options = {"trust_remote_code": True, "revision": revision}
model = AutoModel.from_pretrained(source, **options).eval()
processor = AutoImageProcessor.from_pretrained(source, **options)
same = AutoProcessor.from_pretrained(source, **options)
with torch.no_grad():
    output = model(**processor([Image.open(path) for path in images], clinical))
print(json.dumps({
    "logits": output.logits[0].tolist(),
    "labels": model.config.id2label,
    "module": type(model).__module__,
    "same": type(same).__name__ == type(processor).__name__,
    "ours": [name for name, module in sys.modules.items() if name.startswith("lymph_hf") and module],
}))
"""


def test_a_model_loads_as_remote_code_where_the_package_is_missing(hub, client, tmp_path):
    oid, logits = client.call(push_with_code, "org/with-code", tmp_path / "export")
    files = hub.repo("org/with-code").files
    model_path = {name for name in files if name.endswith(".py")}
    assert model_path >= {"modeling_lymph.py", "pooling_simple.py", "encoders.py", "chunking.py"}
    images = [tmp_path / f"{i}.png" for i in range(4)]
    for path, image in zip(images, cells(), strict=True):
        image.save(path)
    question = json.dumps(["org/with-code", oid, [str(path) for path in images], CLINICAL])
    environment = client_environment(hub, str(tmp_path / "home"))
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, question], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ours"] == []
    assert found["module"].startswith("transformers_modules.")
    assert found["labels"] == {str(i): name for i, name in LABELS.items()}
    assert found["same"]
    assert found["logits"] == pytest.approx(logits, abs=1e-6)
    with_package = client.call(load, "org/with-code")
    assert with_package["classes"][0] == "lymph_hf.modeling_lymph", "the installed package goes first"
    assert with_package["logits"] == pytest.approx(logits, abs=1e-6)


def ask_pipeline(repo_id, folder):
    classify = pipeline(TASK, model=repo_id, device="cpu")
    paths = []
    for i, image in enumerate(cells()):
        paths.append(str(folder / f"{i}.png"))
        image.save(paths[-1])
    return classify(paths, clinical=CLINICAL)


def test_the_pipeline_takes_a_model_from_the_hub(client, tmp_path):
    _, logits = client.call(push_model, "org/piped")
    answer = client.call(ask_pipeline, "org/piped", tmp_path)
    expected = torch.tensor(logits).softmax(-1).tolist()
    assert list(answer["probabilities"].values()) == pytest.approx(expected, abs=1e-5)
    assert answer["label"] == ("tumoral" if expected[1] >= 0.3 else "reactive")
    assert len(answer["attentions"]) == 4


def test_damaged_weights_are_refused_with_the_name_of_the_file(hub, client):
    client.call(push_model, "org/damaged")
    whole = hub.repo("org/damaged").files["model.safetensors"]
    client.call(push_files, "org/damaged", {"model.safetensors": whole[: len(whole) // 2]})
    with pytest.raises(OSError, match=r"model\.safetensors: damaged or incomplete.*force_download=True"):
        client.call(load, "org/damaged")


def test_pickled_weights_are_not_loaded(hub, client, tmp_path):
    client.call(push_model, "org/pickled")
    torch.save(small_model().state_dict(), tmp_path / "pytorch_model.bin")
    content = (tmp_path / "pytorch_model.bin").read_bytes()
    client.call(replace_file, "org/pickled", "model.safetensors", "pytorch_model.bin", content)
    with pytest.raises(OSError, match=r"org/pickled holds no model\.safetensors\. Pickled weights"):
        client.call(load, "org/pickled")


def replace_file(repo_id, old, new, content):
    operations = [CommitOperationDelete(old), CommitOperationAdd(new, content)]
    HfApi(token=WRITER).create_commit(repo_id, operations, commit_message="swap")
