"""Which writes each token reads: the memory's counterpart of an attention map."""

from __future__ import annotations

import torch
from torch import Tensor

from factorization_memory.layers import Routing


def writes_read(routing: Routing) -> Tensor:
    """How strongly token t reads what token s wrote to memory, from the routing of sequences that start from empty memory.

        P[t, s] = sum_j phi_tj theta_sj prod_{r = s+1..t} (1 - theta_rj)

    Returns P, float64 `[B, H, T, T]`, zero for s > t: the merged vectors are `P @ v` (docs/method.md, "Parallel over time").
    Takes O(T² M) memory and time, so use it for short sequences.
    """
    update, merge = (weights.double().transpose(1, 2) for weights in routing.of_all_states())  # [B, H, T, M]
    length = update.shape[2]
    reads = update.new_zeros(*update.shape[:2], length, length)
    written = torch.zeros_like(update)  # for each token s, what remains of its write in each state
    for t in range(length):
        written = written * (1 - update[:, :, t, None])
        written[:, :, t] = update[:, :, t]
        reads[:, :, t] = (written @ merge[:, :, t, :, None])[..., 0]
    return reads
