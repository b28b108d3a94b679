from __future__ import annotations

import pytest
import torch
from torch import Tensor

from factorization_memory.config import ModelConfig, TrainingConfig
from factorization_memory.data.loader import Batch
from factorization_memory.models import LanguageModel, ModelState
from factorization_memory.models.device import autocast
from factorization_memory.training.step import Gradient, accumulate_gradient, clip_gradient

CPU = torch.device("cpu")
FLOAT32 = autocast(TrainingConfig(precision="float32"), CPU)


@pytest.fixture
def model() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(ModelConfig(vocab_size=30, hidden_size=16, num_layers=2, num_states=4, conv_size=3)).double()


def batch(
    tokens: Tensor, targets: Tensor, reset: Tensor, cu_seqlens: list[int] | None = None, starts: list[int] | None = None
) -> Batch:
    return Batch(
        tokens=tokens,
        targets=targets,
        cu_seqlens=None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32),
        row_starts=None if starts is None else torch.tensor(starts),
        reset=reset,
        windows=[f"en:{row}" for row in range(len(reset))],
    )


def rows(count: int, length: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    text = torch.randint(0, 30, (count, length + 1), generator=torch.Generator().manual_seed(seed))
    return text[:, :-1], text[:, 1:].clone()


def gradients(
    model: LanguageModel, batches: list[Batch], carried: list[ModelState | None] | None
) -> tuple[Gradient, list[Tensor]]:
    model.zero_grad()
    result = accumulate_gradient(model, batches, carried, FLOAT32, CPU)
    return result, [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_accumulation_equals_the_whole_batch_with_uneven_targets(model: LanguageModel, size: int) -> None:
    tokens, targets = rows(6, 9)
    targets[0, :7] = -100
    targets[3] = -100  # with size 1, a micro-batch with nothing to predict
    new = torch.ones(6, dtype=torch.bool)
    whole, expected = gradients(model, [batch(tokens, targets, new)], None)
    parts = [batch(tokens[i : i + size], targets[i : i + size], new[i : i + size]) for i in range(0, 6, size)]
    split, actual = gradients(model, parts, None)
    assert sum(split.targets) == whole.targets[0] == 6 * 9 - 16
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    loss = sum(float(loss) * count for loss, count in zip(split.losses, split.targets, strict=True)) / sum(split.targets)
    assert loss == pytest.approx(float(whole.losses[0]), rel=1e-6)
    assert split.carried is None


def test_a_step_without_any_target_names_its_rows(model: LanguageModel) -> None:
    tokens, targets = rows(2, 4)
    with pytest.raises(ValueError, match="en:0, en:1"):
        gradients(model, [batch(tokens, torch.full_like(targets, -100), torch.ones(2, dtype=torch.bool))], None)


def test_carried_memory_reads_on_and_is_cut_from_the_graph(model: LanguageModel) -> None:
    tokens, targets = rows(3, 12)
    reset = torch.zeros(3, dtype=torch.bool)
    first, _ = gradients(model, [batch(tokens[:, :5], targets[:, :5], ~reset)], [None])
    assert first.carried is not None
    assert first.carried[0] is not None
    assert not any(tensor.requires_grad for tensor in first.carried[0].tensors())
    second, _ = gradients(model, [batch(tokens[:, 5:], targets[:, 5:], reset)], first.carried)
    whole, _ = model(tokens, targets, reduction="none")
    assert float(second.losses[0]) == pytest.approx(float(whole[:, 5:].mean()), rel=1e-6)


def test_rows_that_start_anew_forget_and_the_others_do_not(model: LanguageModel) -> None:
    tokens, targets = rows(3, 12)
    first, _ = gradients(model, [batch(tokens[:, :5], targets[:, :5], torch.ones(3, dtype=torch.bool))], [None])
    reset = torch.tensor([False, True, False])
    second, _ = gradients(model, [batch(tokens[:, 5:], targets[:, 5:], reset)], first.carried)
    expected = model(tokens, targets, reduction="none")[0][:, 5:].clone()
    expected[1] = model(tokens[1:2, 5:], targets[1:2, 5:], reduction="none")[0][0]
    assert float(second.losses[0]) == pytest.approx(float(expected.mean()), rel=1e-6)


def test_packed_rows_carry_the_memory_of_their_last_document(model: LanguageModel) -> None:
    """Two rows of 6 tokens, packed: a document starts at token 4 of row 0 and row 1 goes on whole; then both read on."""
    tokens, targets = rows(2, 12)
    a, b = tokens[:, :6], tokens[:, 6:]
    reset = torch.zeros(2, dtype=torch.bool)
    before, _ = gradients(model, [batch(tokens[:, :3], targets[:, :3], ~reset)], [None])
    packed = batch(a.reshape(1, -1), targets[:, :6].reshape(1, -1), torch.tensor([False, True]), [0, 4, 6, 12], [0, 2])
    first, _ = gradients(model, [packed], before.carried)
    second, _ = gradients(model, [batch(b, targets[:, 6:], reset)], first.carried)

    assert before.carried is not None
    assert before.carried[0] is not None
    head, _ = model(a[:1, :4], targets[:1, :4], state=before.carried[0].select([0]), reduction="none")
    row0, _ = model(tokens[:1, 4:], targets[:1, 4:], reduction="none")
    row1, _ = model(tokens[1:], targets[1:], reduction="none")
    expected_first = torch.cat([head[0], row0[0, :2], row1[0, :6]]).mean()
    expected_second = torch.cat([row0[0, 2:], row1[0, 6:]]).mean()
    assert float(first.losses[0]) == pytest.approx(float(expected_first), rel=1e-6)
    assert float(second.losses[0]) == pytest.approx(float(expected_second), rel=1e-6)


@pytest.mark.parametrize(("limit", "expected"), [(0.0, 5.0), (1.0, 1.0), (10.0, 5.0)])
def test_clipping_scales_only_what_passes_the_limit(limit: float, expected: float) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(3)]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0]), torch.tensor([4.0])
    assert float(clip_gradient(parameters, limit)) == 5.0
    clipped = torch.cat([parameter.grad for parameter in parameters if parameter.grad is not None])
    assert float(clipped.norm()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_hooks_on_the_model_run_once_a_pass(model: LanguageModel, compiled: bool) -> None:
    tokens, targets = rows(2, 6)
    calls: list[str] = []
    model.register_forward_pre_hook(lambda *_: calls.append("before"))
    model.register_forward_hook(lambda *_: calls.append("after"))
    step = torch.compile(model, backend="eager") if compiled else None
    batches = [batch(tokens[i : i + 1], targets[i : i + 1], torch.ones(1, dtype=torch.bool)) for i in range(2)]
    accumulate_gradient(model, batches, None, FLOAT32, CPU, step)
    assert calls == 2 * ["before", "after"]


def test_a_compiled_loss_takes_the_batches_it_was_made_for(model: LanguageModel) -> None:
    tokens, targets = rows(2, 6)
    calls: list[dict[str, object]] = []

    def compiled(*arguments: Tensor, **options: object) -> object:
        calls.append(options)
        return model(*arguments, **options)

    new = torch.ones(2, dtype=torch.bool)
    plain = batch(tokens, targets, new)
    packed = batch(tokens.reshape(1, 12), targets.reshape(1, 12), new, cu_seqlens=[0, 6, 12], starts=[0, 1])
    for each, carried, count in ((plain, None, 1), (packed, None, 1), (plain, [None], 1)):
        accumulate_gradient(model, [each], carried, FLOAT32, CPU, compiled)
        assert len(calls) == count
    assert calls == [{"state": None, "cu_seqlens": None, "keep_state": False}]
