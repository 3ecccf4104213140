"""The scale of a frozen encoder's features, taken from the training patients."""

import logging

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from .adapters import evaluation_mode
from .bags import BagDataset
from .features import FeatureBags
from .inference import outputs
from .modeling_lymph import LymphMILForBagClassification

logger = logging.getLogger(__name__)

# Of a feature's size: what rounding makes of a constant is left as it is rather than blown up.
_SMALLEST_SPREAD = 1e-6


def fit_cell_standardizer(
    model: LymphMILForBagClassification,
    dataset: BagDataset | FeatureBags,
    accelerator: Accelerator,
    *,
    workers: int = 0,
) -> None:
    """Set mean and scale of the model's `CellStandardizer`; every patient weighs the same, whatever its cells.

    With m_p and v_p, the mean and the variance of a feature over the cells of patient p, its mean is m = mean m_p and
    its variance mean(v_p + (m_p - m)^2). A feature that is the same in all cells is moved, and keeps its scale.

    Args:
        model: with `standardize_cells`; its encoder is frozen.
        dataset: training patients and nobody else, all their cells as they are.
        accelerator: device, precision and processes.
        workers: processes that decode images.
    """
    rows = []
    with evaluation_mode(model.to(accelerator.device)):
        for index, output in outputs(model.model, dataset, accelerator, workers=workers):
            variance, mean = torch.var_mean(output.cell_embeddings[0].double(), dim=0, correction=0)
            rows.append((index, mean.cpu(), variance.cpu()))
    rows = sorted(gather_object(rows), key=lambda row: row[0])
    means, variances = (torch.stack(column) for column in list(zip(*rows, strict=True))[1:])
    mean = means.mean(dim=0)
    spread = (variances + (means - mean).square()).mean(dim=0).sqrt()
    constant = spread <= _SMALLEST_SPREAD * mean.abs().clamp_min(_SMALLEST_SPREAD)
    standardizer = model.model.standardizer
    standardizer.mean.copy_(mean)
    standardizer.scale.copy_(torch.where(constant, 1.0, 1 / spread))
    logger.info(
        "Cells standardised on %d training patients: spread of a feature %.2g (median), %d of %d constant.",
        len(means),
        spread.median(),
        constant.sum(),
        len(constant),
    )
