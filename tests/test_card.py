"""The card says everything a reader needs, and only what the run or its publisher knows."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from hub_server import card_problems as hub_problems
from huggingface_hub import ModelCard

import lymph_hf
from lymph_hf import recipes
from lymph_hf.card import model_card
from lymph_hf.card_evaluation import predictive_values
from lymph_hf.card_patterns import SECTIONS, CardError, card_problems
from lymph_hf.options import CohortOptions, EvaluateOptions, InferenceOptions
from lymph_hf.options_publish import CardOptions
from lymph_hf.runs import Run
from lymph_hf.synthetic import write_synthetic_cohort

FACTS = {
    "training_data": "Painted patients, seed 0.",
    "evaluation_data": "Painted patients, seed 9.",
    "reference_standard": "The painter knows.",
    "acquisition": "Painted, not stained.",
}


@pytest.fixture(scope="module")
def run(trained_run, tmp_path_factory) -> Run:
    """A run that was evaluated on other patients, one image of training left out."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(trained_run, folder)
    other = tmp_path_factory.mktemp("cohorts") / "other"
    write_synthetic_cohort(other, patients=14, seed=9, cells=(3, 4), image_size=48, progress=False)
    options = EvaluateOptions(run=str(folder), resamples=50)
    recipes.evaluate(CohortOptions(data=str(other)), options, InferenceOptions(cpu=True))
    record = json.loads((folder / "cohort.json").read_text())
    record["exclusions"] = [{"patient_id": "P001", "file": "x.png", "reason": "empty file"}]
    (folder / "cohort.json").write_text(json.dumps(record))
    return Run(folder)


def write(run, **changes) -> str:
    return str(model_card(run, CardOptions(**FACTS | changes), repo="org/lymph-mil", tag="v1"))


def test_the_whole_card_follows_its_pattern(run):
    """Every section, in order, with the numbers of the run."""
    config = json.loads((run.model / "config.json").read_text())
    patients = json.loads(run.cohort.read_text())["patients"]
    threshold = re.escape(f"{config['decision_threshold']:.4g}")
    value, share = r"\d\.\d{3}", r"\d+%"
    interval = rf"{value} +\| {value} to {value}( \(\d+\.\d% of resamples not estimable\))? *\|"
    scores = "balanced accuracy|AUROC|AUPRC|sensitivity|specificity|Brier score|accuracy"
    table = rf"\| score +\|.+\n\|.+\n(\| ({scores}) +\| {interval}\n){{7}}"
    evaluation = rf"14 patients \(\d+ reactive, \d+ tumoral\): .+\n.+\n\n{table}"
    parts = [
        r"\A---\nlanguage: en\n(.+\n)+---\n\n# lymph-mil\n",
        r"\*\*Research software, not a medical device\.\*\*",
        r"age in years, sex, lymphocyte count",
        r"\*\*reactive or tumoral\*\*",
        r"\| Encoder \| `test_vit` \(timm\), trained from random weights \|",
        r"\| Pooling, fusion \| `gated_attention`, `concat` \|",
        r"\| Parameters \| [\d,]{7,} \|\n\| Weights \| safetensors, float32; licence apache-2\.0 \|",
        r"## Intended use\n\nResearch on",
        r"## Out-of-scope use\n\n(- .+\n)+",
        rf"## Training data\n\n{FACTS['training_data']}\n\nStain, analyser, export: {FACTS['acquisition']}\n",
        rf"\| train \| {patients['train']} \|\n\| validation \| {patients['validation']} \|\n",
        r"Left out: 1 patients or images\.",
        r"\| empty file \| 1 \|",
        rf"## Reference standard\n\n{FACTS['reference_standard']}\n",
        rf"## Evaluation\n\n### Held-out patients\n\n{FACTS['evaluation_data']}\n",
        evaluation,
        rf"\n\nAUROC of other models on the same patients: clinical alone {value} .+\.\n\n",
        r"!\[.+\]\(evaluation\.png\)",
        r"### Validation patients\n",
        r"not a test",
        r"!\[.+\]\(validation\.png\)",
        rf"## Decision threshold\n\n.+at least {threshold}\. ",
        r"## Prevalence\n(.*\n)+?\|.+\|\n\|---\|---\|---\|\n",
        rf"(\| {share}(, as in this sample)? \| ({value}|no such answer) \| ({value}|no such answer) \|\n){{4}}",
        r"## Calibration\n\nThe probabilities went through Platt scaling, fitted on the validation patients\. ",
        rf"Held-out patients: Brier score {value} \({value} to {value}\)(; .+)?\. A probability",
        r"## Referral\n\nConformal prediction sets with a coverage of 90% per label, fitted on the validation ",
        rf".+ held the label {value} ",
        r"## Subgroups\n\n(\| variable \| group \| patients \|.+\n(\|.+\n)+|Scores by age, sex and)",
        r"## Limitations\n\n(- .+\n)+",
        r'## How to use\n(.*\n)+?.+revision="v1"',
        r'"trust_remote_code": True',
        r"## Training procedure\n\n(\|.+\n)+",
        r"## Environmental cost\n\nThe energy of this training was not metered",
        r"## Privacy\n",
        r"## Citation\n\n```bibtex\n@software",
        r"hal-03032875\)\.\n?\Z",
    ]
    text, at = write(run), 0
    for part in parts:
        found = re.compile(part).search(text, at)
        assert found, f"not found after position {at}: {part}\n{text[at : at + 600]}"
        at = found.end()


def test_the_metadata_pass_the_hub_and_hold_the_scores_of_the_run(run):
    text = write(run, datasets=["org/cells"], base_model="timm/test_vit.r160_in1k")
    assert hub_problems(text, "model") == ([], [])
    data = ModelCard(text).data
    assert (data.license, data.library_name, data.pipeline_tag) == (
        "apache-2.0",
        "transformers",
        "image-classification",
    )
    assert data.datasets == ["org/cells"]
    assert data.base_model == "timm/test_vit.r160_in1k"
    assert {"multiple-instance-learning", "lymph-hf"} <= set(data.tags)
    stored = json.loads((run.folder / "metrics.json").read_text())
    of_test = {r.metric_type: r for r in data.eval_results if r.dataset_split == "test"}
    assert {r.dataset_split for r in data.eval_results} == {"test", "validation"}
    assert len(of_test) == len([score for score in stored["scores"].values() if score["value"] is not None])
    auroc = stored["scores"]["auroc"]
    assert of_test["roc_auc"].metric_value == pytest.approx(auroc["value"], abs=1e-4)
    assert of_test["roc_auc"].metric_args["low"] == pytest.approx(auroc["low"], abs=1e-4)
    assert of_test["roc_auc"].metric_args["n"] == stored["n"]


def test_words_with_yaml_meaning_stay_words(run):
    text = write(run, license="other: mine", training_data="None of them 'quoted' # or <b>more</b>")
    assert yaml.safe_load(text.split("---")[1])["license"] == "other: mine"
    assert "None of them 'quoted' # or <b>more</b>" in text
    with pytest.raises(CardError, match="left behind"):
        write(run, training_data="{{ filled in later }}")


def test_facts_that_only_the_publisher_knows_are_asked_for(run):
    with pytest.raises(CardError, match="--training-data, --reference-standard, --acquisition, --evaluation-data"):
        model_card(run, CardOptions(), repo="org/x", tag="v1")
    with pytest.raises(CardError, match="between 0 and 1"):
        write(run, prevalence=[18.0])


def test_a_run_without_held_out_patients_says_so(trained_run):
    facts = CardOptions(**{**FACTS, "evaluation_data": None})
    text = str(model_card(Run(trained_run), facts, repo="org/x", tag="v1"))
    assert "No patient outside training and validation was scored" in text
    assert "### Held-out patients" not in text


def test_a_painted_cohort_is_declared_in_the_first_line(run):
    body = ModelCard(write(run, synthetic=True)).text.strip().splitlines()
    assert body[0] == "# lymph-mil"
    assert body[2].startswith("**A demonstration trained on painted images of invented patients")
    assert "synthetic" in ModelCard(write(run, synthetic=True)).data.tags


def test_the_environmental_cost_is_computed_where_it_is_known(run):
    text = write(run, hours=2.0, watts=50.0, carbon_intensity=200.0, hardware="2 CPU cores")
    assert "Trained in 2 hours on 2 CPU cores at about 50 W: 0.1 kWh. At 200 g CO2 equivalent per kWh, 20 g." in text
    assert ModelCard(text).data.to_dict()["co2_eq_emissions"]["emissions"] == pytest.approx(20)


@pytest.mark.parametrize(
    ("sensitivity", "specificity", "prevalence"), [(0.9, 0.8, 0.18), (0.5, 0.99, 0.01), (1.0, 0.0, 0.3)]
)
def test_predictive_values_are_those_of_a_thousand_counted_patients(sensitivity, specificity, prevalence):
    ill, well = 1000 * prevalence, 1000 * (1 - prevalence)
    called = ill * sensitivity + well * (1 - specificity)
    ppv, npv = predictive_values(sensitivity, specificity, prevalence)
    assert ppv == pytest.approx(ill * sensitivity / called)
    if called < 1000:
        assert npv == pytest.approx(well * specificity / (1000 - called))
    else:
        assert npv != npv


def test_subgroups_are_shown_where_they_were_computed(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    report = json.loads((folder / "metrics.json").read_text())
    group = {"variable": "sex", "group": "female", "n": 6, "positives": 4, "scores": report["scores"]}
    (folder / "metrics.json").write_text(json.dumps(report | {"subgroups": [group]}))
    assert "| sex | female | 6 | 4 | 0." in write(Run(folder)).replace("| 1.", "| 0.")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda text: text.replace("## Limitations", "## Notes"), "no section 'Limitations'"),
        (lambda text: text.replace("license: apache-2.0\n", ""), "no 'license'"),
        (lambda text: text + "\nTODO\n", "left behind: 'TODO'"),
        (lambda text: text + "\n{{ repo }}\n", "left behind"),
        (lambda text: text.replace("not a medical device", "a device"), "medical device"),
        (lambda text: "---\n- 1\n---\n", "cannot be read"),
    ],
    ids=["section", "license", "todo", "template", "medical device", "metadata"],
)
def test_an_incomplete_card_is_noticed(run, change, problem):
    assert card_problems(write(run)) == []
    assert any(problem in found for found in card_problems(change(write(run))))


def test_every_section_of_the_template_is_required():
    template = Path(lymph_hf.__file__).with_name("model_card_template.md").read_text()
    assert tuple(re.findall(r"^## (.+)$", template, flags=re.MULTILINE)) == SECTIONS


ROOT = Path(lymph_hf.__file__).parents[1]
PLACES = ("lymph_hf/*_template.md", "*.md", "space/*.md", "model_cards/*/README.md")
DOCUMENTS = [path for place in PLACES for path in sorted(ROOT.glob(place))]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_code_from_the_hub_is_pinned_wherever_it_is_shown(path):
    """Whoever copies an example must not run what is pushed to a repository later."""
    examples = re.findall(r"```(?:python|bash)\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for example in examples:
        assert "trust_remote_code" not in example or "revision" in example, example
        assert not re.search(r"from_pretrained\(\s*\"(?!runs/|model_cards/)[^\"]+/[^\"]+\"\s*\)", example), example
