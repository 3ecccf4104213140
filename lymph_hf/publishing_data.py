"""A cohort -> a data set on the Hub: a row per patient in parquet, without anything that says who it was."""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path

import datasets
import pandas as pd
from tqdm.auto import tqdm

from .card_data import data_card
from .cohort import DEFAULT_REFERENCE_DATE, Cohort, Patient, read_cohort, scan_images
from .files import write_text, writing_folder
from .hub_push import PublishError
from .image_cleaning import without_metadata
from .options_publish import CardOptions, DownloadOptions, PublishOptions
from .publication_checks import DATASET
from .publishing_stage import Staged

logger = logging.getLogger(__name__)

SHARD_BYTES = 256 * 2**20
OLDEST = 90  # ages above are as rare as names
_ID_DIGITS = 12


def stage_data(folder: Path, options: PublishOptions, card: CardOptions) -> Staged:
    """The patients of a cohort as parquet files with a card.

    Identifiers give way to the beginning of a hash of the patient's images, names of files go, ages become whole
    years, and of each image only the pixels are kept; patients and images stand in the order of their hashes. The
    same cohort gives the same files, so that a push can be repeated, and nothing in them follows from an identifier.

    Raises:
        CardError, CohortError: as in `publish`.
        PublishError: nobody has confirmed that the patients may be published, or no folder is named.
    """
    if options.data is None:
        raise PublishError("--repo-type dataset: name the folder of patients with --data.")
    if not options.patients_may_be_published:
        raise PublishError(
            f"{options.data}: images of patients are health data, and cannot be called back. Where consent or law "
            "permits their publication, say so with --patients-may-be-published."
        )
    reference_date = options.reference_date or DEFAULT_REFERENCE_DATE
    cohort = scan_images(read_cohort(options.data, reference_date=reference_date))
    features = data_features(cohort)
    sizes: dict[str, datasets.SplitInfo] = {}
    for split, patients in _splits(cohort).items():
        number, size = _write_split(folder / "data", split, patients, features)
        sizes[split] = datasets.SplitInfo(split, num_bytes=size, num_examples=number)
    write_text(folder / "README.md", data_card(cohort, features, sizes, card, repo=options.repo, tag=options.tag))
    return Staged(
        folder,
        DATASET,
        repo_type="dataset",
        identifiers=frozenset(_identifiers(cohort)),
        digests=frozenset(digest for digests in cohort.digests.values() for digest in digests),
        notes=("Every image was written anew without EXIF, comments and names.",),
    )


def data_features(cohort: Cohort) -> datasets.Features:
    """The columns of a published cohort, which the viewer of the Hub shows as pictures, classes and numbers."""
    names = list(cohort.label_names)
    return datasets.Features(
        {
            "patient_id": datasets.Value("string"),
            "label": datasets.ClassLabel(names=names) if names else datasets.Value("string"),
            "age": datasets.Value("float32"),
            "sex": datasets.Value("string"),
            "lymphocyte_count": datasets.Value("float32"),
            "images": datasets.List(datasets.Image()),
        }
    )


def download(options: DownloadOptions) -> Path:
    """Write a published data set as a folder of patients, for every command that takes `--data`.

    Returns:
        The folder, in the generic layout: `clinical.csv` and `images/<patient_id>/`.

    Raises:
        PublishError: the data set has other columns, or the folder exists.
    """
    output = Path(options.output)
    if output.exists():
        raise PublishError(f"{output} exists: choose another --output.")
    rows = datasets.load_dataset(options.repo, split=options.split, revision=options.revision, streaming=True)
    wanted = {"patient_id", "label", "age", "sex", "lymphocyte_count", "images"}
    if missing := sorted(wanted - set(rows.features or ())):
        raise PublishError(f"{options.repo} has no columns {', '.join(missing)}: it is no published cohort.")
    label = rows.features["label"]
    rows = rows.cast_column("images", datasets.List(datasets.Image(decode=False)))
    table = []
    with writing_folder(output) as beside:
        for row in tqdm(rows, desc="patients", disable=None):
            images = row.pop("images")
            named = row["label"] is not None and isinstance(label, datasets.ClassLabel)
            table.append(row | {"label": label.int2str(row["label"]) if named else row["label"]})
            place = beside / "images" / row["patient_id"]
            place.mkdir(parents=True)
            for i, image in enumerate(images):
                suffix = "jpg" if image["bytes"].startswith(b"\xff\xd8") else "png"
                (place / f"{i:04d}.{suffix}").write_bytes(image["bytes"])
        pd.DataFrame(table).to_csv(beside / "clinical.csv", index=False)
    logger.info("%d patients: %s", len(table), output)
    return output


def _splits(cohort: Cohort) -> dict[str, list[Patient]]:
    """As the challenge divides them, else all in one."""
    parts = sorted({patient.part or "train" for patient in cohort.patients}, reverse=True)
    return {part: [p for p in cohort.patients if (p.part or "train") == part] for part in parts}


def _write_split(folder: Path, split: str, patients: Sequence[Patient], features: datasets.Features) -> tuple[int, int]:
    """Write the shards of a split; their number stands in their names, so they are renamed at the end.

    Returns:
        Number of patients and of bytes.
    """
    folder.mkdir(exist_ok=True)
    named = sorted(((_image_hash(patient), patient) for patient in patients), key=itemgetter(0))
    paths, total = [], 0
    for rows in _sharded(_row(name, patient) for name, patient in tqdm(named, desc=split, disable=None)):
        paths.append(folder / f"{split}-{len(paths)}.parquet")
        # Small row groups: a reader that wants one patient, or streams, does not fetch a gigabyte.
        datasets.Dataset.from_list(rows, features=features).to_parquet(paths[-1], batch_size=4)
        total += paths[-1].stat().st_size
    for i, path in enumerate(paths):
        path.rename(folder / f"{split}-{i:05d}-of-{len(paths):05d}.parquet")
    return len(named), total


def _sharded(patients: Iterable[dict]) -> Iterator[list[dict]]:
    rows, size = [], 0
    for row in patients:
        weight = sum(len(image["bytes"]) for image in row["images"])
        if rows and size + weight > SHARD_BYTES:
            yield rows
            rows, size = [], 0
        rows.append(row)
        size += weight
    if rows:
        yield rows


def _row(image_hash: str, patient: Patient) -> dict:
    images = sorted((without_metadata(path.read_bytes()) for path in patient.images), key=_sha256)
    return {
        "patient_id": f"p{image_hash[:_ID_DIGITS]}",
        "label": patient.label,
        "age": None if patient.age is None else float(min(round(patient.age), OLDEST)),
        "sex": patient.sex,
        "lymphocyte_count": patient.lymphocyte_count,
        "images": [{"bytes": image, "path": None} for image in images],
    }


def _image_hash(patient: Patient) -> str:
    """Of the published images, which everyone can see anyway: it says nothing more of the patient."""
    return _sha256("".join(sorted(_sha256(without_metadata(path.read_bytes())) for path in patient.images)).encode())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _identifiers(cohort: Cohort) -> set[str]:
    excluded = {exclusion.patient_id for exclusion in cohort.exclusions}
    return {patient.patient_id for patient in cohort.patients} | {name for name in excluded if name}
