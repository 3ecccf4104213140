"""`lymph publish`: nothing leaves unchecked, and nothing is half-published, whatever the Hub and the line do."""

import ast
import json
import re
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import answers
import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from publishing_cases import FACTS, WRITER, options, publish_as, run_examples, sent
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from lymph_hf.card_patterns import CardError
from lymph_hf.hub_push import PublishError
from lymph_hf.publication_checks import folder_problems, run_identifiers, searchable
from lymph_hf.publishing import publish
from lymph_hf.publishing_model import stage_run
from lymph_hf.runs import Run, RunError
from lymph_hf.synthetic import write_synthetic_cohort


@pytest.fixture(scope="module")
def staged(trained_run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("staged")
    return stage_run(Run(trained_run), folder, FACTS, repo="org/staged", tag="v1")


@pytest.fixture
def folder(staged, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(staged, tmp_path / "folder"))


# What is sent -------------------------------------------------------------------------------------------------


def test_only_model_code_card_and_figures_are_put_together(staged, trained_run):
    names = {path.name for path in staged.iterdir()}
    modules = {name for name in names if name.endswith(".py")}
    assert names - modules == {
        "README.md",
        "config.json",
        "golden.json",
        "model.safetensors",
        "preprocessor_config.json",
        "validation.png",
    }
    assert {"modeling_lymph.py", "pooling_base.py", "processing_lymph.py"} <= modules
    assert not {"recipes.py", "cohort.py", "publishing.py"} & modules
    weights = (staged / "model.safetensors").read_bytes()
    assert weights == (trained_run / "lymph-mil" / "model.safetensors").read_bytes()
    assert (
        json.loads((staged / "config.json").read_text())["auto_map"]["AutoConfig"]
        == "configuration_lymph.LymphMILConfig"
    )
    assert type(AutoModel.from_pretrained(staged)).__module__ == "lymph_hf.modeling_lymph"


def test_the_staged_folder_passes_and_twice_gives_the_same_bytes(staged, trained_run, tmp_path):
    run = Run(trained_run)
    assert folder_problems(staged, run_identifiers(run)) == []
    again = stage_run(run, tmp_path, FACTS, repo="org/staged", tag="v1")
    assert {p.name: p.read_bytes() for p in again.iterdir()} == {p.name: p.read_bytes() for p in staged.iterdir()}


def test_a_dry_run_lists_everything_and_asks_nobody(hub, trained_run, cohort_folder, tmp_path, caplog):
    caplog.set_level("INFO")
    done = publish(options(trained_run, data=str(cohort_folder), cache_dir=str(tmp_path)), FACTS)
    assert done.commit is None
    assert hub.requests == []
    for name in done.files:
        assert name in caplog.text
    assert "Dry run: nothing was sent" in caplog.text
    assert "reproduces the 4 predictions of validation.csv" in caplog.text
    assert "None of 14 patient identifiers" in caplog.text


def test_what_would_be_sent_can_be_kept_and_loads_in_place(trained_run, tmp_path):
    done = publish(options(trained_run, output=str(tmp_path / "model_cards" / "lymph-mil")), FACTS)
    kept = tmp_path / "model_cards" / "lymph-mil"
    assert {path.name for path in kept.iterdir()} == set(done.files)
    assert AutoModel.from_pretrained(kept).config.id2label == {0: "reactive", 1: "tumoral"}


def test_without_the_patients_it_says_what_was_not_checked(trained_run):
    assert any("not reproduced" in note and "--data" in note for note in publish(options(trained_run), FACTS).notes)


def test_changed_weights_do_not_pass_for_those_that_were_evaluated(trained_run, cohort_folder, tmp_path):
    run = Path(shutil.copytree(trained_run, tmp_path / "run"))
    weights = load_file(run / "lymph-mil" / "model.safetensors")
    weights["classifier.bias"] += torch.tensor([0.0, 0.5])
    save_file(weights, run / "lymph-mil" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PublishError, match=r"validation\.csv: 4 of 4 stored predictions are not reproduced"):
        publish(options(run, data=str(cohort_folder), cache_dir=str(tmp_path / "cache")), FACTS)


def test_other_patients_are_recognised(trained_run, tmp_path):
    write_synthetic_cohort(tmp_path / "other", patients=4, seed=3, cells=(7, 8), image_size=48, progress=False)
    with pytest.raises(PublishError, match="not the patients"):
        publish(options(trained_run, data=str(tmp_path / "other"), cache_dir=str(tmp_path)), FACTS)


def test_an_unfinished_run_and_a_card_without_facts_are_refused(trained_run, tmp_path):
    with pytest.raises(RunError, match="no finished model"):
        publish(options(tmp_path), FACTS)
    with pytest.raises(CardError, match="--reference-standard"):
        publish(options(trained_run), replace(FACTS, reference_standard=None))


def test_scores_of_held_out_patients_go_along_without_data_and_groups(trained_run, tmp_path):
    """The Space computes predictive values from them, of the run or of what was published of it."""
    run = Path(shutil.copytree(trained_run, tmp_path / "run"))
    report = json.loads((run / "validation.json").read_text())
    group = {"variable": "age", "group": "< 50 years", "n": 1, "positives": 1, "scores": report["scores"]}
    report |= {"data": "ward 7", "subgroups": [group], "baselines": {"clinical alone": {"scores": {}}}}
    report["scores"]["sensitivity"] = {"value": 2 / 3, "low": 0.5, "high": 1.0, "level": 0.95, "dropped": 0.1}
    (run / "metrics.json").write_text(json.dumps(report))
    folder = tmp_path / "staged"
    folder.mkdir()
    stage_run(Run(run), folder, FACTS, repo="org/staged", tag="v1")
    scores = json.loads((folder / "evaluation.json").read_text())
    assert set(scores) == {"n", "n_per_label", "interval", "threshold", "scores"}
    assert scores["scores"]["sensitivity"] == {"value": 0.6667, "low": 0.5, "high": 1.0}
    assert scores["n_per_label"] == report["n_per_label"]
    assert (folder / "evaluation.json").stat().st_size < 5_000
    assert folder_problems(folder, run_identifiers(Run(run))) == []
    performance = answers.Predictor(str(folder)).performance
    assert performance.sensitivity == 0.6667 and performance.patients == report["n"]
    ppv, npv = performance.predictive_values(0.2)
    assert 0 <= ppv <= 1 and 0 <= npv <= 1


# What may not leave -------------------------------------------------------------------------------------------


def write_optimizer(folder):
    torch.save({"state": 1}, folder / "optimizer.bin")


def write_training_state(folder):
    weights = load_file(folder / "model.safetensors")
    weights["optimizer.exp_avg"] = torch.zeros(2)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def write_notes(folder):
    weights = load_file(folder / "model.safetensors")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt", "trained_on": "P001"})


def write_nan(folder):
    weights = load_file(folder / "model.safetensors")
    weights["classifier.bias"][0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def lie_about_the_header(folder):
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**60) + path.read_bytes()[8:])


def add_exif(folder):
    exif = Image.Exif()
    exif[0x010F] = "analyser of ward 3"
    Image.new("RGB", (32, 32)).save(folder / "validation.png", exif=exif)


def add_note(folder):
    note = PngImagePlugin.PngInfo()
    note.add_text("Comment", "Mrs X")
    Image.new("RGB", (32, 32)).save(folder / "validation.png", pnginfo=note)


def append(name, text):
    return lambda folder: (folder / name).write_text((folder / name).read_text() + text)


def add_folder(folder):
    (folder / "checkpoints").mkdir()


SPOILT = {
    "patient identifier": (append("README.md", "\nsee P003.\n"), r"README\.md: holds a patient identifier in line \d+"),
    "identifier in a file's name": (append("README.md", "\n![](P003_1.jpg)\n"), "holds a patient identifier"),
    "identifier in the code": (append("fusion.py", "# P011\n"), r"fusion\.py: holds a patient identifier"),
    "date": (append("README.md", "\nborn 1951-02-03\n"), r"README\.md: holds a date"),
    "date in figures": (append("README.md", "\nborn 3/2/1951\n"), "holds a date"),
    "path": (append("encoders.py", "# /home/ada/cohort\n"), r"encoders\.py: holds a path"),
    "path of Windows": (append("encoders.py", "# D:\\cohort\n"), "holds a path"),
    "card": (append("README.md", "\nTODO\n"), "left behind"),
    "no card": (lambda folder: (folder / "README.md").unlink(), r"README\.md is missing"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "safetensors is missing"),
    "pickle": (write_optimizer, r"optimizer\.bin: only"),
    "folder": (add_folder, "checkpoints: only"),
    "hidden file": (lambda folder: (folder / ".lock").touch(), r"\.lock: only"),
    "table": (lambda folder: (folder / "predictions.csv").touch(), r"predictions\.csv: only"),
    "optimizer": (write_training_state, "training state such as optimizer"),
    "notes in the weights": (write_notes, "trained_on"),
    "nan": (write_nan, r"classifier\.bias is not finite"),
    "truncated": (truncate, "cannot be read as safetensors"),
    "header": (lie_about_the_header, "cannot be read as safetensors"),
    "exif": (add_exif, "EXIF|exif"),
    "note in a picture": (add_note, "Comment"),
    "broken settings": (append("config.json", "}"), "is not JSON"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_what_may_not_leave_is_found_and_named(folder, trained_run, case):
    spoil, problem = SPOILT[case]
    spoil(folder)
    found = "\n".join(folder_problems(folder, run_identifiers(Run(trained_run))))
    assert re.search(problem, found), found
    assert "P003" not in found, "the message itself must not pass it on"


def test_a_missing_shard_is_named(folder):
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert any("model-00001-of-00002.safetensors is missing" in p for p in folder_problems(folder))


def test_identifiers_that_look_like_numbers_are_counted_not_searched(trained_run):
    identifiers = run_identifiers(Run(trained_run))
    assert identifiers == {f"P{i:03d}" for i in range(1, 15)}
    assert searchable({"12", "1234", "ab", "P1x", "12345", "Müller"}) == ["12345", "Müller", "P1x"]


# Pushing ------------------------------------------------------------------------------------------------------


def test_a_run_is_published_in_one_commit_under_a_tag(hub, client, trained_run):
    commit = client.call(publish_as, WRITER, sent(trained_run, repo="org/published"))
    repo = hub.repo("org/published")
    assert repo.titles == ["initial commit", "Publish"]
    assert repo.refs["main"] == repo.tags["v1"] == commit
    assert not repo.private
    dry = publish(options(trained_run, repo="org/published"), FACTS)
    assert set(repo.files) == {".gitattributes", *dry.files}, "what the dry run listed, and nothing else"
    assert not any(b"P001" in content for content in repo.files.values())


def test_repeating_changes_nothing_and_a_version_stays_what_it_is(hub, client, trained_run):
    arguments = sent(trained_run, repo="org/repeated")
    first = client.call(publish_as, WRITER, arguments)
    hub.forget()
    assert client.call(publish_as, WRITER, arguments) == first
    assert not hub.seen("POST", "/commit/|/preupload/") and not hub.seen("PUT")
    other = replace(FACTS, acquisition="Another analyser.")
    with pytest.raises(PublishError, match=r"other content \(README\.md\).*another --tag"):
        client.call(publish_as, WRITER, arguments, other)
    second = client.call(publish_as, WRITER, replace(arguments, tag="v2"), other)
    assert hub.repo("org/repeated").tags == {"v1": first, "v2": second}
    assert not hub.seen("PUT"), "unchanged weights are not sent again"


def test_files_that_the_new_version_lacks_are_removed(hub, client, trained_run):
    arguments = sent(trained_run, repo="org/cleaned")
    client.call(publish_as, WRITER, arguments)
    repo = hub.repo("org/cleaned")
    extra = repo.commits[repo.refs["main"]] | {"old/weights.txt": repo.commits[repo.refs["main"]]["README.md"]}
    repo.commit(extra, "someone adds a file")
    client.call(publish_as, WRITER, replace(arguments, tag="v2"))
    assert "old/weights.txt" not in repo.files


def test_a_private_repository_stays_private(hub, client, trained_run):
    client.call(publish_as, WRITER, sent(trained_run, repo="org/hidden", private=True))
    assert hub.repo("org/hidden").private
    client.call(publish_as, WRITER, sent(trained_run, repo="org/shown"))
    with pytest.raises(PublishError, match="exists and is public"):
        client.call(publish_as, WRITER, sent(trained_run, repo="org/shown", private=True, tag="v2"))


def test_the_token_is_asked_for_only_when_pushing(hub, client, trained_run):
    assert client.call(publish_as, None, options(trained_run)) is None
    with pytest.raises(PublishError, match="hf auth login"):
        client.call(publish_as, None, sent(trained_run, repo="org/no-token"))
    assert hub.requests == []


@pytest.mark.parametrize(
    ("token", "repo", "message"),
    [
        ("hf_wrong", "org/refused", r"does not accept the token.*\(401\)"),
        ("hf_reader", "org/refused", r"may not write there.*\(403\)"),
        ("hf_stranger", "org/refused", r"may not write there.*\(403\)"),
        (WRITER, "org/a/b", "expected organisation/name"),
    ],
)
def test_tokens_and_names_that_do_not_fit(hub, client, trained_run, token, repo, message):
    with pytest.raises(PublishError, match=message):
        client.call(publish_as, token, sent(trained_run, repo=repo))
    assert ("model", "org/refused") not in hub.repos


FAULTS = {
    "401 at the commit": ({"method": "POST", "path": "/commit/", "status": 401}, r"\(401\)"),
    "403 at the commit": ({"method": "POST", "path": "/commit/", "status": 403}, r"may not write.*\(403\)"),
    "404 at the commit": ({"method": "POST", "path": "/commit/", "status": 404}, r"Check the name \(404\)"),
    "409 at the commit": ({"method": "POST", "path": "/commit/", "status": 409}, r"someone else.*\(409\)"),
    "429 at the commit": (
        {"method": "POST", "path": "/commit/", "status": 429, "headers": {"Retry-After": "60"}},
        r"Wait 60 seconds.*\(429\)",
    ),
    "500 at the commit": ({"method": "POST", "path": "/commit/", "status": 500}, r"the Hub fails \(500\)"),
    "503 at creation": ({"method": "POST", "path": "/repos/create", "status": 503}, r"the Hub fails \(503\)"),
    "403 at the upload": ({"method": "PUT", "path": "/lfs/", "status": 403}, r"may not write.*\(403\)"),
    "line breaks in the commit": ({"method": "POST", "path": "/commit/", "cut": 2000}, "connection broke off"),
    "400 at the card": (
        {"method": "POST", "path": "/validate-yaml", "status": 400},
        r"(?s)refuses what was sent.*\(400\)",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_failure_publishes_nothing_and_the_same_command_finishes_the_work(hub, client, trained_run, case):
    fault, message = FAULTS[case]
    repo = f"org/{case.replace(' ', '-')}"
    hub.objects.clear()  # so that the weights have to be sent
    hub.fail(**fault)
    with pytest.raises(PublishError, match=message) as caught:
        client.call(publish_as, WRITER, sent(trained_run, repo=repo))
    assert repo in str(caught.value)
    if ("model", repo) in hub.repos:
        assert set(hub.repo(repo).files) == {".gitattributes"}, "nothing is half-published"
    commit = client.call(publish_as, WRITER, sent(trained_run, repo=repo))
    assert hub.repo(repo).tags == {"v1": commit}
    assert hub.repo(repo).titles == ["initial commit", "Publish"]


def test_an_upload_that_breaks_off_once_is_taken_up_again(hub, client, trained_run):
    hub.objects.clear()
    hub.fail("PUT", "/lfs/", cut=10_000)
    commit = client.call(publish_as, WRITER, sent(trained_run, repo="org/resumed"))
    assert len(hub.seen("PUT")) == 2
    assert hub.repo("org/resumed").tags == {"v1": commit}


def test_a_lost_answer_is_no_second_commit(hub, client, trained_run):
    """The commit arrived, its answer did not: the repeated command finds it."""
    hub.fail("POST", "/commit/", cut=0, after=True)
    with pytest.raises(PublishError, match="connection broke off"):
        client.call(publish_as, WRITER, sent(trained_run, repo="org/lost-answer"))
    assert hub.repo("org/lost-answer").tags == {}
    commit = client.call(publish_as, WRITER, sent(trained_run, repo="org/lost-answer"))
    assert hub.repo("org/lost-answer").titles == ["initial commit", "Publish"]
    assert hub.repo("org/lost-answer").tags == {"v1": commit}


def test_the_examples_of_the_card_run_as_they_stand(client, trained_run, tmp_path):
    client.call(publish_as, WRITER, sent(trained_run, repo="org/examples"))
    (tmp_path / "patient").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (3, 40, 40, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "patient" / f"cell-{i}.png")
    with_package, without = client.call(run_examples, "org/examples", tmp_path)
    answer, *cells = with_package.splitlines()
    assert answer.split()[0] in ("reactive", "tumoral"), with_package
    assert sorted(line.split()[1] for line in cells) == ["cell-0.png", "cell-1.png", "cell-2.png"]
    probabilities = ast.literal_eval(without)
    assert set(probabilities) == {"reactive", "tumoral"}
    assert sum(probabilities.values()) == pytest.approx(1, abs=2e-3)
    label, said = answer.split(maxsplit=1)
    assert ast.literal_eval(said) == pytest.approx(probabilities, abs=2e-3)
