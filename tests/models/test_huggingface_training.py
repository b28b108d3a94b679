"""Training through the tools of the Hugging Face ecosystem: Trainer, PEFT's LoRA, TRL's SFTTrainer."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, Trainer, TrainerCallback, TrainingArguments

from factorization_memory.config import ModelConfig
from factorization_memory.data.tokenizer import Tokenizer
from factorization_memory.models import LanguageModel
from factorization_memory.models.huggingface import FactorizationMemoryForCausalLM, fast_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # these libraries about each other
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]

TEXTS = [f"It was the {n}th day; 吾輩は{n}番目の猫である。" for n in range(12)]


@pytest.fixture
def model() -> FactorizationMemoryForCausalLM:
    tokenizer = Tokenizer.bytes_level()
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=16, num_layers=2, num_states=8, top_k=3, num_heads=2, conv_size=3,
        embedding_multiplier=10.0,
    )  # fmt: skip
    return FactorizationMemoryForCausalLM.from_language_model(
        LanguageModel(config), eos_token_id=tokenizer.document_end, pad_token_id=tokenizer.padding
    )


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    Tokenizer.bytes_level().save(tmp_path / "tokenizer.json")
    return fast_tokenizer(tmp_path / "tokenizer.json")


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True,
        learning_rate=1e-2, seed=1, **{"max_steps": 4, "save_steps": 2, "logging_steps": 1, **options},
    )  # fmt: skip


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def test_trainer_resumes(model: FactorizationMemoryForCausalLM, tmp_path: Path) -> None:
    """Stopped after two steps and resumed, training ends where it would have; the loss falls; the model loads again."""
    tokenizer = Tokenizer.bytes_level()
    examples = [{"input_ids": ids, "labels": ids} for ids in (tokenizer.encode(text)[:24] for text in TEXTS)]
    model.save_pretrained(tmp_path / "start")

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 2

    ends = []
    for folder, stopped in (("whole", False), ("parts", True)):
        started = AutoModelForCausalLM.from_pretrained(tmp_path / "start")
        options = arguments(tmp_path / folder, gradient_accumulation_steps=2, gradient_checkpointing=True)
        trainer = Trainer(started, options, train_dataset=examples, callbacks=[Stop()] if stopped else [])
        trainer.train()
        if stopped:
            again = AutoModelForCausalLM.from_pretrained(tmp_path / "start")
            trainer = Trainer(again, options, train_dataset=examples)
            trainer.train(resume_from_checkpoint=str(tmp_path / folder / "checkpoint-2"))
        ends.append(weights(trainer.model))
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        assert len(losses) == 4
        assert losses[-1] < losses[0]
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name]), name
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "parts" / "checkpoint-4")
    for name, tensor in saved.state_dict().items():
        assert torch.equal(tensor, ends[1][name]), name


def test_trainer_evaluates(model: FactorizationMemoryForCausalLM, tmp_path: Path) -> None:
    """`evaluate`, `predict`, evaluation while training and the best model at the end; with `compute_metrics`, logits too."""
    tokenizer = Tokenizer.bytes_level()
    examples = [{"input_ids": ids, "labels": ids} for ids in (tokenizer.encode(text)[:24] for text in TEXTS)]
    tokens = torch.tensor([example["input_ids"] for example in examples])

    def expected(model: Any) -> float:
        with torch.no_grad():
            return float(model.eval()(tokens, labels=tokens).loss)

    seen: dict[str, Any] = {}

    def metrics(found: Any) -> dict[str, float]:
        seen["logits"] = found.predictions
        return {"rows": len(found.predictions)}

    options = arguments(
        tmp_path, eval_strategy="steps", eval_steps=2, save_strategy="steps", load_best_model_at_end=True, save_total_limit=1
    )
    trainer = Trainer(model, options, train_dataset=examples, eval_dataset=examples)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected(model), rel=1e-4)
    predicted = trainer.predict(examples)
    assert predicted.metrics["test_loss"] == pytest.approx(expected(model), rel=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(predicted.predictions), model(tokens).logits, rtol=1e-4, atol=1e-4)
    trainer.train()
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert len(losses) == 2
    assert trainer.state.best_metric == min(losses)
    assert expected(model) == pytest.approx(min(losses), rel=1e-4)
    measured = Trainer(model, arguments(tmp_path / "measured"), eval_dataset=examples, compute_metrics=metrics).evaluate()
    assert measured["eval_rows"] == len(examples)
    assert seen["logits"].shape == (len(examples), 24, tokenizer.vocab_size)


def test_collator_without_padding(model: FactorizationMemoryForCausalLM, tmp_path: Path) -> None:
    """Sequences that the collator packs into a row train as they do apart."""
    tokenizer = Tokenizer.bytes_level()
    examples = [{"input_ids": tokenizer.encode(text)} for text in TEXTS[:3]]
    expected = sum(
        model(torch.tensor([e["input_ids"]]), labels=torch.tensor([e["input_ids"]]), num_items_in_batch=1).loss
        for e in examples
    )
    for options in ({}, {"return_flash_attn_kwargs": True}):
        batch = DataCollatorWithFlattening(return_tensors="pt", **options)(examples)
        assert batch["input_ids"].shape[0] == 1
        torch.testing.assert_close(model(**batch, num_items_in_batch=1).loss, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.timeout(300)
def test_loaded_in_shards(model: FactorizationMemoryForCausalLM, in_two_processes: Callable[..., None], tmp_path: Path) -> None:
    """FSDP2 of `transformers`, which shards the weights while it loads them."""
    distributed = pytest.importorskip("transformers.distributed")
    if "fsdp_size" not in signature(distributed.DistributedConfig).parameters:
        pytest.skip("this version of transformers does not shard while it loads")
    model.save_pretrained(tmp_path / "whole")
    kept = {name: tensor for name, tensor in weights(model).items() if "1.mixer.value" not in name and "lm_head" not in name}
    model.config.save_pretrained(tmp_path / "parts")
    save_file(kept, tmp_path / "parts" / "model.safetensors", {"format": "pt"})
    # No GPU, over one of which both would shard.
    world = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "RANK": "0", "CUDA_VISIBLE_DEVICES": ""}
    in_two_processes(Path(__file__).with_name("loading_in_shards.py"), tmp_path, **world)


def test_lora(model: FactorizationMemoryForCausalLM, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    before = weights(model)
    tokens = torch.randint(2, 250, (2, 12))
    model.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["affinity", "value", "output", "gate_up", "down"], task_type="CAUSAL_LM")
    )
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = adapted(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapted.eval()
    expected = adapted(input_ids=tokens).logits
    generated = adapted.generate(input_ids=tokens, max_new_tokens=4, do_sample=False)
    adapted.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, before[name]), name  # LoRA left the weights alone
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(again(input_ids=tokens).logits, expected)
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(merged.generate(tokens, max_new_tokens=4, do_sample=False), generated)


def test_supervised_fine_tuning(model: FactorizationMemoryForCausalLM, tokenizer: Any, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    # As in examples/fine_tune_with_trl.py: tokens with their end, which TRL would add as the characters "</s>".
    end = tokenizer.eos_token_id
    rows = [{"input_ids": [*tokenizer(text)["input_ids"], end], "completion_mask": [0] * 8 + [1] * 80} for text in TEXTS]
    for row in rows:
        row["completion_mask"] = row["completion_mask"][: len(row["input_ids"])]
    options = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, report_to=[], use_cpu=True, max_length=64,
        logging_steps=1, learning_rate=1e-2, disable_tqdm=True, completion_only_loss=True,
    )  # fmt: skip
    trainer = trl.SFTTrainer(model, args=options, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer)
    labels = next(iter(trainer.get_train_dataloader()))["labels"]
    assert (labels == end).sum(1).tolist() == [1] * 4
    assert (labels[:, :8] == -100).all()
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]
    trainer.save_model(str(tmp_path / "tuned"))
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    for name, tensor in tuned.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
