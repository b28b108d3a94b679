"""Correctness of a decoding step: outputs and memory against the reference in float64, and that it can be taken back.

Shapes as in step.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from factorization_memory.benchmarks.correctness import TOLERANCES, relative_error
from factorization_memory.benchmarks.step_contenders import Contender, Tokens, backend_of
from factorization_memory.benchmarks.timing import reason
from factorization_memory.ops import recurrence_undo
from factorization_memory.ops.memory import reference

GATE_STEPS = 3
"""Steps of the correctness gate, one after the other."""
ROUNDED_TOLERANCE = 2e-2
"""Largest relative error of outputs and of the memory's change where the memory is rounded to bfloat16 at each step."""


def check(contender: Contender, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """How far `GATE_STEPS` steps at the contender's size are from the reference in float64, in the first and the last
    sequence; at a sparse size also whether they are taken back to the bit.

    Returns:
        As `correctness.check` without `seconds`, with `backend`, `shape` and `restored` (None in the dense form, whose steps
        are not taken back); the errors are of the outputs and of the memory's change.
    """
    shape, state = contender.shape, contender.state
    tolerance = ROUNDED_TOLERANCE if state == torch.bfloat16 else TOLERANCES[dtype]
    result: dict[str, Any] = {"backend": f"step of a {contender.state_name} memory", "shape": str(shape), "passed": False}
    result |= {"error": None, "worst": None, "tolerance": tolerance, "restored": None, "reason": None}
    try:
        errors, restored = _gate(contender, dtype, device)
    except Exception as error:  # any failure of a step is a result
        return result | {"reason": reason(error)}
    result["restored"] = restored if shape.top_k else None
    unfinite = [name for name, value in errors.items() if not math.isfinite(value)]
    if unfinite:
        return result | {"worst": unfinite[0], "reason": f"{unfinite[0]} is not finite"}
    worst = max(errors, key=lambda name: errors[name])
    result |= {"error": errors[worst], "worst": worst, "passed": restored and errors[worst] <= tolerance}
    return result if restored else result | {"reason": "rolling its steps back does not restore the memory"}


def _gate(contender: Contender, dtype: torch.dtype, device: torch.device) -> tuple[dict[str, float], bool]:
    """Relative errors by name, and whether taking back restored the memory."""
    shape, backend, seed = contender.shape, *backend_of(contender, device)
    # Tokens of steps that are drawn one by one select states that others select too.
    drawn = [Tokens.random(shape, 1, dtype, device) for _ in range(GATE_STEPS)]
    before = torch.randn(shape.batch, shape.heads, shape.num_states, shape.value_size, device=device).to(contender.state)
    state = before.clone()
    aside: dict[str, Tensor] = {}
    if shape.top_k:
        rows = (GATE_STEPS, shape.batch, 1, shape.heads, shape.top_k, shape.value_size)
        aside = {"undo": before.new_empty(rows), "position": torch.zeros(1, dtype=torch.int64, device=device)}
    outputs = []
    for tokens in drawn:
        step_aside = {"undo": aside["undo"][:, :, 0], "position": aside["position"]} if aside else {}
        outputs.append(tokens.step(0, state, backend, seed, **step_aside))
        if aside:
            aside["position"].add_(1).remainder_(GATE_STEPS)
    some = sorted({0, shape.batch - 1})
    truth = before[some].double()
    update, merge, value = (
        torch.stack([getattr(tokens, name)[0, some] for tokens in drawn], 1).double() for name in ("update", "merge", "value")
    )
    chosen = [tokens.indices[0] for tokens in drawn if tokens.indices is not None]
    indices = torch.stack(chosen, 1)[some] if chosen else None
    expected = reference.steps(update, merge, value, indices, None, truth, None, None, None)
    start = before[some].double()
    errors = {
        "output": relative_error(torch.stack(outputs, 1)[some].double(), expected),
        "change": relative_error(state[some].double() - start, truth - start),
    }
    if aside:
        recurrence_undo(state, aside["undo"], torch.stack(chosen)[:, :, None], None, aside["position"], GATE_STEPS)
    return errors, not aside or torch.equal(state, before)
