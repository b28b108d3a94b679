"""Plans a call, its layout, tiles and precision, from shapes, dtype and device.

Shapes: B sequences, T tokens, H heads, M memory states, D value width of a head, N packed sequences.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from factorization_memory.ops.memory.kernels.layout import Layout, packed_chunks
from factorization_memory.ops.memory.kernels.tuning import Tile, tile
from factorization_memory.ops.runtime import interpreted

SEGMENT_STATES = 4
"""Least tokens per state in a segment, so that the state saved at its border is small compared with its values."""
SEGMENT_LEAST = 256
"""Least tokens per segment."""
PROGRAMS = 2
"""Target programs per multiprocessor when rows are split into segments, which happens if there is less than one without."""
WORKSPACE_SHARE = 0.5
"""Bytes of states in memory at a time, relative to those of values and outputs."""
WORKSPACE_LEAST = 256 * 2**20
"""Bytes of states in memory at a time that are always allowed."""
LONGEST_CHUNK = 128
"""Tokens per chunk, at most; segments begin at multiples of it."""


@dataclass(frozen=True)
class Plan:
    """How one call is computed."""

    layout: Layout
    heads: int
    states: int
    """M."""
    padded: int
    """MP."""
    width: int
    """D."""
    dtype: torch.dtype
    """Dtype of the operands of matrix products and of workspaces."""
    precision: str
    """`input_precision` of matrix products."""
    processors: int
    """Multiprocessors of the GPU."""
    keeps_weights: bool
    """Whether P, Q, K and G are saved for backward: if it uses the same chunks, and they take less memory than values and
    outputs."""

    @property
    def resident(self) -> bool:
        """Whether a program holds all states of a block of columns on chip."""
        return self.padded <= 128

    @property
    def carried(self) -> bool:
        """Whether rows are split into several segments."""
        return self.layout.segments > 1

    @property
    def workspace_room(self) -> int:
        """Bytes of states in memory at a time."""
        size = self.dtype.itemsize
        values = self.layout.rows * self.layout.length * self.heads * self.width * size
        return max(WORKSPACE_LEAST, int(WORKSPACE_SHARE * 2 * values))

    def state_bytes(self, tokens: int) -> int:
        """Bytes of the states before each chunk of `tokens` tokens, in backward's chunks."""
        chunk = longest_chunk(self.padded, self.dtype, backward=True)
        return -(-tokens // chunk) * self.heads * self.padded * self.width * self.dtype.itemsize

    def tile(self, kernel: str) -> Tile:
        """The tile of a kernel, no wider than the values."""
        found = tile(kernel, self.layout.chunk, self.padded, self.dtype)
        return found if found.width <= self.width else replace(found, width=min(found.width, power_of_two(self.width, 16)))


def power_of_two(number: int, least: int) -> int:
    """The smallest power of two that is at least `number` and `least`."""
    return max(least, 1 << (number - 1).bit_length())


def padded_states(states: int) -> int:
    """M, padded to whole blocks."""
    return power_of_two(states, 16) if states <= 128 else -(-states // 128) * 128


def operands(dtype: torch.dtype, exact: bool) -> tuple[torch.dtype, str]:
    """Dtype and precision of the operands of matrix products for values of `dtype`.

    bfloat16 values stay bfloat16. float32 values use three TF32 products, which is as exact as float32, or one if not `exact`.
    float16 values are treated as float32: gradients of states exceed float16's range, and a single TF32 product, whose
    operands the GPU truncates rather than rounds, would have an error of 1e-3.
    """
    if interpreted():
        return torch.float32, "ieee"
    if dtype == torch.bfloat16:
        return torch.bfloat16, "tf32"
    return torch.float32, "tf32x3" if exact else "tf32"


def longest_chunk(padded: int, dtype: torch.dtype, backward: bool) -> int:
    """Tokens per chunk in long sequences. Short chunks suit kernels that hold all states on chip; if states go through memory,
    long chunks halve their traffic."""
    return 128 if dtype == torch.bfloat16 and (padded > 128 or (backward and padded <= 64)) else 64


def plan(update: Tensor, value: Tensor, cu_seqlens: Tensor | None, backward: bool) -> Plan:
    """The plan for weights `[B, T, H, M]` and values `[B, T, H, D]`, of N packed sequences if `cu_seqlens` `[N + 1]` is given;
    does not compute their table yet."""
    sequences = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    exact = value.dtype == torch.bfloat16 or _exact_products()
    shape = tuple(int(size) for size in update.shape)  # turns traced sizes into constants
    return _plan(shape, int(value.shape[3]), value.dtype, exact, value.device, sequences, backward)


def _exact_products() -> bool:
    """Whether PyTorch is set to multiply float32 at full precision, by either of its settings."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # the newer setting was used
        return torch.backends.cuda.matmul.fp32_precision != "tf32"


@lru_cache(maxsize=1024)
def _plan(
    shape: tuple[int, ...],
    width: int,
    dtype: torch.dtype,
    exact: bool,
    device: torch.device,
    sequences: int | None,
    backward: bool,
) -> Plan:
    batch, length, heads, states = shape
    padded = padded_states(states)
    dtype, precision = operands(dtype, exact)
    mean = length if sequences is None else length // sequences
    short = power_of_two(mean, 16)
    chunk = min(longest_chunk(padded, dtype, backward), short)
    chunks = -(-length // chunk) if sequences is None else packed_chunks(length, sequences, chunk)
    keeps = chunk == min(longest_chunk(padded, dtype, not backward), short) and chunk + padded <= width
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    layout = Layout(chunk, batch, length, chunks, 1, chunks, None)
    made = Plan(layout, heads, states, padded, width, dtype, precision, processors, keeps)

    # Segments are the same in forward and backward, whatever the chunks and tiles, so that both can use the states at their
    # borders.
    blocks = 1 if made.resident else -(-padded // 128)
    programs = batch * heads * -(-width // (64 if made.resident else 256)) * blocks
    parallel = PROGRAMS * processors // programs if programs < PROGRAMS * processors // 2 else 1
    of_row = made.state_bytes(length) * 2
    small = -(-of_row // made.workspace_room)
    segments = min(max(parallel, small), length // max(SEGMENT_LEAST, SEGMENT_STATES * padded))
    if segments < 2:
        return made
    segment = -(-length // (segments * LONGEST_CHUNK)) * LONGEST_CHUNK
    layout = Layout(chunk, batch, length, chunks, -(-chunks * chunk // segment), segment // chunk, None)
    return replace(made, layout=layout)
