"""Tunes the Triton kernels' tiles on the current device: kernel by kernel, with the best found so far for the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from factorization_memory.benchmarks.correctness import Problem, check
from factorization_memory.benchmarks.settings import Shape
from factorization_memory.benchmarks.timing import graph_seconds, interleaved_seconds, summary
from factorization_memory.config import ConfigError
from factorization_memory.ops import why_unsupported


def tune(
    shapes: Sequence[Shape],
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
    progress: Callable[[str], None] = lambda what: None,
) -> list[dict[str, Any]]:
    """The fastest tiles at each of `shapes`; they stay chosen for the rest of the process.

    Returns one record per kernel and size that it meets: `kernel`, `chunk` (tokens), `padded` (states), `tile` (the chosen
    one's fields), `shipped` (whether it is the one that ships), and `tried`, seconds of forward and backward with each
    candidate that ran and was right (None otherwise), the shipped one first.

    Raises:
        ConfigError: the kernels cannot run here.
    """
    reason = why_unsupported(torch.empty(0, dtype=dtype, device=device))
    if reason is not None:
        raise ConfigError(f"tune=True: {reason}; tune on the GPU that will run the kernels")
    # Import only after the check above: Triton may be missing.
    from factorization_memory.ops.memory.kernels import plan, tuning

    records: list[dict[str, Any]] = []
    for shape in dict.fromkeys(replace(shape, top_k=None) for shape in shapes):
        problem = Problem.random(shape, dtype, device)
        small = Problem.random(replace(shape, batch=1, length=min(shape.length, 150)), dtype, device, initial_state=True)
        for backward in (False, True):
            made = plan.plan(problem.update, problem.value, None, backward)
            for kernel in tuning.KERNELS:
                key = (kernel, made.layout.chunk, made.padded, made.dtype)
                found = tuning.candidates(*key)
                known = any((r["kernel"], r["chunk"], r["padded"]) == key[:3] for r in records)
                if len(found) < 2 or known or (kernel == "walk" and backward):
                    continue
                progress(f"{len(found)} tiles of {kernel} at {shape}")
                tried = [_seconds(key, tile, problem, small, repeats, device) for tile in found]
                right = [seconds for seconds in tried if seconds is not None]
                best = found[tried.index(min(right))] if right else found[0]
                tuning.CHOSEN[key] = best
                records.append(
                    {
                        "kernel": kernel,
                        "chunk": made.layout.chunk,
                        "padded": made.padded,
                        "tile": asdict(best),
                        "shipped": best == found[0],
                        "tried": tried,
                    }
                )
    return records


def _seconds(
    key: tuple[str, int, int, torch.dtype], tile: Any, problem: Problem, small: Problem, repeats: int, device: torch.device
) -> float | None:
    """Median seconds of forward and backward with a tile; None if it does not run, or not right."""
    from factorization_memory.ops.memory.kernels import tuning

    tuning.CHOSEN[key] = tile
    leaves = problem.leaves()

    def call() -> object:
        (output,) = problem.forward("triton", leaves)
        return torch.autograd.grad(output, leaves, problem.d_output)

    try:
        if not check("triton", small)["passed"]:
            return None
        if device.type == "cuda":  # without the host's part, which is the same for all
            return summary(graph_seconds(call, repeats, device))["median"]
        return summary(interleaved_seconds({"triton": call}, repeats, device)["triton"])["median"]
    except Exception:  # a tile that asks for more than the device has is not a candidate there
        return None
