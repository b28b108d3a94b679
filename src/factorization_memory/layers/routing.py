"""Which memory states the tokens of a layer update and merge.

Shapes: B sequences, T tokens, H heads, M memory states of each head, K selected states.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Routing:
    """Which memory states each token updates and merges, and how strongly.

    Attributes:
        affinity: alpha, `[B, T, H, M]`, or `[B, T, H, K]` with `indices`; sums to 1 over the last dimension.
        update: theta, the same shape.
        merge: phi, the same shape.
        indices: the selected states, int64 `[B, T, H, K]`; None in the dense form.
        num_states: M.
        padding_mask: bool `[B, T]`, False where a token is padding; None if none is.
    """

    affinity: Tensor
    update: Tensor
    merge: Tensor
    indices: Tensor | None
    num_states: int
    padding_mask: Tensor | None = None

    def touched(self, count: int) -> Routing:
        """The same routing of all M states, of the `count` alone that have any weight. Where fewer have, others make up the
        number, the lower index first."""
        is_touched = (self.update != 0) | (self.merge != 0)
        keys = is_touched * self.num_states - torch.arange(self.num_states, device=is_touched.device)
        indices = keys.topk(count, dim=-1).indices
        affinity, update, merge = (weight.gather(-1, indices) for weight in (self.affinity, self.update, self.merge))
        return Routing(affinity, update, merge, indices, self.num_states, self.padding_mask)


def among_all(weights: Tensor, indices: Tensor | None, num_states: int) -> Tensor:
    """Weights of selected states `[..., H, K]` among all, `[..., H, M]`."""
    if indices is None:
        return weights
    return weights.new_zeros(*weights.shape[:-1], num_states).scatter(-1, indices, weights)
