"""The sparse recurrence on a CPU, token by token in compiled loops.

A token touches K + R rows of the state, whatever M is: a few hundred vector instructions, where the chunked form pays for all
M states. Forward saves the state every `interval` tokens, and backward recomputes the tokens in between, so that memory grows
with T (K + R + D).

Numba is imported, and compiles, at the first call.

Shapes: B sequences, T tokens, H heads, M memory states, K states that a token updates, R that it merges, D value width of a
head, N packed sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from factorization_memory.ops.memory.scan import operators


def forward(
    update: Tensor,
    merge: Tensor,
    value: Tensor,
    indices: Tensor,
    merge_indices: Tensor | None,
    num_states: int,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The sparse recurrence over whole sequences; arguments and results are those of `factorization_memory`."""
    leaves = (update, merge, value, initial_state)
    differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves)
    output, final, _ = torch.ops.factorization_memory.scan.default(
        update,
        merge,
        value,
        indices,
        indices if merge_indices is None else merge_indices,
        initial_state,
        cu_seqlens,
        num_states,
        output_final_state,
        differentiable,
    )
    return output, final if output_final_state else None


def step(
    update: Tensor,
    merge: Tensor,
    value: Tensor,
    indices: Tensor,
    merge_indices: Tensor | None,
    state: Tensor,
    places: Tensor | None,
    undo: Tensor | None,
    position: Tensor | None,
) -> Tensor:
    """A few tokens of each sequence, `state` updated in place: see `reference.steps`; y has value's dtype."""
    merged = indices if merge_indices is None else merge_indices
    # An operator costs more than the step of one sequence.
    run = torch.ops.factorization_memory.scan_step.default if torch.compiler.is_compiling() else operators.step
    return run(update, merge, value, indices, merged, state, places, undo, position)
