"""Small poolings, fusions and ragged batches shared by the tests of poolings and fusions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lymph_hf.fusion import FUSERS, Fuser, build_fuser
from lymph_hf.pooling import POOLERS, Pooler, build_pooler

CELL_SIZE = 12
NUM_LABELS = 3
NUM_CLINICAL = 3

TRANSFORMER = {"width": 16, "num_heads": 4}
POOLER_OPTIONS = {
    "top_k": {"k": 3, "hidden_size": 8},
    "attention": {"hidden_size": 8},
    "gated_attention": {"hidden_size": 8},
    "self_attention": {**TRANSFORMER, "num_layers": 2},
    "clam_sb": {"width": 16, "hidden_size": 8, "k": 3},
    "clam_mb": {"width": 16, "hidden_size": 8, "k": 3, "out_of_class": True},
    "dsmil": {"width": 16, "hidden_size": 8},
    "transmil": TRANSFORMER,
    "dtfd": {"width": 16, "hidden_size": 8, "pseudo_bags": 3},
    "set_transformer": {**TRANSFORMER, "num_inducing": 5, "num_seeds": 2},
    "perceiver": {**TRANSFORMER, "num_latents": 4},
}
# Every entry of POOLERS, and the branches that an option opens.
POOLER_CASES: dict[str, tuple[str, dict]] = {name: (name, POOLER_OPTIONS.get(name, {})) for name in POOLERS} | {
    "instance_logits/sum": ("instance_logits", {"aggregation": "sum"}),
    "instance_logits/max": ("instance_logits", {"aggregation": "max"}),
    "instance_logits/log_sum_exp": ("instance_logits", {"aggregation": "log_sum_exp"}),
    "self_attention/mean": ("self_attention", {**TRANSFORMER, "aggregation": "mean"}),
    "transmil/landmarks": ("transmil", {**TRANSFORMER, "landmarks": 4}),
    "clam_sb/smooth_svm": ("clam_sb", {"width": 16, "k": 3, "instance_loss": "smooth_svm"}),
}
FUSER_CASES: dict[str, tuple[str, dict]] = {name: (name, {}) for name in FUSERS} | {
    "clinical_query": ("clinical_query", {"width": 16, "num_heads": 4}),
    "clinical_token/self_attention": ("clinical_token", {"self_attention": True}),
    "concat/mlp": ("concat", {"clinical_hidden_size": 8}),
}


def make_pooler(case: str, *, dtype: torch.dtype = torch.float64, seed: int = 0, **options) -> Pooler:
    """The pooling of a case with seeded weights, in evaluation mode; float64 makes invariants exact."""
    name, defaults = POOLER_CASES[case]
    torch.manual_seed(seed)
    return build_pooler(name, CELL_SIZE, num_labels=NUM_LABELS, **defaults | options).to(dtype).eval()


def make_fuser(case: str, pooler: Pooler, *, seed: int = 1) -> Fuser:
    """The fusion of a case behind `pooler`, in its dtype and in evaluation mode."""
    name, options = FUSER_CASES[case]
    torch.manual_seed(seed)
    return build_fuser(name, CELL_SIZE, pooler.output_size, NUM_CLINICAL, **options).double().eval()


def make_batch(sizes: Sequence[int], *, extra: int = 0, seed: int = 0, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    """Gaussian cells `(B, N, CELL_SIZE)` with NaN as padding, and the mask; N = the largest bag + `extra`."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(sizes) + extra) < torch.tensor(list(sizes)).unsqueeze(1)
    x = torch.randn(*mask.shape, CELL_SIZE, generator=generator, dtype=dtype)
    return x.masked_fill(~mask.unsqueeze(-1), torch.nan), mask


def shuffled(x: Tensor, mask: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Each bag's positions, padding included, in an order of its own: cells, mask, order `(B, N)`."""
    order = torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)
    return x.gather(1, order.unsqueeze(-1).expand_as(x)), mask.gather(1, order), order
