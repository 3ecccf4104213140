"""From a patient's images and clinical values to the tensors a model takes."""

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import PILImageResampling
from transformers.processing_utils import ImagesKwargs

from .configuration_lymph import CLINICAL_FEATURES, LymphMILConfig
from .encoders import encoder_data_config

_SEX = {"f": 0.0, "female": 0.0, "m": 1.0, "male": 1.0}
_RANGES = {"age": (0.0, 120.0), "lymphocyte_count": (0.0, 2000.0)}
# Counts run over two orders of magnitude (2 to 295 x 10^9/L in the published cohort), so their logarithm is scaled.
_LOGARITHMIC = ("lymphocyte_count",)


def clinical_number(name: str, value: Any) -> float:
    """One clinical value as a number: years, 0 female / 1 male, or 10^9 cells per litre; NaN when missing.

    Raises:
        ValueError: not a number, out of range (age 0 to 120, count above 0 to 2000) or an unknown sex.
    """
    if value is None or (isinstance(value, numbers.Real) and math.isnan(value)):
        return math.nan
    if name == "sex":
        if isinstance(value, str) and value.strip().lower() in _SEX:
            return _SEX[value.strip().lower()]
        raise ValueError(f"sex={value!r}: expected 'F' or 'M', or None when unknown.")
    low, high = _RANGES[name]
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}={value!r}: expected a number, or None when unknown.") from None
    if not low <= number <= high or (name in _LOGARITHMIC and number == 0):
        unit = "years" if name == "age" else "10^9 cells per litre, above 0"
        raise ValueError(f"{name}={value!r}: expected {low:g} to {high:g} {unit}, or None when unknown.")
    return number


@dataclass(frozen=True)
class ClinicalStandardizer:
    """Scales clinical values by the mean and deviation of the *training* patients, which it stores.

    Fitted once and saved with the model, so that a patient's values mean the same in every file they come from.

    Attributes:
        features: order of the columns.
        mean, std: one number per feature, of the logarithm for the lymphocyte count.

    Raises:
        ValueError: an unknown feature, not one mean and deviation for each, or a deviation that is not above 0.
    """

    features: tuple[str, ...] = CLINICAL_FEATURES
    mean: tuple[float, ...] = (60.0, 0.5, math.log(10.0))
    std: tuple[float, ...] = (20.0, 0.5, 1.0)

    def __post_init__(self):
        _refuse_unknown(self.features)
        if not len(self.features) == len(self.mean) == len(self.std):
            raise ValueError(f"{self}: expected one mean and one std per feature.")
        if not all(math.isfinite(m) and 0 < s < math.inf for m, s in zip(self.mean, self.std, strict=True)):
            raise ValueError(f"{self}: expected finite numbers, and every std above 0.")

    @classmethod
    def fit(cls, patients: Sequence[Mapping[str, Any]], features: Sequence[str] = CLINICAL_FEATURES):
        """Fit on training patients; a feature that none of them has is left out.

        Args:
            patients: one mapping per patient with any of `age`, `sex`, `lymphocyte_count`.
            features: the ones to use, in order.

        Raises:
            ValueError: no patient, an unknown feature, or a value out of range.
        """
        if not patients:
            raise ValueError("No patient to fit the clinical statistics on: give the training patients.")
        table = _raw_table(patients, features)
        seen = [i for i in range(len(features)) if not table[:, i].isnan().all()]
        columns = [table[:, i][~table[:, i].isnan()] for i in seen]
        deviations = [float(c.std(correction=0)) for c in columns]
        return cls(
            features=tuple(features[i] for i in seen),
            mean=tuple(float(c.mean()) for c in columns),
            std=tuple(deviation if deviation > 1e-6 else 1.0 for deviation in deviations),
        )

    def transform(self, patients: Sequence[Mapping[str, Any]]) -> torch.Tensor:
        """(B, F) float32, NaN where a value is missing."""
        table = _raw_table(patients, self.features)
        mean, std = (torch.tensor(v, dtype=torch.float64) for v in (self.mean, self.std))
        return ((table - mean) / std).float()


def _raw_table(patients: Sequence[Mapping[str, Any]], features: Sequence[str]) -> torch.Tensor:
    """(B, F) float64 before scaling."""
    _refuse_unknown(features)
    rows = []
    for patient in patients:
        _refuse_unknown(patient)
        values = [clinical_number(name, patient.get(name)) for name in features]
        rows.append([math.log(v) if n in _LOGARITHMIC else v for n, v in zip(features, values, strict=True)])
    return torch.tensor(rows, dtype=torch.float64).reshape(len(patients), len(features))


def _refuse_unknown(names) -> None:
    if unknown := set(names) - set(CLINICAL_FEATURES):
        raise ValueError(f"Unknown clinical value(s) {sorted(unknown)}: expected {', '.join(CLINICAL_FEATURES)}.")


class LymphImageProcessorKwargs(ImagesKwargs, total=False):
    """Image options, and the stored statistics of the clinical values."""

    clinical_statistics: dict | None


class LymphImageProcessor(TorchvisionBackend):
    r"""
    Turns patients into `pixel_values` (B, N, 3, H, W), `bag_mask` (B, N) and `clinical` (B, F).

    Size, mean and standard deviation are the encoder's; the clinical statistics are those of the training patients.
    Images of another size are resized as a whole, without cropping.

    Args:
        clinical_statistics (`dict`, *optional*):
            `features`, `mean` and `std` of a `ClinicalStandardizer`. `None` takes typical values of patients
            with lymphocytosis; an empty list of features means that the model takes no clinical value.

    Example:

    ```python
    >>> from PIL import Image
    >>> from lymph_hf import LymphImageProcessor

    >>> processor = LymphImageProcessor()
    >>> cells = [Image.new("RGB", (224, 224))] * 12
    >>> inputs = processor(cells, clinical={"age": 71, "sex": "F", "lymphocyte_count": None})
    >>> inputs.pixel_values.shape, inputs.clinical.shape
    (torch.Size([1, 12, 3, 224, 224]), torch.Size([1, 3]))

    ```
    """

    valid_kwargs = LymphImageProcessorKwargs
    model_input_names = ["pixel_values", "bag_mask", "clinical"]

    resample = PILImageResampling.BICUBIC
    image_mean = (0.5, 0.5, 0.5)
    image_std = (0.5, 0.5, 0.5)
    size = {"height": 224, "width": 224}
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    clinical_statistics = None

    @classmethod
    def from_config(cls, config: LymphMILConfig, standardizer: ClinicalStandardizer | None = None):
        """The processor that fits a model: the encoder's input and the training patients' clinical statistics."""
        data_config = encoder_data_config(config)
        _, height, width = data_config["input_size"]
        return cls(
            size={"height": height, "width": width},
            image_mean=data_config["mean"],
            image_std=data_config["std"],
            resample=PILImageResampling[data_config["interpolation"].upper()],
            clinical_statistics=None if standardizer is None else _json_ready(standardizer),
        )

    @property
    def standardizer(self) -> ClinicalStandardizer:
        """The clinical standardiser with the stored statistics."""
        stored = self.clinical_statistics
        if stored is None:
            return ClinicalStandardizer()
        return ClinicalStandardizer(**{name: tuple(values) for name, values in stored.items()})

    def __call__(self, images, clinical=None, *, return_tensors="pt", device=None) -> BatchFeature:
        """Prepare one patient or several.

        Args:
            images: a list of images (one patient), or a list of such lists; an array or tensor of images, such as
                (N, H, W, 3), is a list, too. See `stack` for what an image can be.
            clinical: a mapping with any of `age` (years), `sex` ("F" or "M") and `lymphocyte_count`
                (10^9 per litre), or a list of mappings, one per patient. What is absent, `None` or NaN is missing.
            return_tensors: `"pt"`, the only kind there is.
            device: where the tensors go, such as `"cuda"`.

        Returns:
            `pixel_values`, `bag_mask` (True = a real cell) and, for a model that takes clinical values, `clinical`.

        Raises:
            ValueError: a patient without images, something that is no image of 8 bits, a clinical value out of range,
                or unequal numbers of patients.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors={return_tensors!r}: bags come as PyTorch tensors only, pass 'pt'.")
        bags = _bags(images)
        cells = self.normalize_cells(self.stack([cell for bag in bags for cell in bag]))
        data = pad_bags(cells, [len(bag) for bag in bags])
        if self.standardizer.features:
            data["clinical"] = self._clinical(clinical, len(bags))
        batch = BatchFeature(data=data)
        return batch if device is None else batch.to(device)

    def stack(self, images: Sequence) -> torch.Tensor:
        """Images of any size -> (N, 3, H, W) uint8 at the encoder's size; not normalised.

        Args:
            images: PIL images of 8 bits per channel in any mode, or uint8 arrays or tensors, (H, W), (H, W, C) or
                (C, H, W) with 1, 3 or 4 channels. A fourth channel (transparency) is dropped.

        Raises:
            ValueError: anything else: the scale of its pixels would be a guess.
        """
        images = [_rgb(image) for image in images]
        if all(image.shape[1:] == (self.size.height, self.size.width) for image in images):
            return torch.stack([image.contiguous() for image in images])
        return self.preprocess(
            images, do_rescale=False, do_normalize=False, return_tensors="pt", input_data_format="channels_first"
        ).pixel_values

    def normalize_cells(self, cells: torch.Tensor, *, inplace: bool = False) -> torch.Tensor:
        """(N, 3, H, W) of 0..255, uint8 or float -> float32 with the encoder's mean and standard deviation.

        Args:
            inplace: overwrite `cells`, which have to be float32 then.
        """
        values = torch.tensor([self.image_mean, self.image_std], device=cells.device) * (1 / self.rescale_factor)
        return self.normalize(cells.float(), *values, inplace=inplace or cells.dtype != torch.float32)

    def _clinical(self, clinical, bags: int) -> torch.Tensor:
        rows = [{}] * bags if clinical is None else [clinical] if isinstance(clinical, Mapping) else list(clinical)
        if len(rows) != bags:
            raise ValueError(f"{len(rows)} sets of clinical values for {bags} patients: give one per patient.")
        return self.standardizer.transform([row or {} for row in rows])


def _bags(images) -> list:
    """One patient's images or several patients' -> a list of bags, each with at least one image."""
    if not isinstance(images, list | tuple | np.ndarray | torch.Tensor):
        raise ValueError(f"{type(images).__name__}: expected a list of images, or a list of such lists.")
    if len(images) == 0:
        raise ValueError("No image: give at least one cell per patient.")
    nested = [isinstance(item, list | tuple) or _dimensions(item) > 3 for item in images]
    if any(nested) and not all(nested):
        raise ValueError("Images and lists of images are mixed: give either one patient or a list of patients.")
    bags = list(images) if all(nested) else [images]
    if empty := [i for i, bag in enumerate(bags) if len(bag) == 0]:
        raise ValueError(f"Patient(s) at position {empty} have no image: give at least one cell per patient.")
    if single := [i for i, bag in enumerate(bags) if _dimensions(bag) in (1, 2, 3)]:
        raise ValueError(f"Patient(s) at position {single}: a single image, expected a list of images.")
    return bags


def _dimensions(item) -> int:
    return item.ndim if isinstance(item, np.ndarray | torch.Tensor) else 0


def _rgb(image) -> torch.Tensor:
    """Any image of 8 bits per channel -> (3, H, W) uint8."""
    if isinstance(image, torch.Tensor):
        image = image.numpy(force=True)
    if isinstance(image, np.ndarray):
        image = _picture(image)
    if not isinstance(image, Image.Image):
        raise ValueError(f"{type(image).__name__} is no image: expected a PIL image, an array or a tensor.")
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"Image of mode {image.mode!r}: expected 8 bits per channel; scale its pixels to 0..255.")
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _picture(pixels: np.ndarray) -> Image.Image:
    if pixels.dtype != np.uint8:
        raise ValueError(f"Image of {pixels.dtype}: expected uint8 pixels of 0..255, as in the file.")
    if pixels.ndim == 3 and pixels.shape[2] not in (1, 3, 4) and pixels.shape[0] in (1, 3, 4):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (1, 3, 4)):
        raise ValueError(f"Image of shape {pixels.shape}: expected (H, W), (H, W, C) or (C, H, W), C of 1, 3 or 4.")
    return Image.fromarray(pixels.squeeze(2) if pixels.shape[2:] == (1,) else pixels)


def pad_bags(cells: torch.Tensor, sizes: Sequence[int]) -> dict[str, torch.Tensor]:
    """Cells of several bags in a row -> `pixel_values` padded with zeros, and `bag_mask`.

    Args:
        cells: (sum of sizes, 3, H, W)
        sizes: cells of each bag.

    Returns:
        `pixel_values` (B, N, 3, H, W) and `bag_mask` (B, N), N the largest size.
    """
    pixel_values = torch.nn.utils.rnn.pad_sequence(cells.split(list(sizes)), batch_first=True)
    bag_mask = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
    return {"pixel_values": pixel_values, "bag_mask": bag_mask}


def _json_ready(standardizer: ClinicalStandardizer) -> dict[str, list]:
    return {name: list(values) for name, values in asdict(standardizer).items()}


__all__ = ["ClinicalStandardizer", "LymphImageProcessor"]
