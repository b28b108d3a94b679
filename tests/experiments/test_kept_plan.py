from __future__ import annotations

import json

from factorization_memory.config import RunConfig, to_dict
from factorization_memory.experiments.kept_plan import first_difference, with_defaults


def test_a_plan_of_before_a_field_came_is_the_same() -> None:
    config = json.loads(json.dumps(to_dict(RunConfig())))
    del config["data"]["corpus"], config["data"]["read_ahead"]
    new = {"contenders": {"a": {"learning_rates": [1e-3], **config}}, "seeds": [0]}
    old = json.loads(json.dumps(new))
    del old["contenders"]["a"]["model"]["update_lag"], old["contenders"]["a"]["model"]["attention"]["rope_theta"]
    assert first_difference(old, new) is not None
    assert first_difference(with_defaults(old), new) is None
    old["contenders"]["a"]["model"]["dropout"] = 0.0  # retired since
    assert first_difference(with_defaults(old), new) is None
    old["contenders"]["a"]["model"]["dropout"] = 0.1
    assert first_difference(with_defaults(old), new) == ("contenders.a.model.dropout", 0.1, None)
    del old["contenders"]["a"]["model"]["dropout"]
    new["contenders"]["a"]["model"]["update_lag"] = 1
    assert first_difference(with_defaults(old), new) == ("contenders.a.model.update_lag", 0, 1)
    assert with_defaults(None) is None


def test_first_difference() -> None:
    old = {"a": {"b": [1, 2], "c": None}, "d": 1}
    assert first_difference(old, json.loads(json.dumps(old))) is None
    assert first_difference(old, {"a": {"b": [1, 3], "c": None}, "d": 2}) == ("a.b", [1, 2], [1, 3])
    assert first_difference(old, {"a": {"b": [1, 2]}, "d": 1}) == ("a.c", None, None)
    assert first_difference(None, old)[0] == ""
