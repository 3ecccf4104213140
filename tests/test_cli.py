"""The command line: one definition of each option, files and flags alike, mistakes refused."""

import json
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from lymph_hf import cli

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as done:
        cli.parse(name, ["--help"])
    text = capsys.readouterr().out
    assert done.value.code == 0
    for example in cli.COMMANDS[name].examples:
        assert example in text
    for group in cli.COMMANDS[name].options:
        for field in fields(group):
            assert f"--{field.name}" in text
            assert field.metadata["help"].split("%")[0][:30] in " ".join(text.split())[:] or field.metadata["help"]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_option_stands_once_and_examples_parse(name):
    names = [field.name for group in cli.COMMANDS[name].options for field in fields(group)]
    assert len(names) == len(set(names)), "two groups of a command share an option"
    for example in cli.COMMANDS[name].examples:
        words = example.split()
        if words[0] == "lymph" and "--config" not in words and "--resume" not in words:
            command, rest = cli._command(words[1:])
            assert command == name
            cli.parse(command, rest)


def test_python_and_the_command_line_have_the_same_defaults():
    parsed = cli.parse("train", ["--data", "d", "--output", "o"])
    for group, options in zip(cli.COMMANDS["train"].options, parsed, strict=True):
        required = {f.name: getattr(options, f.name) for f in fields(group) if f.default is MISSING}
        assert options == group(**required)


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_a_file_sets_options_and_the_command_line_overrides_it(tmp_path, suffix):
    settings = {"data": "cohort", "output": "run", "epochs": 7, "augment": False, "pooling_options": {"hidden": 4}}
    path = tmp_path / f"settings.{suffix}"
    path.write_text(json.dumps(settings))
    cohort, _, model, training = cli.parse("train", ["--config", str(path), "--epochs", "9"])
    assert (cohort.data, training.output, training.epochs, training.augment) == ("cohort", "run", 9, False)
    assert json.loads(model.pooling_options) == {"hidden": 4}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("epoch: 3", "--epoch"),
        ("epochs: many", "epochs"),
        ("- 1", "table"),
        ("a: [", "config"),
        ("tracker: paper", "paper"),
    ],
)
def test_mistakes_in_a_file_are_refused(tmp_path, capsys, content, message):
    path = tmp_path / "settings.yaml"
    path.write_text(content)
    with pytest.raises(SystemExit) as done:
        cli.parse("train", ["--data", "d", "--output", "o", "--config", str(path)])
    assert done.value.code == 2
    assert message in capsys.readouterr().err


def test_unknown_options_are_refused_with_a_guess(capsys):
    with pytest.raises(SystemExit) as done:
        cli.parse("train", ["--data", "d", "--output", "o", "--lerning-rate", "1"])
    assert done.value.code == 2
    assert "Did you mean --learning-rate" in capsys.readouterr().err


def test_abbreviations_are_refused():
    """An option that is added later would make them ambiguous."""
    with pytest.raises(SystemExit):
        cli.parse("train", ["--data", "d", "--output", "o", "--epo", "1"])


def test_resuming_takes_the_settings_of_the_run(tmp_path):
    (tmp_path / "settings.json").write_text(
        json.dumps({"data": "d", "output": str(tmp_path), "epochs": 5, "resume": False})
    )
    cohort, _, _, training = cli.parse("train", ["--resume", "--output", str(tmp_path)])
    assert (cohort.data, training.epochs, training.resume) == ("d", 5, True)


def test_no_and_unknown_commands(capsys):
    assert cli.main([]) == 0
    assert "not a medical device" in capsys.readouterr().out
    assert cli.main(["trian"]) == 2
    assert "no command 'trian'" in capsys.readouterr().err


def test_failures_are_told_in_one_line_without_a_traceback(tmp_path, capsys, caplog):
    assert cli.main(["cohort", "check", str(tmp_path)]) == 1
    assert "CohortError" in caplog.text + capsys.readouterr().out
    assert "Traceback" not in caplog.text


def test_cohort_check_prints_and_draws(cohort_folder, tmp_path, capsys, caplog):
    figure = tmp_path / "figure.png"
    assert cli.main(["cohort", "check", str(cohort_folder), "--output", str(figure)]) == 0
    assert figure.stat().st_size > 10_000
    text = caplog.text + capsys.readouterr().out
    for word in ("Patients: 14", "reactive", "tumoral", "Exclusions: 0"):
        assert word in text


def test_synth_makes_a_cohort_and_says_the_best_score(tmp_path, capsys, caplog):
    arguments = ["synth", str(tmp_path / "c"), "--patients", "4", "--cells", "1", "2", "--image-size", "32"]
    assert cli.main(arguments) == 0
    assert "best possible AUROC" in caplog.text + capsys.readouterr().out
    assert cli.main(["synth", str(tmp_path / "d"), "--cells", "1"]) == 1


@pytest.mark.parametrize("script", ["train", "evaluate", "predict"])
def test_scripts_are_the_same_command(script):
    source = (ROOT / "scripts" / f"{script}.py").read_text()
    assert f'main(["{script}", *sys.argv[1:]])' in source


def test_the_installed_command_starts():
    done = subprocess.run(
        [sys.executable, "-m", "lymph_hf.cli", "train", "--help"], capture_output=True, text=True, check=True
    )
    assert "accelerate launch scripts/train.py" in done.stdout
