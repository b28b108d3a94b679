"""Other people's sequence mixers as contenders: built from a problem of the recurrence, at its size or at equal width.

A width W = H * D of values stands for a layer of hidden size W: attention gets W, Mamba-2 its usual 2 W. Inputs are made before
timing starts, in the form that suits the peer best; what a layer computes around them is not counted for anyone.

Shapes: B sequences, T tokens, H heads, M memory states, D value width of a head.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from factorization_memory.benchmarks.correctness import Problem, truth
from factorization_memory.benchmarks.timing import reason

GLA, ATTENTION, SSD = "gla", "attention", "ssd"
LEAST_LOG_DECAY = -20.0
"""`log(1 - theta)` is not finite at a full overwrite; below this a decay is no more than 2e-9."""
GLA_TOLERANCE = 3e-2
"""Relative error in norm up to which `chunk_gla` in bfloat16 counts as computing the same maths."""
ATTENTION_HEAD = 128
"""Width of an attention head, where it divides the whole."""
SSD_EXPAND, SSD_HEAD, SSD_STATE, SSD_CHUNK = 2, 64, 128, 256
"""Mamba-2's inner width over the hidden size, its width of a head, state size and chunk, as its models are configured."""
FLA_REMEDY = "pip install fla-core"
SSD_REMEDY = "pip install mamba-ssm, or fla-core for the same recurrence as chunk_simple_gla"

Function = Callable[..., Tensor]
"""Leaves to the output that has the gradient `d_output`."""


class MissingPeerError(RuntimeError):
    """A peer is not available; the message gives the remedy."""


@dataclass(frozen=True)
class Contender:
    """Something to time: a function of tensors that require gradients."""

    name: str
    function: Function
    leaves: tuple[Tensor, ...]
    d_output: Tensor
    peer: bool = False
    same_maths: bool = True
    """Whether it computes the recurrence, so that the recurrence's bytes and FLOPs are its own."""
    note: str = ""
    """What it is, for people."""

    @torch.no_grad()
    def forward(self) -> Tensor:
        """The output."""
        return self.function(*self.leaves)

    def forward_backward(self) -> tuple[Tensor, ...]:
        """Gradients of all leaves, the output computed for it."""
        output = self.function(*self.leaves)
        return torch.autograd.grad(output, self.leaves, self.d_output)


def build(name: str, problem: Problem) -> Contender:
    """The peer called `name` for a problem without initial state, on the problem's device.

    Raises:
        MissingPeerError: its package is not installed, or it needs a GPU.
        ValueError: it does not come at this size.
    """
    return BUILDERS[name](problem)


def _gla(problem: Problem) -> Contender:
    """`chunk_gla` of fla: with q = phi, k = theta and log decays log(1 - theta) its state is the memory."""
    kernel = _from_fla(problem, "fla.ops.gla", "chunk_gla")
    value = problem.value
    update, merge = problem.update, problem.merge
    if problem.indices is not None:  # it has no sparse form: all states, most of them with weight 0
        dense = (*update.shape[:3], problem.num_states)
        update, merge = (x.new_zeros(dense).scatter(3, problem.indices.long(), x) for x in (update, merge))
    log_decay = torch.log1p(-update).clamp(min=LEAST_LOG_DECAY).float()
    leaves = _leaves(merge.to(value.dtype), update.to(value.dtype), value, log_decay)

    def function(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        return kernel(q, k, v, g, scale=1.0)[0]

    note = "fla chunk_gla on the same maths: q = phi, k = theta, g = log(1 - theta)"
    return Contender(GLA, function, leaves, problem.d_output, peer=True, note=note)


def _attention(problem: Problem) -> Contender:
    """PyTorch's causal attention of equal width."""
    batch, length, heads, width = problem.value.shape
    total = heads * width
    head = next(size for size in range(min(ATTENTION_HEAD, total), 0, -1) if total % size == 0)
    shape = (batch, total // head, length, head)
    q, k, v, d_output = (_normal(shape, problem.value, seed) for seed in range(4))

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    note = f"scaled_dot_product_attention, causal, heads {total // head} x {head}"
    return Contender(ATTENTION, function, _leaves(q, k, v), d_output, peer=True, same_maths=False, note=note)


def _ssd(problem: Problem) -> Contender:
    """Mamba-2's scan of equal width: mamba-ssm's kernels, else fla's of the same recurrence."""
    batch, length, heads, width = problem.value.shape
    inner = SSD_EXPAND * heads * width
    _needs_gpu(problem, SSD)
    if inner % SSD_HEAD:
        raise ValueError(f"inner width {inner} is not a multiple of the head width {SSD_HEAD}")
    tokens, count = (batch, length), inner // SSD_HEAD
    x, d_output = (_normal((*tokens, count, SSD_HEAD), problem.value, seed) for seed in range(2))
    step = nn.functional.softplus(_normal((*tokens, count), problem.value, 2).float() - 4)
    rate = -torch.linspace(1, 16, count, device=x.device)
    inputs, outputs = (_normal((*tokens, 1, SSD_STATE), problem.value, seed) / SSD_STATE**0.5 for seed in (3, 4))
    size = f"inner width {inner}, heads {count} x {SSD_HEAD}, state {SSD_STATE}"
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except Exception as error:  # its compiled parts fail in many ways with an incompatible PyTorch
        why = f"mamba-ssm cannot be imported ({type(error).__name__})"
    else:

        def scan(x: Tensor, step: Tensor, rate: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
            return mamba_chunk_scan_combined(x, step, rate, inputs, outputs, SSD_CHUNK)

        leaves = _leaves(x, step, rate, inputs, outputs)
        note = f"mamba-ssm mamba_chunk_scan_combined, {size}"
        return Contender(SSD, scan, leaves, d_output, peer=True, same_maths=False, note=note)

    kernel = _from_fla(problem, "fla.ops.simple_gla", "chunk_simple_gla", SSD_REMEDY)
    # It has no inputs and outputs shared by heads, as Mamba-2 has: they are written out for each head beforehand.
    spread = (*tokens, count, SSD_STATE)
    leaves = _leaves(
        outputs.expand(spread).contiguous(), inputs.expand(spread).contiguous(), x * step[..., None].to(x.dtype), step * rate
    )

    def simple(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        return kernel(q, k, v, g=g, scale=1.0)[0]

    note = f"fla chunk_simple_gla, Mamba-2's recurrence with B and C written out for each head, {size}; {why}"
    return Contender(SSD, simple, leaves, d_output, peer=True, same_maths=False, note=note)


BUILDERS: dict[str, Callable[[Problem], Contender]] = {GLA: _gla, ATTENTION: _attention, SSD: _ssd}
PEERS = tuple(BUILDERS)


def same_maths(name: str, problem: Problem) -> dict[str, Any]:
    """How far a peer that computes the recurrence is from the float64 reference: `peer`, the output's relative `error` in norm,
    `tolerance`, `passed`, and `reason` where it could not run (then `error` is None).

    To be called after the peer was timed: its kernels choose their configuration at the first size they meet, and this one
    is small.
    """
    result: dict[str, Any] = {"peer": name, "error": None, "tolerance": GLA_TOLERANCE, "passed": False, "reason": None}
    try:
        got = build(name, problem).forward().cpu().double()
    except Exception as error:  # a peer's trouble is its own
        return result | {"reason": reason(error)}
    expected = truth(problem)["output"]
    if not bool(got.isfinite().all()):
        return result | {"reason": "its output is not finite"}
    off = float((got - expected).norm() / expected.norm())
    return result | {"error": off, "passed": off <= GLA_TOLERANCE}


def _from_fla(problem: Problem, module: str, function: str, remedy: str = FLA_REMEDY) -> Any:
    _needs_gpu(problem, module)
    import importlib

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks of another package's imports
            return getattr(importlib.import_module(module), function)
    except ImportError as error:
        raise MissingPeerError(f"{module}.{function} is not installed ({error}); {remedy}") from None


def _needs_gpu(problem: Problem, what: str) -> None:
    if problem.value.device.type != "cuda":
        raise MissingPeerError(f"{what} runs only on a GPU")


def _normal(shape: tuple[int, ...], like: Tensor, seed: int) -> Tensor:
    random = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(shape, generator=random, device=like.device, dtype=torch.float32).to(like.dtype)


def _leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.detach().requires_grad_() for x in tensors)
