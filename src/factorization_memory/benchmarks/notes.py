"""The last training benchmark of this machine, kept in the user's cache folder for `fmem plan` to tell how long a run takes."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from factorization_memory._files import JSONError, cache_folder, read_json, write_atomic
from factorization_memory.benchmarks.training import OURS
from factorization_memory.config import ConfigError, ModelConfig, from_dict
from factorization_memory.models.counting import count


def note(kind: str, dtype: str) -> Path:
    """Where the benchmark of a kind of device ("cpu", "cuda") in that arithmetic is kept."""
    return cache_folder() / "benchmarks" / f"training-{kind}-{dtype}.json"


def remember(record: dict[str, Any]) -> None:
    """Keep a whole result of `fmem bench training` with the date. Raises OSError where the cache folder cannot be written."""
    path = note(record["machine"]["device"].partition(":")[0], record["dtype"])
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    write_atomic(path, json.dumps(record | {"date": date}, ensure_ascii=False, allow_nan=False))


def training_rate(kind: str, name: str, dtype: str, context_length: int) -> tuple[float, str] | None:
    """FLOP/s that training reached here, by the benchmark's length nearest to `context_length`, and the date; None where there
    is no benchmark of the machine called `name`."""
    try:
        kept = read_json(note(kind, dtype))
        if kept["machine"]["name"] != name:
            return None
        records = [each for each in kept["records"] if each["model"] == OURS and not each["error"]]
        nearest = min(records, key=lambda each: abs(each["length"] - context_length), default=None)
        if nearest is None:
            return None
        model = from_dict(ModelConfig, kept["model"])
        return count(model, nearest["length"]).train_flops * nearest["tokens_per_second"], str(kept["date"])
    except (OSError, RuntimeError, JSONError, ConfigError, KeyError, TypeError):
        return None  # none, or of another version of this package
