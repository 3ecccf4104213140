"""Trained models that are asked once about each patient; their answers are kept on disk by content."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import datasets
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from .bags import BagDataset
from .baselines import ordered_columns
from .clinical import ClinicalModel
from .cohort import CLINICAL, Cohort, Patient
from .configuration_lymph import LymphMILConfig
from .evaluation import label_names
from .files import writing_file
from .inference import outputs
from .options_distill import DistillOptions
from .patient_models import load_model

logger = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]

# A probability of 0 has no logarithm.
_SMALLEST_PROBABILITY = 1e-6


class DistillationError(ValueError):
    """This teacher cannot teach this student; the message says why and what to do."""


@dataclass(frozen=True)
class Answer:
    """What teachers say of one patient, seen with all of its cells.

    Attributes:
        logits: (K, C), of K teachers, in the order of the student's labels.
        embedding: (E,), the patient's embeddings in all networks in a row; `None` when nobody asks.
        attentions: (N,), mean over the teachers, summing to 1; `None` when nobody asks.
    """

    logits: torch.Tensor
    embedding: torch.Tensor | None = None
    attentions: torch.Tensor | None = None

    def tensors(self) -> Tensors:
        """The fields that are there."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}


class Teacher(Protocol):
    """A model that is asked, frozen.

    Attributes:
        key: a hash of everything that decides its answers, but the patient.
        label_names: in the order of its logits.
    """

    key: str
    label_names: Sequence[str]

    def ask(self, patients: Cohort, rows: datasets.Dataset, accelerator: Accelerator) -> Iterator[tuple[int, Tensors]]:
        """Position and answer of every patient, each position in one process."""


class NetworkTeacher:
    """A patient model: `logits` (C,), `embedding` (E,) and `attentions` (N,).

    Args:
        source: run folder, model folder or Hub id.
    """

    def __init__(self, source: str):
        model, self.processor = load_model(source)
        self.model = model.eval().requires_grad_(False)
        self.label_names = label_names(model.config)
        self.key = _hash(model.config.to_json_string(), self.processor.to_json_string(), model.state_dict())

    def ask(self, patients: Cohort, rows: datasets.Dataset, accelerator: Accelerator) -> Iterator[tuple[int, Tensors]]:
        """See `Teacher`."""
        model = self.model.to(accelerator.device)
        for position, output in outputs(model, BagDataset(rows, self.processor), accelerator):
            found = {"logits": output.logits, "embedding": output.bag_embedding, "attentions": output.attentions}
            found = {name: tensor for name, tensor in found.items() if tensor is not None}
            yield position, {name: tensor[0].float().cpu().contiguous() for name, tensor in found.items()}
        model.cpu()


class ClinicalTeacher:
    """A clinical model: `logits` (C,), the logarithms of its probabilities.

    Args:
        folder: what `ClinicalModel.save` wrote.
    """

    def __init__(self, folder: Path):
        self.model = ClinicalModel.load(folder)
        self.label_names = list(self.model.label_names)
        self.key = _hash(*((folder / name).read_bytes() for name in ("clinical.json", "model.skops")))

    def ask(self, patients: Cohort, rows: datasets.Dataset, accelerator: Accelerator) -> Iterator[tuple[int, Tensors]]:
        """See `Teacher`."""
        if accelerator.is_main_process:
            probabilities = torch.from_numpy(self.model.predict_proba(patients.to_frame())).float()
            for position, logits in enumerate(probabilities.clamp_min(_SMALLEST_PROBABILITY).log()):
                yield position, {"logits": logits.contiguous()}


def read_teacher(source: str) -> NetworkTeacher | ClinicalTeacher:
    """A teacher from a folder or the Hub.

    Raises:
        RunError, ClinicalError: nothing can be loaded from there.
    """
    folder = Path(source)
    return ClinicalTeacher(folder) if (folder / "clinical.json").is_file() else NetworkTeacher(source)


class Ensemble:
    """Several teachers as one.

    Args:
        sources: as in `read_teacher`.
        config: of the student, for its labels.
        needs: which terms the student's loss has.

    Raises:
        DistillationError: other labels than the student's.
    """

    def __init__(self, sources: Sequence[str], config: LymphMILConfig, needs: DistillOptions):
        self.teachers = [read_teacher(source) for source in sources]
        self.names = label_names(config)
        self.needs = needs
        for source, teacher in zip(sources, self.teachers, strict=True):
            if set(teacher.label_names) != set(self.names):
                raise DistillationError(
                    f"{source} knows the labels {sorted(teacher.label_names)}, the student {sorted(self.names)}; a "
                    "teacher has to be trained for the same labels"
                )

    def answers(
        self, patients: Cohort, rows: datasets.Dataset, accelerator: Accelerator, *, cache_dir: str | Path | None = None
    ) -> list[Answer]:
        """One answer per patient, from the disk where the same teacher has seen the same patient before.

        Args:
            patients: checked, in the order of the rows.
            rows: the `"patients"` view of their bags.
            accelerator: for forward passes.
            cache_dir: where answers are kept; by default beside the cache of `datasets`.

        Raises:
            DistillationError: no teacher has the embedding or the attention that a term needs.
        """
        root = Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "lymph-teachers")
        by_teacher = []
        for teacher in self.teachers:
            cache = AnswerCache(root / teacher.key)
            keys = [patient_key(patient, patients.digests[patient.patient_id]) for patient in patients.patients]
            missing = [position for position, key in enumerate(keys) if not cache.path(key).is_file()]
            if missing:
                asked = patients.select([patients.patients[position].patient_id for position in missing])
                logger.info("teacher: %d patients asked, %d known", len(missing), len(keys) - len(missing))
                for position, answer in teacher.ask(asked, rows.select(missing), accelerator):
                    cache.save(keys[missing[position]], answer)
            accelerator.wait_for_everyone()
            by_teacher.append([self._in_order(cache.load(key), teacher) for key in keys])
        return [self._joined(answers) for answers in zip(*by_teacher, strict=True)]

    def _in_order(self, found: Tensors, teacher: Teacher) -> Tensors:
        logits = ordered_columns(found["logits"][None], teacher.label_names, self.names)[0]
        return found | {"logits": logits}

    def _joined(self, answers: Sequence[Tensors]) -> Answer:
        return Answer(
            logits=torch.stack([answer["logits"] for answer in answers]),
            embedding=self._embedding(answers) if self.needs.feature_weight else None,
            attentions=self._attentions(answers) if self.needs.attention_weight else None,
        )

    def _embedding(self, answers: Sequence[Tensors]) -> torch.Tensor:
        found = [answer["embedding"] for answer in answers if "embedding" in answer]
        if not found:
            raise DistillationError("--feature-weight: a clinical model has no embedding; add a network as a teacher")
        return torch.cat(found)

    def _attentions(self, answers: Sequence[Tensors]) -> torch.Tensor:
        found = [answer["attentions"] for answer in answers if "attentions" in answer]
        if not found or not all(map(is_attention, found)):
            raise DistillationError(
                "--attention-weight: a teacher's weights over the cells are no attention (at least 0, sum 1); choose "
                "networks with an attention pooling, or leave the term out"
            )
        return torch.stack(found).mean(dim=0)


class AnswerCache:
    """The answers of one teacher, a file per patient; whole or absent.

    Args:
        folder: of this teacher alone.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, key: str) -> Path:
        """Of an answer, written or not."""
        return self.folder / f"{key}.safetensors"

    def save(self, key: str, answer: Tensors) -> None:
        """Write an answer in one step."""
        with writing_file(self.path(key)) as beside:
            save_file(answer, beside)

    def load(self, key: str) -> Tensors:
        """Read an answer."""
        return load_file(self.path(key))


def patient_key(patient: Patient, digests: Sequence[str]) -> str:
    """A hash of all that a model can see of a patient: images in their order and clinical values; of no name."""
    return _hash(repr((tuple(digests), *(getattr(patient, name) for name in CLINICAL))))


def is_attention(weights: torch.Tensor) -> bool:
    """Whether weights (N,) are at least 0 and sum to 1."""
    return bool((weights >= 0).all()) and abs(float(weights.sum()) - 1) < 1e-3


def _hash(*parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, dict):
            for name in sorted(part):
                tensor = part[name].detach().cpu().contiguous()
                digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
                digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(part if isinstance(part, bytes) else part.encode())
    return digest.hexdigest()[:32]
