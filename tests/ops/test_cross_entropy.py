"""The loss by kernels against PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from factorization_memory.ops import cross_entropy as loss_module
from factorization_memory.ops.cross_entropy import IGNORE, linear_cross_entropy
from factorization_memory.ops.cross_entropy.kernels import cross_entropy, row_size

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
LOW, FULL = torch.bfloat16, torch.float32


def given_targets(rows: int, vocabulary: int) -> Tensor:
    """With the first id, the last, and some that have no loss."""
    targets = torch.randint(0, vocabulary, (rows,), device=DEVICE)
    targets[0], targets[-1] = 0, vocabulary - 1
    targets[1::3] = IGNORE
    return targets


def run(logits: Tensor, targets: Tensor, share: float | None) -> tuple[Tensor, Tensor]:
    """Losses, and what then stands in a copy of the logits, whose rows are as far apart as they should be."""
    room = torch.full((len(logits), row_size(logits.shape[1])), torch.nan, dtype=logits.dtype, device=DEVICE)
    copy = room[:, : logits.shape[1]]
    copy.copy_(logits)
    losses = torch.full((len(logits),), torch.nan, device=DEVICE)
    cross_entropy(copy, targets, losses, None if share is None else torch.tensor([share], device=DEVICE), IGNORE)
    return losses, copy


def truth(logits: Tensor, targets: Tensor, share: float) -> tuple[Tensor, Tensor]:
    exact = logits.double().requires_grad_()
    losses = functional.cross_entropy(exact, targets, ignore_index=IGNORE, reduction="none")
    return losses.detach(), torch.autograd.grad(share * losses.sum(), exact)[0]


@pytest.mark.parametrize("dtype", [FULL, LOW, torch.float16])
@pytest.mark.parametrize("vocabulary", [2, 30, 64, 1000, 4096, 32000, 50257])
def test_losses_and_gradient(vocabulary: int, dtype: torch.dtype) -> None:
    logits = (3 * torch.randn(7, vocabulary, device=DEVICE)).to(dtype)
    targets = given_targets(7, vocabulary)
    losses, gradient = run(logits, targets, 0.25)
    expected, expected_gradient = truth(logits, targets, 0.25)
    torch.testing.assert_close(losses.double(), expected, rtol=2e-6, atol=2e-6)
    # Triton's interpreter cuts where a GPU rounds.
    relative = {FULL: 2e-5, LOW: 2**-8, torch.float16: 2**-10}[dtype] * (1 if CUDA else 2)
    least = 6e-8 if dtype == torch.float16 else 1e-8
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=relative, atol=least)
    assert not losses[targets == IGNORE].any()
    assert not gradient[targets == IGNORE].any()
    alone, untouched = run(logits, targets, None)
    assert torch.equal(alone, losses)
    assert torch.equal(untouched, logits)


def test_logits_of_any_size() -> None:
    """Nothing overflows, of whatever size the logits are and wherever in the row the largest stands; and what a row without a
    target holds does not matter."""
    logits = torch.randn(6, 9000, device=DEVICE)
    logits[0] -= 1e6
    logits[1] *= 1e4
    logits[2, :8999] = -torch.inf
    logits[3] = torch.arange(9000)
    logits[4] = -torch.arange(9000)
    logits[5] = torch.nan
    targets = torch.tensor([5, 7, 8999, 8999, 8999, IGNORE], device=DEVICE)
    losses, gradient = run(logits, targets, 1.0)
    expected, expected_gradient = truth(logits[:5], targets[:5], 1.0)
    torch.testing.assert_close(losses[:5].double(), expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gradient[:5].double(), expected_gradient, rtol=2e-5, atol=1e-8)
    assert losses[5] == 0
    assert not gradient[5].any()


@pytest.mark.parametrize("wrong", [-1, 1000, -(2**40), 2**40])
def test_a_target_that_is_no_id(wrong: int) -> None:
    """Its loss and its gradient are NaN, and so is the mean; its neighbours do not notice."""
    logits, targets = torch.randn(3, 1000, device=DEVICE), torch.tensor([3, wrong, IGNORE], device=DEVICE)
    losses, gradient = run(logits, targets, 1.0)
    assert losses.isnan().tolist() == [False, True, False]
    assert gradient.isnan().all(1).tolist() == [False, True, False]
    assert gradient.isnan().any(1).tolist() == [False, True, False]
    hidden, weight = torch.randn(3, 8, device=DEVICE), torch.randn(1000, 8, device=DEVICE)
    assert linear_cross_entropy(hidden, weight, targets, backend="triton").isnan()


def problem(dtype: torch.dtype, rows: int = 300, vocabulary: int = 75, width: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(rows, width, device=DEVICE).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, device=DEVICE).to(dtype).requires_grad_()
    return hidden, weight, given_targets(rows, vocabulary)


@pytest.mark.parametrize("pieces", ["one", "tiles", "few rows"])
@pytest.mark.parametrize("dtype", [FULL, LOW])
def test_mean_loss(dtype: torch.dtype, pieces: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = problem(dtype)
    rows = {"one": 1000, "tiles": 140, "few rows": 7}[pieces] * hidden.element_size() // 4
    monkeypatch.setattr(loss_module, "PIECE_LOGITS", {DEVICE: rows * 75})
    loss = linear_cross_entropy(hidden, weight, targets, backend="triton")
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = functional.cross_entropy(exact[0] @ exact[1].T, targets, ignore_index=IGNORE)
    assert loss.dtype == FULL
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6 if dtype == FULL else 2e-3, atol=0)
    got, wanted = torch.autograd.grad(3 * loss, [hidden, weight]), torch.autograd.grad(3 * expected, exact)
    for x, y in zip(got, wanted, strict=True):
        assert x.dtype == dtype
        error = (x.double() - y).norm() / y.norm()
        assert error <= (1e-5 if dtype == FULL else 2e-2), f"{error:.1e}"


@pytest.mark.parametrize("dtype", [FULL, LOW])
def test_equals_the_plain_loss(dtype: torch.dtype) -> None:
    """Under autocast too, and with one gradient asked for."""
    hidden, weight, targets = problem(FULL, rows=50)
    results = []
    for backend in ("plain", "triton"):
        with torch.autocast(DEVICE, LOW, enabled=dtype == LOW):
            losses = [
                linear_cross_entropy(h, w, targets, backend=backend)
                for h, w in ((hidden, weight), (hidden.detach(), weight), (hidden, weight.detach()))
            ]
            with torch.no_grad():
                assert torch.equal(linear_cross_entropy(hidden, weight, targets, backend=backend), losses[0])
        whole = torch.autograd.grad(losses[0], [hidden, weight])
        results.append((*losses, *whole, *torch.autograd.grad(losses[1] + losses[2], [weight, hidden])))
    relative = 1e-5 if dtype == FULL else 2e-2
    for x, y in zip(*results, strict=True):
        assert x.dtype == y.dtype == FULL
        assert (x - y).norm() <= relative * y.norm()


def test_weight_gradient_adds_up_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of one row each: in bfloat16 the sum would stand still long before the last."""
    hidden = torch.ones(300, 8, device=DEVICE, dtype=LOW)
    weight = torch.zeros(2, 8, device=DEVICE, dtype=LOW, requires_grad=True)
    monkeypatch.setattr(loss_module, "PIECE_LOGITS", {DEVICE: 1})
    loss = linear_cross_entropy(hidden, weight, torch.zeros(300, dtype=torch.long, device=DEVICE), backend="triton")
    (gradient,) = torch.autograd.grad(loss, weight)
    expected = torch.tensor([[-0.5], [0.5]], device=DEVICE).expand(2, 8)
    torch.testing.assert_close(gradient.float(), expected, rtol=1e-2, atol=0)


def test_nothing_to_predict() -> None:
    hidden, weight, _ = problem(FULL)
    loss = linear_cross_entropy(hidden, weight, torch.full((300,), IGNORE, device=DEVICE), backend="triton")
    assert loss == 0
    assert not any(x.any() for x in torch.autograd.grad(loss, [hidden, weight]))
    none = torch.empty(0, dtype=torch.long, device=DEVICE)
    assert linear_cross_entropy(hidden[:0], weight, none, backend="triton") == 0


def test_compiled_as_one_graph() -> None:
    hidden, weight, targets = problem(FULL, rows=20)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, targets, backend="triton")

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(hidden, weight), loss(hidden, weight))
    got, wanted = (torch.autograd.grad(f(hidden, weight), [hidden, weight]) for f in (compiled, loss))
    for x, y in zip(got, wanted, strict=True):
        assert torch.equal(x, y)


def test_operator() -> None:
    hidden, weight, targets = problem(FULL, rows=5)
    operator = torch.ops.factorization_memory.linear_cross_entropy.default
    torch.library.opcheck(operator, (hidden, weight, targets, True, True, True))


def test_backends() -> None:
    hidden, weight, targets = problem(FULL, rows=5)
    with pytest.raises(ValueError, match="backend='fast': use one of auto, plain, triton"):
        linear_cross_entropy(hidden, weight, targets, backend="fast")
    with pytest.raises(ValueError, match="backend='fast': use one of"):
        linear_cross_entropy(hidden, weight, targets, "none", backend="fast")
    with pytest.raises(ValueError, match=r"backend='triton': hidden has dtype torch\.float64"):
        linear_cross_entropy(hidden.double(), weight.double(), targets, backend="triton")
