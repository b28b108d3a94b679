"""Correctness of a backend: its outputs and gradients against the reference loop in float64.

Shapes: B sequences, T tokens, H heads, M memory states, K selected states, D value width of a head, N packed sequences.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from factorization_memory.benchmarks.settings import Shape
from factorization_memory.ops import BACKENDS, factorization_memory
from factorization_memory.ops.precision import state_dtype

TRUTH_BYTES = 1 << 30
"""Approximate limit on what the reference loop keeps for its backward pass; on a GPU, a quarter of the free memory."""
TRUTH_COPIES = 5
"""Approximate number of tensors of the memory's size that autograd keeps per token of the loop."""

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}
"""Largest relative error (of a whole tensor, in norm) by dtype of the values; float32 products on a GPU must not be TF32."""


class IncorrectBackendError(RuntimeError):
    """A backend is wrong, so its speed is meaningless. `checks` are the gate's results."""

    def __init__(self, checks: list[dict[str, Any]]) -> None:
        self.checks = checks
        red = [
            f"{result['backend']} at {result['shape']} "
            f"({result['reason'] or 'relative error ' + format(result['error'], '.1e') + ' of ' + result['worst']})"
            for result in checks
            if not result["passed"]
        ]
        super().__init__(f"correctness gate failed, so nothing was timed: {', '.join(red)}")


@dataclass(frozen=True)
class Problem:
    """The arguments of one call, and the gradients of its results."""

    update: Tensor
    merge: Tensor
    value: Tensor
    indices: Tensor | None
    num_states: int
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    d_output: Tensor
    d_final: Tensor

    @classmethod
    def random(
        cls,
        shape: Shape,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        initial_state: bool = False,
        borders: list[int] | None = None,
        seed: int = 0,
        drawn_on: torch.device | str = "cpu",
    ) -> Problem:
        """A problem as a layer poses it: affinities sum to 1 over the states, rates anywhere between 0 and 1; weights and
        states are float32 (float64 with float64 values), values are of `dtype`. Numbers drawn on the CPU are the same on every
        device; a GPU draws its own much faster."""
        random = torch.Generator(drawn_on).manual_seed(seed)
        wide = state_dtype(torch.empty(0, dtype=dtype))
        sequences = shape.batch if borders is None else len(borders) - 1
        tokens = (shape.batch, shape.length, shape.heads)
        states = (sequences, shape.heads, shape.num_states, shape.value_size)
        logits = torch.randn(*tokens, shape.num_states, generator=random, dtype=wide, device=drawn_on)
        indices = None
        if shape.top_k is not None:
            logits, indices = logits.topk(shape.top_k, dim=-1)
        affinity = logits.softmax(-1)
        update, merge = (affinity * torch.rand(affinity.shape, generator=random, dtype=wide, device=drawn_on) for _ in range(2))
        value, d_output = (
            torch.randn(*tokens, shape.value_size, generator=random, dtype=wide, device=drawn_on).to(dtype) for _ in range(2)
        )
        initial, d_final = (torch.randn(states, generator=random, dtype=wide, device=drawn_on) for _ in range(2))
        return cls(
            update,
            merge,
            value,
            indices,
            shape.num_states,
            initial if initial_state else None,
            None if borders is None else torch.tensor(borders, dtype=torch.int32),
            d_output,
            d_final,
        ).to(device)

    def adversarial(self) -> Problem:
        """The problem with update weights at and next to 0 and 1, and merge weights anywhere, some of them 0."""
        random = torch.Generator().manual_seed(1)
        update, merge = (torch.rand(self.update.shape, generator=random) for _ in range(2))
        which = torch.randint(0, 8, update.shape, generator=random)
        for i, level in enumerate((0.0, 1.0, 1e-12, 1 - 1e-7, 1e-4, 0.9999)):
            update = torch.where(which == i, level, update)
        merge = torch.where(which == 7, 0, merge)
        return replace(self, update=update.to(self.update), merge=merge.to(self.merge))

    def to(self, target: torch.device | str | torch.dtype) -> Problem:
        """The problem on another device, or its floating-point numbers in another dtype."""
        tensors: dict[str, Any] = {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}
        if isinstance(target, torch.dtype):
            tensors = {name: x for name, x in tensors.items() if x.is_floating_point()}
        return replace(self, **{name: x.to(target) for name, x in tensors.items()})

    def leaves(self) -> tuple[Tensor, ...]:
        """Tensors that require gradients: update, merge, value and, if given, the initial state."""
        given = (self.update, self.merge, self.value, self.initial_state)
        return tuple(x.detach().requires_grad_() for x in given if x is not None)

    def forward(self, backend: str, leaves: tuple[Tensor, ...], output_final_state: bool = False) -> tuple[Tensor, ...]:
        """The output `[B, T, H, D]` of `leaves` on `backend`, and the final state if asked for."""
        update, merge, value, *initial = leaves
        output, final = factorization_memory(
            update,
            merge,
            value,
            indices=self.indices,
            num_states=self.num_states,
            initial_state=initial[0] if initial else None,
            output_final_state=output_final_state,
            cu_seqlens=self.cu_seqlens,
            backend=backend,
        )
        return (output,) if final is None else (output, final)

    def columns(self, part: slice) -> Problem:
        """The problem restricted to some columns of the values. Columns interact only in the gradients of both weights, which
        are sums over them."""
        return replace(
            self,
            value=self.value[..., part],
            d_output=self.d_output[..., part],
            d_final=self.d_final[..., part],
            initial_state=None if self.initial_state is None else self.initial_state[..., part],
        )

    def solve(self, backend: str) -> dict[str, Tensor]:
        """Output, final state and every gradient, by name."""
        leaves = self.leaves()
        results = self.forward(backend, leaves, output_final_state=True)
        gradients = torch.autograd.grad(results, leaves, (self.d_output, self.d_final))
        names = ("output", "final state", "d_update", "d_merge", "d_value", "d_initial_state")
        return dict(zip(names, (*(x.detach() for x in results), *gradients), strict=False))


def truth(problem: Problem) -> dict[str, Tensor]:
    """Output, final state and every gradient by the reference loop in float64, where the problem lies; on the CPU.

    The loop goes over blocks of columns, so that what it keeps for its backward pass stays near `TRUTH_BYTES`.
    """
    problem = problem.to(torch.float64)
    width = problem.value.shape[-1]
    token_bytes = problem.d_final.numel() // width * 8 * problem.value.shape[1] * TRUTH_COPIES
    limit = TRUTH_BYTES
    if problem.value.is_cuda:  # few wide blocks: the loop's time on a GPU depends on the number of steps, not their width
        limit = max(limit, torch.cuda.mem_get_info(problem.value.device)[0] // 4)
    block = max(1, min(width, limit // max(token_bytes, 1)))
    parts = [problem.columns(slice(start, start + block)).solve("reference") for start in range(0, width, block)]
    result = {}
    for name in parts[0]:
        pieces = [part[name].cpu() for part in parts]
        result[name] = sum(pieces[1:], pieces[0]) if name in ("d_update", "d_merge") else torch.cat(pieces, dim=-1)
    return result


def check(backend: str, problem: Problem) -> dict[str, Any]:
    """How far `backend` is from the float64 reference on `problem`.

    Returns:
        `passed`; `error`, the largest relative error among output, final state and gradients (each tensor's, in norm), and
        `worst`, the tensor it is of; `tolerance`; `seconds` that the backend took; `reason`, the message if it could not run
        or gave a number that is not finite (then `error` is None).
    """
    result: dict[str, Any] = {"passed": False, "error": None, "worst": None, "tolerance": TOLERANCES[problem.value.dtype]}
    start = time.perf_counter()
    try:
        got = {name: x.cpu().double() for name, x in problem.solve(backend).items()}
    except Exception as error:  # any failure of a backend is a result
        reason = f"{type(error).__name__}: {error}"
        return result | {"seconds": time.perf_counter() - start, "reason": reason}
    result["seconds"] = time.perf_counter() - start
    expected = truth(problem)
    unfinite = [name for name, x in got.items() if not bool(x.isfinite().all())]
    if unfinite:
        return result | {"worst": unfinite[0], "reason": f"{unfinite[0]} is not finite"}
    errors = {name: relative_error(got[name], x) for name, x in expected.items()}
    worst = max(errors, key=lambda name: errors[name])
    passed = errors[worst] <= TOLERANCES[problem.value.dtype]
    return result | {"passed": passed, "error": errors[worst], "worst": worst, "reason": None}


def check_backend(backend: str, device: torch.device | str) -> list[dict[str, Any]]:
    """A tiny forward and backward of `backend` on `device` for each form of the recurrence: `check`'s results, each with its
    `backend`, `device`, `case` and `dtype`."""
    dense = Shape(batch=2, length=150, heads=2, num_states=8, value_size=16)
    packed = replace(dense, batch=1, top_k=3)
    cases: list[tuple[str, Problem]] = [
        ("dense", Problem.random(dense, device=device)),
        ("dense, initial state", Problem.random(dense, device=device, initial_state=True)),
        ("sparse", Problem.random(replace(dense, top_k=3), device=device, initial_state=True)),
        ("packed, sparse", Problem.random(packed, device=device, initial_state=True, borders=[0, 1, 70, 70, 150])),
        ("dense, initial state", Problem.random(dense, torch.bfloat16, device, initial_state=True)),
    ]
    sparse_alone = any(one.needs_indices for one in BACKENDS if one.name == backend)
    return [
        {"backend": backend, "device": str(device), "case": case, "dtype": str(problem.value.dtype).removeprefix("torch.")}
        | check(backend, problem)
        for case, problem in cases
        if problem.indices is not None or not sparse_alone
    ]


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Error of a whole tensor, in norm."""
    return float((got - expected).norm() / expected.norm().clamp(min=1e-300))
