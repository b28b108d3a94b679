"""Associative recall: pairs of key and value are read, then the keys come again, and their values are asked for. Which layers
learn it, and how soon?

    python examples/associative_recall.py [--pairs 4] [--seed 0] [--steps 600] [NAME...] >> results.jsonl

Prints for each name the share of values that are named rightly after each 100 steps (and after the last), on 256 test sequences
that are the same for all (`factorization_memory.evaluation.recall_learning`). Two blocks, d = 64, 128 sequences a step.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

from factorization_memory.config import AttentionConfig, Mamba2Config, ModelConfig
from factorization_memory.evaluation.recall_learning import learn_recall

BASE = ModelConfig(hidden_size=64, num_layers=2, num_heads=1, num_states=64, embedding_multiplier=8.0, intermediate_size=128)
MODELS = {
    "transformer": replace(BASE, mixers=("attention",), attention=AttentionConfig(num_heads=2)),
    "mamba2": replace(BASE, mixers=("mamba2",), mamba2=Mamba2Config(state_size=32, head_size=32)),
    "paper": BASE,
    "paper-k16": replace(BASE, top_k=16),
    "associative": replace(BASE, top_k=8, update_lag=1, rates="head"),
    "associative-additions": replace(BASE, top_k=8, update_lag=1, rates="head", conv_size=4, value_skip=True, output_gate=True),
}


def run(name: str, pairs: int, seed: int, steps: int) -> None:
    """Train one model and print its line."""
    reports = list(learn_recall(MODELS[name], pairs, steps, seed))
    line = {
        "name": name,
        "pairs": pairs,
        "seed": seed,
        "accuracy": [round(report.accuracy, 4) for report in reports],
        "parameters": reports[-1].parameters,
        "seconds": round(reports[-1].seconds),
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("names", nargs="*", help="of MODELS; all by default")
    options = parser.parse_args()
    for each in options.names or MODELS:
        run(each, options.pairs, options.seed, options.steps)
