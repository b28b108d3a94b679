"""From texts to a trained model and a generated line, in Python. Usage: train_from_python.py [FOLDER_OR_FILE] [STEPS]"""

import sys
import tempfile
from pathlib import Path

from factorization_memory.config import DataConfig, ModelConfig, OptimizerConfig, RunConfig, TrainingConfig
from factorization_memory.data.corpora import builtin_corpus
from factorization_memory.data.shards import pack
from factorization_memory.data.tokenizer import Tokenizer
from factorization_memory.evaluation import evaluate_corpus
from factorization_memory.generation import SamplingConfig, generate
from factorization_memory.runs import load_model
from factorization_memory.training import Trainer

texts = Path(sys.argv[1]) if len(sys.argv) > 1 else builtin_corpus()
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 50

with tempfile.TemporaryDirectory() as folder:
    corpus = pack([(None, texts)], Tokenizer.bytes_level(), Path(folder) / "packed", holdout="tail", holdout_fraction=0.1)
    config = RunConfig(
        model=ModelConfig(hidden_size=64, num_layers=2, num_states=16, top_k=4, num_heads=2, conv_size=4),
        data=DataConfig(corpus=str(corpus.folder), context_length=128),
        optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=10),
        training=TrainingConfig(steps=steps, tokens_per_step=2048, evaluate_every=0),
    )
    result = Trainer(config, corpus, Path(folder) / "run").run()
    model, tokenizer, _ = load_model(Path(folder) / "run")
    held_out = evaluate_corpus(model, corpus, context_length=128, max_tokens=20_000)
    print(f"{result['tokens']:,} tokens, held-out bits per byte {held_out['total']['bits_per_byte']:.2f}")
    (line,) = generate(model, tokenizer, "It was", max_tokens=80, sampling=SamplingConfig(temperature=0.7))
    print("It was" + line.text)
