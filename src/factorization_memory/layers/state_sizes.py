"""The sizes of a memory layer's state, and the functions that create, check and extend it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from factorization_memory import ops
from factorization_memory.layers.state import LayerState, Undo
from factorization_memory.ops.precision import state_dtype

REMEDY = "take one from initial_state or forward of this layer"


@dataclass(frozen=True)
class StateSizes:
    """Sizes of the state of a memory layer."""

    num_heads: int
    """H."""
    num_states: int
    """M."""
    head_size: int
    """D: value width per head."""
    top_k: int | None
    """K; None in the dense form."""
    update_lag: int
    """L."""

    @property
    def selected(self) -> int:
        """States that each token updates: K, or M in the dense form."""
        return self.top_k or self.num_states

    def empty(self, batch_size: int, tail: Tensor | None, weight: Tensor, device: torch.device) -> LayerState:
        """The initial state.

        Args:
            batch_size: B.
            tail: the convolution's initial tail; None without convolution.
            weight: a weight of the layer; its dtype determines that of the memory.
            device: device of the state.
        """
        shape = (batch_size, self.num_heads, self.num_states, self.head_size)
        memory = torch.zeros(shape, dtype=state_dtype(weight), device=device)
        return LayerState(memory, tail, *self.no_selection(batch_size, weight, device))

    def no_selection(self, batch_size: int, weight: Tensor, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """`affinity` and `indices` of the initial state."""
        if not self.update_lag:
            return None, None
        shape = (batch_size, self.update_lag, self.num_heads, self.selected)
        affinity = torch.zeros(shape, dtype=state_dtype(weight), device=device)
        return affinity, None if self.top_k is None else affinity.new_zeros(shape, dtype=torch.int64)

    def keep_undo(self, state: LayerState, steps: int, position: Tensor) -> LayerState:
        """The same state, recording what the next `steps` steps overwrite; `position` as in `Undo`."""
        memory = state.memory
        selected = (steps, memory.shape[0], self.num_heads, self.selected)
        with torch.inference_mode(False):  # steps outside inference mode write to these tensors too
            undo = Undo(
                memory.new_empty(*selected, self.head_size),
                None if self.top_k is None else memory.new_zeros(selected, dtype=torch.int64),
                [tensor.new_empty(steps, *tensor.shape) for tensor in state.rest()],
                position,
            )
        return LayerState(memory, state.convolution, state.affinity, state.indices, undo)

    def check(self, state: LayerState, sequences: int, weight: Tensor) -> None:
        """Raises ValueError unless all of `state` except its convolution tail has these sizes, `sequences` sequences, and the
        dtype and device that match `weight`; reads no values."""
        shape = (sequences, self.num_heads, self.num_states, self.head_size)
        ops.check_state(state.memory, "state.memory", shape, weight)
        found = 0 if state.affinity is None else state.affinity.shape[1]
        if found != self.update_lag:
            raise ValueError(
                f"state.affinity: the state has update_lag={found}, but the layer update_lag={self.update_lag}; read the "
                "text again from initial_state"
            )
        if (state.indices is None) != (self.top_k is None or not self.update_lag):
            said = "no selection" if state.indices is None else f"a selection of {state.indices.shape[-1]}"
            raise ValueError(f"state.indices: the state has {said}, but the layer top_k={self.top_k}; {REMEDY}")
        takes = (sequences, self.update_lag, self.num_heads, self.selected)
        for name, tensor, dtype in (
            ("affinity", state.affinity, state.memory.dtype),
            ("indices", state.indices, torch.int64),
        ):
            if tensor is None:
                continue
            if tensor.shape != takes or tensor.dtype != dtype or tensor.device != state.memory.device:
                got = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
                raise ValueError(f"state.{name}: got {got}, takes {dtype} {takes} on {state.memory.device}; {REMEDY}")
        if state.undo is not None:
            rows = state.undo.rows
            wanted = (len(rows), sequences, self.num_heads, self.selected, self.head_size)
            if rows.shape != wanted:
                raise ValueError(f"state.undo: got rows {tuple(rows.shape)}, takes {wanted}; use a state from keep_undo")
