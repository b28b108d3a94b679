"""Launching a kernel with less work on the host than Triton's own way, which looks at every argument anew."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from factorization_memory.ops.runtime import interpreted

REMEMBERED = 4096
"""Compiled kernels remembered at most; then all are forgotten, and Triton finds them again."""
ALIGNMENT = 127
"""Bits of an address that a compiled kernel may depend on: Triton looks at the lowest four."""

_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


DEPENDENT_LAUNCH = True
"""Whether kernels of decoding begin before what was launched before has ended, and wait for it inside (programmatic dependent
launch). What other kernels write they load past the L1 cache, which may hold what was there when they began."""


def dependent(early: bool) -> dict[str, bool]:
    """What to give to `launch` for a kernel that may begin early."""
    if not (early and DEPENDENT_LAUNCH) or interpreted():
        return {"EARLY": False}
    return {"EARLY": True, "launch_pdl": True}


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Tensor | int | float | None, num_warps: int, **constants: Any
) -> None:
    """`kernel[grid](*arguments, num_warps=num_warps, **constants)`.

    A kernel that was launched before with the same numbers and constants, and tensors of the same dtypes and alignments, is
    launched again as compiled then. Whatever Triton makes of a number is in its value, so nothing else need be compared.

    Args:
        kernel: a kernel whose parameters are `arguments` and after them `constants`, all given. The first is a tensor.
        grid: programs, in up to three dimensions.
        num_warps: warps of a program.
    """
    sizes = (*grid, 1, 1)[:3]
    key = (
        id(kernel), num_warps, arguments[0].device,  # type: ignore[union-attr]
        *[(x.dtype, x.data_ptr() & ALIGNMENT) if isinstance(x, Tensor) else x for x in arguments], *constants.values(),
    )  # fmt: skip
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
