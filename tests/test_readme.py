"""What the README shows runs, and what it lists is there."""

import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_of_the_first_screen_runs(trained_run, cohort_folder):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    patient = sorted((cohort_folder / "images").iterdir())[0]
    code = code.replace("data/demo-test/images/P001", str(patient)).replace("runs/demo/patients", str(trained_run))
    assert str(patient) in code
    assert str(trained_run) in code
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["output"].logits.shape == (1, 2)
    assert names["output"].attentions.shape == (1, len(list(patient.iterdir())))
    torch.testing.assert_close(names["output"].attentions.sum(), torch.tensor(1.0))


def test_the_tables_of_poolings_and_fusions_are_those_of_the_registries():
    done = subprocess.run([sys.executable, "scripts/readme_tables.py", "--check"], cwd=ROOT, check=False)
    assert done.returncode == 0, "run python scripts/readme_tables.py"


def test_every_file_of_the_tree_exists():
    tree = README.split("## Annotated tree")[1].split("```")[1]
    for pattern in re.findall(r"[\w*]+\.(?:py|md)", tree):
        for folder in ("lymph_hf", "scripts", "tests"):
            if list((ROOT / folder).glob(pattern)):
                break
        else:
            raise AssertionError(f"{pattern} stands in the README's tree and nowhere else")
