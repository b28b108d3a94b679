"""Associative recall: pairs of key and value, then keys whose values are to be named. Which layers learn it, and how soon?

    python results/associative-recall/recall.py [--pairs 4] [--seed 0] [NAME...] > results.jsonl

A sequence holds P pairs of a key (of 4 P, all different) and a value (of 4 P), then 4 P places, P of which hold the keys again
in any order and the others a filler; the loss is that of the values at those P. Two blocks, d = 64, AdamW, 600 steps of 128
sequences.
Prints for each name the share of values named rightly after each 100 steps, on 256 sequences that are the same for all.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace

import torch
from torch.nn import functional

from factorization_memory.config import AttentionConfig, Mamba2Config, ModelConfig
from factorization_memory.models import LanguageModel

BATCH, STEPS = 128, 600
LEARNING_RATE, WARMUP, EVERY = 1e-2, 100, 100

BASE = ModelConfig(
    hidden_size=64, num_layers=2, num_states=32, num_heads=2, embedding_multiplier=8.0,
    intermediate_size=128,
)  # fmt: skip
CONV = replace(BASE, conv_size=4, output_gate=True)
LAYER = replace(CONV, conv_input="layer")
MODELS = {
    "transformer": replace(BASE, mixers=("attention",), attention=AttentionConfig(num_heads=2)),
    "mamba2": replace(BASE, mixers=("mamba2",), mamba2=Mamba2Config(state_size=32, head_size=32)),
    "paper": replace(BASE, num_heads=1, num_states=64),
    "paper-k16": replace(BASE, num_heads=1, num_states=64, top_k=16),
    "paper-separate": replace(BASE, num_heads=1, num_states=64, query="separate"),
    "conv": CONV,
    "conv-k8": replace(CONV, top_k=8),
    "conv-separate": replace(CONV, query="separate"),
    "conv-separate-k8": replace(CONV, query="separate", top_k=8),
    "conv-linear": replace(CONV, query="linear"),
    "conv-k8-m128": replace(CONV, top_k=8, num_states=128),
    "conv-k8-m512": replace(CONV, top_k=8, num_states=512),
    "conv-k8-m128-head": replace(CONV, top_k=8, num_states=128, rates="head"),
    "conv-k8-m512-head": replace(CONV, top_k=8, num_states=512, rates="head"),
    "conv-own-k8-m128": replace(CONV, query="separate", top_k=8, merge_top_k=8, num_states=128),
    "paper-k16-m512": replace(BASE, num_heads=1, num_states=512, top_k=16),
    "convin": LAYER,
    "convin-k8": replace(LAYER, top_k=8),
    "convin-separate": replace(LAYER, query="separate"),
    "convin-separate-k8": replace(LAYER, query="separate", top_k=8),
    "convin-linear": replace(LAYER, query="linear"),
    "convin-linear-k8": replace(LAYER, query="linear", top_k=8),
    "conv-own-k8": replace(CONV, query="separate", top_k=8, merge_top_k=8),
    "conv-linear-own-k8": replace(CONV, query="linear", top_k=8, merge_top_k=8),
    "both": replace(CONV, conv_input="both"),
    "both-k8": replace(CONV, conv_input="both", top_k=8),
    "both-separate-k8": replace(CONV, conv_input="both", query="separate", top_k=8),
    "both-own-k8": replace(CONV, conv_input="both", query="separate", top_k=8, merge_top_k=8),
    "both-linear": replace(CONV, conv_input="both", query="linear"),
    "hgrn2-conv": replace(LAYER, affinity="none", query="linear", norm="head"),
}


def draw(count: int, pairs: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences and targets, both `[count, 6 P]`; targets are -100 where nothing is asked."""
    symbols = places = 4 * pairs
    keys = torch.stack([torch.randperm(symbols, generator=generator)[:pairs] for _ in range(count)])
    values = torch.randint(0, symbols, (count, pairs), generator=generator) + symbols
    head = torch.stack((keys, values), -1).flatten(1)
    tail = torch.full((count, places), 2 * symbols)
    targets = torch.full((count, 2 * pairs + places), -100)
    for i in range(count):
        where = torch.randperm(places, generator=generator)[:pairs]
        tail[i, where] = keys[i]
        targets[i, 2 * pairs + where] = values[i]
    return torch.cat((head, tail), 1), targets


def run(name: str, pairs: int, seed: int = 0) -> None:
    """Train one model and print its line."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    model = LanguageModel(replace(MODELS[name], vocab_size=8 * pairs + 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1, betas=(0.9, 0.95))
    started, accuracy = time.time(), []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / WARMUP) * (1 - 0.9 * step / STEPS)
        x, y = draw(BATCH, pairs, generator)
        loss = functional.cross_entropy(model(x)[0].flatten(0, 1), y.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % EVERY == 0:
            with torch.no_grad():
                x, y = draw(256, pairs, torch.Generator().manual_seed(99))
                asked = y >= 0
                accuracy.append(round((model(x)[0].argmax(-1)[asked] == y[asked]).float().mean().item(), 4))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    line = {
        "name": name,
        "pairs": pairs,
        "seed": seed,
        "accuracy": accuracy,
        "parameters": parameters,
        "seconds": round(time.time() - started),
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("names", nargs="*", help="of MODELS; all by default")
    options = parser.parse_args()
    for each in options.names or MODELS:
        run(each, options.pairs, options.seed)
