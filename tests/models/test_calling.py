"""What acts in the calls of modules, adapters, hooks and offloading, acts in every way through a model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize
from transformers import AutoModelForCausalLM

from factorization_memory.config import AttentionConfig, GatedDeltaNetConfig, Mamba2Config, ModelConfig
from factorization_memory.data.tokenizer import Tokenizer
from factorization_memory.generation import StepGraph, Steps, generate, prefill_batch, steps_for
from factorization_memory.layers.calling import device_of, why_any_called, why_called, why_hooked
from factorization_memory.models import LanguageModel
from factorization_memory.models.decoding import DecodingModel
from factorization_memory.models.huggingface import CACHE_NAME, FactorizationMemoryForCausalLM

WIDTH = 16
PURE = ModelConfig(
    vocab_size=40, hidden_size=WIDTH, num_layers=2, num_states=8, top_k=3, update_lag=1, conv_size=3, output_gate=True,
    tie_word_embeddings=False,
)  # fmt: skip
MIXED = ModelConfig(
    vocab_size=40, hidden_size=WIDTH, num_layers=4, num_states=8, conv_size=3,
    mixers=("memory", "attention", "mamba2", "gated_deltanet"), attention=AttentionConfig(num_heads=4, sliding_window=6),
    mamba2=Mamba2Config(state_size=8, head_size=8, chunk_size=4), gated_deltanet=GatedDeltaNetConfig(num_heads=2, head_size=8),
)  # fmt: skip
GROWING = ModelConfig(
    vocab_size=40, hidden_size=WIDTH, num_layers=2, num_states=8, mixers=("memory", "attention"),
    attention=AttentionConfig(num_heads=2),
)  # fmt: skip
MODELS = pytest.mark.parametrize("config", [PURE, MIXED, GROWING], ids=["pure", "mixed", "growing"])


def make(config: ModelConfig) -> LanguageModel:
    model = LanguageModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tokens(*shape: int) -> Tensor:
    return torch.randint(2, 40, shape)


def theirs(model: LanguageModel) -> FactorizationMemoryForCausalLM:
    return FactorizationMemoryForCausalLM.from_language_model(model, eos_token_id=0, pad_token_id=1)


@torch.no_grad()
def check_steps(model: LanguageModel) -> None:
    """Steps are the forward, from the beginning and from what forward returns; and so is what generates."""
    text = tokens(2, 12)
    expected, _ = model(text)
    for begin in (0, 5):
        state = model(text[:, :begin])[1] if begin else model.initial_state(2)
        for t in range(begin, 12):
            logits, state = model.step(text[:, t], state)
            torch.testing.assert_close(logits, expected[:, t], rtol=1e-4, atol=1e-4)
    steps = steps_for(model, 2)
    steps.load(prefill_batch(model, list(text[:, :7]), chunk=3)[1])
    for t in range(7, 12):
        torch.testing.assert_close(steps.step(text[:, t]), expected[:, t], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def check_generate(model: FactorizationMemoryForCausalLM) -> list[list[int]]:
    """A text is the same with and without a cache; returns it."""
    torch.manual_seed(1)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [0, 1]}
    text = tokens(2, 9)
    found = model.generate(text, **options)
    assert torch.equal(model.generate(text, use_cache=False, **options), found)
    return found.tolist()


# -- hooks -------------------------------------------------------------------------------------------------------------------


@MODELS
@pytest.mark.parametrize("place", ["block", "mixer", "convolution"])
@pytest.mark.parametrize("before", [False, True])
def test_hooks(config: ModelConfig, place: str, before: bool) -> None:
    """They run once for each token read or written, and what they add counts."""
    model = make(config)
    plain = theirs(model)
    without = check_generate(plain)
    for block in model.blocks:
        module = {"block": block, "mixer": block.mixer}.get(place, getattr(block.mixer, "convolution", None))
        if module is None:
            continue
        calls: list[int] = []
        push: list[Tensor] = []

        def steer(inputs: Any, output: Any = None, calls: list[int] = calls, push: list[Tensor] = push) -> Any:
            calls.append(1)
            first = inputs[0] if output is None else output[0]
            if not push:
                push.append(3 * torch.randn(first.shape[-1]))
            return (first + push[0], *(inputs if output is None else output)[1:])

        if before:
            hook = module.register_forward_pre_hook(lambda _, inputs, steer=steer: steer(inputs))
        else:
            hook = module.register_forward_hook(lambda _, inputs, output, steer=steer: steer(inputs, output))
        assert check_generate(plain) != without
        # 6 tokens: read with a cache in 6 calls, without in 6.
        assert len(calls) == 12
        check_steps(model)
        hook.remove()
    assert check_generate(plain) == without


class Wrapper(nn.Module):
    """As those of sharding and data parallelism are: its call is the model's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return self.module(*inputs, **options)


@pytest.mark.parametrize("wrapped", [False, True])
def test_hooks_on_the_model_itself(wrapped: bool) -> None:
    """They run once for each loss, whatever it is called by, and for each text and step."""
    model = make(PURE)
    calls: list[str] = []
    model.register_forward_pre_hook(lambda *_: calls.append("before"))
    model.register_forward_hook(lambda *_: calls.append("after"))
    text, once = tokens(2, 9), ["before", "after"]
    for call in (Wrapper(model) if wrapped else model, model.loss):
        loss, _ = call(text, text)
        loss.backward()
        assert calls == once
        calls.clear()
    _, state = model(text)
    assert calls == once
    model.step(text[:, 0], state)
    assert calls == 2 * once


@pytest.mark.timeout(300)
def test_training_in_processes(in_two_processes: Callable[..., None], tmp_path: Path) -> None:
    """Data parallelism (DDP) and sharding (FSDP2) see the loss, and a step: gradients of two processes are those of one."""
    in_two_processes(Path(__file__).with_name("training_in_processes.py"), tmp_path)


@MODELS
def test_what_a_hook_on_the_model_changes_counts_in_steps(config: ModelConfig) -> None:
    model = make(config)
    without = check_generate(theirs(model))
    model.register_forward_hook(lambda _module, _inputs, outputs: (0.5 * outputs[0].flip(-1), outputs[1]))
    model.register_forward_pre_hook(lambda _, inputs: ((inputs[0] + 1) % 40, *inputs[1:]))
    check_steps(model)
    # The head and blocks that are shared know nothing of it.
    assert check_generate(theirs(model)) == without


def test_a_hook_on_every_module() -> None:
    model, seen = make(PURE), set()
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.add(type(module).__name__))
    try:
        assert why_called(model.head) == "a global module hook is registered"
        model.step(tokens(1), model.initial_state(1))
    finally:
        hook.remove()
    assert {"Block", "FactorizationMemory", "CausalConvolution"} <= seen
    assert why_any_called(model) is None


def test_steps_that_keep_undo_are_refused_with_hooks() -> None:
    model = make(PURE)
    state = model.keep_undo(model.initial_state(1), 2)
    model.step(tokens(1), state)
    hook = model.blocks[1].mixer.register_forward_hook(lambda *_: None)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"state: keep_undo .* \(FactorizationMemory: it has a forward hook\); remove that"):
        model.step(tokens(1), state)
    hook.remove()
    model.register_forward_hook(lambda *_: None)
    before = state.clone()
    with pytest.raises(ValueError, match=r"state: keep_undo .* \(the model: it has a forward hook\); remove that"):
        model.step(tokens(1), state)
    assert all(torch.equal(x, y) for x, y in zip(state.tensors(), before.tensors(), strict=True))


# -- adapters ----------------------------------------------------------------------------------------------------------------


class Adapter(nn.Module):
    """Stands in a linear layer's place, as PEFT's do: the layer's weight is not all that it computes with."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.more = nn.Parameter(0.3 * torch.randn_like(base.weight))
        self.in_features, self.out_features = base.in_features, base.out_features

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + functional.linear(x, self.more)


def hooked_head(model: LanguageModel) -> None:
    model.head.register_forward_hook(lambda _module, _inputs, output: 0.5 * output)


def adapted_head(model: LanguageModel) -> None:
    model.head = Adapter(model.head)  # type: ignore[assignment]


def lora(model: LanguageModel) -> None:
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(r=2, target_modules=["head", "value", "affinity", "gate_up"], init_lora_weights=False)
    peft.get_peft_model(model, options)


@pytest.mark.parametrize("change", [hooked_head, adapted_head, lora])
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_loss_through_the_head(change: Callable[[LanguageModel], None]) -> None:
    model = make(PURE).double()
    change(model)
    model.double()
    text, targets = tokens(2, 9), tokens(2, 9)
    targets[0, 4:] = -100
    adapter = [parameter for name, parameter in model.named_parameters() if "head" in name and parameter.requires_grad]
    logits, _ = model(text)
    expected = functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    found, _ = model(text, targets)
    torch.testing.assert_close(found, expected)
    for mine, wanted in zip(torch.autograd.grad(found, adapter), torch.autograd.grad(expected, adapter), strict=True):
        assert wanted.abs().max() > 0
        torch.testing.assert_close(mine, wanted)
    each, _ = model(text, targets, reduction="none")
    wanted = functional.cross_entropy(logits.detach().mT, targets, reduction="none")
    torch.testing.assert_close(each, wanted.float())
    assert model(text, torch.full_like(targets, -100))[0] == 0
    with pytest.raises(ValueError, match="reduction='sum'"):
        model(text, targets, reduction="sum")
    check_steps(model.float())


class Plus(nn.Module):
    """What a parametrization adds to a weight wherever it is read."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.more = nn.Parameter(0.3 * torch.randn_like(weight))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.more


@pytest.mark.parametrize(
    ("config", "weight"),
    [
        *((config, weight) for config in (PURE, MIXED) for weight in ("convolution.weight", "norm_weight", "output.weight")),
        (PURE, "convolution.bias"),
        (PURE, "gate.weight"),
        (MIXED, "skip"),
        (MIXED, "log_decay_rate"),
        (MIXED, "step_size_bias"),
    ],
)
def test_parametrized_weights(config: ModelConfig, weight: str) -> None:
    """In every block that has them. Steps see them; what would copy them steps aside."""
    model = make(config)
    text, reasons = tokens(2, 9), []
    without = model(text)[0]
    name = weight.rpartition(".")[2]
    for parameter in [one for one, _ in model.named_parameters() if re.fullmatch(rf"blocks\.\d\.mixer\.{weight}", one)]:
        module = model.get_submodule(parameter.rpartition(".")[0])
        parametrize.register_parametrization(module, name, Plus(getattr(module, name)))
        reasons.append(why_any_called(model))
    assert reasons
    assert re.match(r"blocks\.\d\.mixer.*: (its \w+ is parametrized|ParametrizedLinear replaces it)", reasons[0] or "")
    check_steps(model)
    check_generate(theirs(model))
    assert not torch.allclose(model(text)[0], without)


@pytest.mark.parametrize("config", [PURE, MIXED], ids=["pure", "mixed"])
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_lora_of_the_weights_of_convolutions(config: ModelConfig) -> None:
    """PEFT puts a module in the convolution's place that knows its `forward` alone."""
    peft = pytest.importorskip("peft")
    model = make(config)
    without = check_generate(theirs(model))
    options = peft.LoraConfig(r=2, target_modules=[], target_parameters=["convolution.weight"], init_lora_weights=False)
    peft.get_peft_model(model, options)
    assert why_any_called(model) == "blocks.0.mixer.convolution: ParamWrapper replaces it"
    check_steps(model)
    assert check_generate(theirs(model)) != without
    text = tokens(1, 5)
    model(text, text)[0].backward()
    found = [parameter.grad for name, parameter in model.named_parameters() if "lora_" in name]
    assert found
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in found)


def quantised(model: LanguageModel) -> None:
    class Packed(Tensor):
        pass

    layer = model.blocks[0].mixer.output
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Packed), requires_grad=False)


def normalised(model: LanguageModel) -> None:
    parametrizations.weight_norm(model.blocks[0].mixer.output)


def replaced(model: LanguageModel) -> None:
    model.final_norm.forward = lambda x: x  # type: ignore[method-assign]


def backward_hooked(model: LanguageModel) -> None:
    model.blocks[1].register_full_backward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hooked_head, "head: it has a forward hook"),
        (adapted_head, "head: Adapter replaces it"),
        (lora, r"blocks\.0\.mixer\.affinity: Linear replaces it"),
        (quantised, r"blocks\.0\.mixer\.output: its weight is a Packed"),
        (normalised, r"blocks\.0\.mixer\.output: ParametrizedLinear replaces it"),
        (replaced, "final_norm: its forward was replaced, as Accelerate does"),
        (backward_hooked, r"blocks\.1: it has a backward hook"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_kernels_and_graphs_step_aside(change: Callable[[LanguageModel], None], reason: str) -> None:
    model = make(PURE)
    assert why_any_called(model) is None
    change(model)
    if find_spec("triton") is not None:
        with pytest.raises(ValueError, match=rf"model: {reason}.*; use LanguageModel.step"):
            DecodingModel(model)
    with pytest.raises(ValueError, match=rf"model: {reason}.*; use Steps"):
        StepGraph(model, 1)
    if torch.cuda.is_available():
        assert type(steps_for(model.cuda(), 1)) is Steps


# -- offloading --------------------------------------------------------------------------------------------------------------


@contextmanager
def offloaded(model: nn.Module, folder: Path | None) -> Iterator[None]:
    accelerate = pytest.importorskip("accelerate")
    if folder is None:
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, folder, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert device_of(model) == torch.device("cpu")
    yield
    accelerate.hooks.remove_hook_from_submodules(model)


@MODELS
@pytest.mark.parametrize("disk", [False, True])
@pytest.mark.filterwarnings("ignore:You are calling .generate.. with the `input_ids` being on a device type:UserWarning")
def test_offloaded(config: ModelConfig, disk: bool, tmp_path: Path) -> None:
    model = make(config)
    hugging = theirs(model)
    expected, text = check_generate(hugging), tokens(2, 9)
    with torch.no_grad():
        logits, (loss, _) = model(text)[0], model(text, text)
    with offloaded(hugging, tmp_path if disk else None):
        assert check_generate(hugging) == expected
    with offloaded(model, tmp_path / "ours" if disk else None), torch.no_grad():
        torch.testing.assert_close(model(text)[0], logits)
        torch.testing.assert_close(model(text, text)[0], loss)
        check_steps(model)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_a_text_from_offloaded_weights() -> None:
    tokenizer = Tokenizer.bytes_level()
    model = make(ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=WIDTH, num_layers=2, num_states=8))
    expected = generate(model, tokenizer, "some text", max_tokens=5)[0].tokens
    with offloaded(model, None):
        assert generate(model, tokenizer, "some text", max_tokens=5)[0].tokens == expected


@MODELS
def test_a_block_on_disk(config: ModelConfig, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = theirs(make(config))
    expected, text = check_generate(model), tokens(2, 7)
    model.save_pretrained(tmp_path / "model")
    places: dict[str, Any] = {"model.embedding": "cpu", "model.final_norm": "cpu", "lm_head": "cpu"}
    places |= {f"model.blocks.{i}": "disk" if i % 2 else "cpu" for i in range(config.num_layers)}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "disk")
    assert check_generate(loaded) == expected
    with torch.no_grad():
        cache = loaded(text[:, :4], use_cache=True)[CACHE_NAME]
        for t in range(4, 7):
            found = loaded(text[:, t : t + 1], **{CACHE_NAME: cache}).logits[:, 0]
        torch.testing.assert_close(found, model(text).logits[:, -1], rtol=1e-4, atol=1e-4)


def test_where_a_call_computes() -> None:
    model = make(PURE)
    assert device_of(model) == torch.device("cpu")
    assert device_of(model.to("meta")) == torch.device("meta")
    assert why_hooked(model) is None


def test_mixers_and_models_of_other_packages_are_no_obstacle() -> None:
    class Other(nn.Module):
        state_type = object

        def __init__(self) -> None:
            super().__init__()
            self.part = Part()

    class Part(nn.Module):
        pass

    class Model(LanguageModel):
        pass

    for name in ("Other", "Part", "Model"):  # as classes of another package
        locals()[name].__module__ = "other"
    model = Model(ModelConfig(vocab_size=5, hidden_size=8, num_layers=1, num_states=2))
    assert why_any_called(model) is None
    model.blocks[0].mixer = Other()
    assert why_any_called(model) is None
    handle = model.blocks[0].mixer.part.register_forward_hook(lambda *_: None)
    assert why_any_called(model) == "blocks.0.mixer.part: it has a forward hook"
    handle.remove()
    model.head = Part()
    assert why_any_called(model) == "head: Part replaces it"
