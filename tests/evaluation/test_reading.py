from __future__ import annotations

import pytest
import torch

from factorization_memory.evaluation.reading import writes_read
from factorization_memory.layers import FactorizationMemory, Routing
from factorization_memory.ops import factorization_memory


@pytest.mark.parametrize("update_lag", [0, 1])
@pytest.mark.parametrize("top_k", [None, 3])
def test_what_is_read_of_the_values_is_what_the_recurrence_gives(top_k: int | None, update_lag: int) -> None:
    torch.manual_seed(0)
    layer = FactorizationMemory(16, 8, top_k, num_heads=2, update_lag=update_lag).double()
    x = torch.randn(3, 11, 16, dtype=torch.float64)
    with torch.no_grad():
        routing, _, _ = layer.route(x)
        value = layer.value(x).unflatten(-1, (2, -1))
        expected, _ = factorization_memory(
            routing.update, routing.merge, value, routing.update_indices, routing.merge_indices, 8, backend="reference"
        )
        reads = writes_read(routing)
    assert reads.dtype == torch.float64
    assert (reads >= 0).all()
    assert (reads.triu(1) == 0).all()
    torch.testing.assert_close(torch.einsum("bhts,bshd->bthd", reads, value), expected, rtol=1e-12, atol=1e-14)


def test_an_overwrite_hides_what_was_written_before() -> None:
    update = torch.tensor([0.5, 1.0, 0.0]).view(1, 3, 1, 1)
    routing = Routing(torch.ones(1, 3, 1, 1), update, torch.ones(1, 3, 1, 1), None, None, 1)
    assert writes_read(routing)[0, 0].tolist() == [[0.5, 0, 0], [0, 1, 0], [0, 1, 0]]
