"""Runs given away in Hugging Face's layout and taken back: the same weights, function and configuration, nothing half done."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import factorization_memory.models.huggingface  # noqa: F401 - makes transformers know our models
from factorization_memory.cli import dispatch
from factorization_memory.config import AttentionConfig, DataConfig, Mamba2Config, ModelConfig, RunConfig, TrainingConfig
from factorization_memory.data.shards import PackedCorpus
from factorization_memory.data.tokenizer import Tokenizer
from factorization_memory.models import LanguageModel
from factorization_memory.models.pretrained import FormatError, export
from factorization_memory.runs import CheckpointError, export_run, find_checkpoint, import_model, load_model
from factorization_memory.runs import checkpoint as checkpoint_module
from factorization_memory.training.trainer import Trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),  # transformers about its own names
    pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning"),
]

MEMORY = ModelConfig(hidden_size=16, num_layers=2, num_states=8, top_k=3, embedding_multiplier=10.0, conv_size=3)
ATTENTION = ModelConfig(
    hidden_size=16, num_layers=2, mixers=("attention",), attention=AttentionConfig(4, 2), tie_word_embeddings=False
)
MAMBA2 = ModelConfig(
    hidden_size=16, num_layers=2, mixers=("mamba2",), feed_forward=False,
    mamba2=Mamba2Config(state_size=8, head_size=8, chunk_size=4, conv_size=3),
)  # fmt: skip
KINDS = {
    "memory": (MEMORY, "FactorizationMemoryForCausalLM"),
    "hybrid": (dataclasses.replace(MEMORY, mixers=("memory", "attention")), "FactorizationMemoryForCausalLM"),
    "llama": (ATTENTION, "LlamaForCausalLM"),
    "mistral": (
        dataclasses.replace(ATTENTION, tie_word_embeddings=True, attention=AttentionConfig(4, 1, 500.0, 5)),
        "MistralForCausalLM",
    ),
    "mamba2": (MAMBA2, "Mamba2ForCausalLM"),
}


def trained(corpus: PackedCorpus, run_dir: Path, model: ModelConfig = MEMORY) -> Path:
    """A run of two steps, far enough from its start for its text to depend on what was read."""
    config = RunConfig(
        name="tiny", model=model, data=DataConfig(corpus=str(corpus.folder), context_length=16, read_ahead=0),
        training=TrainingConfig(steps=2, tokens_per_step=64, device="cpu", evaluate_every=1, checkpoint_every=1),
    )  # fmt: skip

    def evaluate(_: LanguageModel, step: int) -> dict[str, Any]:
        score = {"loss": 7.0 - step, "bits_per_byte": 9.2 - step, "perplexity": 148.4, "tokens": 100, "bytes": 100}
        return {"sources": {"en": score}, "bits_per_byte": score["bits_per_byte"]}

    Trainer(config, corpus, run_dir, evaluate=evaluate).run()
    return run_dir


@pytest.fixture
def run(corpus: PackedCorpus, run_dir: Path) -> Path:
    return trained(corpus, run_dir)


def logits(model: LanguageModel, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(corpus: PackedCorpus, run_dir: Path, tmp_path: Path, kind: str) -> None:
    """To the bit: weights, logits, configuration, what is known of the training; and `transformers` computes the same."""
    config, class_name = KINDS[kind]
    trained(corpus, run_dir, config)
    assert export_run(run_dir, tmp_path / "model") == class_name
    model, tokenizer, saved = load_model(run_dir)
    tokens = torch.randint(0, 256, (2, 20))
    expected = logits(model, tokens)

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(theirs).__name__ == class_name
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, expected, rtol=1e-5, atol=1e-5)
    text = "It was 猫 </s> <pad>"
    fast = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert fast(text)["input_ids"] == tokenizer.encode(text)
    assert (fast.bos_token_id, fast.eos_token_id, fast.pad_token_id) == (256, 256, 257)
    assert theirs.generation_config.eos_token_id == tokenizer.document_end

    checkpoint = import_model(tmp_path / "model", tmp_path / "back")
    assert checkpoint == find_checkpoint(tmp_path / "back") == tmp_path / "back" / "checkpoints" / "step-00000002"
    for place in (tmp_path / "model", tmp_path / "back", checkpoint):
        again, own_tokenizer, own_config = load_model(place)
        assert torch.equal(logits(again, tokens), expected)
        assert own_tokenizer.fingerprint == tokenizer.fingerprint
        assert own_config.training == saved.training
        # Automatic sizes come back as the numbers they were.
        assert own_config.model.layer_mixers == saved.model.layer_mixers
        assert own_config.model.feed_forward_size == saved.model.feed_forward_size or not config.feed_forward
    # What `transformers` saves itself is taken too, as after a training of theirs.
    theirs.save_pretrained(tmp_path / "saved")
    fast.save_pretrained(tmp_path / "saved")
    again, own_tokenizer, _ = load_model(tmp_path / "saved")
    assert torch.equal(logits(again, tokens), expected)
    assert own_tokenizer.encode(text) == tokenizer.encode(text)
    export_run(tmp_path / "back", tmp_path / "again", name="model")
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "model" / name).read_bytes(), name
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["state"]
    assert (state["step"], state["tokens"]) == (2, 128)
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors: missing; an imported model cannot be resumed"):
        Trainer(own_config, corpus, tmp_path / "back").run(resume=True)


@pytest.mark.parametrize("config", [ATTENTION, MAMBA2], ids=["llama", "mamba2"])
def test_a_multiplier_goes_into_the_embedding(corpus: PackedCorpus, run_dir: Path, tmp_path: Path, config: ModelConfig) -> None:
    trained(corpus, run_dir, dataclasses.replace(config, embedding_multiplier=10.0, tie_word_embeddings=True))
    export_run(run_dir, tmp_path / "model")
    tokens = torch.randint(0, 256, (2, 20))
    expected = logits(load_model(run_dir)[0], tokens)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")(tokens).logits
    torch.testing.assert_close(theirs, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(load_model(tmp_path / "model")[0], tokens), expected, rtol=1e-5, atol=1e-5)


def test_in_bfloat16_and_several_files(run: Path, tmp_path: Path) -> None:
    export_run(run, tmp_path / "model", dtype="bfloat16", max_shard_size=4000)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    model, _, _ = load_model(run)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    tokens = torch.randint(0, 256, (1, 12))
    assert torch.equal(logits(load_model(tmp_path / "model")[0], tokens), logits(model, tokens))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"dtype='int8': use one of float32"):
        export_run(run, tmp_path / "other", dtype="int8")


def test_remote_code_leads_to_the_installed_package(run: Path, tmp_path: Path) -> None:
    """Nobody imports us: `trust_remote_code` finds the classes where the package is, and says what to install where not."""
    export_run(run, tmp_path / "model")
    script = (
        "import sys, warnings; warnings.simplefilter('ignore')\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "class Gone:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'factorization_memory':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "if sys.argv[2] == 'gone': sys.meta_path.insert(0, Gone())\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "print(type(model).__module__, tokenizer('It')['input_ids'])\n"
    )
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": "", "OMP_NUM_THREADS": "1"}

    def call(where: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", script, str(tmp_path / "model"), where]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    assert call("here").stdout.strip() == "factorization_memory.models.huggingface.modeling [73, 116]"
    assert "pip install factorization_memory" in call("gone").stderr


def test_the_card(run: Path, tmp_path: Path) -> None:
    export_run(run, tmp_path / "model", name='Tiny: a "test"', license="apache-2.0", data="three sentences, *often*")
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "transformers"
    for words in (
        '# Tiny: a "test"', "three sentences, *often*", "128 tokens in 2 steps", "| en | 5.000 | 7.200 | 100 |",
        "3 of them updated", "| en | 1 |", "## Limits",
    ):  # fmt: skip
        assert words in card.text, words
    # The corpus lies there, and the command may have named it.
    record = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    named = record | {"command": ["fmem", "train", f"--data.corpus={tmp_path}/packed", "--run-dir", str(run)]}
    (run / "environment.json").write_text(json.dumps(named), encoding="utf-8")
    export_run(run, tmp_path / "model", name='Tiny: a "test"', license="apache-2.0", overwrite=True)
    assert "fmem train --data.corpus=packed --run-dir run" in (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    for path in (tmp_path / "model").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name
        assert b"/pytest-of-" not in path.read_bytes(), path.name
    import_model(tmp_path / "model", tmp_path / "back")
    export_run(tmp_path / "back", tmp_path / "again")
    assert "| en | 1 |" in (tmp_path / "again" / "README.md").read_text(encoding="utf-8")
    export_run(run, tmp_path / "silent", data="A sentence.")
    assert "Data: A sentence.\n" in (tmp_path / "silent" / "README.md").read_text(encoding="utf-8")
    export_run(run, tmp_path / "silent", overwrite=True)
    assert "Data: not specified." in ModelCard.load(tmp_path / "silent" / "README.md").text


def test_the_card_takes_the_evaluation_of_this_checkpoint_alone(run: Path, tmp_path: Path) -> None:
    row = {"loss": 4.5, "bits_per_byte": 6.5, "tokens": 7}
    record = {"evaluated": {"checkpoint": "step-00000002", "max_tokens": None}, "sources": {"en": row}, "total": row}
    (run / "evaluation.json").write_text(json.dumps(record), encoding="utf-8")
    export_run(run / "checkpoints" / "step-00000002", tmp_path / "last")
    assert "| all | 4.500 | 6.500 | 7 |" in (tmp_path / "last" / "README.md").read_text(encoding="utf-8")
    export_run(run / "checkpoints" / "step-00000001", tmp_path / "first")
    assert "4.500" not in (tmp_path / "first" / "README.md").read_text(encoding="utf-8")


def test_a_folder_that_is_there_stays(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    export_run(run, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(FileExistsError, match="already exists"):
        export_run(run, folder, dtype="bfloat16")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(export, "save_shim", full)
        with pytest.raises(OSError, match="No space"):
            export_run(run, folder, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    export_run(run, folder, overwrite=True, dtype="bfloat16")
    assert (folder / "model.safetensors").stat().st_size < len(before["model.safetensors"])
    import_model(folder, tmp_path / "back")
    with pytest.raises(FileExistsError, match="not empty"):
        import_model(folder, tmp_path / "back")
    assert not list(tmp_path.glob("*.partial"))
    # Nothing but what an export wrote is ever removed.
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    for place, message in (
        (folder, "contains 'notes.txt'"),
        (run, "not an exported model"),
        (run.parent, "not an exported model"),
    ):
        with pytest.raises(FileExistsError, match=message):
            export_run(run, place, overwrite=True)
    (tmp_path / "link").symlink_to(tmp_path / "back")
    with pytest.raises(FileExistsError, match="not an exported model"):
        export_run(run, tmp_path / "link", overwrite=True)
    assert load_model(run)
    assert (folder / "notes.txt").exists()


def test_disk_full(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_run(run, tmp_path / "model")

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(export, "save_torch_state_dict", full)
    with pytest.raises(OSError, match=rf"^{tmp_path / 'other'}: No space left on the disk; nothing was written"):
        export_run(run, tmp_path / "other")
    monkeypatch.setattr(checkpoint_module, "save_file", full)
    with pytest.raises(CheckpointError, match=rf"^{tmp_path / 'back'}: the model could not be written .*No space"):
        import_model(tmp_path / "model", tmp_path / "back")
    assert not {path.name for path in tmp_path.iterdir()} - {"model", "run"}


def test_two_exports_to_one_folder(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that began while another was writing does not take its files away, and fails when it comes second."""
    write, inner = export.save_shim, []

    def meanwhile(folder: Path) -> None:
        if not inner:
            inner.append(folder)
            export_run(run, tmp_path / "model")
        write(folder)

    monkeypatch.setattr(export, "save_shim", meanwhile)
    with pytest.raises(OSError, match="not empty"):
        export_run(run, tmp_path / "model")
    assert load_model(tmp_path / "model")
    assert not list(tmp_path.glob("*.partial"))


def test_weights_that_were_trained_further(run: Path, tmp_path: Path) -> None:
    """What was known of a model is not said of the one that others made of it; its tokenizer stays its own."""
    export_run(run, tmp_path / "model")
    theirs, fast = (auto.from_pretrained(tmp_path / "model") for auto in (AutoModelForCausalLM, AutoTokenizer))
    # As users do before they save: these leave traces in tokenizer.json.
    fast(["a", "longer"], padding=True)
    fast(["a", "longer"], truncation=True, max_length=3)
    with torch.no_grad():
        theirs.lm_head.weight.mul_(1.01)
    theirs.save_pretrained(tmp_path / "model")
    fast.save_pretrained(tmp_path / "model")
    _, tokenizer, config = load_model(tmp_path / "model")
    _, own, _ = load_model(run)
    assert tokenizer.fingerprint == own.fingerprint
    text = "It was.\nHe said: " + "word" * 50
    assert tokenizer.encode(text) == own.encode(text)
    assert config.training.steps == 2
    import_model(tmp_path / "model", tmp_path / "back")
    export_run(tmp_path / "back", tmp_path / "again")
    card = (tmp_path / "again" / "README.md").read_text(encoding="utf-8")
    assert "nats per token" not in card
    assert "128 tokens" not in card
    own.save(tmp_path / "model" / "tokenizer.json")
    Tokenizer.train(["a b c " * 100], 260).save(tmp_path / "model" / "tokenizer.json")
    with pytest.raises(CheckpointError, match="not this model's tokenizer"):
        load_model(tmp_path / "model")


def test_numbers_that_a_type_cannot_hold(run: Path, tmp_path: Path) -> None:
    path = find_checkpoint(run) / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"final_norm.weight": tensors["final_norm.weight"] * 1e6}, path)
    with pytest.raises(ValueError, match=r"'model\.final_norm\.weight' is not finite in float16"):
        export_run(run, tmp_path / "model", dtype="float16")
    assert not (tmp_path / "model").exists()


def damage_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | fields), encoding="utf-8")


def test_folders_that_cannot_be_taken(run: Path, tmp_path: Path) -> None:
    export_run(run, tmp_path / "model")

    def refused(message: str, **fields: Any) -> None:
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "model", folder)
        for name in fields.pop("remove", []):
            (folder / name).unlink()
        for name, content in fields.pop("write", {}).items():
            (folder / name).write_text(content, encoding="utf-8")
        if not fields.pop("damaged", False):
            damage_config(folder, **fields)
        with pytest.raises((FormatError, CheckpointError, ValueError), match=message):
            import_model(folder, tmp_path / "back")
        assert not (tmp_path / "back").exists()
        assert not list(tmp_path.glob("*.partial"))

    refused(
        r"model_type='bert' is not supported; use a model of type 'factorization_memory', 'llama', 'mistral', 'mamba2'",
        model_type="bert",
    )
    refused(
        r"'model\.blocks\.0\.mixer\.affinity\.weight' has shape \(8, 16\).*but according to config\.json \(9, 16\)",
        num_states=9,
    )
    refused(r"tokenizer\.json: missing", remove=["tokenizer.json"])
    refused(r"no model\.safetensors here; pytorch_model\.bin can run code", remove=["model.safetensors"],
            write={"pytorch_model.bin": "x"})  # fmt: skip
    refused(r"training\.json: not JSON", write={"training.json": "{"})
    refused(r"training\.json: format version 9", write={"training.json": '{"format_version": 9}'})
    known = json.loads((tmp_path / "model" / "training.json").read_text(encoding="utf-8"))
    for field, value, words in (
        ("config", {"steps": 3}, "steps: no such field"),
        ("state", known["state"] | {"step": -1}, r"'state\.step' cannot be -1"),
        ("state", known["state"] | {"step": "x"}, r"'state\.step' cannot be 'x'"),
        ("state", {}, "is missing"),
        ("environment", [], "'environment' cannot be"),
        ("corpus_fingerprint", 5, "'corpus_fingerprint' cannot be 5"),
    ):
        refused(rf"training\.json: .*{words}", write={"training.json": json.dumps(known | {field: value})})
    refused(r"num_states=0", num_states=0)
    refused(r"config\.json: vocab_size=0", vocab_size=0)
    refused(r"config\.json: rms_norm_eps", rms_norm_eps=10**400)
    refused(r"config\.json: 1,000,000 layers, but", num_hidden_layers=1_000_000)
    refused(r"has shape \(16, 64\), but according to config\.json \(100000000, 64\)", hidden_size=10**8)
    refused(r"not this model's tokenizer.*eos_token_id=7", eos_token_id=7)
    refused(r"not JSON, damaged", write={"config.json": "{"}, damaged=True)
    for files in ({}, [], {"a": 3}, {"a": ""}, {"a": ".."}, {"a": "../b.safetensors"}, {"a": "shard.bin"}):
        refused(
            r"index\.json: (its weight_map does not map|lists '.*', which is not a safetensors file of this folder)",
            remove=["model.safetensors"], write={"model.safetensors.index.json": json.dumps({"weight_map": files})},
        )  # fmt: skip
    (tmp_path / "model" / "training.json").unlink()
    _, _, config = load_model(tmp_path / "model")
    assert (config.name, config.model.num_states) == ("imported", 8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention_bias": True}, "attention_bias=True"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, r"rope_parameters=\{'rope_type': 'llama3'\}"),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}},
            "scaled rotary positions are not supported",
        ),
        ({"rope_parameters": [1]}, "of the wrong kind"),
        ({"hidden_size": "16"}, "of the wrong kind"),
        ({"num_attention_heads": 0}, "of the wrong kind"),
        ({"num_attention_heads": None}, "of the wrong kind"),
        ({"vocab_size": 258.0}, "vocab_size=258.0: expected int"),
        ({"rms_norm_eps": "1e-6"}, "norm_eps='1e-6': expected float"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings='no': expected bool"),
        ({"tie_word_embeddings": True}, "head's weight differs from the embedding's"),
        ({"head_dim": 8}, "head_dim=8"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        (
            {"intermediate_size": 32},
            r"'blocks\.0\.feed_forward\.down\.weight' has shape \(16, 64\).*but according to config\.json \(16, 32\)",
        ),
    ],
)
def test_llamas_that_ours_are_not(
    corpus: PackedCorpus, run_dir: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    export_run(trained(corpus, run_dir, ATTENTION), tmp_path / "model")
    damage_config(tmp_path / "model", **fields)
    with pytest.raises(FormatError, match=message):
        load_model(tmp_path / "model")


@pytest.mark.parametrize(
    ("fields", "message"), [({"time_step_limit": [0.0, 0.1]}, "time_step_limit="), ({"num_heads": 3}, "num_heads=3: heads of")]
)
def test_mamba2s_that_ours_are_not(
    corpus: PackedCorpus, run_dir: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    export_run(trained(corpus, run_dir, MAMBA2), tmp_path / "model")
    damage_config(tmp_path / "model", **fields)
    with pytest.raises(FormatError, match=message):
        load_model(tmp_path / "model")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_in_every_format(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float
) -> None:
    """Else a model of them writes nothing at all, and everything says that it went well."""
    export_run(run, tmp_path / "model")
    checkpoint = find_checkpoint(run, "last")
    for file in (checkpoint / "model.safetensors", tmp_path / "model" / "model.safetensors"):
        weights = load_file(file)
        name = next(name for name in sorted(weights) if "mixer" in name and weights[name].dim() == 2)
        weights[name][1, 1] = value
        save_file(weights, file, metadata={"format": "pt"})
    named = r"'(model\.)?blocks\.0\.mixer.*' is NaN or infinite"
    with pytest.raises(CheckpointError, match=named + ".*delete the folder .*--resume continue from"):
        load_model(checkpoint)
    with pytest.raises(CheckpointError, match=named):
        export_run(checkpoint, tmp_path / "again")
    for read in (lambda: load_model(tmp_path / "model"), lambda: import_model(tmp_path / "model", tmp_path / "imported")):
        with pytest.raises(FormatError, match=named):
            read()
    assert not (tmp_path / "again").exists()
    assert not (tmp_path / "imported").exists()
    for model in (checkpoint, tmp_path / "model"):
        assert dispatch(["generate", str(model), "--prompt", "It was"]) == 1
        said = capsys.readouterr()
        assert (said.out, "is NaN or infinite" in said.err) == ("", True)
    with pytest.raises(ValueError, match=named):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def test_weights_that_are_not_finite_are_not_saved(run: Path, tmp_path: Path) -> None:
    export_run(run, tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    theirs.model.final_norm.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match=r"not saved, as weight 'model\.final_norm\.weight' is NaN or infinite"):
        theirs.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
