"""P, Q, K and G of every chunk, and their gradients, against float64 loops over the definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from factorization_memory.ops.memory.kernels.gate_gradients import gates_backward
from factorization_memory.ops.memory.kernels.gates import gates_forward
from factorization_memory.ops.memory.kernels.layout import Layout, chunk_table, packed_chunks

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
PRECISION = "tf32x3" if CUDA else "ieee"


def weights(theta: Tensor, phi: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """P `[C, C]`, Q, K `[C, M]`, G `[M]` of one chunk of theta, phi `[count, M]`, token by token."""
    count, states = theta.shape
    inner, read = theta.new_zeros(chunk, chunk), theta.new_zeros(chunk, states)
    reach, decay = theta.new_zeros(0, states), theta.new_ones(states)
    for t in range(count):
        # reach: theta_s decay(s -> t) of every s up to t.
        reach = torch.cat((reach * (1 - theta[t]), theta[t : t + 1]))
        decay = decay * (1 - theta[t])
        inner = inner.index_put((torch.tensor(t), torch.arange(t + 1)), (phi[t] * reach).sum(-1))
        read = read.index_put((torch.tensor(t),), phi[t] * decay)
    return inner, read, torch.nn.functional.pad(reach, (0, 0, 0, chunk - count)), decay


def place(layout: Layout, slot: int) -> tuple[int, int, int]:
    """Row, first token in the row and number of tokens of a slot's chunk."""
    segment, chunk = divmod(slot, layout.segment_chunks)
    row, segment = divmod(segment, layout.segments)
    chunk += segment * layout.segment_chunks
    if layout.table is not None:
        first, count = layout.table[chunk, :2].tolist() if chunk < layout.chunks else (0, 0)
        return row, first, count
    first = chunk * layout.chunk
    return row, first, max(min(layout.length - first, layout.chunk), 0)


def expected(theta: Tensor, phi: Tensor, layout: Layout, states: int) -> list[Tensor]:
    """P, Q, K, G of all slots from theta, phi `[B, T, H, M]`, on the CPU."""
    theta, phi = (torch.nn.functional.pad(x, (0, states - x.shape[-1])) for x in (theta, phi))
    slots = []
    for slot in range(layout.slots):
        row, first, count = place(layout, slot)
        chunk = slice(first, first + count)
        heads = [weights(theta[row, chunk, h], phi[row, chunk, h], layout.chunk) for h in range(theta.shape[2])]
        slots.append([torch.stack(x) for x in zip(*heads, strict=True)])
    return [torch.stack(x) for x in zip(*slots, strict=True)]


def dense(chunk: int, rows: int, length: int, segments: int = 1) -> Layout:
    chunks = math.ceil(length / chunk)
    return Layout(chunk, rows, length, chunks, segments, math.ceil(chunks / segments), None)


def packed(chunk: int, lengths: list[int], segments: int = 1) -> Layout:
    borders = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    length = sum(lengths)
    chunks = packed_chunks(length, len(lengths), chunk)
    return Layout(chunk, 1, length, chunks, segments, math.ceil(chunks / segments), chunk_table(borders, length, chunk))


def gates(layout: Layout, heads: int, states: int) -> list[Tensor]:
    """theta, phi with all that is awkward: exact 0 and 1, next to nothing, next to 1."""
    shape = (layout.rows, layout.length, heads, states)
    pair = []
    for _ in range(2):
        x, which = torch.rand(shape) ** 3, torch.randint(12, shape)
        for i, value in enumerate((0.0, 1.0, 1e-12, 1 - 1e-7)):
            x = torch.where(which == i, value, x)
        pair.append(x.to(DEVICE))
    return pair


def forward(
    theta: Tensor, phi: Tensor, layout: Layout, states: int, precision: str = PRECISION, block_states: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """P, Q, K, G; what stands beside K is the transpose of P."""
    read, write, total = gates_forward(theta, phi, layout, states, torch.float32, precision, block_states)
    chunk = layout.chunk
    assert torch.equal(write[..., :chunk], read[..., :chunk].mT)
    return read[..., :chunk], read[..., chunk:], write[..., chunk:], total


def close(actual: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    """Relative to the norm."""
    assert actual.shape == wanted.shape, what
    actual = actual.cpu().double()
    assert actual.isfinite().all(), what
    error, norm = (actual - wanted).norm().item(), wanted.norm().item()
    assert error <= tolerance * norm, f"{what}: off by {error} of {norm}"


def check(
    layout: Layout,
    theta: Tensor,
    phi: Tensor,
    precision: str = PRECISION,
    tolerances: tuple[float, float] = (1e-6, 1e-5),
    block_states: int | None = None,
) -> None:
    states = math.ceil(theta.shape[-1] / 16) * 16
    leaves = [x.cpu().double().requires_grad_() for x in (theta, phi)]
    wanted = expected(leaves[0], leaves[1], layout, states)
    actual = forward(theta, phi, layout, states, precision, block_states)
    for name, x, y in zip("PQKG", actual, wanted, strict=True):
        close(x, y, tolerances[0], name)

    upstream = [torch.randn(x.shape) for x in wanted]
    torch.autograd.backward(wanted, [x.double() for x in upstream])
    # Nobody promises what stands above the diagonal and behind a chunk's last token.
    upstream[0] = upstream[0].masked_fill(torch.ones(layout.chunk, layout.chunk).triu(1).bool(), torch.nan)
    for slot in range(layout.slots):
        for x in upstream[:3]:
            x[slot, :, place(layout, slot)[2] :] = torch.nan
    upstream = [x.to(DEVICE) for x in upstream]

    gradients = [torch.full_like(x, torch.nan, dtype=torch.float32) for x in (theta, phi)]
    cut = layout.slots // 3
    for first, count in ((cut, layout.slots - cut), (0, cut)):
        if count:
            part = [x[first : first + count].contiguous() for x in upstream]
            gates_backward(theta, phi, layout, (first, count), *part, *gradients, precision)
        if first == cut:
            for slot in range(cut):
                row, start, tokens = place(layout, slot)
                assert gradients[0][row, start : start + tokens].isnan().all(), "wrote to tokens of another slot"
    strong = leaves[0] >= 0.99
    for name, gradient, leaf in zip(("d theta", "d phi"), gradients, leaves, strict=True):
        assert leaf.grad is not None
        close(gradient, leaf.grad, tolerances[1], name)
        if strong.any():
            close(gradient.cpu()[strong], leaf.grad[strong], tolerances[1], f"{name} where theta is near 1")


@pytest.mark.parametrize(
    ("chunk", "rows", "length", "heads", "states", "segments"),
    [
        (16, 1, 16, 1, 16, 1),
        (16, 2, 37, 2, 5, 1),
        (16, 1, 61, 1, 33, 3),
        (32, 1, 45, 1, 5, 1),
        (64, 2, 65, 1, 5, 1),
        (64, 1, 100, 2, 16, 1),
        (64, 1, 130, 1, 40, 2),
        (128, 1, 140, 2, 16, 1),
        (128, 1, 30, 1, 70, 1),
    ],
)
def test_rows(chunk: int, rows: int, length: int, heads: int, states: int, segments: int) -> None:
    layout = dense(chunk, rows, length, segments)
    check(layout, *gates(layout, heads, states))


@pytest.mark.parametrize(
    ("chunk", "lengths", "segments"),
    [(16, [0, 5, 16, 0, 33, 1, 0], 2), (64, [70, 0, 3], 1), (128, [3, 129], 1)],
)
def test_packed_sequences(chunk: int, lengths: list[int], segments: int) -> None:
    layout = packed(chunk, lengths, segments)
    check(layout, *gates(layout, 1, 5))


@pytest.mark.parametrize("block_states", [16, 32])
def test_blocks_of_states(block_states: int) -> None:
    layout = dense(64, 1, 64)
    check(layout, *gates(layout, 1, 70), block_states=block_states)


def test_low_precision_gates() -> None:
    layout = dense(16, 1, 50)
    theta, phi = (x.bfloat16() for x in gates(layout, 1, 33))
    assert (theta == 1).any()
    check(layout, theta, phi)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_all_alike(value: float) -> None:
    layout = dense(64, 1, 64)
    theta, phi = torch.full((1, 64, 1, 16), value, device=DEVICE), torch.rand(1, 64, 1, 16, device=DEVICE)
    inner, read, write, total = forward(theta, phi, layout, 16)
    if value == 0:
        assert not inner.any()
        assert not write.any()
        assert torch.equal(read[0, 0], phi[0, :, 0])
        assert torch.equal(total, torch.ones_like(total))
    else:
        assert torch.equal(inner[0, 0], inner[0, 0].diagonal().diag())
        assert not read.any()
        assert torch.equal(write[0, 0], torch.eye(64, device=DEVICE)[:, -1:].expand(-1, 16))
        assert not total.any()
    check(layout, theta, phi)


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", [16, 32, 64, 128])
def test_fast_products(chunk: int) -> None:
    layout = dense(chunk, 2, 300)
    theta, phi = gates(layout, 2, 150)
    check(layout, theta, phi, precision="tf32", tolerances=(2e-3, 2e-3))
    for x, y in zip(
        gates_forward(theta, phi, layout, 160, torch.bfloat16, "tf32"),
        gates_forward(theta, phi, layout, 160, torch.float32, "tf32x3"),
        strict=True,
    ):
        close(x, y.cpu().double(), 5e-3, "bfloat16")
