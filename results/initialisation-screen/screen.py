"""The screen behind `results.jsonl`: one configuration, trained and evaluated on bytes.

    python screen.py FOLDER NAME '{"affinity_init": 2, "top_k": 4}' [STEPS]

FOLDER holds en.train, en.val, ja.train, ja.val: raw UTF-8 bytes of books, the val ones by other authors. Prints one JSON line.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch

from factorization_memory.config import ModelConfig
from factorization_memory.models import LanguageModel
from factorization_memory.models.routing import RoutingHealth

CONTEXT, BATCH, LONG, LONG_BATCH = 512, 32, 4096, 48
folder, name, overrides = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
steps = int(sys.argv[4]) if len(sys.argv) > 4 else 600
device = "cuda" if torch.cuda.is_available() else "cpu"
peak = overrides.get("learning_rate", 2e-3)
if "update_rate_init" in overrides:
    overrides["update_rate_init"] = tuple(overrides["update_rate_init"])
fields = {key: value for key, value in overrides.items() if key != "learning_rate"}

torch.manual_seed(0)
model = LanguageModel(ModelConfig(vocab_size=256, hidden_size=256, num_layers=4, **fields)).to(device)
decay = [p for n, p in model.named_parameters() if p.ndim >= 2 and "embedding" not in n]
rest = [p for n, p in model.named_parameters() if p.ndim < 2 or "embedding" in n]
groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=True)
data = {part: np.fromfile(folder / part, np.uint8) for part in ("en.train", "en.val", "ja.train", "ja.val")}
order = np.random.default_rng(1)


def batch() -> torch.Tensor:
    rows = []
    for row in range(BATCH):
        source = data["en.train" if row % 2 else "ja.train"]
        start = order.integers(0, len(source) - CONTEXT - 1)
        rows.append(source[start : start + CONTEXT + 1])
    return torch.from_numpy(np.stack(rows).astype(np.int64)).to(device)


for step in range(steps):
    tokens = batch()
    cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * max(0, step - 60) / max(steps - 60, 1)))
    for group in optimizer.param_groups:
        group["lr"] = peak * min((step + 1) / 60, cosine)
    with torch.autocast(device, dtype=torch.bfloat16):
        loss, _ = model.loss(tokens[:, :-1], tokens[:, 1:])
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()

result = {"name": name, "overrides": overrides, "steps": steps, "train_bits_per_byte": loss.item() / math.log(2)}
with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16):
    health = RoutingHealth(model)
    with health.observe():
        model.loss(tokens[:, :-1], tokens[:, 1:])
    for language in ("en", "ja"):
        text = (
            torch.from_numpy(data[f"{language}.val"][: LONG_BATCH * (LONG + 1)].astype(np.int64)).view(-1, LONG + 1).to(device)
        )
        bits = model.loss(text[:, :-1], text[:, 1:], reduction="none")[0].mean(0) / math.log(2)
        parts = {"first_512": bits[:512], "all_4096": bits, "last_512": bits[-512:]}
        result[language] = {key: round(part.mean().item(), 4) for key, part in parts.items()}
layers = health.summary()
result["dead_states"] = sum(sum(layer["dead"]) for layer in layers)
for key in ("entropy", "balance"):
    result[key] = [round(sum(layer[key]) / len(layer[key]), 2) for layer in layers]
print(json.dumps(result))
