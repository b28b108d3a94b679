"""The model card: README.md of an exported model, as shown on Hugging Face's hub."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from factorization_memory._text import markdown_cell
from factorization_memory.config import ModelConfig
from factorization_memory.models.pretrained.conversion import NATIVE, native_type

_LANGUAGE = re.compile(r"([A-Za-z]{2,3})([-_][A-Za-z0-9]{1,8})*")

UNSPECIFIED = "not specified"


@dataclass(frozen=True)
class CardFacts:
    """Known facts about a model; empty ones are omitted, or reported as unknown."""

    name: str
    """Name of the model."""
    config: ModelConfig
    parameters: int
    license: str = ""
    """The hub's identifier of the licence of the weights."""
    data: str = ""
    """A sentence on the training data, in Markdown."""
    languages: tuple[str, ...] = ()
    """Languages as given by the texts: ISO 639 codes, with region or script if given."""
    sources: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """For each source of the training text: `documents`, `tokens` and `bytes`."""
    context_length: int = 0
    """Tokens of a training sequence."""
    tokens: int = 0
    """Tokens trained on, counting repetitions."""
    steps: int = 0
    held_out: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """For each source of held-out text: `loss` in nats per token, `bits_per_byte`, `tokens`."""
    held_out_note: str = ""
    """Description of that text and how it was read."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    """Environment of the training: `command`, `date`, `torch`, `cpu`, `gpu`, `git_commit`, `package`."""
    seconds: float = 0.0
    """Total seconds of training."""
    precision: str = ""


def model_card(facts: CardFacts) -> str:
    """The card as Markdown, preceded by the hub's metadata."""
    native = native_type(facts.config)
    parts = [_front_matter(facts, native), f"# {facts.name}\n", _what(facts, native), _use(native), _training(facts)]
    if facts.held_out:
        parts.append(_held_out(facts))
    parts.append(_LIMITS)
    return "\n".join(parts)


def _front_matter(facts: CardFacts, native: str | None) -> str:
    # JSON strings are valid YAML strings, whatever they contain.
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if facts.license:
        lines.append(f"license: {json.dumps(facts.license, ensure_ascii=False)}")
    # The hub accepts only codes: "en" for "en-us", nothing for a name.
    codes = dict.fromkeys(found[1].lower() for language in facts.languages if (found := _LANGUAGE.fullmatch(language)))
    if codes:
        lines += ["language:", *(f"- {json.dumps(code)}" for code in codes)]
    return "\n".join([*lines, "tags:", "- factorization-memory" if native is None else f"- {native}", "---\n"])


def _what(facts: CardFacts, native: str | None) -> str:
    config = facts.config
    kinds = "/".join(dict.fromkeys(config.layer_mixers))
    if native is not None:
        what = f"A baseline trained with `factorization_memory`, saved as a `{NATIVE[native]}` model."
    else:
        what = (
            "A recurrent language model whose memory is a matrix of states, after *Language Modeling With Factorization "
            "Memory* ([arXiv 2511.00315](https://arxiv.org/abs/2511.00315)), by an independent implementation, "
            "`factorization_memory`."
        )
    rows = {
        "parameters": f"{facts.parameters:,}",
        "blocks": f"{config.num_layers} of {kinds}, width {config.hidden_size}",
        "vocabulary": f"{config.vocab_size:,} ids (byte-level, so that any text can be encoded and decoded exactly)",
        "training context": f"{facts.context_length:,} tokens" if facts.context_length else "",
        "licence of the weights": facts.license or UNSPECIFIED,
    }
    if "memory" in config.layer_mixers:
        selected = "all of them" if config.top_k is None else f"{config.top_k} of them"
        rows["memory"] = (
            f"{config.num_heads} x {config.num_states} states of width {config.value_size // config.num_heads} in each block, "
            f"{selected} updated and {'as many others read' if config.update_lag and config.top_k else 'read'} by a token"
        )
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value)
    return f"{what}\n\n| | |\n| --- | --- |\n{table}\n"


def _use(native: str | None) -> str:
    known = (
        ""
        if native is not None
        else "import factorization_memory.models.huggingface  # pip install factorization_memory; registers the model\n"
    )
    return (
        "## Use\n\n```python\n"
        f"{known}from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")\n'
        'prompt = tokenizer("It was", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**prompt, max_new_tokens=40)[0]))\n```\n"
    )


def _training(facts: CardFacts) -> str:
    lines = [f"## Training\n\nData: {facts.data or UNSPECIFIED}."]
    if facts.sources:
        rows = [
            f"| {markdown_cell(name)} | {source['documents']:,} | {source['tokens']:,} | {source['bytes']:,} |"
            for name, source in facts.sources.items()
        ]
        lines.append("\n".join(["| source | documents | tokens | bytes |", "| --- | --- | --- | --- |", *rows]))
    if facts.tokens:
        where = facts.environment.get("gpu") or facts.environment.get("cpu")
        precision = f" in {facts.precision}" if facts.precision else ""
        time = f"{facts.seconds:.0f} seconds" if facts.seconds < 120 else f"{facts.seconds / 60:.0f} minutes"
        on = f", {time} on {where}{precision}" if where else ""
        lines.append(f"{facts.tokens:,} tokens in {facts.steps:,} steps{on}.")
    command = facts.environment.get("command")
    if command:
        versions = ", ".join(
            f"{name} {facts.environment[key]}"
            for name, key in (("factorization_memory", "package"), ("commit", "git_commit"), ("torch", "torch"))
            if facts.environment.get(key)
        )
        lines.append(f"```sh\n{shlex.join(command)}\n```\n\n{versions}; {str(facts.environment.get('date', ''))[:10]}.")
    return "\n\n".join(lines) + "\n"


def _held_out(facts: CardFacts) -> str:
    rows = [
        f"| {markdown_cell(name)} | {row['loss']:.3f} | {row['bits_per_byte']:.3f} | {int(row['tokens']):,} |"
        for name, row in facts.held_out.items()
    ]
    table = "\n".join(["| | nats per token | bits per byte | tokens |", "| --- | --- | --- | --- |", *rows])
    return f"## Held-out text\n\n{facts.held_out_note}\n\n{table}\n"


_LIMITS = """## Limits

This is a base model: it continues text, and was not trained to follow instructions, to be correct or to be harmless. Its output
can be false, and reflects the language and attitudes of its training texts. It knows nothing beyond them.
"""
