"""Training: exact resume, the same result on any number of processes, and what stops a run."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn

from lymph_hf import recipes
from lymph_hf.options import TrainingOptions
from lymph_hf.training import Monitor, TrainingError, TrainingLoop, parameter_groups, set_training_mode

ROOT = Path(__file__).parents[1]
STEPS = ["--epochs", "3", "--encoder", "test_vit", "--image_size", "32", "--batch_size", "4", "--tracker", "none"]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "lymph-mil" / "model.safetensors")


def assert_same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]):
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def command(data: Path, output: Path, *more: str) -> list[str]:
    options = [
        *STEPS,
        "--validation_fraction",
        "0.3",
        "--cpu",
        "--mixed_precision",
        "no",
        "--data",
        str(data),
        "--output",
        str(output),
        *more,
    ]
    return [str(ROOT / "scripts" / "train.py"), *options]


@pytest.fixture(scope="module")
def uninterrupted(tiny_options, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "uninterrupted"
    recipes.train(*tiny_options(run, epochs=3, checkpoint_every=1))
    return run


@pytest.mark.parametrize("moment", ["while a checkpoint is written", "between two checkpoints"])
def test_a_killed_run_resumes_to_the_same_bits(moment, uninterrupted, tiny_options, cohort_folder, tmp_path):
    run = tmp_path / "run"
    log = tmp_path / "log"
    arguments = [sys.executable, *command(cohort_folder, run, "--checkpoint_every", "1")]
    checkpoints = run / "checkpoints"
    with log.open("wb") as stream, subprocess.Popen(arguments, stdout=stream, stderr=stream, cwd=ROOT) as process:
        while process.poll() is None:
            begun = any(checkpoints.glob("step-*"))
            writing = (checkpoints / ".writing").exists()
            if begun and writing == (moment == "while a checkpoint is written"):
                process.send_signal(signal.SIGKILL)
            time.sleep(0.0005)
    assert process.returncode == -signal.SIGKILL, log.read_text()[-2000:]
    assert not (run / "lymph-mil").exists()

    recipes.train(*tiny_options(run, epochs=3, checkpoint_every=1, resume=True))

    assert_same_bits(weights_of(run), weights_of(uninterrupted))
    assert (run / "history.csv").read_text() == (uninterrupted / "history.csv").read_text()
    assert (run / "validation.csv").read_text() == (uninterrupted / "validation.csv").read_text()


def test_two_processes_reach_what_accumulation_on_one_reaches(tiny_options, cohort_folder, tmp_path):
    # An odd group size leaves one process without an example in some steps. No dropout: masks differ by process.
    changes = {"epochs": 3, "batch_size": 3, "dropout": 0.0}
    recipes.train(*tiny_options(tmp_path / "one", **changes))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    # The last option given counts.
    flags = ["--batch_size", "3", "--dropout", "0"]
    launch = [*launcher, "--main_process_port", "0", *command(cohort_folder, tmp_path / "two", *flags)]
    done = subprocess.run(launch, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-3, atol=1e-5, msg=name)


def test_micro_batches_change_the_memory_not_the_result(tiny_options, tmp_path):
    for size in (1, 3):
        recipes.train(*tiny_options(tmp_path / str(size), micro_batch=size, dropout=0.0))
    one, three = weights_of(tmp_path / "1"), weights_of(tmp_path / "3")
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, three[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.fixture
def pretrained_resnet(tmp_path) -> str:
    """A file of weights with statistics, as pretraining leaves them."""
    encoder = timm.create_model("test_resnet", num_classes=0)
    encoder(torch.rand(64, 3, 32, 32))
    save_file(encoder.state_dict(), tmp_path / "encoder.safetensors")
    return str(tmp_path / "encoder.safetensors")


def test_pretrained_batch_norms_keep_their_statistics(pretrained_resnet, tiny_options, tmp_path, caplog):
    """They would be those of one patient at a time, and the result would depend on micro-batches."""
    given = {"encoder": "test_resnet", "encoder_weights": pretrained_resnet, "dropout": 0.0, "mixed_precision": "no"}
    for size in (1, 3):
        recipes.train(*tiny_options(tmp_path / str(size), micro_batch=size, epochs=1, **given))
    one, three, before = weights_of(tmp_path / "1"), weights_of(tmp_path / "3"), load_file(pretrained_resnet)
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, three[name], rtol=1e-3, atol=1e-5, msg=name)
        if "running" in name:
            assert torch.equal(tensor, before[name.removeprefix("model.encoder.")]), name
    assert any(not torch.equal(one[f"model.encoder.{name}"], tensor) for name, tensor in before.items())
    assert "batch normalisation" not in caplog.text


def test_batch_norms_with_random_weights_are_warned_about(tiny_options, tmp_path, caplog):
    recipes.train(*tiny_options(tmp_path / "run", encoder="test_resnet", epochs=1))
    assert "batch normalisation and random weights" in caplog.text


def test_bf16_on_the_cpu_trains(tiny_options, tmp_path):
    recipes.train(*tiny_options(tmp_path / "run", mixed_precision="bf16", epochs=1))
    weights = weights_of(tmp_path / "run")
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in weights.values())


class Line(nn.Module):
    """y = w x with the loss the loop expects; learns slowly enough to see the epochs."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1, 1))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        output = type("Output", (), {})()
        output.loss = (self.dropout(self.w * x) - 2 * x).square().mean()
        return output


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, key):
        return {"x": torch.tensor([float(key[1]) / 10])}


def collate(items):
    return {"x": torch.stack([item["x"] for item in items])}


def loop_over_numbers(folder: Path, validate=None, **changes) -> TrainingLoop:
    options = TrainingOptions(output=str(folder), epochs=6, batch_size=4, learning_rate=0.1, **changes)
    return TrainingLoop(Accelerator(cpu=True), Line(), Numbers(), collate, options, folder, validate=validate)


def test_the_best_epoch_is_kept_and_patience_stops(tmp_path):
    scores = iter([0.5, 0.9, 0.9, 0.7, 0.8, 0.99])
    losses = iter([1.0, 0.8, 0.6, 0.5, 0.4, 0.3])
    seen = []

    def validate(model):
        assert not model.training
        seen.append(model.w.item())
        return {"auroc": next(scores), "loss": next(losses)}

    loop = loop_over_numbers(tmp_path, validate, patience=2)
    progress = loop.run()
    assert len(progress.history) == 5, "epochs 4 and 5 were no better than epoch 3"
    assert progress.best == {"auroc": 0.9, "loss": 0.6}, "equal AUROC: the lower loss wins"
    assert loop.model.w.item() == seen[2]


def test_without_validation_the_last_epoch_is_kept(tmp_path):
    loop = loop_over_numbers(tmp_path)
    progress = loop.run()
    assert len(progress.history) == 6
    assert progress.total_step == 18
    assert loop.model.w.item() != 0


def test_an_undefined_score_is_never_the_best():
    monitor = Monitor("auroc")
    assert monitor.value({"auroc": float("nan")}) < monitor.value({"auroc": 0.0})
    assert Monitor("loss", larger_is_better=False).value({"loss": 1.0}) > monitor.value({})


def test_two_checkpoints_are_kept_and_each_is_whole(tmp_path):
    loop_over_numbers(tmp_path, checkpoint_every=1).run()
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000017", "step-00000018"]
    for name in names:
        progress = json.loads((tmp_path / "checkpoints" / name / "progress.json").read_text())
        assert progress["total_step"] == int(name[-8:])


def test_a_loss_that_is_not_a_number_stops_with_advice(tmp_path):
    loop = loop_over_numbers(tmp_path)
    loop.model.w.data.fill_(float("inf"))
    with pytest.raises(TrainingError, match="--learning-rate"):
        loop.run()


def test_a_missing_tracker_names_the_command_that_installs_it(tiny_options, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(TrainingError, match="pip install wandb"):
        recipes.train(*tiny_options(tmp_path / "run", tracker="wandb"))


def test_frozen_parts_stay_in_evaluation_mode():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5), nn.BatchNorm1d(2)), nn.Linear(2, 1))
    model[0].requires_grad_(False)
    set_training_mode(model)
    assert [module.training for module in (model[0], model[0][1], model[0][2], model[1])] == [False] * 3 + [True]


def test_the_encoder_has_its_own_rate_and_vectors_no_decay():
    model = nn.ModuleDict({"encoder": nn.Linear(3, 3), "head": nn.Linear(3, 1)})
    options = TrainingOptions(output="", learning_rate=1.0, weight_decay=0.5)
    groups = {(g["lr"], g["weight_decay"]): g["params"] for g in parameter_groups(model, options, model["encoder"])}
    assert groups.keys() == {(0.1, 0.5), (0.1, 0.0), (1.0, 0.5), (1.0, 0.0)}
    assert groups[0.1, 0.5] == [model["encoder"].weight]
    model.requires_grad_(False)
    with pytest.raises(TrainingError, match="frozen"):
        parameter_groups(model, options)


def test_a_full_disk_leaves_the_checkpoint_before_as_it_was(tmp_path):
    """The file-size limit of a process is a disk that is full: the write fails half-way with a real error."""
    script = f"""
import resource, signal, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from pathlib import Path
from test_training import loop_over_numbers
from lymph_hf.checkpoints import CheckpointError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

def validate(model):
    if validate.epochs == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, resource.RLIM_INFINITY))
    validate.epochs += 1
    return {{"auroc": 0.5 + 0.1 * validate.epochs, "loss": 1.0}}

validate.epochs = 0
try:
    loop_over_numbers(Path({str(tmp_path)!r}), validate).run()
except CheckpointError as error:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    sys.stdout.write(str(error))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert "--resume" in done.stdout, done.stderr[-2000:]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]
    resumed = loop_over_numbers(tmp_path, resume=True)
    plain = loop_over_numbers(tmp_path / "plain")
    resumed.run()
    plain.run()
    assert torch.equal(resumed.model.w, plain.model.w)


def test_balanced_sampling_draws_the_rare_class_more_often(tiny_options, tmp_path):
    groups = tiny_options(tmp_path / "run", epochs=1, balance="sampling")
    recipes.train(*groups)
    config = json.loads((tmp_path / "run" / "lymph-mil" / "config.json").read_text())
    assert config["class_weights"] is None


def test_the_schedule_warms_up_and_ends_at_zero(tmp_path):
    loop = loop_over_numbers(tmp_path, warmup=0.2)
    rates = []
    step = loop.optimizer.step

    def recording_step(*arguments):
        rates.append(loop.optimizer.param_groups[0]["lr"])
        return step(*arguments)

    loop.optimizer.step = recording_step
    loop.run()
    assert rates[0] == 0
    assert max(rates) == rates[4] == pytest.approx(0.1)
    assert np.diff(rates[4:]).max() < 0
    assert loop.schedule.get_last_lr()[0] == pytest.approx(0)


def test_a_resumed_run_sees_the_same_numbers_of_workers_or_not(tiny_options, tmp_path, uninterrupted):
    groups = tiny_options(tmp_path / "run", epochs=3, checkpoint_every=1)
    groups[-1] = replace(groups[-1], workers=2)
    recipes.train(*groups)
    assert_same_bits(weights_of(tmp_path / "run"), weights_of(uninterrupted))
