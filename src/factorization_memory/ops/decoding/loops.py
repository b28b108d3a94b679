"""Everything between the matmuls of a decoding step, compiled for the CPU by Numba: one call each where PyTorch's operations
would take some forty, of which each costs more than its work.

Shapes: B sequences, d channels, H heads, M memory states, K selected states, D value width of a head, R rates of a head (M or
1), L update lag, I hidden channels of the feed-forward layer.
"""

import math

import numpy as np

from factorization_memory.ops.runtime.loops import compiled, reordered


@compiled
def sigmoid(x):
    """Of a number, in float32."""
    return np.float32(1) / (np.float32(1) + math.exp(-x))


@reordered
def sum_of_squares(x):
    """Of a row."""
    total = np.float32(0)
    for i in range(x.shape[0]):
        total += x[i] * x[i]
    return total


@compiled
def add_and_normalise(
    x,  # in and out: the residual stream, [B, d]
    added,  # what to add to it first, [B, d], or no rows
    weight,  # of the norm, [d]
    eps,
    out,  # [B, d]
):
    """The residual sum, and its RMS norm."""
    size = x.shape[1]
    for b in range(x.shape[0]):
        if added.shape[0]:
            for i in range(size):
                x[b, i] += added[b, i]
        scale = np.float32(1) / math.sqrt(sum_of_squares(x[b]) / np.float32(size) + eps)
        for i in range(size):
            out[b, i] = x[b, i] * scale * weight[i]


@compiled
def glu(
    gate_up,  # both halves, [B, 2 I]
    out,  # silu(gate) * up, [B, I]
):
    """SwiGLU of the two halves of a projection."""
    size = out.shape[1]
    for b in range(out.shape[0]):
        for i in range(size):
            out[b, i] = gate_up[b, i] * sigmoid(gate_up[b, i]) * gate_up[b, size + i]


@compiled
def select(logits, selected):
    """The states of the largest logits `[M]` by descending logit, into `selected` `[K]`; ties go to the lower index, and NaN is
    above any number."""
    count = 0
    for j in range(logits.shape[0]):
        logit = logits[j]
        if count == selected.shape[0]:
            least = logits[selected[count - 1]]
            if not (logit > least or (math.isnan(logit) and not math.isnan(least))):
                continue
            count -= 1
        place = count
        while place > 0:
            above = logits[selected[place - 1]]
            if not (logit > above or (math.isnan(logit) and not math.isnan(above))):
                break
            selected[place] = selected[place - 1]
            place -= 1
        selected[place] = j
        count += 1


@compiled
def memory_layer(
    projected,  # affinity, update rate and merge rate logits, values and, with has_gate, gate logits, [B, ..]
    num_heads,
    num_states,
    rate_bias,  # of the update rates, then of the merge rates, [2 H R]
    temperature,
    tail,  # in and out: last inputs of the convolution, [B, taps - 1, H D]; unread without taps
    taps,  # of the convolution, [taps, H D], or no rows
    taps_bias,  # [H D]
    last_affinity,  # in and out: affinities of the last L tokens, [B, L, H, K]; L = 0 without lag
    last_indices,  # in and out: their states, [B, L, H, K]
    memory,  # in and out, [B, H, M, D]
    norm_weight,  # [H D]
    norm_eps,
    skip,  # [H D], or empty
    has_gate,
    out,  # [B, H D]: the input of the output projection
):
    """The memory layer between its projections: convolution, routing, write, read, norm, skip, gate."""
    lag, top_k, width = last_affinity.shape[1], last_affinity.shape[3], memory.shape[3]
    channels, rates = num_heads * width, rate_bias.shape[0] // (2 * num_heads)
    first_update = num_heads * num_states
    first_merge = first_update + num_heads * rates
    first_value = first_merge + num_heads * rates
    first_gate = first_value + channels
    if last_indices.size and not (last_indices.min() >= 0 and last_indices.max() < num_states):
        raise ValueError("state.indices: contains an index outside the layer's states; read the text again from initial_state")
    value, y = np.empty(channels, np.float32), np.empty(channels, np.float32)
    selected, affinity = np.empty(top_k, np.int64), np.empty(top_k, np.float32)
    for b in range(projected.shape[0]):
        token = projected[b]
        for c in range(channels):
            value[c] = token[first_value + c]
        if taps.shape[0]:
            last = taps.shape[0] - 1
            for c in range(channels):
                total = taps_bias[c] + taps[last, c] * value[c]
                for i in range(last):
                    total += taps[i, c] * tail[b, i, c]
                for i in range(last - 1):
                    tail[b, i, c] = tail[b, i + 1, c]
                if last:
                    tail[b, last - 1, c] = value[c]
                value[c] = total * sigmoid(total)
        for head in range(num_heads):
            logits = token[head * num_states : (head + 1) * num_states]
            h = memory[b, head]
            v, y_head = value[head * width : (head + 1) * width], y[head * width : (head + 1) * width]
            select(logits, selected)
            largest, total = logits[selected[0]], np.float32(0)
            for k in range(top_k):
                affinity[k] = math.exp((logits[selected[k]] - largest) / temperature)
                total += affinity[k]
            for k in range(top_k):
                affinity[k] /= total
            # Write: where the token before has read, or with no lag where this one reads.
            for k in range(top_k):
                j = last_indices[b, 0, head, k] if lag else selected[k]
                rate = head * rates + (j if rates > 1 else 0)
                weight = sigmoid(token[first_update + rate] + rate_bias[rate])
                weight *= last_affinity[b, 0, head, k] if lag else affinity[k]
                kept, h_j = np.float32(1) - weight, h[j]
                for d in range(width):
                    h_j[d] = kept * h_j[d] + weight * v[d]
            if lag:
                for before in range(lag - 1):
                    last_affinity[b, before, head] = last_affinity[b, before + 1, head]
                    last_indices[b, before, head] = last_indices[b, before + 1, head]
                last_affinity[b, lag - 1, head] = affinity
                last_indices[b, lag - 1, head] = selected
            # Read.
            y_head[:] = 0
            for k in range(top_k):
                rate = head * rates + (selected[k] if rates > 1 else 0)
                weight = sigmoid(token[first_merge + rate] + rate_bias[num_heads * rates + rate]) * affinity[k]
                h_j = h[selected[k]]
                for d in range(width):
                    y_head[d] += weight * h_j[d]
        scale = np.float32(1) / math.sqrt(sum_of_squares(y) / np.float32(channels) + norm_eps)
        for c in range(channels):
            result = y[c] * scale * norm_weight[c]
            if skip.shape[0]:
                result += value[c] * skip[c]
            if has_gate:
                gate = token[first_gate + c]
                result *= gate * sigmoid(gate)
            out[b, c] = result
