"""What models make of tokens that the text before them could tell: loss of held-out and of training text, by whether the same
pair of tokens stood before in the same window.

    python results/parity-ladder/recall_in_text.py PACKED RUN... > recall-in-text.jsonl

Of each source and split 96 windows of the training context, evenly spread, each read from an empty memory. A token is
"repeated" if it followed its predecessor before in the window, "contradicted" if its predecessor stood there but was followed
by other tokens alone, "new" otherwise. One line for each run, with mean losses in nats and the numbers of tokens.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch

from factorization_memory.evaluation.recall import KINDS, kinds
from factorization_memory.training import find_checkpoint, load_model

WINDOWS, BATCH = 96, 16


@torch.no_grad()
def measure(run: Path, packed: Path) -> dict[str, object]:
    """The line of a run."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, _, config = load_model(find_checkpoint(run, "last"), device)
    length = config.data.context_length
    line: dict[str, object] = {"run": f"{run.parent.name}/{run.name}"}
    for path in sorted(packed.glob("*.tokens")):
        tokens = np.memmap(path, dtype="<u2", mode="r")
        starts = np.linspace(0, len(tokens) - length - 1, WINDOWS).astype(int)
        windows = np.stack([tokens[start : start + length + 1] for start in starts]).astype(np.int64)
        losses = []
        for part in torch.from_numpy(windows).split(BATCH):
            part = part.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                losses.append(model.loss(part[:, :-1], part[:, 1:], reduction="none", keep_state=False)[0].double().cpu())
        loss, kind = torch.cat(losses).numpy(), np.stack([kinds(window[:-1], window[1:]) for window in windows])
        means = {
            name: {"loss": round(float(loss[kind == i].mean()), 4), "tokens": int((kind == i).sum())}
            for i, name in enumerate(KINDS)
        }
        line[path.stem] = {"loss": round(float(loss.mean()), 4), **means}
    return line


if __name__ == "__main__":
    for each in sys.argv[2:]:
        print(json.dumps(measure(Path(each), Path(sys.argv[1]))), flush=True)
