"""`pipeline("patient-classification", ...)`: one patient in, the answer and the weight of each cell out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoModel, BatchFeature, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from .images import CellImageError, open_cell_image

TASK = "patient-classification"


class LymphPatientPipeline(Pipeline):
    """A patient's cell images and clinical values -> label, probabilities, weight of each cell.

    Files are read as in training (rotation by EXIF, colour modes, depth), so that the same patient gets the same
    answer here and in `lymph predict`.

    Example:

    ```python
    >>> from transformers import pipeline
    >>> import lymph_hf.pipeline_lymph  # registers the task

    >>> classify = pipeline("patient-classification", model="org/lymph-mil")
    >>> classify(["cell-1.jpg", "cell-2.jpg"], clinical={"age": 71, "sex": "F", "lymphocyte_count": 14.2})
    {'label': 'tumoral', 'probabilities': {'reactive': 0.21, 'tumoral': 0.79}, 'attentions': [0.62, 0.38]}
    ```
    """

    _load_processor = False
    _load_image_processor = True
    _load_feature_extractor = False
    _load_tokenizer = False
    # Merely looking for one asks whether to trust the code of a repository, though none of it is needed.
    _load_video_processor = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.model.config.num_labels < 2:
            raise ValueError(f"The model has {self.model.config.num_labels} label: a classifier has at least two.")

    def __call__(self, inputs, clinical: Mapping[str, Any] | None = None, **options):
        """Classify one patient, or several.

        Args:
            inputs: one patient as a list of images (paths or PIL images) or as `{"images": [...], "clinical": {...}}`;
                several as a list, data set or generator of such mappings.
            clinical: `age` (years), `sex` ("F" or "M"), `lymphocyte_count` (10^9 per litre) of the one patient whose
                images are given as a list; what is absent or `None` is missing.

        Returns:
            For one patient a dictionary: `label` (for two labels by the model's frozen threshold), `probabilities` by
            label, and `attentions`, one weight per image in the order given. For several a list of them, or an
            iterator where a generator was given.

        Raises:
            ValueError: a patient without images, a clinical value out of range, or an argument that does not fit.
            CellImageError: an image that cannot be read, with its name.
        """
        if options.get("batch_size", 1) not in (None, 1):
            raise ValueError(
                f"batch_size={options['batch_size']}: patients are taken one by one, as their numbers of cells differ; "
                "the model's chunk_size says how many cells pass at once."
            )
        if _is_one_bag(inputs):
            inputs = {"images": inputs, "clinical": clinical}
        elif clinical is not None:
            raise ValueError("Put clinical values beside the images of each patient: {'images': ..., 'clinical': ...}.")
        return super().__call__(inputs, **options)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Save model and image processor; the task needs no entry in the configuration.

        With an entry, loading would ask for `trust_remote_code` though this package is installed.
        """
        self.model.save_pretrained(save_directory, **kwargs)
        self.image_processor.save_pretrained(save_directory)

    def _sanitize_parameters(self, **options):
        if options:
            raise ValueError(f"Unknown option(s) {sorted(options)} of the {TASK} pipeline.")
        return {}, {}, {}

    def preprocess(self, patient: Mapping[str, Any]) -> BatchFeature:
        """One patient -> `pixel_values` (1, N, 3, H, W), `bag_mask` and `clinical`."""
        if unknown := set(patient) - {"images", "clinical"}:
            raise ValueError(f"Unknown key(s) {sorted(unknown)} of a patient: expected images and clinical.")
        images = [_opened(image) for image in patient["images"]]
        return self.image_processor(images, patient.get("clinical")).to(self.dtype)

    def _forward(self, model_inputs: BatchFeature):
        return self.model(**model_inputs)

    def postprocess(self, model_outputs) -> dict[str, Any]:
        """The output for one patient -> plain numbers and names."""
        config = self.model.config
        probabilities = model_outputs.logits[0].double().softmax(dim=-1).tolist()
        decided = max(range(len(probabilities)), key=probabilities.__getitem__)
        if len(probabilities) == 2:
            decided = int(probabilities[1] >= config.decision_threshold)
        return {
            "label": config.id2label[decided],
            "prediction_set": config.prediction_set(probabilities),
            "probabilities": {config.id2label[i]: probability for i, probability in enumerate(probabilities)},
            "attentions": model_outputs.attentions[0].float().tolist(),
        }


def _is_one_bag(inputs: Any) -> bool:
    """Whether these are the images of one patient, rather than patients."""
    return isinstance(inputs, list | tuple) and not any(isinstance(item, Mapping) for item in inputs)


def _opened(image: Any) -> Any:
    if not isinstance(image, str | Path):
        return image
    try:
        return open_cell_image(Path(image)).image
    except CellImageError as error:
        raise CellImageError(f"{image}: {error}. Leave the image out, or export it again.") from error


if TASK not in PIPELINE_REGISTRY.get_supported_tasks():
    PIPELINE_REGISTRY.register_pipeline(TASK, pipeline_class=LymphPatientPipeline, pt_model=(AutoModel,))

__all__ = ["TASK", "LymphPatientPipeline"]
