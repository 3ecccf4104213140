"""Keep the folders under model_cards/ as they would be published: `python scripts/model_cards.py [--check]`.

For each model_cards/NAME.yaml whose run is here, the folder is made anew from the run (card, weights, code, golden
answers). In every other folder the copies of the package's code are brought up to date. `--check` only says what would
change in the code.
"""

import logging
import sys
from pathlib import Path

import yaml

from lymph_hf.cli import main as lymph
from lymph_hf.golden import GOLDEN, golden_problems
from lymph_hf.publishing_code import outdated_code, refresh_code

CARDS = Path(__file__).parents[1] / "model_cards"


def folders() -> list[Path]:
    return sorted(path for path in CARDS.iterdir() if path.is_dir())


def check() -> int:
    outdated = {folder.name: names for folder in folders() if (names := outdated_code(folder))}
    for name, modules in outdated.items():
        print(f"{name}: {', '.join(modules)} differ from the package: make model-cards")
    return int(bool(outdated))


def main() -> int:
    if "--check" in sys.argv[1:]:
        return check()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    made = set()
    for facts in sorted(CARDS.glob("*.yaml")):
        run = yaml.safe_load(facts.read_text(encoding="utf-8")).get("run")
        if run is not None and Path(run).is_dir():
            if status := lymph(["publish", "--config", str(facts), "--dry-run"]):
                return status
            made.add(facts.stem)
    for folder in folders():
        changed = [] if folder.name in made else refresh_code(folder)
        problems = golden_problems(folder) if (folder / GOLDEN).exists() else []
        print(f"{folder.name}: {'made anew' if folder.name in made else f'{len(changed)} modules refreshed'}")
        if problems:
            print(f"{folder.name}: {'; '.join(problems)}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
