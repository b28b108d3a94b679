"""The plan stored in the folder of a comparison: upgraded to the current format, and compared with a command's plan."""

from __future__ import annotations

import json
from typing import Any

from factorization_memory.config import ModelConfig, RunConfig, is_neutral, to_dict
from factorization_memory.experiments.plan import PLAN_VERSION, SAME_COMMAND_MAY_CHANGE


def with_defaults(plan: Any) -> Any:
    """A stored `Plan.description` in the current format: with the defaults of fields added since, which are what it was
    trained with, without retired fields at their neutral value, and with seeds per contender, which used to be the same for
    all."""
    if not isinstance(plan, dict) or not isinstance(plan.get("contenders"), dict):
        return plan
    if plan.get("schema_version") == 1 and "seeds" not in plan:
        return plan
    default = to_dict(RunConfig())
    for name in SAME_COMMAND_MAY_CHANGE:
        section, _, field = name.partition(".")
        del default[section][field]
    default = json.loads(json.dumps(default))
    contenders = {name: _filled(_without_neutral(config), default) for name, config in plan["contenders"].items()}
    if plan.get("schema_version") == 1:
        plan = dict(plan, schema_version=PLAN_VERSION)
        seeds = plan.pop("seeds")
        contenders = {name: {"seeds": seeds, **config} for name, config in contenders.items() if isinstance(config, dict)}
    return plan | {"contenders": contenders}


def _without_neutral(config: Any) -> Any:
    """A contender's configuration without the retired fields of its model that have their neutral value."""
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        return config
    section = ModelConfig.__name__
    model = {name: value for name, value in config["model"].items() if not is_neutral(section, name, value)}
    return config | {"model": model}


def is_plan(plan: Any) -> bool:
    """Whether a JSON document has the structure of `Plan.description`, checking the contenders' seeds and the order."""
    if not isinstance(plan, dict) or not all(isinstance(plan.get(part), dict) for part in ("contenders", "order")):
        return False
    seeds = [each.get("seeds") if isinstance(each, dict) else None for each in plan["contenders"].values()]
    return all(isinstance(each, list) and all(isinstance(seed, int) for seed in each) for each in seeds)


def part_to_keep(old: Any, new: dict[str, Any]) -> dict[str, Any]:
    """The part of the plan `new` that must equal `old` for `new` to extend it: without the contenders and seeds missing from
    `old`, if `new` has all those of `old`. Both are in the form of `Plan.description`."""
    if not is_plan(old):
        return new
    contenders = {}
    for name, kept in old["contenders"].items():
        if name not in new["contenders"]:
            return new
        contenders[name] = dict(new["contenders"][name])
        if set(kept["seeds"]) <= set(contenders[name]["seeds"]):
            contenders[name]["seeds"] = kept["seeds"]
    order = {seed: digest for seed, digest in new["order"].items() if seed in old["order"]}
    return new | {"contenders": contenders, "order": order}


def _filled(values: Any, default: dict[str, Any]) -> Any:
    if not isinstance(values, dict):
        return values
    filled = dict(values)
    for name, value in default.items():
        filled[name] = _filled(values[name], value) if name in values and isinstance(value, dict) else values.get(name, value)
    return filled


def first_difference(old: Any, new: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """Path, old and new value of the first difference between two JSON documents."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            name = f"{path}.{key}" if path else key
            if key not in old or key not in new:
                return name, old.get(key), new.get(key)
            found = first_difference(old[key], new[key], name)
            if found is not None:
                return found
        return None
    return None if old == new else (path, old, new)
