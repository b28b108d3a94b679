"""The sparse recurrence, compiled for the CPU by Numba: a token reads and writes the rows of its selected states alone.

Every function works on a block of columns of a range of lanes, so that several threads share a call; all release the GIL.
Sums alone may be reordered, which lets them use vector instructions: elsewhere the compiler would turn (1 - theta) h + theta v
into h + theta (v - h), which is not v at theta = 1.

Shapes: B sequences, T tokens, H heads, M memory states, K states that a token updates, R that it merges, D value width of a
head, N packed sequences (N = B unless packed), S slots of a pooled state; W columns of a block; a lane is a head of a sequence,
N H in all.
"""

import numpy as np

from factorization_memory.ops.runtime.loops import compiled, reordered


@reordered
def dot(a, b):
    """sum a b."""
    total = a.dtype.type(0)
    for d in range(a.shape[0]):
        total += a[d] * b[d]
    return total


@reordered
def dot_difference(a, b, c):
    """sum a (b - c)."""
    total = a.dtype.type(0)
    for d in range(a.shape[0]):
        total += a[d] * (b[d] - c[d])
    return total


@compiled
def forward(
    theta,  # update weights, [B, T, H, K]
    phi,  # merge weights, [B, T, H, R]
    v,  # values, [B, T, H, D]
    updated,  # states that a token updates, int32 [B, T, H, K]
    merged,  # states that it merges, int32 [B, T, H, R]
    sequences,  # row, first token and end of each sequence, and its first snapshot, int64 [N, 4]
    initial,  # h_0, [N, H, M, D]; unread without has_initial
    has_initial,
    output,  # y, [B, T, H, D]
    final,  # states after the last token, [N, H, M, D]; unwritten without keep_final
    keep_final,
    snapshots,  # states after every `interval` tokens, [.., H, M, D]; unwritten if interval is 0
    interval,
    num_states,
    lanes,  # first lane and end
    columns,  # first column and end
):
    """The recurrence over whole sequences."""
    heads, first_column, end_column = v.shape[2], columns[0], columns[1]
    width = end_column - first_column
    h = np.empty((num_states, width), dtype=v.dtype)
    y = np.empty(width, dtype=v.dtype)
    for lane in range(lanes[0], lanes[1]):
        n, head = lane // heads, lane % heads
        row, start, end, snapshot = sequences[n]
        if has_initial:
            h[:] = initial[n, head, :, first_column:end_column]
        else:
            h[:] = 0
        for t in range(start, end):
            if interval > 0 and t > start and (t - start) % interval == 0:
                snapshots[snapshot, head, :, first_column:end_column] = h
                snapshot += 1
            v_t = v[row, t, head, first_column:end_column]
            for k in range(updated.shape[3]):
                weight, h_j = theta[row, t, head, k], h[updated[row, t, head, k]]
                kept = 1 - weight
                for d in range(width):
                    h_j[d] = kept * h_j[d] + weight * v_t[d]
            y[:] = 0
            for r in range(merged.shape[3]):
                weight, h_j = phi[row, t, head, r], h[merged[row, t, head, r]]
                for d in range(width):
                    y[d] += weight * h_j[d]
            output[row, t, head, first_column:end_column] = y
        if keep_final:
            final[n, head, :, first_column:end_column] = h


@compiled
def backward(
    d_output,  # dy, [B, T, H, D]
    d_final,  # gradient of the final states, [N, H, M, D]; unread without has_final
    has_final,
    theta,  # as in forward, like the next ten
    phi,
    v,
    updated,
    merged,
    sequences,
    initial,
    has_initial,
    snapshots,
    interval,
    num_states,
    d_theta,  # the block's part of the gradient of update weights, [B, T, H, K]
    d_phi,  # the block's part of the gradient of merge weights, [B, T, H, R]
    d_v,  # gradient of values, [B, T, H, D]
    d_initial,  # gradient of the initial states, [N, H, M, D]; unwritten without has_initial
    lanes,
    columns,
):
    """Gradients: each stretch forward again from its snapshot, then back."""
    heads, first_column, end_column = v.shape[2], columns[0], columns[1]
    width = end_column - first_column
    h, d_h = np.empty((num_states, width), dtype=v.dtype), np.empty((num_states, width), dtype=v.dtype)
    overwritten = np.empty((interval, updated.shape[3], width), dtype=v.dtype)
    d_v_t = np.empty(width, dtype=v.dtype)
    for lane in range(lanes[0], lanes[1]):
        n, head = lane // heads, lane % heads
        row, start, end, snapshot = sequences[n]
        if has_final:
            d_h[:] = d_final[n, head, :, first_column:end_column]
        else:
            d_h[:] = 0
        for part in range((end - start + interval - 1) // interval - 1, -1, -1):
            first = start + part * interval
            last = min(first + interval, end)
            # Forward again, keeping what each token overwrites.
            if part > 0:
                h[:] = snapshots[snapshot + part - 1, head, :, first_column:end_column]
            elif has_initial:
                h[:] = initial[n, head, :, first_column:end_column]
            else:
                h[:] = 0
            for t in range(first, last):
                v_t, d_y = v[row, t, head, first_column:end_column], d_output[row, t, head, first_column:end_column]
                for k in range(updated.shape[3]):
                    weight, h_j = theta[row, t, head, k], h[updated[row, t, head, k]]
                    kept, before = 1 - weight, overwritten[t - first, k]
                    for d in range(width):
                        before[d] = h_j[d]
                        h_j[d] = kept * h_j[d] + weight * v_t[d]
                for r in range(merged.shape[3]):
                    d_phi[row, t, head, r] = dot(d_y, h[merged[row, t, head, r]])
            for t in range(last - 1, first - 1, -1):
                v_t, d_y = v[row, t, head, first_column:end_column], d_output[row, t, head, first_column:end_column]
                for r in range(merged.shape[3]):
                    weight, d_h_j = phi[row, t, head, r], d_h[merged[row, t, head, r]]
                    for d in range(width):
                        d_h_j[d] += weight * d_y[d]
                d_v_t[:] = 0
                for k in range(updated.shape[3]):
                    weight, d_h_j = theta[row, t, head, k], d_h[updated[row, t, head, k]]
                    kept = 1 - weight
                    d_theta[row, t, head, k] = dot_difference(d_h_j, v_t, overwritten[t - first, k])
                    for d in range(width):
                        d_v_t[d] += weight * d_h_j[d]
                        d_h_j[d] *= kept
                d_v[row, t, head, first_column:end_column] = d_v_t
        if has_initial:
            d_initial[n, head, :, first_column:end_column] = d_h


@compiled
def step(
    theta,  # update weights, [B, T, H, K]
    phi,  # merge weights, [B, T, H, R]
    v,  # values, [B, T, H, D]
    updated,  # states that a token updates, integers [B, T, H, K]
    merged,  # states that it merges, integers [B, T, H, R]
    state,  # h, [S, H, M, D], updated in place
    places,  # slot of each sequence, integers [B]; -1 marks a padding row (output 0)
    undo,  # ring that receives the overwritten rows, [depth, B, T, H, K, D]; unwritten if position is -1
    position,  # entry of the ring to write
    output,  # y, [B, T, H, D]
):
    """A few tokens of each sequence; `state` is updated in place."""
    for b in range(v.shape[0]):
        for t in range(v.shape[1]):
            for head in range(v.shape[2]):
                y = output[b, t, head]
                y[:] = 0
                if places[b] < 0:
                    continue
                h, v_t = state[places[b], head], v[b, t, head]
                for k in range(updated.shape[3]):
                    weight, h_j = theta[b, t, head, k], h[updated[b, t, head, k]]
                    if position >= 0:
                        undo[position, b, t, head, k] = h_j
                    kept = 1 - weight
                    for d in range(v_t.shape[0]):
                        h_j[d] = kept * h_j[d] + weight * v_t[d]
                for r in range(merged.shape[3]):
                    weight, h_j = phi[b, t, head, r], h[merged[b, t, head, r]]
                    for d in range(v_t.shape[0]):
                        y[d] += weight * h_j[d]
