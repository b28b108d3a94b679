"""The loss by its former name: it is an operator, `factorization_memory.ops.cross_entropy`."""

from factorization_memory.ops.cross_entropy import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
