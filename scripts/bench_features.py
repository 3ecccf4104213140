"""Seconds per epoch of training a head on a frozen encoder: cells encoded anew against features from the cache.

    python scripts/bench_features.py --threads 2

Both are whole epochs of the training loop, with sampling, validation and checkpoint, in turns within one run. The table
ends with where a cached epoch goes.
"""

import argparse
import cProfile
import logging
import pstats
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import Dataset

from lymph_hf import ClinicalStandardizer, LymphImageProcessor, LymphMILConfig, LymphMILForBagClassification
from lymph_hf.bags import BagDataset, build_bags, collate_bags
from lymph_hf.cohort import CLINICAL, Cohort, read_cohort, scan_images
from lymph_hf.features import FeatureBags, cached_features, take_encoder
from lymph_hf.inference import infer
from lymph_hf.metrics import score
from lymph_hf.options import TrainingOptions
from lymph_hf.synthetic import write_synthetic_cohort
from lymph_hf.training import TrainingLoop, make_accelerator

LABELS = {"reactive": 0, "tumoral": 1}
# Where a cached epoch goes: functions of the loop, cumulative times of which do not overlap.
PARTS = {
    "reading and collating": [("dataloader.py", "__next__")],
    "forward pass": [("modeling_lymph.py", "forward")],
    "backward pass": [("accelerator.py", "backward")],
    "optimizer": [("optimizer.py", "step"), ("accelerator.py", "clip_grad_norm_")],
    "checkpoint": [("checkpoints.py", "save")],
}


@dataclass
class Way:
    """One way to train: a fresh model and its patients."""

    model: nn.Module
    train: Dataset
    validation: Dataset

    def seconds(self, options: TrainingOptions, folder: Path) -> float:
        """Mean time of an epoch."""
        accelerator = make_accelerator(options)

        def validate(model: nn.Module) -> dict[str, float]:
            result = infer(model, self.validation, accelerator, progress=False)
            return {"loss": result.loss, "auroc": score(self.validation.label_ids, result.probabilities)["auroc"]}

        loop = TrainingLoop(accelerator, self.model, self.train, collate_bags, options, folder, validate=validate)
        start = time.perf_counter()
        loop.run()
        return (time.perf_counter() - start) / options.epochs


def make_model(encoder: str, processor: LymphImageProcessor) -> LymphMILForBagClassification:
    set_seed(0)
    features = list(processor.standardizer.features)
    model = LymphMILForBagClassification(LymphMILConfig(encoder=encoder, clinical_features=features))
    model.model.encoder.requires_grad_(False)
    return model


def make_ways(cohort: Cohort, encoder: str, max_cells: int, scratch: Path) -> tuple[dict[str, Way], float]:
    """Both ways, and the seconds of encoding once. The patients validate, too: here only the time counts."""
    values = [{name: getattr(patient, name) for name in CLINICAL} for patient in cohort.patients]
    processor = LymphImageProcessor.from_config(LymphMILConfig(encoder=encoder), ClinicalStandardizer.fit(values))
    rows = build_bags(cohort, cache_dir=scratch / "arrow")
    from_images = partial(BagDataset, rows, processor, label2id=LABELS)
    head = make_model(encoder, processor)
    start = time.perf_counter()
    features = cached_features(head, processor, cohort, scratch / "features", accelerator=None)
    once = time.perf_counter() - start
    take_encoder(head)
    from_cache = partial(FeatureBags, features, cohort.patients, processor.standardizer, label2id=LABELS)
    ways = {
        "encoded anew": Way(make_model(encoder, processor), from_images(max_cells=max_cells), from_images()),
        "from the cache": Way(head, from_cache(max_cells=max_cells), from_cache()),
    }
    return ways, once


def where_it_goes(way: Way, options: TrainingOptions, folder: Path) -> dict[str, float]:
    """Shares of a cached epoch."""
    profile = cProfile.Profile()
    profile.enable()
    way.seconds(options, folder)
    profile.disable()
    stats = pstats.Stats(profile)
    named = {(Path(file).name, name): entry[3] for (file, _, name), entry in stats.stats.items()}
    shares = {part: sum(named.get(key, 0.0) for key in keys) / stats.total_tt for part, keys in PARTS.items()}
    return shares | {"rest": 1 - sum(shares.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="vit_tiny_patch16_224")
    parser.add_argument("--patients", type=int, default=6, help="(default 6)")
    parser.add_argument("--cells", type=int, default=32, help="per patient (default 32)")
    parser.add_argument("--micro-batch", type=int, default=1, help="patients per forward pass (default 1)")
    parser.add_argument("--epochs", type=int, default=20, help="cached epochs per round (default 20)")
    parser.add_argument("--rounds", type=int, default=3, help="(default 3)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.getLogger("lymph_hf").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        cells = (arguments.cells, arguments.cells)
        write_synthetic_cohort(scratch / "cohort", patients=arguments.patients, seed=0, cells=cells, progress=False)
        cohort = scan_images(read_cohort(scratch / "cohort"), progress=False)
        ways, once = make_ways(cohort, arguments.encoder, arguments.cells, scratch)
        options = TrainingOptions(
            output="", micro_batch=arguments.micro_batch, epochs=1, patience=0, tracker="none", cpu=True
        )
        many = replace(options, epochs=arguments.epochs)
        times: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(arguments.rounds):
            for way, settings in zip(ways, (options, many), strict=True):
                times[way].append(ways[way].seconds(settings, scratch / f"{number}-{way}"))
        shares = where_it_goes(ways["from the cache"], many, scratch / "profiled")
    medians = {way: statistics.median(found) for way, found in times.items()}
    ratio = medians["encoded anew"] / medians["from the cache"]
    print(f"{arguments.encoder}, {arguments.patients} patients of {arguments.cells} cells, trained and validated on\n")
    print("| epoch | seconds | times faster |\n|---|---|---|")
    for way, seconds in medians.items():
        print(f"| {way} | {seconds:.4f} | {medians['encoded anew'] / seconds:.0f} |")
    print(f"\nencoding once: {once:.2f} s; ratio of medians of {arguments.rounds} rounds {ratio:.0f}")
    print("\n| part of a cached epoch | share |\n|---|---|")
    for part, share in shares.items():
        print(f"| {part} | {share:.0%} |")


if __name__ == "__main__":
    main()
