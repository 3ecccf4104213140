"""The Space under load: start-up, one patient of 84 cells with ViT-tiny, eight users at once. Prints a table.

    python scripts/bench_space.py

Times of a busy machine mean little; the ratio to the plain way (single precision, the model's own chunks of 32 cells),
measured in turns in the same process, means more.
"""

import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "space"), str(ROOT / "tests")]

from answers import Predictor  # noqa: E402
from space_server import EXAMPLES, running_space, write_model  # noqa: E402

from lymph_hf import LymphMILForBagClassification  # noqa: E402
from lymph_hf.painting import CELL_TYPES, Smear, paint_cell  # noqa: E402

CELLS, USERS, ROUNDS = 84, 8, 5
CLINICAL = {"age": 70, "sex": "F", "lymphocyte_count": 12.0}


def main():
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = write_model(folder / "vit-tiny", encoder="vit_tiny_patch16_224", image_size=None)
        one_patient(model)
        served(model, folder)


def one_patient(folder):
    rng = np.random.default_rng(0)
    smear, types = Smear.draw(rng), list(CELL_TYPES)
    cells = [Image.fromarray(paint_cell(types[i % len(types)], smear, rng)) for i in range(CELLS)]
    predictor, plain = Predictor(str(folder)), LymphMILForBagClassification.from_pretrained(folder).eval()

    def ask_plainly():
        with torch.inference_mode():
            return plain(**predictor.processor(cells, CLINICAL)).logits.softmax(-1)[0].numpy()

    def ask():
        return next(predictor.answers(cells, CLINICAL)).probabilities

    def ask_with_maps():
        *_, answer = predictor.answers(cells, CLINICAL)
        return answer.probabilities

    ways = {"plain": ask_plainly, "answer": ask, "answer and maps": ask_with_maps}
    found = {name: way() for name, way in ways.items()}  # warms up
    seconds, work = {name: [] for name in ways}, {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            start, busy = time.perf_counter(), time.process_time()
            way()
            seconds[name].append(time.perf_counter() - start)
            work[name].append(time.process_time() - busy)
    print(f"{CELLS} cells, vit_tiny_patch16_224, {torch.get_num_threads()} threads, median of {ROUNDS}")
    print(f"{'':<18}{'seconds':>9}{'fastest':>9}{'CPU s':>9}{'to plain':>10}{'difference':>12}")
    for name in ways:
        ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds["plain"], strict=True))
        difference = np.abs(found[name] - found["plain"]).max()
        print(
            f"{name:<18}{statistics.median(seconds[name]):>9.2f}{min(seconds[name]):>9.2f}"
            f"{statistics.median(work[name]):>9.2f}{ratio:>10.2f}{difference:>12.5f}"
        )


def served(model, folder):
    from gradio_client import Client, handle_file

    temporary = folder / "temporary"
    temporary.mkdir()
    with running_space(model, temporary) as space:
        print(f"start-up {space.seconds:.1f} s")
        clients = [Client(space.address, verbose=False) for _ in range(USERS)]

        def ask(client):
            start = time.perf_counter()
            file = handle_file(str(EXAMPLES / "tumoral.zip"))
            client.predict([file], "Single cells", None, 70, "Female", 12.0, api_name="/analyse")
            return time.perf_counter() - start

        alone = ask(clients[0])
        for users in (1, 2, 4, USERS):
            start = time.perf_counter()
            with ThreadPoolExecutor(users) as pool:
                waits = list(pool.map(ask, clients[:users]))
            total = time.perf_counter() - start
            print(
                f"{users} users: all done after {total:.1f} s, one waits {statistics.median(waits):.1f} s, "
                f"at most {max(waits):.1f} s, none failed"
            )
        print(f"(first request {alone:.1f} s)")
        for client in clients:
            client.close()
        time.sleep(10)
        print(f"{len(space.uploads())} uploads left 10 s after the last user")


if __name__ == "__main__":
    main()
