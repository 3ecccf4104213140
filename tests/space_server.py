"""The Space with a tiny model, served as a process on a free port for the tests that speak to it."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

import torch

from lymph_hf import LymphImageProcessor, LymphMILConfig, LymphMILForBagClassification

SPACE = Path(__file__).parents[1] / "space"
EXAMPLES = SPACE / "examples"

EVALUATION = (
    '{"scores": {"sensitivity": {"value": 0.9}, "specificity": {"value": 0.8}},'
    ' "n_per_label": {"reactive": 40, "tumoral": 60}}'
)


def write_model(folder: Path, **config) -> Path:
    """A patient model with random weights, sure of nothing: its prediction sets hold both labels."""
    torch.manual_seed(0)
    values = {
        "encoder": "test_vit",
        "image_size": 32,
        "id2label": {0: "reactive", 1: "tumoral"},
        "conformal": {"coverage": 0.9, "quantiles": [0.9, 0.9], "calibrated_on": [20, 20]},
    } | config
    model = LymphMILForBagClassification(LymphMILConfig(**values))
    model.save_pretrained(folder)
    LymphImageProcessor.from_config(model.config).save_pretrained(folder)
    (folder / "evaluation.json").write_text(EVALUATION)
    return folder


@dataclass(frozen=True)
class Served:
    """A running Space: its address, the folder where it keeps uploads, and how long it took to start."""

    address: str
    temporary: Path
    seconds: float

    def uploads(self) -> list[Path]:
        """Files that somebody sent and that are still there; gradio also leaves empty ones."""
        return [path for path in self.temporary.rglob("*") if path.is_file() and path.stat().st_size]


@contextmanager
def running_space(model: Path, temporary: Path) -> Iterator[Served]:
    """`python space/app.py` in a process of its own, as on the Hub.

    Args:
        model: folder of the model.
        temporary: where the process puts its temporary files.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = {"LYMPH_MODEL": str(model), "GRADIO_SERVER_PORT": str(port), "TMPDIR": str(temporary), "HF_HUB_OFFLINE": "1"}
    own["GRADIO_HEARTBEAT_INTERVAL"] = "0.5"  # seconds until a reader who left is missed; 15 otherwise
    start = time.monotonic()
    log = temporary.with_suffix(".log")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "app.py"], cwd=SPACE, env=os.environ | own, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        while not _answers(port):
            if process.poll() is not None or time.monotonic() - start > 120:
                raise RuntimeError(f"the Space did not start:\n{log.read_text()}")
            time.sleep(0.1)
        yield Served(f"http://127.0.0.1:{port}/", temporary, time.monotonic() - start)
    finally:
        process.terminate()
        process.wait(20)


def _answers(port: int) -> bool:
    try:
        with urlopen(f"http://127.0.0.1:{port}/config", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False
