"""The recurrence parallel over time in plain PyTorch, for CPU and GPU.

Time is split into chunks of C tokens. Within a chunk, with `decay_j(s -> t) = prod_{r = s+1..t} (1 - theta_rj)`,

    y_t = sum_{s <= t} P[t, s] v_s + sum_j Q[t, j] h_j        P[t, s] = sum_j phi_tj theta_sj decay_j(s -> t)
    h'_j = G_j h_j + sum_s K[s, j] v_s                        Q[t, j] = phi_tj decay_j(start -> t)
                                                              K[s, j] = theta_sj decay_j(s -> end),  G_j = decay_j(start -> end)

so that everything of width D is a matrix product, and only the states between chunks are sequential. P, Q, K and G come from a
binary tree over the chunk (`DecayTree`): merging two neighbouring blocks of w tokens is one product for the part of P from the
left block to the right, then Q of the right block is multiplied by the decay over the left one, and K of the left block by the
decay over the right one. All are products of numbers in [0, 1]: no logarithm, no division, nothing that overflows or loses
digits when theta is close to 1 or exactly 0 or 1; backward goes through the same products.

Forward saves the inputs and one state per group of chunks, and backward recomputes the rest group by group, so memory grows
with T * (M + D).

In the code P is `inner`, Q `read`, K `write` and G `total`.

Shapes: L = B * H lanes, n chunks of C tokens, M memory states, D value width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from factorization_memory.ops.autograd import once_differentiable
from factorization_memory.ops.memory.decay_tree import DecayTree
from factorization_memory.ops.memory.layout import Layout, lay_out
from factorization_memory.ops.precision import no_autocast, outside_autocast, state_dtype


def _put(chunk: Tensor, slot: Tensor) -> None:
    """Writes a chunk `[L, C, W]` to its slot."""
    slot.copy_(chunk[:, : slot.shape[2]].unflatten(0, slot.shape[:2]))


def _walk(
    update: Tensor,
    merge: Tensor,
    value: Tensor,
    initial: Tensor | None,
    layout: Layout,
    keep_final: bool,
    keep_snapshots: bool,
    keep_output: bool = True,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The recurrence over sequences that begin and end at chunk borders (the last chunk of a lane may be short).

    Args:
        update, merge: `[B, T, H, M]`.
        value: `[B, T, H, D]`.
        initial: `[N, L, M, D]`, or None for zeros.
        layout: layout of these sequences.
        keep_final, keep_snapshots, keep_output: which results to return.

    Returns:
        y `[B, T, H, D]`; the final states `[N, L, M, D]`; and the snapshots, the initial state `[L, M, D]` of each group of
        chunks. Those not requested are empty.
    """
    output = torch.empty_like(value) if keep_output else value.new_empty(0)
    shape = layout.state_shape
    final = value.new_empty(shape if keep_final else 0, dtype=layout.dtype)
    if keep_final and layout.empty:
        final[layout.empty] = 0 if initial is None else initial[layout.empty]
    snapshots = []
    state = value.new_zeros(shape[1:], dtype=layout.dtype)
    for first, count in layout.groups():
        theta, phi = (torch.cat(layout.cut(x, first, count)) for x in (update, merge))
        tree = DecayTree.build(theta, phi, keep_levels=False)
        values = layout.cut(value, first, count)
        slots = layout.slots(output, first, count) if keep_output else ()
        for i, inner, read, write, total in zip(range(first, first + count), *tree.chunks(count), strict=True):
            if i in layout.starts:
                state = layout.initial_state(initial, state, i)
            if keep_snapshots and i == first:
                snapshots.append(state.clone())
            v = values[i - first]
            if keep_output:
                _put(torch.bmm(inner, v).baddbmm_(read, state), slots[i - first])
            state.mul_(total).baddbmm_(write.mT, v)
            if keep_final and i in layout.ends:
                final[layout.ends[i]] = state
    return output, final, snapshots


def _walk_back(
    d_output: Tensor,
    d_final: Tensor | None,
    update: Tensor,
    merge: Tensor,
    value: Tensor,
    initial: Tensor | None,
    snapshots: list[Tensor],
    layout: Layout,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of update, merge, value and initial states (None without them), given `_walk`'s arguments and snapshots and
    the gradients of y and final states (None means zero)."""
    d_update, d_merge, d_value = torch.empty_like(update), torch.empty_like(merge), torch.empty_like(value)
    d_initial = None if initial is None else torch.empty_like(initial, dtype=layout.dtype)
    if d_initial is not None and layout.empty:
        d_initial[layout.empty] = 0 if d_final is None else d_final[layout.empty]
    d_state = value.new_zeros(layout.state_shape[1:], dtype=layout.dtype)
    for (first, count), snapshot in reversed(list(zip(layout.groups(), snapshots, strict=True))):
        theta, phi = (torch.cat(layout.cut(x, first, count)) for x in (update, merge))
        tree = DecayTree.build(theta, phi, keep_levels=True)
        chunks = list(zip(*tree.chunks(count), strict=True))
        values, d_outputs = layout.cut(value, first, count), layout.cut(d_output, first, count)
        d_tree = tree.empty_like()
        d_chunks = list(zip(*d_tree.chunks(count), layout.slots(d_value, first, count), strict=True))

        states = [snapshot]
        for i in range(first + 1, first + count):
            if i in layout.starts:
                states.append(layout.initial_state(initial, torch.empty_like(d_state), i))
            else:
                _, _, write, total = chunks[i - 1 - first]
                states.append((states[-1] * total).baddbmm_(write.mT, values[i - 1 - first]))
        for i in reversed(range(first, first + count)):
            (inner, read, write, total), (d_inner, d_read, d_write, d_total, slot) = chunks.pop(), d_chunks.pop()
            v, d_y, state = values.pop(), d_outputs.pop(), states.pop()
            if i in layout.ends:
                d_state = d_state.zero_() if d_final is None else d_final[layout.ends[i]].clone()
            torch.bmm(d_y, v.mT, out=d_inner)
            torch.bmm(d_y, state.mT, out=d_read)
            torch.bmm(v, d_state.mT, out=d_write)
            torch.sum(d_state * state, -1, keepdim=True, out=d_total)
            _put(torch.bmm(inner.mT, d_y).baddbmm_(write, d_state), slot)
            d_state.mul_(total).baddbmm_(read.mT, d_y)
            if d_initial is not None and i in layout.starts:
                d_initial[layout.starts[i]] = d_state
        d_theta, d_phi = tree.backward(theta, phi, d_tree)
        for x, parts in ((d_update, d_theta), (d_merge, d_phi)):
            for part, slot in zip(parts.chunk(count), layout.slots(x, first, count), strict=True):
                _put(part, slot)
    return d_update, d_merge, d_value, d_initial


class _Chunked(torch.autograd.Function):
    """`_walk`, saving its snapshots for `_walk_back`."""

    @staticmethod
    def forward(
        ctx: Any, update: Tensor, merge: Tensor, value: Tensor, initial: Tensor | None, layout: Layout, keep_final: bool
    ) -> tuple[Tensor, Tensor]:
        keep_snapshots = any(ctx.needs_input_grad)
        output, final, snapshots = _walk(update, merge, value, initial, layout, keep_final, keep_snapshots)
        ctx.save_for_backward(update, merge, value, initial, *snapshots)
        ctx.layout = layout
        ctx.keep_final = keep_final
        return output, final

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, d_output: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        update, merge, value, initial, *snapshots = ctx.saved_tensors
        d_final = d_final if ctx.keep_final else None  # type: ignore[assignment]
        found = _walk_back(d_output, d_final, update, merge, value, initial, snapshots, ctx.layout)
        return *found, None, None


def forward(
    update: Tensor, merge: Tensor, value: Tensor, state: Tensor | None, keep_final: bool, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The dense recurrence over whole sequences.

    Args:
        update: theta, `[B, T, H, M]`.
        merge: phi, same shape.
        value: v, `[B, T, H, D]`.
        state: h_0, `[B, H, M, D]` (`[N, H, M, D]` with `cu_seqlens`), or None for zeros.
        keep_final: whether to return the final state.
        cu_seqlens: `[N + 1]` integers, the borders of packed sequences (B = 1).

    Returns:
        y `[B, T, H, D]` in value's dtype and the final state, shaped as `state`, in float32 (float64 for float64 values).
    """
    if torch.compiler.is_compiling():
        output, final = _operator(update, merge, value, state, cu_seqlens, keep_final)
        return output, final if keep_final else None
    layout, packing, initial = lay_out(update, value, state, cu_seqlens)
    if packing is not None:
        update, merge, value = map(packing.gather, (update, merge, value))
    with no_autocast(value.device):
        output, final = _Chunked.apply(update, merge, value, initial, layout, keep_final)
    if packing is not None:
        output = output[:, packing.slot]
    return output, (final.view(-1, *update.shape[2:], value.shape[-1]) if keep_final else None)


# One operator under `torch.compile` and `torch.export`, so that one graph serves any length. The number of snapshots depends
# on the length, so none are saved: backward recomputes them.
def _forward(
    update: Tensor, merge: Tensor, value: Tensor, state: Tensor | None, cu_seqlens: Tensor | None, keep_final: bool
) -> tuple[Tensor, Tensor]:
    layout, packing, initial = lay_out(update, value, state, cu_seqlens)
    if packing is not None:
        update, merge, value = map(packing.gather, (update, merge, value))
    with no_autocast(value.device):
        output, final, _ = _walk(update, merge, value, initial, layout, keep_final, keep_snapshots=False)
    if packing is not None:
        output = output[:, packing.slot]
    final = final.view(-1, *update.shape[2:], value.shape[-1]) if keep_final else final
    return output.contiguous(), final


def _fake_forward(
    update: Tensor, merge: Tensor, value: Tensor, state: Tensor | None, cu_seqlens: Tensor | None, keep_final: bool
) -> tuple[Tensor, Tensor]:
    sequences = value.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (sequences, *update.shape[2:], value.shape[3]) if keep_final else (0,)
    return value.new_empty(value.shape), value.new_empty(shape, dtype=state_dtype(value))


def _backward(
    d_output: Tensor,
    d_final: Tensor | None,
    update: Tensor,
    merge: Tensor,
    value: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of update, merge, value and the initial state (empty without one), given those of the results (None means
    zero)."""
    layout, packing, initial = lay_out(update, value, state, cu_seqlens)
    if packing is not None:
        d_output, update, merge, value = map(packing.gather, (d_output, update, merge, value))
    d_final = None if d_final is None else d_final.reshape(layout.state_shape)
    with no_autocast(value.device):
        *_, snapshots = _walk(update, merge, value, initial, layout, keep_final=False, keep_snapshots=True, keep_output=False)
        d_update, d_merge, d_value, d_initial = _walk_back(d_output, d_final, update, merge, value, initial, snapshots, layout)
    if packing is not None:
        d_update, d_merge, d_value = (x[:, packing.slot] for x in (d_update, d_merge, d_value))
    d_state = value.new_empty(0) if d_initial is None or state is None else d_initial.view(state.shape).to(state.dtype)
    return d_update.contiguous(), d_merge.contiguous(), d_value.contiguous(), d_state


def _fake_backward(
    d_output: Tensor,
    d_final: Tensor | None,
    update: Tensor,
    merge: Tensor,
    value: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_update, d_merge, d_value = (x.new_empty(x.shape) for x in (update, merge, value))
    return d_update, d_merge, d_value, value.new_empty(0) if state is None else state.new_empty(state.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.keep_final = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


@once_differentiable
def _gradients(ctx: Any, d_output: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
    update, merge, value, state, cu_seqlens = ctx.saved_tensors
    d_output = torch.zeros_like(value) if d_output is None else d_output
    d_final = d_final if ctx.keep_final else None
    *found, d_state = torch.ops.factorization_memory.chunked_backward.default(
        d_output, d_final, update, merge, value, state, cu_seqlens
    )
    return *found, None if state is None else d_state, None, None


_SHARED = "Tensor update, Tensor merge, Tensor value, Tensor? state, Tensor? cu_seqlens"
torch.library.define("factorization_memory::chunked", f"({_SHARED}, bool keep_final) -> (Tensor, Tensor)")
torch.library.define(
    "factorization_memory::chunked_backward",
    f"(Tensor d_output, Tensor? d_final, {_SHARED}) -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.impl("factorization_memory::chunked", "default", _forward)
torch.library.impl("factorization_memory::chunked_backward", "default", _backward)
torch.library.register_fake("factorization_memory::chunked", _fake_forward)
torch.library.register_fake("factorization_memory::chunked_backward", _fake_backward)
torch.library.register_autograd("factorization_memory::chunked", _gradients, setup_context=_setup_context)

_operator = torch.ops.factorization_memory.chunked.default
