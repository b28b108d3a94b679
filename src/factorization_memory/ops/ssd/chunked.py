"""Mamba-2's recurrence parallel over time in plain PyTorch (arXiv 2405.21060, section 6), for CPU and GPU.

Time is split into chunks of L tokens. With `a_t = dt_t A` and `decay(s -> t) = exp(a_{s+1} + ... + a_t)`,

    y_t = sum_{s <= t} (C_t . B_s) decay(s -> t) dt_s x_s + decay(start -> t) S C_t      within a chunk that begins with S
    S'  = decay(start -> end) S + sum_s decay(s -> end) dt_s x_s B_s^T                    from chunk to chunk

everything of width P or N is a matrix product, over all chunks at once. States pass from chunk to chunk by products with decay
matrices too, in blocks of chunks, blocks of blocks, and so on. `exp` only ever returns numbers in [0, 1]. Each packed sequence
starts a new chunk, so nothing is masked inside a chunk.

Products are in x's dtype; decays and the states passed between chunks are float32 (float64 for float64 x).

Shapes: B sequences, T tokens, H heads, P head width, G groups of heads, N state size; n chunks of L tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from factorization_memory.ops.autograd import once_differentiable
from factorization_memory.ops.precision import no_autocast, state_dtype
from factorization_memory.ops.recomputed import recomputed_operator

BLOCK = 32
"""States per decay matrix; more are processed in blocks."""
MIN_CHUNK = 16
"""Chunks of packed sequences are not shortened below this."""
NO_DECAY_LEFT = {torch.float32: -100.0, torch.float64: -750.0}
"""Log decay below which a state is negligible next to what is added to it. Clamped there, so that sums of log decays keep
their precision."""


@dataclass(frozen=True)
class _Packing:
    """Layout of packed sequences: each fills whole chunks, and its initial state precedes theirs in the list of states.

    Attributes:
        token: index of each token among the n L positions in chunks, `[T]`.
        order: source of each of the N + n states: the index of an initial state, or N + chunk; `[N + n]`.
        before: index of the state that each chunk begins with, `[n]`.
        last: index of each sequence's last state, `[N]`.
        starts: whether a state is an initial one, bool `[N + n]`.
    """

    token: Tensor
    order: Tensor
    before: Tensor
    last: Tensor
    starts: Tensor

    @classmethod
    def plan(cls, cu_seqlens: Tensor, length: int, chunk: int, chunks: int) -> _Packing:
        """Packs sequences with these borders into `chunks` chunks, the last of which may stay empty."""
        borders = cu_seqlens.long()
        device, sequences = borders.device, borders.shape[0] - 1
        counts = (borders.diff() + (chunk - 1)) // chunk
        stops = counts.cumsum(0)
        first = stops - counts
        token = torch.arange(length, device=device)
        sequence = torch.bucketize(token, borders[1:], right=True)
        token = first[sequence] * chunk + token - borders[sequence]
        start = first + torch.arange(sequences, device=device)
        number = torch.arange(chunks, device=device)
        # Chunks after the last sequence count as its own; they leave its state unchanged.
        before = number + torch.bucketize(number, stops, right=True).clamp(max=sequences - 1)
        places = torch.cat((start, before + 1))
        order = torch.empty_like(places).index_copy(0, places, torch.arange(sequences + chunks, device=device))
        return cls(token, order, before, start + counts, order < sequences)


def forward(
    x: Tensor,
    dt: Tensor,
    decay_rate: Tensor,
    input_map: Tensor,
    output_map: Tensor,
    chunk_size: int,
    initial: Tensor | None,
    keep_final: bool,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence over whole sequences; arguments and results as in `ssd.ssd`."""
    with no_autocast(x.device):
        return _forward(x, dt, decay_rate, input_map, output_map, chunk_size, initial, keep_final, cu_seqlens)


def chunk_of(chunk_size: int, length: int) -> int:
    """Tokens per chunk of unpacked sequences: at most their length, except in a compiled graph, which must serve any
    length."""
    return chunk_size if torch.compiler.is_compiling() else min(chunk_size, max(length, 1))


def log_decays(dt: Tensor, decay_rate: Tensor, dtype: torch.dtype) -> Tensor:
    """dt A, `[B, T, H]`, in `dtype`, clamped at `NO_DECAY_LEFT`."""
    return (dt.to(dtype) * decay_rate.to(dtype)).clamp(min=NO_DECAY_LEFT[dtype])


def _forward(
    x: Tensor,
    dt: Tensor,
    decay_rate: Tensor,
    input_map: Tensor,
    output_map: Tensor,
    chunk_size: int,
    initial: Tensor | None,
    keep_final: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    batch, length, heads, width = x.shape
    groups, size = input_map.shape[2:]
    wide, packing = state_dtype(x), None
    if cu_seqlens is None:
        chunk = chunk_of(chunk_size, length)
        chunks = max(1, -(-length // chunk))
    else:
        sequences, chunk = cu_seqlens.shape[0] - 1, chunk_size
        # Short sequences get smaller chunks, so that less of each one's last chunk is empty.
        while chunk >= 2 * MIN_CHUNK and chunk * sequences > length:
            chunk //= 2
        # The most that N sequences of T tokens in all can need: reading their lengths would synchronize.
        chunks = max(1, (length + sequences * (chunk - 1)) // chunk)
        packing = _Packing.plan(cu_seqlens.to(x.device), length, chunk, chunks)

    def cut(tensor: Tensor) -> Tensor:
        """`[B, T, ...]` to `[B, n, L, ...]`, zero where there is no token."""
        if packing is not None:
            room = tensor.new_zeros(1, chunks * chunk, *tensor.shape[2:])
            tensor = room.index_copy(1, packing.token, tensor)
        elif torch.compiler.is_compiling() or length < chunks * chunk:
            tensor = functional.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, chunks * chunk - length))
        return tensor.unflatten(1, (chunks, chunk))

    values = cut((x * dt.to(wide)[..., None]).to(x.dtype))
    logs = cut(log_decays(dt, decay_rate, wide)).transpose(2, 3)  # [B, n, H, L]
    total, from_start = logs.sum(-1), logs.cumsum(-1).exp()
    # Sums of the later logs, not differences of sums, whose gradient would be a difference of large numbers.
    to_end = functional.pad(logs[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1).exp()
    # [B, n, G, L, N]
    inputs, outputs = (cut(tensor.to(x.dtype)).transpose(2, 3) for tensor in (input_map, output_map))

    # Within chunks: [B, n, H, L, L] weights.
    decay = decays(logs).unflatten(2, (groups, heads // groups))
    weights = ((outputs @ inputs.mT)[:, :, :, None] * decay).to(x.dtype).flatten(2, 3)
    inner = (weights @ values.transpose(2, 3)).transpose(2, 3)

    # From chunk to chunk: states [B, H, states, P N], initial ones first.
    kept = values * to_end.transpose(2, 3)[..., None]
    kept = kept.to(x.dtype).unflatten(3, (groups, heads // groups)).flatten(4).permute(0, 1, 3, 4, 2)
    states = (kept @ inputs).to(wide).view(batch, chunks, heads, width * size).transpose(1, 2)
    sequences = batch if packing is None else len(packing.last)
    begin = states.new_zeros(sequences, heads, width * size) if initial is None else initial.to(wide).flatten(2)
    begin = begin[:, :, None] if packing is None else begin.transpose(0, 1)[None]
    states = torch.cat((begin, states), dim=2)
    total = functional.pad(total.transpose(1, 2), (begin.shape[2], 0))
    if packing is not None:
        states, total = states.index_select(2, packing.order), total.index_select(2, packing.order)
        total = total.masked_fill(packing.starts, -torch.inf)
    states = _carry(total, states)
    before = states[:, :, :-1] if packing is None else states.index_select(2, packing.before)
    before = before.transpose(1, 2).to(x.dtype).reshape(batch, chunks, groups, heads // groups * width, size)
    outer = (outputs @ before.mT).transpose(2, 3).reshape(batch, chunks, chunk, heads, width)

    y = (inner + outer * from_start.transpose(2, 3)[..., None]).to(x.dtype).flatten(1, 2)
    y = y[:, :length] if packing is None else y.index_select(1, packing.token)
    if not keep_final:
        return y, None
    final = states[:, :, -1] if packing is None else states.index_select(2, packing.last)[0].transpose(0, 1)
    return y, final.unflatten(2, (width, size)).clone(memory_format=torch.contiguous_format)


def decays(logs: Tensor) -> Tensor:
    """Decays from each token s to each later token t, `exp(logs_{s+1} + ... + logs_t)` at `[..., t, s]`, for logs `[..., L]`;
    zero for t < s."""
    # The compiler fuses the plain form with what follows, forward and backward.
    return _decays(logs) if torch.compiler.is_compiling() else _Decays.apply(logs)


def _decays(logs: Tensor) -> Tensor:
    """`decays` in plain PyTorch, differentiated by autograd."""
    length, sums = logs.shape[-1], logs.cumsum(-1)
    edge = torch.full((length, length), -torch.inf, dtype=logs.dtype, device=logs.device).triu(1)
    return torch.where(_later(length, logs.device), sums[..., :, None] - sums[..., None, :], edge).exp()


class _Decays(torch.autograd.Function):
    """`_decays` with a gradient computed as a plain sum: autograd's is a difference of sums, which cancels under strong
    decay."""

    @staticmethod
    def forward(ctx: Any, logs: Tensor) -> Tensor:
        decay = _decays(logs)
        ctx.save_for_backward(decay)
        return decay

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (decay,) = ctx.saved_tensors
        # logs_r contributes to every pair written at s < r and read at t >= r.
        written = (gradient * decay).cumsum(-1).masked_fill_(~_later(decay.shape[-1], decay.device), 0)
        return functional.pad(written.sum(-2)[..., :-1], (1, 0))


def _carry(logs: Tensor, states: Tensor) -> Tensor:
    """`h_i = exp(logs_i) h_{i-1} + states_i` along the third dimension.

    Args:
        logs: `[B, H, S]`; may be -inf.
        states: `[B, H, S, X]`.

    Returns:
        h `[B, H, S, X]`.
    """
    count = logs.shape[2]
    if count <= BLOCK:
        return _segments(logs).exp() @ states
    blocks = -(-count // BLOCK)
    width = -(-count // blocks)
    missing = blocks * width - count
    logs = functional.pad(logs, (0, missing)).unflatten(2, (blocks, width))
    states = functional.pad(states, (0, 0, 0, missing)).unflatten(2, (blocks, width))
    states = _segments(logs).exp() @ states
    ends = _carry(logs.sum(-1), states[:, :, :, -1])
    entering = functional.pad(ends[:, :, :-1], (0, 0, 1, 0))
    states = torch.addcmul(states, logs.cumsum(-1).exp()[..., None], entering[:, :, :, None])
    return states.flatten(2, 3)[:, :, :count]


def _segments(logs: Tensor) -> Tensor:
    """`logs_{j+1} + ... + logs_i` at `[..., i, j]` for logs `[..., S]`, -inf for j > i. Computed as sums, not differences of
    sums, since logs may be -inf."""
    count = logs.shape[-1]
    later = _later(count, logs.device)
    sums = logs[..., :, None].expand(*logs.shape, count).masked_fill(~later, 0).cumsum(-2)
    return sums.masked_fill(later.mT, -torch.inf)


def _later(count: int, device: torch.device) -> Tensor:
    """Whether i > j, bool `[count, count]`."""
    return torch.ones(count, count, dtype=torch.bool, device=device).tril(-1)


def _reordered(*given: Any) -> tuple[Tensor, Tensor | None]:
    x, dt, decay_rate, input_map, output_map, initial, cu_seqlens, chunk_size, keep_final = given
    return forward(x, dt, decay_rate, input_map, output_map, chunk_size, initial, keep_final, cu_seqlens)


_operator = recomputed_operator(
    "ssd_chunked",
    ("x", "dt", "decay_rate", "input_map", "output_map", "initial?", "cu_seqlens?"),
    ("int chunk_size",),
    _reordered,
    "x",
    lambda x, dt, decay_rate, input_map, output_map, initial, cu_seqlens, chunk_size: (
        *(x.shape[:1] if cu_seqlens is None else (cu_seqlens.shape[0] - 1,)),
        *x.shape[2:],
        input_map.shape[3],
    ),
)


def as_operator(
    x: Tensor,
    dt: Tensor,
    decay_rate: Tensor,
    input_map: Tensor,
    output_map: Tensor,
    chunk_size: int,
    initial: Tensor | None,
    keep_final: bool,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`forward` as one operator of a compiled or exported graph."""
    return _operator(x, dt, decay_rate, input_map, output_map, initial, cu_seqlens, chunk_size, keep_final)
