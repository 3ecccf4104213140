"""How long a published model takes to load: from a Hub, from the cache, without the network. Prints a table.

    python scripts/bench_load.py [FOLDER]      by default model_cards/lymph-mil

A local Hub serves the folder. Each load is a process of its own without this package, so that the code comes from the
Hub too. Seconds of a busy machine mean little; their ratio to the import of the libraries alone means more.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_DISABLE_XET"] = "1"  # with xet the client has no fallback to LFS
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from hub_server import client_environment, running_hub  # noqa: E402
from huggingface_hub import HfApi  # noqa: E402

REPO, WRITER, ROUNDS = "org/measured", "hf_writer", 3
# Prints wall and CPU seconds of the imports and of the load.
LOAD = """
import json, sys, time
sys.modules["lymph_hf"] = None  # import lymph_hf fails
def clock(): return time.perf_counter(), time.process_time()
def since(start): return [now - then for now, then in zip(clock(), start)]
start = clock()
import torch, torchvision, timm
from transformers import AutoImageProcessor, AutoModel
imports, start = since(start), clock()
pinned = {"trust_remote_code": True, "revision": sys.argv[2]}
AutoModel.from_pretrained(sys.argv[1], **pinned)
AutoImageProcessor.from_pretrained(sys.argv[1], **pinned)
print(json.dumps([imports, since(start)]))
"""


def main(folder: Path):
    hub = running_hub()
    api = HfApi(endpoint=hub.url, token=WRITER)
    api.create_repo(REPO)
    commit = api.upload_folder(repo_id=REPO, folder_path=folder).oid
    kinds = {"cold: download, code, weights": {}, "warm: from the cache": {}, "offline": {"HF_HUB_OFFLINE": "1"}}
    taken = {kind: [] for kind in kinds}
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as home:
            for kind, changes in kinds.items():
                taken[kind].append(load(client_environment(hub, home) | changes, commit))
    imports = statistics.median(wall for rounds in taken.values() for (wall, _), _ in rounds)
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    print(f"{folder.name}: {size:.1f} MB; imports of torch, timm, transformers {imports:.1f} s\n")
    print("| load | seconds | CPU seconds | over imports |\n|---|---|---|---|")
    for kind, rounds in taken.items():
        wall, cpu = (statistics.median(loaded[i] for _, loaded in rounds) for i in (0, 1))
        ratio = statistics.median(loaded[0] / first[0] for first, loaded in rounds)
        print(f"| {kind} | {wall:.2f} | {cpu:.2f} | {ratio:.2f} |")


def load(environment: dict[str, str], commit: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """Wall and CPU seconds of imports and load in a new process."""
    command = [sys.executable, "-c", LOAD, REPO, commit]
    return json.loads(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "model_cards" / "lymph-mil")
