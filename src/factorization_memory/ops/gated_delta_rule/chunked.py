"""The gated delta rule parallel over time in plain PyTorch (arXiv 2412.06464, section 3.3), for CPU and GPU.

Time is split into chunks of L tokens. In a chunk that begins with the state S, with
`decay(s -> t) = exp(g_{s+1} + ... + g_t)`, what token t writes along its key, u_t, depends on the writes before it:

    u_t = beta_t (v_t - decay(start -> t) S^T k_t - sum_{s < t} decay(s -> t) (k_t . k_s) u_s)

This is a unit triangular system. Solved with the right-hand sides `beta v` and `beta decay(start -> t) k`, for all chunks at
once, it gives `u = U - W S` (the UT transform). Then, chunk after chunk,

    S'  = decay(start -> end) S + sum_s decay(s -> end) k_s u_s^T

and, again for all chunks at once,

    o_t = scale (decay(start -> t) S^T q_t + sum_{s <= t} decay(s -> t) (q_t . k_s) u_s)

`exp` only ever sees numbers <= 0. Each packed sequence starts a new chunk, so nothing is masked inside a chunk. All arithmetic
is float32 (float64 for float64 values).

Shapes: B sequences, T tokens, H heads, K width of a key, V width of a value; n chunks of L tokens, P pairs of a
sequence and a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from factorization_memory.ops.gated_delta_rule.carry import carry
from factorization_memory.ops.precision import no_autocast, state_dtype
from factorization_memory.ops.recomputed import recomputed_operator
from factorization_memory.ops.ssd.chunked import MIN_CHUNK, NO_DECAY_LEFT, decays

CHUNK_SIZE = 64
"""Tokens of a chunk, as in the paper."""


@dataclass(frozen=True)
class _Packing:
    """Assignment of packed sequences to chunks: each fills whole chunks.

    Attributes:
        token: index of each token among the n L positions in chunks, `[T]`.
        sequence: the sequence of each chunk, `[n]`.
        starts: whether a chunk is the first of its sequence, bool `[n]`.
        last: the last chunk of each sequence, `[N]`; arbitrary for an empty one.
        empty: whether a sequence has no tokens, bool `[N]`.
    """

    token: Tensor
    sequence: Tensor
    starts: Tensor
    last: Tensor
    empty: Tensor

    @classmethod
    def plan(cls, cu_seqlens: Tensor, length: int, chunk: int, chunks: int) -> _Packing:
        """Packs sequences with these borders into `chunks` chunks, the last of which may stay empty."""
        borders = cu_seqlens.long()
        counts = (borders.diff() + (chunk - 1)) // chunk
        stops = counts.cumsum(0)
        first = stops - counts
        token = torch.arange(length, device=borders.device)
        owner = torch.bucketize(token, borders[1:], right=True)
        number = torch.arange(chunks, device=borders.device)
        # Chunks after the last sequence hold no token, and no final state is read from them.
        sequence = torch.bucketize(number, stops, right=True).clamp(max=len(counts) - 1)
        token = first[owner] * chunk + token - borders[owner]
        return cls(token, sequence, number == first[sequence], (stops - 1).clamp(min=0), counts == 0)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    initial: Tensor | None,
    keep_final: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence over whole sequences; arguments and results as in `gated_delta_rule`, with as many key heads as value
    heads and an explicit scale."""
    run = _operator if torch.compiler.is_compiling() else _forward
    return run(q, k, v, g, beta, initial, cu_seqlens, scale, keep_final)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    keep_final: bool,
) -> tuple[Tensor, Tensor | None]:
    with no_autocast(v.device):
        y, final = _in_chunks(q, k, v, g, beta, initial, cu_seqlens, scale, keep_final)
        return y.to(v.dtype), final


def _in_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    keep_final: bool,
) -> tuple[Tensor, Tensor | None]:
    batch, length, heads, width = v.shape
    wide, packing = state_dtype(v), None
    if cu_seqlens is None:
        chunk = min(CHUNK_SIZE, max(length, 1))
        sequences, chunks = batch, max(1, -(-length // chunk))
    else:
        sequences, chunk = cu_seqlens.shape[0] - 1, CHUNK_SIZE
        # Short sequences take smaller chunks, so that less of each one's last chunk is empty.
        while chunk >= 2 * MIN_CHUNK and chunk * sequences > length:
            chunk //= 2
        # The most that N sequences of T tokens in all can need: their lengths are not read, which would synchronize.
        chunks = max(1, (length + sequences * (chunk - 1)) // chunk)
        packing = _Packing.plan(cu_seqlens.to(v.device), length, chunk, chunks)

    def cut(tensor: Tensor) -> Tensor:
        """`[B, T, H, ...]` to `[n, P, L, ...]`, zero where there is no token, which leaves the state unchanged."""
        tensor = tensor.to(wide)
        if packing is not None:
            room = tensor.new_zeros(1, chunks * chunk, *tensor.shape[2:])
            tensor = room.index_copy(1, packing.token, tensor)
        elif length < chunks * chunk:
            tensor = functional.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, chunks * chunk - length))
        return tensor.unflatten(1, (chunks, chunk)).movedim((1, 3), (0, 2)).flatten(1, 2).contiguous()

    q, k, v, beta = cut(q) * scale, cut(k), cut(v), cut(beta)[..., None]
    logs = cut(g.to(wide).clamp(min=NO_DECAY_LEFT[wide]))
    from_start = logs.cumsum(-1).exp()[..., None]
    # Sums of the later logs, not differences of sums, whose gradient would be a difference of large numbers.
    to_end = functional.pad(logs[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1).exp()[..., None]
    whole = logs.sum(-1).exp()[..., None, None]
    decay = decays(logs)

    # The writes of each chunk are U - W S: here U and W.
    system = beta * (k @ k.mT) * decay  # the solver takes its diagonal as 1
    right = torch.cat((beta * v, beta * from_start * k), dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    free, along = solved.split((width, k.shape[-1]), dim=-1)

    begin = v.new_zeros(sequences, heads, k.shape[-1], width) if initial is None else initial.to(wide)
    begins = begin.flatten(0, 1) if packing is None else begin.index_select(0, packing.sequence)
    kept = (k * to_end).mT
    before, writes = carry(free, along, kept, whole, begins, None if packing is None else packing.starts)

    y = (q * from_start) @ before + ((q @ k.mT) * decay) @ writes
    y = y.unflatten(1, (batch, heads)).movedim((0, 2), (1, 3)).flatten(1, 2)
    y = y[:, :length] if packing is None else y.index_select(1, packing.token)
    if not keep_final:
        return y, None
    if packing is None:
        return y, (whole[-1] * before[-1] + kept[-1] @ writes[-1]).unflatten(0, (batch, heads))
    kept, whole, before, writes = (x.index_select(0, packing.last) for x in (kept, whole, before, writes))
    return y, torch.where(packing.empty[:, None, None, None], begin, whole * before + kept @ writes)


_operator = recomputed_operator(
    "gated_delta_rule",
    ("q", "k", "v", "g", "beta", "initial?", "cu_seqlens?"),
    ("float scale",),
    _forward,
    "v",
    lambda q, k, v, g, beta, initial, cu_seqlens, scale: (
        *(v.shape[:1] if cu_seqlens is None else (cu_seqlens.shape[0] - 1,)),
        v.shape[2],
        k.shape[3],
        v.shape[3],
    ),
)
"""The loop of `carry` takes a turn for each chunk, and the number of chunks depends on the length."""
