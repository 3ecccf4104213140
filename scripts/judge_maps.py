"""Are the maps inside cells true to the model? Where a map says "for", other cells' pixels should lower the evidence.

The places that a map ranks first are filled with those of other cells of the same patient, a tenth to a half of the
picture; then those that it ranks last. The score is how much lower the cell's evidence is after the first than after
the second, in units of the evidence's spread over the patient's cells: 0 is chance, and a map that is turned over
scores the negative.

    python scripts/judge_maps.py runs/first --data cohort --patients 20
"""

import argparse
import logging
import sys

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from lymph_hf.cohort import CLINICAL, read_cohort
from lymph_hf.explain import PatientHead, explain_bag
from lymph_hf.explain_maps import cell_maps
from lymph_hf.images import open_cell_image
from lymph_hf.metrics import Bootstrap
from lymph_hf.patient_models import load_model

PLACES = 6
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)
CELLS = 4  # for and against the label, each

logger = logging.getLogger("judge_maps")


def evidence(patient: PatientHead, embeddings: torch.Tensor, cells: list[int]) -> torch.Tensor:
    """(k, D): gradient of the log-odds with respect to the embeddings of some cells."""
    embeddings = embeddings.clone().requires_grad_()
    logits = patient.logits(embeddings)[0]
    return torch.autograd.grad(logits[1] - logits[0], embeddings)[0][cells]


def filled(pictures: torch.Tensor, other: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Pictures (k, 3, H, W) with those of `other` (3, H, W) where `places` (k, PLACES, PLACES) is 1."""
    mask = F.interpolate(places[:, None], size=pictures.shape[-2:], mode="nearest")
    return pictures * (1 - mask) + other * mask


def score(encoder, pictures, directions, others, maps: torch.Tensor, spread: float) -> float:
    """Mean over the cells of one patient."""
    coarse = F.adaptive_avg_pool2d(maps[:, None], PLACES).flatten(1)
    order = coarse.argsort(dim=1, descending=True)
    drops = []
    for share in SHARES:
        number = round(share * PLACES**2)
        evidences = [0.0, 0.0]
        for which, chosen in enumerate((order[:, :number], order[:, -number:])):
            places = torch.zeros_like(coarse).scatter_(1, chosen, 1).unflatten(1, (PLACES, PLACES))
            for other in others:
                evidences[which] += (encoder(filled(pictures, other, places)) * directions).sum() / len(others)
        drops.append(evidences[1] - evidences[0])
    return float(torch.stack(drops).mean()) / (len(pictures) * spread)


def judge(model, inputs, rng: np.random.Generator) -> dict[str, float]:
    """Method -> score of one patient."""
    patient, explanation = PatientHead(model, inputs), explain_bag(model, inputs)
    ranking = explanation.ranking().tolist()
    cells = ranking[:CELLS] + ranking[-CELLS:]
    embeddings = torch.from_numpy(explanation.cell_embeddings)
    directions = evidence(patient, embeddings, cells)
    encoder = patient.model.base_model.encoder
    others = patient.cells[rng.choice(ranking[CELLS:-CELLS], 6)]
    centre = torch.linspace(-1, 1, PLACES) ** 2
    maps = {
        "random": torch.from_numpy(rng.normal(size=(len(cells), PLACES, PLACES))).float(),
        "centre": -(centre[:, None] + centre).expand(len(cells), -1, -1),
    }
    for method in ("integrated", "grad_cam"):
        try:
            found = cell_maps(model, inputs["pixel_values"], cells, clinical=inputs.get("clinical"), method=method)
        except ValueError:
            continue  # the encoder has no feature map
        maps[method] = torch.from_numpy(found)
    spread = float((embeddings @ directions.mean(dim=0)).std())
    with torch.no_grad():
        return {name: score(encoder, patient.cells[cells], directions, others, m, spread) for name, m in maps.items()}


def main() -> None:
    """Parse, judge, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder of a model with two labels")
    parser.add_argument("--data", required=True, help="folder of patients")
    parser.add_argument("--patients", type=int, default=20, help="how many, with enough cells, in the cohort's order")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    model, processor = load_model(arguments.run)
    rng = np.random.default_rng(arguments.seed)
    patients = [p for p in read_cohort(arguments.data).patients if len(p.images) > 2 * CELLS][: arguments.patients]
    rows = []
    for patient in tqdm(patients, disable=None):
        pictures = [open_cell_image(path).image for path in patient.images]
        rows.append(judge(model.eval(), processor(pictures, {name: getattr(patient, name) for name in CLINICAL}), rng))
    for method in rows[0]:
        values = np.array([row[method] for row in rows])
        means = Bootstrap(seed=arguments.seed).intervals(lambda w, v=values: {"mean": w @ v / w.sum(1)}, len(values))
        logger.info("%-12s %s  (n = %d patients)", method, means["mean"], len(values))


if __name__ == "__main__":
    main()
