"""The recurrence of Mamba-2 (state space duality, arXiv 2405.21060) as functions of tensors: checks arguments and picks a
backend.

For each token t and head, with value x, step size dt, decay rate A < 0, input map B and output map C:

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T        y_t = S_t C_t

Shapes: B sequences, T tokens, H heads, P values of a head, G groups of heads that share B and C, N state size.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from factorization_memory.ops.arguments import FLOATS, check_borders, check_state, check_writable, read_borders
from factorization_memory.ops.precision import no_autocast, state_dtype
from factorization_memory.ops.runtime.backends import Backend, choose
from factorization_memory.ops.ssd import chunked, kernels


def ssd(
    x: Tensor,
    dt: Tensor,
    decay_rate: Tensor,
    input_map: Tensor,
    output_map: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The recurrence over whole sequences. Gradients flow to x, dt, decay_rate, both maps and initial_state.

    Args:
        x: `[B, T, H, P]`.
        dt: step sizes, `[B, T, H]`, not negative; a token of step size 0 leaves the state as it is.
        decay_rate: A, `[H]`, not positive.
        input_map: B, `[B, T, G, N]`; G divides H, and neighbouring heads share a group.
        output_map: C, the same shape.
        chunk_size: tokens that "chunked" takes at once; a matter of speed alone.
        initial_state: S_0, `[B, H, P, N]`, or `[N, H, P, N]` for N sequences of `cu_seqlens`; None is zero.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: `[N + 1]` integers, the borders of N sequences packed along T (B = 1); the state is reset at each.
        backend: "reference" (a plain loop, the ground truth), "chunked" (parallel over time, in plain PyTorch; on a GPU never
            compiled), "mamba-ssm" or "fla" (the kernels of these packages, for GPUs), or "auto": of the kernels the first that
            are installed, for bfloat16 and float16 x; chunked elsewhere, as the kernels take float32 with fewer digits.

    Returns:
        y `[B, T, H, P]` in x's dtype; the final state, shaped as `initial_state`, in float32 (float64 for float64 x), or None.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device, an unknown backend, or one that cannot run here; the
            message names the argument, the value and what is accepted.
    """
    _check(x, dt, decay_rate, input_map, output_map)
    if cu_seqlens is not None:
        check_borders(cu_seqlens, x.shape[0], x.shape[1])
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if initial_state is not None:
        check_state(initial_state, "initial_state", (sequences, *x.shape[2:], input_map.shape[3]), x)
    if chunk_size < 1:
        raise ValueError(f"chunk_size: got {chunk_size}, takes 1 or more")
    stateful = initial_state is not None or output_final_state
    chosen = choose(BACKENDS, backend, x, cu_seqlens is not None and stateful)
    return chosen.forward(x, dt, decay_rate, input_map, output_map, chunk_size, initial_state, output_final_state, cu_seqlens)


_uncompiled_chunked = torch.compiler.disable(chunked.forward)


def _compiles_wrongly(x: Tensor) -> bool:
    """Whether a compiled "chunked" would be wrong. On an H200 the code that PyTorch 2.11 generated gave a gradient of dt that
    was off by more than its size, or could not be generated; so on GPUs the form is called from between the graphs."""
    return x.is_cuda and torch.compiler.is_compiling()


@torch.no_grad()
def ssd_step(x: Tensor, dt: Tensor, decay_rate: Tensor, input_map: Tensor, output_map: Tensor, state: Tensor) -> Tensor:
    """One token: `state` `[B, H, P, N]` is updated in place. Shapes as of `ssd`, without T; returns y `[B, H, P]` in x's dtype.
    ValueError as of `ssd`."""
    if x.dim() != 3:
        raise ValueError(f"x: got shape {tuple(x.shape)}, takes one token of each sequence, [B, H, P]")
    _check(x[:, None], dt[:, None], decay_rate, input_map[:, None], output_map[:, None])
    check_state(state, "state", (*x.shape, input_map.shape[2]), x)
    check_writable(state)
    with no_autocast(x.device):
        dtype, groups = state.dtype, input_map.shape[1]
        dt = dt.to(dtype)
        decay = (dt * decay_rate.to(dtype)).exp()
        grouped = state.unflatten(1, (groups, -1))
        value = (x.to(dtype) * dt[..., None]).unflatten(1, (groups, -1))
        state.mul_(decay[..., None, None])
        grouped.addcmul_(value[..., None], input_map.to(dtype)[:, :, None, None])
        y = grouped.flatten(2, 3) @ output_map.to(dtype)[..., None]
        return y.reshape(x.shape).to(x.dtype)


def _check(x: Tensor, dt: Tensor, decay_rate: Tensor, input_map: Tensor, output_map: Tensor) -> None:
    if x.dim() != 4 or x.dtype not in FLOATS:
        raise ValueError(f"x: got {x.dtype} {tuple(x.shape)}, takes [B, T, H, P] of float64, float32, bfloat16 or float16")
    heads = x.shape[2]
    if dt.shape != x.shape[:3]:
        raise ValueError(f"dt: got shape {tuple(dt.shape)}, takes {tuple(x.shape[:3])}, x's [B, T, H]")
    if decay_rate.shape != (heads,):
        raise ValueError(f"decay_rate: got shape {tuple(decay_rate.shape)}, takes {(heads,)}, one for each head of x")
    for name, tensor in (("input_map", input_map), ("output_map", output_map)):
        if tensor.dim() != 4 or tensor.shape[:2] != x.shape[:2] or tensor.shape[2] < 1 or heads % tensor.shape[2]:
            raise ValueError(
                f"{name}: got shape {tuple(tensor.shape)}, takes [B, T, G, N] with [B, T] = {list(x.shape[:2])} as in x, G a "
                f"divisor of {heads} heads"
            )
    if output_map.shape != input_map.shape:
        raise ValueError(f"output_map: got shape {tuple(output_map.shape)}, takes that of input_map, {tuple(input_map.shape)}")
    arguments = {"dt": dt, "decay_rate": decay_rate, "input_map": input_map, "output_map": output_map}
    for name, tensor in arguments.items():
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{name}: got dtype {tensor.dtype}, takes float64, float32, bfloat16 or float16")
        if tensor.device != x.device:
            raise ValueError(f"{name}: is on {tensor.device}, x on {x.device}; move them to one device")


def _reference(
    x: Tensor,
    dt: Tensor,
    decay_rate: Tensor,
    input_map: Tensor,
    output_map: Tensor,
    chunk_size: int,
    initial: Tensor | None,
    keep_final: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The formula as a loop over tokens, sequence by sequence if packed."""
    dtype = state_dtype(x)
    borders = [0, x.shape[1]] if cu_seqlens is None else read_borders(cu_seqlens)
    batch, _, heads, width = x.shape
    share = heads // input_map.shape[2]
    with no_autocast(x.device):
        x_wide, dt, decay_rate = x.to(dtype), dt.to(dtype), decay_rate.to(dtype)
        b, c = (tensor.to(dtype).repeat_interleave(share, dim=2) for tensor in (input_map, output_map))
        outputs, finals = [], []
        for n, (start, stop) in enumerate(pairwise(borders)):
            if initial is None:
                state = x_wide.new_zeros(batch, heads, width, b.shape[-1])
            else:
                state = initial.clone() if cu_seqlens is None else initial[n : n + 1].clone()
            for t in range(start, stop):
                decay = (dt[:, t] * decay_rate).exp()[..., None, None]
                write = (dt[:, t, :, None] * x_wide[:, t])[..., None] * b[:, t, :, None]
                state = decay * state + write
                outputs.append((state * c[:, t, :, None]).sum(-1))
            finals.append(state)
        y = torch.stack(outputs, dim=1).to(x.dtype) if outputs else x.new_zeros(x.shape)
    return y, torch.cat(finals) if keep_final else None


def _chunked(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor | None]:
    return (_uncompiled_chunked if _compiles_wrongly(x) else chunked.forward)(x, *arguments)


def _of_package(package: str) -> Backend:
    """The kernels of a package, for bfloat16 and float16 x where nobody asks for them: they take float32 with fewer digits."""

    def forward(
        x: Tensor, dt: Tensor, decay_rate: Tensor, input_map: Tensor, output_map: Tensor, chunk_size: int, *more: Any
    ) -> tuple[Tensor, Tensor | None]:
        return kernels.forward(package, x, dt, decay_rate, input_map, output_map, *more)

    return Backend(
        package,
        forward,
        needs_gpu=True,
        why_unsupported=lambda x, packed_states: kernels.why_unsupported(package, x, packed_states),
        pays=lambda x, packed_states: x.dtype in (torch.bfloat16, torch.float16),
    )


BACKENDS = (*map(_of_package, kernels.PACKAGES), Backend("chunked", _chunked), Backend("reference", _reference))
"""The fastest first. Their choice depends on x and on whether states go into packed sequences or come out of them."""
