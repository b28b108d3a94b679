"""Lower bound on the time per token: the recurrence's compulsory traffic and FLOPs at this device's measured rates.

Shapes: B sequences, T tokens, H heads, M memory states, K selected states (M in the dense form), D value width of a head.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any

import torch

from factorization_memory.benchmarks.settings import Shape
from factorization_memory.benchmarks.timing import interleaved_seconds
from factorization_memory.layers.mixer import MERGE_FLOPS, UPDATE_FLOPS
from factorization_memory.models.counting import Counts
from factorization_memory.ops.precision import state_dtype

RECURRENCE_FLOPS = 4
"""Of one number of the memory and one token: a multiplication and an addition each for writing and for reading, as the two
matrix products `theta^T v` and `phi h` count them. Decays, and what a chunked form computes besides, are left out."""
BACKWARD_PASSES = 2
"""Backward does each product twice: for the gradients of both its factors."""
INDEX_BYTES = 8
"""Of one selected state's number, int64."""
PASSES = ("forward", "forward_backward")

PEAK_TERAFLOPS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H200 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "A100": 312.0,
}
"""Dense bfloat16 matrix products by the makers' data sheets, by what a device's name contains; the first that fits counts."""


@dataclass(frozen=True)
class Rates:
    """Measured rates of a device for what bounds the recurrence."""

    copy_bytes_per_second: float
    """Of a large copy on the device, bytes read and bytes written both counted."""
    matmul_flops_per_second: float
    """Of a large square matrix product of random numbers."""
    matmul: str
    """Which product that was."""

    def asdict(self) -> dict[str, Any]:
        """As a JSON-ready dict."""
        return asdict(self)


def measure_rates(device: torch.device, repeats: int = 5) -> Rates:
    """The rates of `device`: a copy of 1 GiB and an 8192 x 8192 x 8192 product of bfloat16 on a GPU; 128 MiB and
    1024 x 1024 x 1024 of float32 on a CPU."""
    gpu = device.type == "cuda"
    size, width, dtype = (1 << 30, 8192, torch.bfloat16) if gpu else (128 << 20, 1024, torch.float32)
    source = torch.zeros(size, dtype=torch.int8, device=device)
    target = torch.zeros_like(source)
    # Random numbers: a product of zeros draws less power and runs faster than a realistic one.
    left, right = (torch.randn(width, width, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    calls = {"copy": lambda: target.copy_(source), "matmul": lambda: left @ right}
    seconds = {name: statistics.median(s) for name, s in interleaved_seconds(calls, repeats, device, cold=True).items()}
    return Rates(
        2 * size / seconds["copy"],
        2 * width**3 / seconds["matmul"],
        f"{width} x {width} x {width}, {str(dtype).removeprefix('torch.')}",
    )


def compulsory_bytes(shape: Shape, dtype: torch.dtype) -> dict[str, int]:
    """Bytes per token that any implementation reads and writes, for `forward` and for `forward_backward` together.

    Forward reads v and both weights and writes y; backward reads v, its output's gradient and both weights and writes the
    gradients of v and of both weights. Weights are float32 (float64 with float64 values), values of `dtype`; indices, where
    states are selected, are read once in each pass. States and everything kept between the passes are not compulsory.
    """
    value = shape.heads * shape.value_size * dtype.itemsize
    selected = shape.heads * (shape.top_k or shape.num_states)
    weights = 2 * selected * state_dtype(torch.empty(0, dtype=dtype)).itemsize
    indices = 0 if shape.top_k is None else selected * INDEX_BYTES
    forward = 2 * value + weights + indices
    return {"forward": forward, "forward_backward": forward + 3 * value + 2 * weights + indices}


def least_flops(shape: Shape) -> dict[str, int]:
    """FLOPs per token that the formula takes, by pass: `RECURRENCE_FLOPS * K * D * H` forward, three times that in all."""
    forward = RECURRENCE_FLOPS * (shape.top_k or shape.num_states) * shape.value_size * shape.heads
    return {"forward": forward, "forward_backward": (1 + BACKWARD_PASSES) * forward}


def floor(shape: Shape, dtype: torch.dtype, rates: Rates) -> dict[str, Any]:
    """The floor of `shape`: by pass `bytes_per_token`, `flops_per_token`, `ns_per_token` (the larger of the time for the bytes
    at the copy's rate and for the FLOPs at the product's) and `bound` ("memory" or "arithmetic")."""
    size, flops = compulsory_bytes(shape, dtype), least_flops(shape)
    result = {}
    for name in PASSES:
        memory = size[name] / rates.copy_bytes_per_second * 1e9
        arithmetic = flops[name] / rates.matmul_flops_per_second * 1e9
        result[name] = {
            "bytes_per_token": size[name],
            "flops_per_token": flops[name],
            "ns_per_token": max(memory, arithmetic),
            "bound": "memory" if memory >= arithmetic else "arithmetic",
        }
    return result


def training_flops(counts: Counts) -> int:
    """Model FLOPs of training on one token, as MFU counts them: 3 times (forward, and twice that backward) the matrix products
    of blocks and output head, 2 FLOPs per weight, of attention, and of the recurrence, `RECURRENCE_FLOPS * K * D` a memory
    layer with D the total value width.

    So 6 per weight of the blocks' and the head's linear layers. Norms, gates, the embedding's look-up, what is computed a
    second time, and what the chunked form computes beyond the formula count nothing.
    """
    recurrence = RECURRENCE_FLOPS * counts.recurrence_flops // (UPDATE_FLOPS + MERGE_FLOPS)
    return (1 + BACKWARD_PASSES) * (counts.projection_flops + counts.head_flops + counts.attention_flops + recurrence)


def peak_teraflops(device_name: str) -> float | None:
    """The data sheet's dense bfloat16 rate of a device, by its name; None if it is not in `PEAK_TERAFLOPS`."""
    return next((peak for part, peak in PEAK_TERAFLOPS.items() if part in device_name), None)
