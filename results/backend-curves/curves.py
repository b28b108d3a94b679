"""Draws curves.png and prints how far runs are apart, of losses.jsonl: `curves.py`, in this folder."""

import json
import statistics
from itertools import combinations
from pathlib import Path

import matplotlib.pyplot as plt

HERE = Path(__file__).parent
COLOUR = {"triton": "#2457c5", "chunked": "#c2531b"}
LAST, SMOOTH = 100, 20

runs = [json.loads(line) for line in (HERE / "losses.jsonl").read_text().splitlines()]
apart: dict[str, list[float]] = {"the same backend": [], "triton and chunked": []}
for one, other in combinations(runs, 2):
    kind = "the same backend" if one["backend"] == other["backend"] else "triton and chunked"
    apart[kind].append(statistics.mean(abs(a - b) for a, b in zip(one["loss"], other["loss"], strict=True)))
for kind, differences in apart.items():
    low, middle, high = min(differences), statistics.median(differences), max(differences)
    print(f"{kind}: {len(differences)} pairs, mean |difference| {low:.4f} to {high:.4f}, median {middle:.4f}")
for one, other in combinations(runs, 2):
    if (one["replica"], one["gpu"]) == (other["replica"], other["gpu"]):
        differences = [abs(a - b) for a, b in zip(one["loss"], other["loss"], strict=True)]
        middle, step = statistics.mean(differences), differences.index(max(differences)) + 1
        print(f"replica {one['replica']}, {one['gpu']}: first {differences[0]:.1e}, mean {middle:.4f}, ", end="")
        print(f"largest {max(differences):.3f} at step {step}")
for backend in COLOUR:
    ends = [statistics.mean(run["loss"][-LAST:]) for run in runs if run["backend"] == backend]
    error = statistics.stdev(ends) / len(ends) ** 0.5
    print(f"{backend}: last {LAST} steps {statistics.mean(ends):.4f}, standard error {error:.4f} of {len(ends)} runs")

mean = [statistics.mean(losses) for losses in zip(*(run["loss"] for run in runs), strict=True)]
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
for run in runs:
    own = run["gpu"] == runs[-1]["gpu"]
    style = {"color": COLOUR[run["backend"]], "linewidth": 1, "linestyle": "--" if own else "-"}
    left.plot(range(1, len(mean) + 1), run["loss"], **style)
    off = [a - b for a, b in zip(run["loss"], mean, strict=True)]
    smooth = [statistics.mean(off[i - SMOOTH : i]) for i in range(SMOOTH, len(off) + 1)]
    right.plot(range(SMOOTH, len(mean) + 1), smooth, **style)
for backend, colour in COLOUR.items():
    left.plot([], [], color=colour, label=backend)
left.plot([], [], color="black", linestyle="--", label=runs[-1]["gpu"].split()[1])
left.legend(frameon=False)
left.set(title="training loss", xlabel="step", ylabel="nats per token")
right.set(title=f"from the mean of all runs, over {SMOOTH} steps", xlabel="step")
right.grid(alpha=0.3)
figure.savefig(HERE / "curves.png", dpi=110)
