"""How a matrix may be represented: a file per paper, one interface (`base.Weight`)."""

from research.weights.base import Weight, dense, is_weight, leaf_axes, matmul, merge

__all__ = ["Weight", "dense", "is_weight", "leaf_axes", "matmul", "merge"]
