"""Guided training of untrainable networks at scale: exact layerwise similarity over the global batch."""

from scale_guide.analysis.error_consistency import (
    error_consistency,
    error_consistency_bounds,
    error_consistency_interval,
)
from scale_guide.guidance import Guidance
from scale_guide.layer_map import layer_pairs
from scale_guide.objective import linear_cka

__all__ = [
    "Guidance",
    "error_consistency",
    "error_consistency_bounds",
    "error_consistency_interval",
    "layer_pairs",
    "linear_cka",
]
