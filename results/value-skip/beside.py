"""Draws beside.png: loss by position of the contenders of two records, Mamba-2's seeds of both. `beside.py`, in this folder."""

import json
import statistics
from pathlib import Path

from factorization_memory.experiments.figures import comparison_curves, png

HERE = Path(__file__).parent
NAMES = {"transformer": "Transformer", "mamba2": "Mamba-2", "both-skip": "memory alone", "hybrid": "memory and attention"}

seeds: dict[str, dict[int, dict]] = {name: {} for name in NAMES}
for folder in (HERE.parent / "parity-ladder", HERE):
    for contender in json.loads((folder / "compare.json").read_text())["contenders"]:
        if contender["name"] in NAMES:
            seeds[contender["name"]] |= {
                seed["seed"]: seed["by_position"] for seed in contender["seeds"] if seed["by_position"]
            }
curves = {}
for name, runs in seeds.items():
    assert len(runs) == 3, name
    curves[NAMES[name]] = {
        source: [
            {
                "start": bins[0]["start"],
                "end": bins[0]["end"],
                "tokens": bins[0]["tokens"],
                "loss": {
                    "mean": statistics.mean(each["loss"] for each in bins),
                    "spread": statistics.stdev(each["loss"] for each in bins),
                },
            }
            for bins in zip(*(run[source] for run in runs.values()), strict=True)
        ]
        for source in ("en", "ja")
    }
figure = comparison_curves(curves, 1024)
assert figure is not None
png(figure, HERE / "beside.png")
