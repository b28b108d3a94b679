"""The attention layer: against the formula, in every way that a text can be cut, padded and packed."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from factorization_memory.config import ConfigError
from factorization_memory.layers import Attention, AttentionState
from factorization_memory.layers import attention as layers_module
from factorization_memory.ops import attention as ops

FORMS = [(4, 4, None), (4, 2, None), (4, 1, 5), (2, 2, 1), (4, 2, 3)]
"""Heads, key and value heads, window."""


def layer(heads: int = 4, shared: int = 2, window: int | None = None) -> Attention:
    torch.manual_seed(1)
    return Attention(16, heads, shared, sliding_window=window).double()


def by_formula(attention: Attention, x: Tensor) -> Tensor:
    """One sequence `[T, d]`, token by token and head by head."""
    size, heads, shared = attention.head_size, attention.num_heads, attention.num_key_value_heads
    parts = attention.query_key_value.weight.split([heads * size, shared * size, shared * size])
    q, k, v = ((x @ weight.T).unflatten(-1, (-1, size)) for weight in parts)
    frequency = 1.0 / attention.rope_theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)

    def turned(vector: Tensor, position: int) -> Tensor:
        cos, sin = (position * frequency).cos().double(), (position * frequency).sin().double()
        a, b = vector.chunk(2)
        return torch.cat((a * cos - b * sin, b * cos + a * sin))

    rows = []
    for t in range(len(x)):
        first = 0 if attention.sliding_window is None else max(0, t + 1 - attention.sliding_window)
        merged = []
        for head in range(heads):
            other = head * shared // heads
            scores = [turned(q[t, head], t) @ turned(k[s, other], s) * size**-0.5 for s in range(first, t + 1)]
            merged.append(torch.stack(scores).softmax(0) @ v[first : t + 1, other])
        rows.append(torch.cat(merged))
    return torch.stack(rows) @ attention.output.weight.T


@pytest.mark.parametrize(("heads", "shared", "window"), FORMS)
def test_is_the_formula(heads: int, shared: int, window: int | None) -> None:
    attention, x = layer(heads, shared, window), torch.randn(2, 9, 16, dtype=torch.float64)
    y, _ = attention(x)
    torch.testing.assert_close(y, torch.stack([by_formula(attention, row) for row in x]))


def varlen_by_formula(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    borders: Tensor,
    key_borders: Tensor,
    most: int,
    most_keys: int,
    *,
    window_size: tuple[int, int],
) -> Tensor:
    """What `torch.nn.attention.varlen.varlen_attn` of torch 2.11 is documented to do, which only GPUs have."""
    assert borders.dtype == key_borders.dtype == torch.int32
    assert q.shape[1] == k.shape[1]
    parts = []
    for (a, b), (c, d) in zip(pairwise(borders.tolist()), pairwise(key_borders.tolist()), strict=True):
        assert b - a <= most
        assert d - c <= most_keys
        key, query = torch.arange(d - c), torch.arange(d - c - (b - a), d - c)[:, None]
        seen = (key <= query + window_size[1]) & ((window_size[0] < 0) | (key >= query - window_size[0]))
        scores = torch.einsum("qhp,khp->hqk", q[a:b], k[c:d]) * q.shape[2] ** -0.5
        parts.append(torch.einsum("hqk,khp->qhp", scores.masked_fill(~seen, -torch.inf).softmax(-1), v[c:d]))
    return torch.cat(parts)


@pytest.mark.parametrize(("heads", "shared", "window"), FORMS)
def test_calls_the_kernel_of_packed_sequences_as_documented(
    heads: int, shared: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention, x = layer(heads, shared, window), torch.randn(2, 12, 16, dtype=torch.float64)
    _, state = attention(x[:, :5])
    cases = [(x[:, 5:], state, None), (x, None, None), (x[:1], None, torch.tensor([0, 4, 4, 12]))]
    expected = [attention(*case)[0] for case in cases]
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_formula)
    monkeypatch.setattr(ops, "_shares_heads", lambda: False)
    for module in (ops, layers_module):
        monkeypatch.setattr(module, "has_packed", lambda q: True)
    torch.testing.assert_close([attention(*case)[0] for case in cases], expected)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 100])
def test_kernels_on_a_gpu(window: int | None) -> None:
    """bfloat16 against float64: whole, packed, from a state, by steps, and the gradients."""
    wide = Attention(256, 4, 2, sliding_window=window).cuda().double()
    attention = Attention(256, 4, 2, sliding_window=window).cuda().bfloat16()
    attention.load_state_dict(wide.state_dict())
    x, borders = torch.randn(1, 700, 256, device="cuda", dtype=torch.bfloat16), torch.tensor([0, 300, 300, 317, 700]).cuda()
    mask = torch.rand(1, 700, device="cuda") > 0.3

    def outputs(attention: Attention, x: Tensor) -> list[Tensor]:
        first, state = attention(x[:, :400])
        second, state = attention(x[:, 400:699], state)
        last = attention.step(x[:, 699], state.apply(torch.clone))
        padded = attention(x, padding_mask=mask)[0] * mask[..., None]
        return [attention(x)[0], attention(x, None, borders)[0], first, second, padded, last]

    mine, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    for y, right in zip(outputs(attention, mine), outputs(wide, exact), strict=True):
        torch.testing.assert_close(y.double(), right, rtol=0.05, atol=0.05)
        if right.requires_grad:
            gradients = [torch.autograd.grad(out.sum(), of, retain_graph=True)[0] for out, of in ((y, mine), (right, exact))]
            assert (gradients[0].double() - gradients[1]).norm() <= 0.02 * gradients[1].norm()


def test_many_queries_are_taken_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    x, mask = torch.randn(2, 23, 16, dtype=torch.float64), torch.rand(2, 23) > 0.3
    for window in (None, 4):
        attention = layer(window=window)
        _, state = attention(x[:, :3])
        whole = attention(x, state)[0], attention(x, padding_mask=mask)[0]
        with monkeypatch.context() as patch:
            patch.setattr(ops, "WINDOW_QUERIES", 5)
            patch.setattr(ops, "MASK_NUMBERS", 100)
            pieces = attention(x, state)[0], attention(x, padding_mask=mask)[0]
        torch.testing.assert_close(pieces, whole)


@pytest.mark.parametrize(("heads", "shared", "window"), FORMS)
def test_gradients(heads: int, shared: int, window: int | None) -> None:
    attention, x = layer(heads, shared, window), torch.randn(1, 6, 16, dtype=torch.float64, requires_grad=True)
    inputs, weight = [x, *attention.parameters()], torch.randn(1, 6, 16, dtype=torch.float64)
    first, state = attention(x[:, :4])
    in_pieces = torch.cat((first, attention(x[:, 4:], state)[0]), 1)
    padded = attention(x, padding_mask=torch.ones(1, 6, dtype=torch.bool))[0]
    mine, formula, pieces, masked = (
        torch.autograd.grad((y * weight).sum(), inputs)
        for y in (attention(x)[0], by_formula(attention, x[0])[None], in_pieces, padded)
    )
    torch.testing.assert_close(mine, formula)
    torch.testing.assert_close(pieces, formula)
    torch.testing.assert_close(masked, formula)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_pieces_of_any_rows_are_the_whole(data: st.DataObject) -> None:
    """Rows of different lengths, read in pieces with padding anywhere, in packed pieces and by steps, some taken out, put
    elsewhere and emptied between."""
    heads, shared, window = data.draw(st.sampled_from(FORMS))
    attention = layer(heads, shared, window)
    torch.manual_seed(data.draw(st.integers(0, 99)))
    rows = 3
    x = torch.randn(rows, 60, 16, dtype=torch.float64)
    expected = attention(x)[0]
    state: AttentionState = attention.initial_state(rows, data.draw(st.sampled_from([0, 0, 4])))
    read = [0] * rows
    for _ in range(data.draw(st.integers(1, 5))):
        how = data.draw(st.sampled_from(["padded", "packed", "steps", "even", "reset", "rows"]))
        before = state.apply(torch.clone)
        old = state
        if how == "padded":
            mask = torch.rand(rows, data.draw(st.integers(0, 9))) > 0.4
            piece = torch.full((*mask.shape, 16), torch.nan, dtype=torch.float64)
            for n in range(rows):
                piece[n, mask[n]] = x[n, read[n] : read[n] + int(mask[n].sum())]
            y, state = attention(piece, state, padding_mask=mask)
            for n in range(rows):
                count = int(mask[n].sum())
                torch.testing.assert_close(y[n, mask[n]], expected[n, read[n] : read[n] + count])
                read[n] += count
        elif how == "packed":
            lengths = [data.draw(st.integers(0, 7)) for _ in range(rows)]
            pieces = [x[n, read[n] : read[n] + lengths[n]] for n in range(rows)]
            borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
            y, state = attention(torch.cat(pieces)[None], state, borders)
            for n, (start, stop) in enumerate(pairwise(borders.tolist())):
                torch.testing.assert_close(y[0, start:stop], expected[n, read[n] : read[n] + lengths[n]])
                read[n] += lengths[n]
        elif how == "even":
            count = data.draw(st.integers(0, 9))
            y, state = attention(torch.stack([x[n, read[n] : read[n] + count] for n in range(rows)]), state)
            for n in range(rows):
                torch.testing.assert_close(y[n], expected[n, read[n] : read[n] + count])
                read[n] += count
        elif how == "steps":
            state = state.apply(torch.clone)
            for _ in range(data.draw(st.integers(1, 7))):
                y = attention.step(torch.stack([x[n, read[n]] for n in range(rows)]), state)
                torch.testing.assert_close(y, torch.stack([expected[n, read[n]] for n in range(rows)]))
                read = [r + 1 for r in read]
        elif how == "reset":
            state = state.apply(lambda tensor: tensor * torch.tensor([1, 0, 1]).view(-1, *[1] * (tensor.dim() - 1)))
            read[1] = 0
        else:
            order = [2, 0, 1]
            state = state.apply(lambda tensor: tensor[[2, 0, 1]])
            x, expected, read = x[order], expected[order], [read[n] for n in order]
        assert state.length.tolist() == read
        for now, then in zip(old.tensors(), before.tensors(), strict=True):
            assert torch.equal(now, then), f"{how} changed the state that it was given"
        if window is not None:
            assert state.capacity <= window


def test_a_packed_sequence_does_not_see_the_others() -> None:
    attention, x = layer(), torch.randn(1, 11, 16, dtype=torch.float64)
    y, state = attention(x, cu_seqlens=torch.tensor([0, 4, 4, 11]))
    torch.testing.assert_close(y[:, :4], attention(x[:, :4])[0])
    torch.testing.assert_close(y[:, 4:], attention(x[:, 4:])[0])
    assert state.length.tolist() == [4, 0, 7]


def test_steps_copy_little() -> None:
    """The cache doubles: T steps make it anew some log T times."""
    attention = layer()
    state = attention.initial_state(2)
    sizes = []
    for _ in range(100):
        attention.step(torch.randn(2, 16, dtype=torch.float64), state)
        sizes.append(state.capacity)
    assert sorted(set(sizes)) == [16, 32, 64, 128]
    windowed = layer(window=24)
    state = windowed.initial_state(2)
    for _ in range(100):
        windowed.step(torch.randn(2, 16, dtype=torch.float64), state)
    assert state.capacity == 24
    assert state.positions.sort(dim=1).values.tolist() == [list(range(77, 101))] * 2


def test_compiles_as_one_graph() -> None:
    x, borders = torch.randn(1, 12, 16, dtype=torch.float64), torch.tensor([0, 5, 12])
    layers = layer(), layer(window=3)

    def outputs() -> list[Tensor]:
        return [attention(x, None, cuts, None, False)[0] for attention in layers for cuts in (None, borders)]

    torch._dynamo.reset()
    compiled = torch.compile(outputs, fullgraph=True, backend="aot_eager")()
    torch.testing.assert_close(compiled, outputs())


def test_autocast_takes_a_carried_state() -> None:
    attention, x = layer().float(), torch.randn(2, 8, 16)
    with torch.autocast("cpu", torch.bfloat16):
        whole, _ = attention(x)
        _, state = attention(x[:, :5])
        y, state = attention(x[:, 5:7], state)
        last = attention.step(x[:, 7], state)
    assert state.keys.dtype == torch.bfloat16
    torch.testing.assert_close(torch.cat((y, last[:, None]), 1), whole[:, 5:], rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(2, 3, 8)}, r"x: got shape \(2, 3, 8\), takes \[B, T, 16\]"),
        ({"padding_mask": torch.ones(2, 2, dtype=torch.bool)}, r"padding_mask: got torch.bool \(2, 2\)"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "cu_seqlens: got B = 2"),
        ({"state": Attention(16, 4).initial_state(1)}, r"state.keys: got shape \(1, 4, 0, 4\), takes \(2, 4, 0, 4\)"),
        ({"state": Attention(16, 4).initial_state(2, 9)}, "sliding_window=None, not 8"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Attention(16, 4, sliding_window=8)(**{"x": torch.zeros(2, 3, 16), **arguments})


def test_wrong_sizes() -> None:
    with pytest.raises(ConfigError, match=r"model.attention.num_heads=3.*divide hidden_size=16"):
        Attention(16, 3)
    with pytest.raises(ConfigError, match=r"num_key_value_heads=3: must divide num_heads=4"):
        Attention(16, 4, 3)


def test_an_empty_stretch_gives_a_state_of_its_own() -> None:
    torch.manual_seed(0)
    for options, borders in (({"sliding_window": 4}, None), ({}, torch.tensor([0, 0]))):
        layer = Attention(16, 2, **options).double()  # type: ignore[arg-type]
        _, state = layer(torch.randn(1, 6, 16, dtype=torch.float64))
        assert state is not None
        kept = [tensor.clone() for tensor in state.tensors()]
        _, after = layer(torch.randn(1, 0, 16, dtype=torch.float64), state, borders)
        assert after is not None
        for _ in range(3):
            layer.step(torch.randn(1, 16, dtype=torch.float64), after)
        assert all(torch.equal(a, b) for a, b in zip(kept, state.tensors(), strict=True))


def test_no_sequences() -> None:
    layer = Attention(16, 2)
    y, state = layer(torch.randn(0, 5, 16))
    assert y.shape == (0, 5, 16)
    assert layer.step(torch.randn(0, 16), state).shape == (0, 16)
