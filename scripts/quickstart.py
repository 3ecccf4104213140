"""Load a model and diagnose one patient: `python scripts/quickstart.py MODEL COHORT [PATIENT]`."""

import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel
from transformers.utils import logging

import lymph_hf  # noqa: F401  registers the models with the Auto classes
from lymph_hf.cohort import read_cohort

logging.disable_progress_bar()
folder, cohort, *named = sys.argv[1:]
patients = {patient.patient_id: patient for patient in read_cohort(cohort).patients}
patient = patients[named[0]] if named else next(iter(patients.values()))
clinical = {"age": patient.age, "sex": patient.sex, "lymphocyte_count": patient.lymphocyte_count}

model = AutoModel.from_pretrained(folder)
processor = AutoImageProcessor.from_pretrained(folder)
inputs = processor([Image.open(path) for path in patient.images], clinical)
with torch.no_grad():
    output = model(**inputs)

probability = output.logits.softmax(-1)[0, 1].item()
label = model.config.id2label[int(probability >= model.config.decision_threshold)]
print(f"{patient.patient_id}: {label}, probability of {model.config.id2label[1]} {probability:.2f}")
print(f"(threshold {model.config.decision_threshold:.2f}, recorded label {patient.label})")
print("most attended cells:", *(Path(patient.images[i]).name for i in output.attentions[0].topk(3).indices))
print(f"\nNext: the scores are in {Path(folder).parent}/metrics.json, the figures beside it; lymph --help")
