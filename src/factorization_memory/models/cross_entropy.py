"""The loss under its former name; it is now the operator `factorization_memory.ops.cross_entropy`."""

from factorization_memory.ops.cross_entropy import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
