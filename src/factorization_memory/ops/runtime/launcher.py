"""Launches kernels with less host overhead than Triton, which inspects every argument at each launch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from factorization_memory.ops.runtime import interpreted

REMEMBERED = 4096
"""Size of the cache of compiled kernels; when full it is cleared, and Triton looks them up again."""
ALIGNMENT = 127
"""Address bits that a compiled kernel may be specialized on; Triton uses the lowest four."""

_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


DEPENDENT_LAUNCH = True
"""Whether decoding kernels start before the previous kernel has ended, and wait for it inside (programmatic dependent launch).
They load what other kernels write past the L1 cache, which may be stale."""


def dependent(early: bool) -> dict[str, bool]:
    """Arguments of `launch` for a kernel that may start early."""
    if not (early and DEPENDENT_LAUNCH) or interpreted():
        return {"EARLY": False}
    return {"EARLY": True, "launch_pdl": True}


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Tensor | int | float | None, num_warps: int, **constants: Any
) -> None:
    """`kernel[grid](*arguments, num_warps=num_warps, **constants)`.

    Reuses the compiled kernel of an earlier launch with the same numbers and constants, and tensors of the same dtypes and
    alignments. Triton specializes on nothing else.

    Args:
        kernel: a kernel whose parameters are `arguments`, then `constants`, all given. The first is a tensor.
        grid: number of programs in up to three dimensions.
        num_warps: warps per program.
    """
    sizes = (*grid, 1, 1)[:3]
    key = (
        id(kernel),
        num_warps,
        arguments[0].device,  # type: ignore[union-attr]
        *[(x.dtype, x.data_ptr() & ALIGNMENT) if isinstance(x, Tensor) else x for x in arguments],
        *constants.values(),
    )
    found = _compiled.get(key)
    if found is not None:
        compiled, more = found
        compiled[sizes](*arguments, *more)
        return
    compiled = kernel[sizes](*arguments, num_warps=num_warps, **constants)
    if compiled is None:  # interpreted
        return
    if len(_compiled) >= REMEMBERED:
        _compiled.clear()
    _compiled[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
