"""The operators, one package each: `__init__` checks arguments and picks a backend, other modules have the plain PyTorch form
and the kernels. The public functions of the recurrence are re-exported here.
"""

from factorization_memory.ops.arguments import check_borders, check_state, check_tensors, read_borders
from factorization_memory.ops.memory import factorization_memory, recurrence
from factorization_memory.ops.memory.backends import BACKEND_NAMES, BACKENDS, over_states
from factorization_memory.ops.memory.step import (
    factorization_memory_step,
    factorization_memory_undo,
    recurrence_step,
    recurrence_undo,
)
from factorization_memory.ops.runtime import why_unsupported

__all__ = [
    "BACKENDS",
    "BACKEND_NAMES",
    "check_borders",
    "check_state",
    "check_tensors",
    "factorization_memory",
    "factorization_memory_step",
    "factorization_memory_undo",
    "over_states",
    "read_borders",
    "recurrence",
    "recurrence_step",
    "recurrence_undo",
    "why_unsupported",
]
