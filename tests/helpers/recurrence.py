"""Arguments of the recurrence for tests, and their results by any backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from factorization_memory.ops import factorization_memory


@dataclass
class Case:
    """Arguments of one call, and the output gradients to test with."""

    update: Tensor
    merge: Tensor
    value: Tensor
    initial: Tensor | None
    indices: Tensor | None
    merge_indices: Tensor | None
    borders: Tensor | None
    num_states: int
    d_output: Tensor
    d_final: Tensor

    def run(self, backend: str, dtype: torch.dtype = torch.float64, device: str = "cpu") -> list[Tensor]:
        """Output, final state, gradients of update, merge, value (and initial state), in float64 on the CPU."""
        leaves = [x.to(device, dtype).requires_grad_() for x in (self.update, self.merge, self.value)]
        if self.initial is not None:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            leaves.append(self.initial.to(device, wide).requires_grad_())
        chosen = {name: None if (x := getattr(self, name)) is None else x.to(device) for name in ("indices", "merge_indices")}
        borders = None if self.borders is None else self.borders.to(device)
        y, final = factorization_memory(
            *leaves[:3],
            **chosen,
            num_states=self.num_states,
            initial_state=leaves[3] if self.initial is not None else None,
            output_final_state=True,
            cu_seqlens=borders,
            backend=backend,
        )
        assert final is not None
        loss = (y.double() * self.d_output.to(device)).sum() + (final.double() * self.d_final.to(device)).sum()
        return [x.detach().double().cpu() for x in (y, final, *torch.autograd.grad(loss, leaves))]


def gates(shape: tuple[int, ...], kind: str) -> Tensor:
    """Update weights: anything in [0, 1], or mostly at and next to its ends."""
    theta = torch.rand(shape, dtype=torch.float64)
    if kind == "adversarial":
        choice = torch.randint(0, 8, shape)
        for i, level in enumerate((0.0, 1.0, 1e-12, 1 - 1e-12, 1e-4, 0.9999)):
            theta[choice == i] = level
    return theta


def make(
    batch: int, length: int, heads: int, num_states: int, width: int, top_k: int | None = None, kind: str = "uniform",
    with_initial: bool = True, borders: list[int] | None = None, seed: int = 0, merge_top_k: int | None = None,
) -> Case:  # fmt: skip
    torch.manual_seed(seed)
    sequences = batch if borders is None else len(borders) - 1
    lead = (batch, length, heads)
    weights = (*lead, top_k or num_states)
    double = torch.float64
    return Case(
        update=gates(weights, kind),
        merge=torch.rand((*lead, merge_top_k or weights[-1]), dtype=double),
        value=torch.randn(batch, length, heads, width, dtype=double),
        initial=torch.randn(sequences, heads, num_states, width, dtype=double) if with_initial else None,
        indices=torch.rand(batch, length, heads, num_states).topk(top_k, dim=-1).indices if top_k else None,
        merge_indices=torch.rand(*lead, num_states).topk(merge_top_k, dim=-1).indices if merge_top_k else None,
        borders=None if borders is None else torch.tensor(borders, dtype=torch.int32),
        num_states=num_states,
        d_output=torch.randn(batch, length, heads, width, dtype=double),
        d_final=torch.randn(sequences, heads, num_states, width, dtype=double),
    )


NAMES = ("output", "final state", "d_update", "d_merge", "d_value", "d_initial")


def assert_close(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for name, a, b in zip(NAMES, got, expected, strict=False):
        assert torch.isfinite(a).all(), name
        error = (a - b).norm() / b.norm().clamp(min=1e-300) if b.numel() and b.norm() > 0 else a.norm()
        assert error <= tolerance, f"{name}: relative error {error:.2e}"


@st.composite
def cases(draw: st.DrawFn, sparse: bool = False) -> Case:
    """Sizes, kinds of gates, packing and selections of all sorts; `sparse`: only with selected states."""
    num_states = draw(st.integers(1, 9))
    packed = draw(st.booleans())
    lengths = draw(st.lists(st.integers(0, 150), min_size=1, max_size=5)) if packed else [draw(st.integers(1, 200))]
    selected = st.integers(1, num_states)
    top_k = draw(selected if sparse else st.none() | selected)
    borders = None
    if packed:
        lengths[-1] = max(lengths[-1], 1)
        borders = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    return make(
        batch=1 if packed else draw(st.integers(1, 3)),
        length=sum(lengths),
        heads=draw(st.integers(1, 3)),
        num_states=num_states,
        width=draw(st.integers(1, 6)),
        top_k=top_k,
        merge_top_k=draw(st.none() | selected) if top_k else None,
        kind=draw(st.sampled_from(["uniform", "adversarial"])),
        with_initial=draw(st.booleans()),
        borders=borders,
        seed=draw(st.integers(0, 2**16)),
    )
