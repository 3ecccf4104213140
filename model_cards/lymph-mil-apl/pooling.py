"""The poolings by name. Adding one = a class with `_pool` in a sibling file, and its entry here."""

from typing import Any

from .pooling_attention import AttentionPooler, GatedAttentionPooler
from .pooling_base import Pooler, build_by_name, check_bags
from .pooling_clam import ClamMultiPooler, ClamSinglePooler
from .pooling_dsmil import DSMILPooler
from .pooling_dtfd import DTFDPooler
from .pooling_simple import (
    InstanceLogitsPooler,
    LogSumExpPooler,
    MaxPooler,
    MeanPooler,
    SumPooler,
    TopKPooler,
)
from .pooling_transformer import PerceiverPooler, SelfAttentionPooler, SetTransformerPooler, TransMILPooler

__all__ = ["POOLERS", "Pooler", "build_pooler", "check_bags"]

POOLERS: dict[str, type[Pooler]] = {
    "mean": MeanPooler,
    "max": MaxPooler,
    "sum": SumPooler,
    "log_sum_exp": LogSumExpPooler,
    "top_k": TopKPooler,
    "instance_logits": InstanceLogitsPooler,
    "attention": AttentionPooler,
    "gated_attention": GatedAttentionPooler,
    "self_attention": SelfAttentionPooler,
    "clam_sb": ClamSinglePooler,
    "clam_mb": ClamMultiPooler,
    "dsmil": DSMILPooler,
    "transmil": TransMILPooler,
    "dtfd": DTFDPooler,
    "set_transformer": SetTransformerPooler,
    "perceiver": PerceiverPooler,
}


def build_pooler(name: str, input_size: int, *, num_labels: int = 2, **options: Any) -> Pooler:
    """The pooling called `name` for cells of width `input_size`.

    Raises:
        ValueError: unknown name or option (the message lists the legal ones), or an option out of its range.

    >>> build_pooler("gated_attention", 384, hidden_size=64).output_size
    384
    """
    return build_by_name(POOLERS, "pooling", name, {"input_size": input_size, "num_labels": num_labels}, options)
