"""Mamba-2's recurrence with the GPU kernels of other packages: mamba-ssm's own, or those of flash-linear-attention (fla) for
the same recurrence. They are imported at the first call.

Under `torch.compile` they are an opaque operator, as neither can be traced; its backward reruns the kernels' forward.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from factorization_memory.ops import runtime
from factorization_memory.ops.autograd import call_once_differentiable
from factorization_memory.ops.precision import no_autocast
from factorization_memory.ops.recomputed import recomputed_operator
from factorization_memory.ops.ssd.chunked import log_decays

PACKAGES = {
    "mamba-ssm": ("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined", "mamba-ssm"),
    "fla": ("fla.ops.simple_gla", "chunk_simple_gla", "fla-core"),
}
"""Backend -> module, function, and name of the package to install; the first is preferred."""
FLA_HOPPER_TRITON = (3, 7, 1)
"""Oldest Triton with which fla's gated kernels run on GPUs of capability 9; from 3.4 up to it they refuse."""
MAMBA_CHUNK = 256
"""Tokens per chunk of mamba-ssm's kernels: its own default. fla's use 64."""


def why_unsupported(backend: str, x: Tensor, packed_states: bool) -> str | None:
    """Why these kernels cannot run on x; None if they can. `packed_states`: whether packed sequences have initial or final
    states."""
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"x has dtype {x.dtype}, the kernels take bfloat16, float16 or float32"
    if not x.is_cuda:
        return f"x is on {x.device}, the kernels need a GPU"
    if x.numel() == 0:
        return f"x is empty, {tuple(x.shape)}"
    if backend == "mamba-ssm" and packed_states:
        return "it has no gradients for the states of packed sequences"
    if backend == "fla" and (reason := fla_refusal(str(x.device))) is not None:
        return reason
    return _missing(backend)


@torch.compiler.assume_constant_result
def fla_refusal(device: str) -> str | None:
    """Why fla would refuse to run, which it reports only in backward; None if it would run."""
    if torch.cuda.get_device_capability(device)[0] != 9:
        return None
    version = runtime.triton_version()
    if version is not None and (3, 4, 0) <= runtime.version_numbers(version) < FLA_HOPPER_TRITON:
        return f"its gradients are wrong on this GPU with Triton {version}; pip install 'triton>=3.7.1'"
    return None


@torch.compiler.assume_constant_result
def _missing(backend: str) -> str | None:
    """Why the package cannot be imported; None if it can."""
    found = _find(backend)
    return found if isinstance(found, str) else None


@lru_cache(maxsize=len(PACKAGES))
def _find(backend: str) -> Callable[..., Any] | str:
    """The kernels' function, or why it is missing."""
    module, function, name = PACKAGES[backend]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # emitted by another package's imports
            return getattr(importlib.import_module(module), function)
    except Exception as error:  # extensions built for another PyTorch fail in many ways
        return f"{module} cannot be imported ({type(error).__name__}: {error}); pip install {name}"


def forward(
    backend: str,
    x: Tensor,
    dt: Tensor,
    decay_rate: Tensor,
    input_map: Tensor,
    output_map: Tensor,
    initial: Tensor | None,
    keep_final: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence over whole sequences; arguments and results as in `ssd.ssd`."""
    run = _operator if torch.compiler.is_compiling() else _run_once
    with no_autocast(x.device):
        # The same tensor for every layer: fla caches what it reads from it.
        borders = None if cu_seqlens is None else cu_seqlens.to(x.device)
        input_map, output_map = input_map.to(x.dtype), output_map.to(x.dtype)
        if backend == "mamba-ssm":
            dt, decay_rate = dt.float(), decay_rate.float()
            if borders is not None:  # it expects the sequence of each token
                tokens = torch.arange(x.shape[1], device=x.device)
                borders = torch.bucketize(tokens, borders[1:].long(), right=True).int()[None]
            y, final = run(x, dt, input_map, output_map, decay_rate, initial, borders, backend, keep_final)
        else:
            value = (x * dt.float()[..., None]).to(x.dtype)
            share = x.shape[2] // input_map.shape[2]
            input_map, output_map = (tensor.repeat_interleave(share, dim=2) for tensor in (input_map, output_map))
            initial = None if initial is None else initial.mT.contiguous()
            logs = log_decays(dt, decay_rate, torch.float32)
            y, final = run(value, logs, input_map, output_map, None, initial, borders, backend, keep_final)
            final = None if final is None else final.mT.contiguous()
    return y, final


def _run_once(*arguments: Any) -> tuple[Tensor, Tensor | None]:
    """`_run` with an error on double backward, which the kernels would compute wrongly."""
    tensors, options = arguments[:6], arguments[6:]
    y, final = call_once_differentiable(lambda *given: _run(*cast(Any, given), *options), *tensors)
    assert y is not None
    return y, final


def _run(
    value: Tensor,
    decay: Tensor,
    input_map: Tensor,
    output_map: Tensor,
    rate: Tensor | None,
    initial: Tensor | None,
    borders: Tensor | None,
    backend: str,
    keep_final: bool,
) -> tuple[Tensor, Tensor | None]:
    """Runs the kernels, given each one's own inputs. Returns y and the final state, None unless requested.

    Args:
        value: x for mamba-ssm, dt x for fla, `[B, T, H, P]`.
        decay: dt for mamba-ssm, dt A for fla, float32 `[B, T, H]`.
        input_map, output_map: `[B, T, G, N]` for mamba-ssm, `[B, T, H, N]` for fla.
        rate: A `[H]` for mamba-ssm.
        initial: `[B, H, P, N]` for mamba-ssm, `[B, H, N, P]` for fla, float32.
        borders: sequence of each token, int32 `[1, T]`, for mamba-ssm; `[N + 1]` for fla.
    """
    kernels: Any = _find(backend)
    final = None
    with no_autocast(value.device):
        if backend == "mamba-ssm":
            result = kernels(
                value,
                decay,
                rate,
                input_map,
                output_map,
                MAMBA_CHUNK,
                initial_states=initial,
                seq_idx=borders,
                return_final_states=keep_final,
            )
            y, final = result if keep_final else (result, None)
        else:
            y, final = kernels(
                q=output_map,
                k=input_map,
                v=value,
                g=decay,
                scale=1.0,
                initial_state=initial,
                output_final_state=keep_final,
                cu_seqlens=borders,
            )
    return y, None if final is None else final.float()


def _state_shape(
    value: Tensor,
    decay: Tensor,
    input_map: Tensor,
    output_map: Tensor,
    rate: Tensor | None,
    initial: Tensor | None,
    borders: Tensor | None,
    backend: str,
) -> tuple[int, ...]:
    batch, _, heads, width = value.shape
    size = input_map.shape[3]
    if backend == "mamba-ssm":
        return batch, heads, width, size
    return batch if borders is None else borders.shape[0] - 1, heads, size, width


_operator = recomputed_operator(
    "ssd",
    ("value", "decay", "input_map", "output_map", "rate?", "initial?", "borders?"),
    ("str backend",),
    _run,
    "value",
    _state_shape,
)
