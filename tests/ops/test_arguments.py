"""Each argument that is off raises one ValueError naming it, what it got and what it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from factorization_memory.ops import factorization_memory, factorization_memory_step

U = torch.rand(2, 5, 1, 4)
V = torch.randn(2, 5, 1, 3)
SPARSE = {"update": U[..., :2], "merge": U[..., :2], "num_states": 4}
CHOSEN = torch.tensor([0, 3]).expand(2, 5, 1, 2)
PACKED = {"update": U[:1], "merge": U[:1], "value": V[:1]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value": V[0]}, r"value: got shape \(5, 1, 3\), takes \[B, T, H, D\]"),
        ({"value": V.long()}, "value: got dtype torch.int64"),
        ({"update": U[:, :4]}, r"update: got shape \(2, 4, 1, 4\)"),
        ({"update": U.long()}, "update: got dtype torch.int64"),
        ({"merge": U[..., :3]}, r"merge: got shape \(2, 5, 1, 3\), takes the shape of update"),
        ({"num_states": 5}, "num_states: got 5, takes update's last dimension 4"),
        ({"indices": torch.zeros(2, 5, 1, 4, dtype=torch.long)}, "num_states: got None"),
        (SPARSE | {"indices": torch.zeros(2, 5, 1, 1, dtype=torch.long)}, r"indices: got shape \(2, 5, 1, 1\)"),
        (SPARSE | {"indices": torch.zeros(2, 5, 1, 2)}, "indices: got dtype torch.float32"),
        (
            SPARSE | {"indices": torch.tensor([0, 4]).expand(2, 5, 1, 2)},
            "indices: got values from 0 to 4, takes 0 to num_states",
        ),
        (SPARSE | {"indices": torch.tensor([-1, 2]).expand(2, 5, 1, 2)}, "indices: got values from -1 to 2"),
        (SPARSE | {"indices": torch.tensor([3, 3]).expand(2, 5, 1, 2)}, "indices: got the same state twice"),
        ({"merge_indices": CHOSEN}, r"merge_indices: got \(2, 5, 1, 2\) without indices"),
        (SPARSE | {"indices": CHOSEN, "merge_indices": 4}, "merge_indices: got int 4, takes a tensor"),
        (
            SPARSE | {"indices": CHOSEN, "merge_indices": CHOSEN[..., :1]},
            r"merge_indices: got shape \(2, 5, 1, 1\), takes the shape of",
        ),
        (SPARSE | {"indices": CHOSEN, "merge_indices": CHOSEN.float()}, "merge_indices: got dtype torch.float32"),
        (
            SPARSE | {"indices": CHOSEN, "merge_indices": CHOSEN + 1},
            "merge_indices: got values from 1 to 4, takes 0 to num_states",
        ),
        (SPARSE | {"indices": CHOSEN, "merge_indices": CHOSEN * 0}, "merge_indices: got the same state twice for one token"),
        ({"initial_state": torch.zeros(2, 1, 4, 2)}, r"initial_state: got shape \(2, 1, 4, 2\), takes \(2, 1, 4, 3\)"),
        ({"initial_state": torch.zeros(2, 1, 4, 3).double()}, "initial_state: got dtype torch.float64, takes torch.float32"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens: got B = 2, takes B = 1 with packed sequences"),
        (
            PACKED | {"cu_seqlens": torch.tensor([0, 4])},
            r"cu_seqlens: got \[0, 4\], takes a non-decreasing sequence from 0 to T = 5",
        ),
        (PACKED | {"cu_seqlens": torch.tensor([0, 4, 3, 5])}, r"cu_seqlens: got \[0, 4, 3, 5\]"),
        (PACKED | {"cu_seqlens": torch.tensor([0.0, 5.0])}, "cu_seqlens: got torch.float32"),
        ({"backend": "cuda"}, "backend='cuda': use one of auto, reference, chunked, triton"),
        ({"value": V.to("meta")}, "update: is on cpu, value on meta"),
    ],
)
def test_bad_argument(changes: dict[str, Any], message: str) -> None:
    arguments = {"update": U, "merge": U, "value": V} | changes
    with pytest.raises(ValueError, match=message):
        factorization_memory(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"indices": None}, r"merge_indices: got \(2, 1, 2\) without indices"),
        ({"merge_indices": CHOSEN[:, 0] + 1}, "merge_indices: got values from 1 to 4"),
        ({"merge_indices": CHOSEN[:, 0] * 0}, "merge_indices: got the same state twice"),
    ],
)
def test_bad_step_selection(changes: dict[str, Any], message: str) -> None:
    arguments = {name: x[:, 0, :, :2] for name, x in (("update", U), ("merge", U))} | {"indices": CHOSEN[:, 0]}
    arguments |= {"value": V[:, 0], "state": torch.zeros(2, 1, 4, 3), "merge_indices": CHOSEN[:, 0]}
    with pytest.raises(ValueError, match=message):
        factorization_memory_step(**arguments | changes)


def test_bad_step_state() -> None:
    with pytest.raises(ValueError, match=r"state: got shape \(2, 1, 4, 2\), takes \(2, 1, 4, 3\)"):
        factorization_memory_step(U[:, 0], U[:, 0], V[:, 0], torch.zeros(2, 1, 4, 2))


@pytest.mark.parametrize("name", ["update", "merge", "value", "indices", "initial_state", "cu_seqlens"])
def test_what_is_no_tensor_is_named(name: str) -> None:
    weights = torch.rand(1, 3, 1, 2)
    arguments = {
        "update": weights, "merge": weights, "value": torch.rand(1, 3, 1, 4), "indices": torch.arange(2).expand(1, 3, 1, 2),
        "num_states": 2, "initial_state": torch.zeros(1, 1, 2, 4), "cu_seqlens": torch.tensor([0, 3]),
    }  # fmt: skip
    factorization_memory(**arguments)
    with pytest.raises(ValueError, match=f"^{name}: got list .*, takes a tensor"):
        factorization_memory(**arguments | {name: arguments[name].tolist()})
