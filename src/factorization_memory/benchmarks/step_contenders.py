"""What takes the steps that `step` measures: a size and the dtype of its memory, the tokens, the backend.

Shapes as in step.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from factorization_memory.benchmarks.settings import Shape
from factorization_memory.benchmarks.timing import FLUSH_BYTES
from factorization_memory.ops import recurrence_step, why_unsupported

MOST_STEPS = 2048
"""Steps in rotation at most: where rows are few and narrow, a cache may hold what these touch."""


@dataclass(frozen=True)
class Contender:
    """A size, the dtype of its memory, and over how many rows its steps go round."""

    shape: Shape
    state: torch.dtype
    """float32, or bfloat16, which is rounded to at random."""
    least: int
    """Steps in rotation at least."""

    def __str__(self) -> str:
        return f"{self.state_name} {self.shape}"

    @property
    def state_name(self) -> str:
        """Dtype of the memory, as "float32"."""
        return str(self.state).removeprefix("torch.")

    @property
    def rows(self) -> int:
        """K, or M in the dense form."""
        return self.shape.top_k or self.shape.num_states

    @property
    def row_bytes(self) -> int:
        """Bytes of the rows of one step; the step reads and writes them."""
        return self.shape.batch * self.shape.heads * self.rows * self.shape.value_size * self.state.itemsize

    @property
    def steps(self) -> int:
        """N: steps in rotation."""
        return max(self.least, min(MOST_STEPS, -(-FLUSH_BYTES // self.row_bytes)))

    @property
    def steps_of_a_memory(self) -> int:
        """Steps that find rows of their own in one memory."""
        return self.shape.num_states // self.rows

    @property
    def memories(self) -> int:
        """S: memories that the steps go round over."""
        return -(-self.steps // self.steps_of_a_memory)

    def memory_of(self, step: int) -> int:
        """The memory that a step belongs to."""
        return step // self.steps_of_a_memory


@dataclass(frozen=True)
class Tokens:
    """One token of each sequence for each of N steps."""

    update: Tensor
    """`[N, B, H, K]`, float32."""
    merge: Tensor
    """`[N, B, H, K]`, float32."""
    value: Tensor
    """`[N, B, H, D]`."""
    indices: Tensor | None
    """`[N, B, H, K]`, int64; None in the dense form."""

    @classmethod
    def random(cls, shape: Shape, steps: int, dtype: torch.dtype, device: torch.device) -> Tokens:
        """Random ones. The steps select every state of the memory before they select one again, as far as K goes into M."""
        chosen = shape.top_k or shape.num_states
        every = (steps, shape.batch, shape.heads)
        update, merge = (torch.rand(*every, chosen, device=device) for _ in range(2))
        value = torch.randn(*every, shape.value_size, device=device).to(dtype)
        if shape.top_k is None:
            return cls(update, merge, value, None)
        together = shape.num_states // chosen
        orders = -(-steps // together)
        order = torch.rand(orders, shape.batch, shape.heads, shape.num_states, device=device).argsort(-1)
        parts = order[..., : together * chosen].unflatten(-1, (together, chosen)).movedim(3, 1)
        return cls(update, merge, value, parts.flatten(0, 1)[:steps].contiguous())

    def step(self, number: int, state: Tensor, backend: str, seed: Tensor | None, **undo: Tensor) -> Tensor:
        """The step of that number on `state` `[B, H, M, D]`, in place; y `[B, H, D]`."""
        chosen = None if self.indices is None else self.indices[number]
        weights = self.update[number], self.merge[number]
        return recurrence_step(*weights, self.value[number], state, chosen, seed=seed, backend=backend, **undo)


def rounds_at_random(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there is a step with a bfloat16 memory, which is the Triton kernel's alone; interpreted, it has no speed."""
    return device.type == "cuda" and why_unsupported(torch.empty(0, dtype=dtype, device=device)) is None


def backend_of(contender: Contender, device: torch.device) -> tuple[str, Tensor | None]:
    """Which backend takes the contender's steps, and its seed."""
    rounded = contender.state == torch.bfloat16
    return ("triton", torch.zeros(1, dtype=torch.int64, device=device)) if rounded else ("auto", None)
