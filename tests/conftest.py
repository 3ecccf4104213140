"""Shared fixtures: offline, caches in a temporary folder, one small painted cohort and one trained run."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

_CACHE = tempfile.mkdtemp(prefix="lymph-tests-")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
os.environ |= {"HF_HOME": _CACHE, "HF_DATASETS_CACHE": f"{_CACHE}/datasets", "HF_HUB_OFFLINE": "1"}
# One thread, also in the processes that tests start: tiny models are faster on it, and sums are added in one order.
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MPLBACKEND": "Agg"}

import pytest  # noqa: E402
import torch  # noqa: E402

from lymph_hf import precision, recipes  # noqa: E402
from lymph_hf.options import CohortOptions, ModelOptions, SplitOptions, TrainingOptions  # noqa: E402
from lymph_hf.options_crossval import CrossvalOptions  # noqa: E402
from lymph_hf.synthetic import write_synthetic_cohort  # noqa: E402

SHARED = Path(__file__).parents[2] / "shared"
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def full_precision():
    """The tests compare float32; what `auto` means must not depend on the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "has_bfloat16", lambda device: False)
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real images, where they are at hand."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip("the real images (../shared/data) are not here")
    return folder


@pytest.fixture(scope="session")
def cohort_folder(tmp_path_factory) -> Path:
    """14 painted patients of 3 to 6 cells, some clinical values missing."""
    folder = tmp_path_factory.mktemp("cohorts") / "painted"
    write_synthetic_cohort(folder, patients=14, seed=0, cells=(3, 6), image_size=48, missing=0.2, progress=False)
    return folder


@pytest.fixture(scope="session")
def tiny_options(cohort_folder):
    """Makes the option groups of a training run that takes a second."""

    def make(output: Path, data: Path = cohort_folder, **changes):
        groups = [CohortOptions, SplitOptions, ModelOptions, TrainingOptions]
        values = {"data": str(data), "output": str(output), "encoder": "test_vit", "image_size": 32, "epochs": 2}
        values |= {
            "batch_size": 4,
            "tracker": "none",
            "cpu": True,
            "validation_fraction": 0.3,
            "mixed_precision": "no",
        } | changes
        known = [set(group.__dataclass_fields__) for group in groups]
        assert values.keys() <= set.union(*known), "a test names an option that does not exist"
        return [
            group(**{k: v for k, v in values.items() if k in names}) for group, names in zip(groups, known, strict=True)
        ]

    return make


@pytest.fixture(scope="session")
def crossval_arguments(tiny_options):
    """Makes makers of what `crossval` takes, with options of their own."""

    def maker(default: CrossvalOptions):
        def make(output: Path, options: CrossvalOptions = default, **changes):
            cohort, _, model, training = tiny_options(output, **{"epochs": 1, "coverage": 0.5} | changes)
            return cohort, options, model, training

        return make

    return maker


@pytest.fixture(scope="session")
def trained_run(tiny_options, tmp_path_factory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    recipes.train(*tiny_options(folder, tracker="tensorboard"))
    return folder


@pytest.fixture
def hub():
    """The local Hub, emptied."""
    from hub_server import running_hub  # starts a server: only for those who ask

    hub = running_hub()
    hub.forget()
    return hub


@pytest.fixture
def client(hub):
    """The real client, in a process of its own that speaks to the local Hub."""
    from hub_server import running_client

    return running_client()
