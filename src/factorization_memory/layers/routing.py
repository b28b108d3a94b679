"""Which memory states the tokens of a layer update and merge.

Shapes: B sequences, T tokens, H heads, M memory states of each head, K selected states, R states merged
where those are others.
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
        merge: phi, the same shape, or `[B, T, H, R]` with `merge_indices`.
        indices: the selected states, int64 `[B, T, H, K]`; None in the dense form.
        num_states: M.
        padding_mask: bool `[B, T]`, False where a token is padding; None if none is.
        merge_indices: the states that are merged, int64 `[B, T, H, R]`; None if they are those that are updated.
    """

    affinity: Tensor
    update: Tensor
    merge: Tensor
    indices: Tensor | None
    num_states: int
    padding_mask: Tensor | None = None
    merge_indices: Tensor | None = None

    def of_all_states(self) -> tuple[Tensor, Tensor]:
        """Update and merge weights of all states, `[B, T, H, M]`; zero for those not selected."""
        merged = self.indices if self.merge_indices is None else self.merge_indices
        return over_states(self.update, self.indices, self.num_states), over_states(self.merge, merged, self.num_states)

    def as_one_selection(self, size: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Update weights, merge weights and the selected states, as the recurrence takes them: with one selection for both.

        Args:
            size: states of the selection where updated and merged ones are not the same, K + R or more, M at most; None for all
                states, without indices.

        Returns:
            `[B, T, H, size]` each; where updated and merged states are the same, what there is.
        """
        if self.merge_indices is None:
            return self.update, self.merge, self.indices
        update, merge = self.of_all_states()
        if size is None:
            return update, merge, None
        selected = (update != 0) | (merge != 0)
        # Where fewer are, others make up the number, the lower index first.
        keys = selected * self.num_states - torch.arange(self.num_states, device=selected.device)
        indices = keys.topk(size, dim=-1).indices
        return update.gather(-1, indices), merge.gather(-1, indices), indices


def over_states(weights: Tensor, indices: Tensor | None, num_states: int) -> Tensor:
    """Weights of selected states `[..., K]` among all, `[..., M]`."""
    if indices is None:
        return weights
    return weights.new_zeros(*weights.shape[:-1], num_states).scatter(-1, indices, weights)
