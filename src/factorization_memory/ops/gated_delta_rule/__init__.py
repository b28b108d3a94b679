"""The recurrence of Gated DeltaNet (arXiv 2412.06464, equation 10) as functions of tensors: checks arguments and picks a
backend.

For each token t and head, with query q, key k, value v, log decay g <= 0 and write strength beta:

    S_t = exp(g_t) S_{t-1} + beta_t k_t (v_t - (exp(g_t) S_{t-1})^T k_t)^T        o_t = scale S_t^T q_t

A write replaces a fraction beta of what the decayed state returns for the key with the value. Keys are expected to have norm
1.

Shapes: B sequences, T tokens, H value heads, G key heads that divide H, K width of a key, V width of a value.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from factorization_memory.ops.arguments import FLOATS, check_borders, check_state, check_writable, read_borders
from factorization_memory.ops.autograd import call_once_differentiable
from factorization_memory.ops.gated_delta_rule import chunked
from factorization_memory.ops.precision import no_autocast, state_dtype
from factorization_memory.ops.runtime.backends import Backend, choose
from factorization_memory.ops.ssd.kernels import fla_refusal

FLA_MAX_KEY_WIDTH = 256
"""Widest key that fla's kernels support."""


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The recurrence over whole sequences. Gradients flow to q, k, v, g, beta and initial_state.

    Args:
        q: queries, `[B, T, G, K]`; G divides H, and neighbouring value heads share a key head.
        k: keys, same shape as q, of norm at most 1.
        v: values, `[B, T, H, V]`.
        g: natural logarithm of the decay, `[B, T, H]`, not positive.
        beta: write strength, `[B, T, H]`, 0 to 1. A token with g = 0 and beta = 0 leaves the state unchanged.
        scale: multiplies the outputs; None means `K ** -0.5`.
        initial_state: S_0, `[B, H, K, V]`, or `[N, H, K, V]` for N sequences of `cu_seqlens`; None is zero.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: `[N + 1]` integers, the borders of N sequences packed along T (B = 1); the state is reset at each.
        backend: "reference" (a plain loop, the ground truth), "chunked" (parallel over time, in plain PyTorch), "fla" (the
            kernels of flash-linear-attention, for GPUs; a graph break under `torch.compile`), or "auto": fla where it is
            installed, for bfloat16 and float16 v on a GPU; chunked elsewhere.

    Returns:
        o `[B, T, H, V]` in v's dtype; the final state, shaped as `initial_state`, in float32 (float64 for float64 v), or None.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device, an unknown backend, or one that cannot run here; the
            message names the argument, the value and what is accepted.
    """
    _check(q, k, v, g, beta)
    if cu_seqlens is not None:
        check_borders(cu_seqlens, v.shape[0], v.shape[1])
    if initial_state is not None:
        sequences = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        check_state(initial_state, "initial_state", (sequences, v.shape[2], k.shape[3], v.shape[3]), v)
    run = choose(BACKENDS, backend, v, k).forward
    share = v.shape[2] // k.shape[2]
    q, k = (_shared(tensor, share) for tensor in (q, k))
    scale = k.shape[3] ** -0.5 if scale is None else scale
    return run(q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens)


@torch.no_grad()
def gated_delta_rule_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, scale: float | None = None
) -> Tensor:
    """One token: `state` `[B, H, K, V]` is updated in place. Shapes as in `gated_delta_rule`, without T; returns o `[B, H, V]`
    in v's dtype. Raises ValueError as `gated_delta_rule` does."""
    if v.dim() != 3:
        raise ValueError(f"v: got shape {tuple(v.shape)}, takes one token per sequence, [B, H, V]")
    _check(*(x[:, None] for x in (q, k, v, g, beta)))
    check_state(state, "state", (*v.shape[:2], k.shape[2], v.shape[2]), v)
    check_writable(state)
    with no_autocast(v.device):
        dtype, share = state.dtype, v.shape[1] // k.shape[1]
        query, key = (_shared(tensor, share, dim=1).to(dtype) for tensor in (q, k))
        state.mul_(g.to(dtype).exp()[..., None, None])
        write = beta.to(dtype)[..., None] * (v.to(dtype) - (key[:, :, None] @ state)[:, :, 0])
        state.addcmul_(key[..., None], write[:, :, None])
        scale = k.shape[2] ** -0.5 if scale is None else scale
        return (scale * (query[:, :, None] @ state)[:, :, 0]).to(v.dtype)


def _shared(tensor: Tensor, share: int, dim: int = 2) -> Tensor:
    """Repeats each key head for the value heads that share it."""
    return tensor if share == 1 else tensor.repeat_interleave(share, dim=dim)


def _check(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> None:
    if v.dim() != 4 or v.dtype not in FLOATS:
        raise ValueError(f"v: got {v.dtype} {tuple(v.shape)}, takes [B, T, H, V] of float64, float32, bfloat16 or float16")
    heads = v.shape[2]
    if k.dim() != 4 or k.shape[:2] != v.shape[:2] or k.shape[2] < 1 or heads % k.shape[2] or k.shape[3] < 1:
        raise ValueError(
            f"k: got shape {tuple(k.shape)}, takes [B, T, G, K] with [B, T] = {list(v.shape[:2])} as in v, G a divisor of "
            f"{heads} heads"
        )
    if q.shape != k.shape:
        raise ValueError(f"q: got shape {tuple(q.shape)}, takes the shape of k, {tuple(k.shape)}")
    for name, tensor in (("g", g), ("beta", beta)):
        if tensor.shape != v.shape[:3]:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, takes {tuple(v.shape[:3])}, v's [B, T, H]")
    for name, tensor in {"q": q, "k": k, "g": g, "beta": beta}.items():
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{name}: got dtype {tensor.dtype}, takes float64, float32, bfloat16 or float16")
        if tensor.device != v.device:
            raise ValueError(f"{name}: is on {tensor.device}, v on {v.device}; move them to one device")


def why_not_fla(k: Tensor, v: Tensor) -> str | None:
    """Why fla's kernels cannot run on these keys and values; None if they can."""
    if v.dtype not in (torch.bfloat16, torch.float16):
        return f"v has dtype {v.dtype}, the kernels take bfloat16 or float16"
    if not v.is_cuda:
        return f"v is on {v.device}, the kernels need a GPU"
    if v.numel() == 0:
        return f"v is empty, {tuple(v.shape)}"
    if k.shape[3] > FLA_MAX_KEY_WIDTH:
        return f"k is of width {k.shape[3]}, the kernels take at most {FLA_MAX_KEY_WIDTH}"
    return _missing() or (None if _tilelang() else fla_refusal(str(v.device)))


@torch.compiler.assume_constant_result
def _missing() -> str | None:
    """Why fla cannot be imported; None if it can."""
    found = _find()
    return found if isinstance(found, str) else None


@torch.compiler.assume_constant_result
def _tilelang() -> bool:
    """Whether fla has TileLang for the backward kernel that it refuses to run in Triton on GPUs of capability 9."""
    try:
        return importlib.import_module("fla.ops.common.backends.tilelang").CommonTileLangBackend.can_use()
    except Exception:  # other fla versions have it elsewhere, or lack it
        return False


@lru_cache(maxsize=1)
def _find() -> Callable[..., Any] | str:
    """fla's kernels, or why they are missing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # emitted by another package's imports
            return importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    except Exception as error:  # extensions built for another PyTorch fail in many ways
        reason = f"{type(error).__name__}: {error}"
        return f"fla.ops.gated_delta_rule cannot be imported ({reason}); pip install fla-core"


@torch.compiler.disable
def _fla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    initial: Tensor | None,
    keep_final: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """fla's kernels, which need queries, keys and values of one dtype, and int64 borders."""
    kernels: Any = _find()
    with no_autocast(v.device):
        # Pass int64 borders on v's device unchanged: fla caches what it reads from a tensor, across layers.
        borders = None if cu_seqlens is None else cu_seqlens.to(v.device, torch.int64)

        def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial: Tensor | None) -> Any:
            return kernels(
                q=q,
                k=k,
                v=v,
                g=g,
                beta=beta,
                scale=scale,
                initial_state=initial,
                output_final_state=keep_final,
                use_qk_l2norm_in_kernel=False,
                cu_seqlens=borders,
            )

        y, final = call_once_differentiable(run, q.to(v.dtype), k.to(v.dtype), v, g.float(), beta.float(), initial)
    assert y is not None
    return y, None if final is None or not keep_final else final.float()


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    initial: Tensor | None,
    keep_final: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The formula as a loop over tokens, sequence by sequence if packed."""
    dtype, result = state_dtype(v), v.dtype
    borders = [0, v.shape[1]] if cu_seqlens is None else read_borders(cu_seqlens)
    with no_autocast(v.device):
        q, k, v, g, beta = (tensor.to(dtype) for tensor in (q, k, v, g, beta))
        outputs, finals = [], []
        for n, (start, stop) in enumerate(pairwise(borders)):
            if initial is None:
                state = v.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3])
            else:
                state = initial.clone() if cu_seqlens is None else initial[n : n + 1].clone()
            for t in range(start, stop):
                state = g[:, t].exp()[..., None, None] * state
                read = (state * k[:, t, :, :, None]).sum(2)
                write = beta[:, t, :, None] * (v[:, t] - read)
                state = state + k[:, t, :, :, None] * write[:, :, None]
                outputs.append(scale * (state * q[:, t, :, :, None]).sum(2))
            finals.append(state)
        y = torch.stack(outputs, dim=1) if outputs else v.clone()
    return y.to(result), torch.cat(finals) if keep_final else None


BACKENDS = (
    Backend("fla", _fla, needs_gpu=True, why_unsupported=lambda v, k: why_not_fla(k, v)),
    Backend("chunked", chunked.forward),
    Backend("reference", _reference),
)
"""Fastest first."""
