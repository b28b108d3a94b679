"""What each of the two processes of `test_loaded_in_shards` does. Arguments: its rank, and the folder of the models."""

from __future__ import annotations

import sys

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import factorization_memory.models.huggingface  # noqa: F401

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
sharding = DistributedConfig(fsdp_size=2)
tokens = torch.randint(2, 250, (2, 12), generator=torch.Generator().manual_seed(0))
expected = AutoModelForCausalLM.from_pretrained(f"{folder}/whole")
loaded = AutoModelForCausalLM.from_pretrained(f"{folder}/whole", distributed_config=sharding)
assert {type(parameter).__name__ for parameter in loaded.parameters()} == {"DTensor"}
assert all(type(block).__name__ == "FSDPCheckpointingBlock" for block in loaded.model.blocks)
torch.testing.assert_close(loaded(tokens).logits, expected(tokens).logits)
generated = [model.generate(tokens, max_new_tokens=4, do_sample=False) for model in (loaded, expected)]
assert torch.equal(*generated)
loaded.train()(tokens, labels=tokens).loss.backward()
expected.train()(tokens, labels=tokens).loss.backward()
for (name, mine), other in zip(loaded.named_parameters(), expected.parameters(), strict=True):
    torch.testing.assert_close(mine.grad.full_tensor(), other.grad, rtol=1e-4, atol=1e-6, msg=name)
# Some weights are missing: initial values for these, the same for all processes.
filled = AutoModelForCausalLM.from_pretrained(f"{folder}/parts", distributed_config=sharding)
given = dict(expected.named_parameters())
for name, parameter in filled.named_parameters():
    assert torch.equal(parameter.full_tensor(), given[name]) == ("1.mixer.value" not in name), name
value = filled.model.blocks[1].mixer.value.weight.full_tensor()
assert value.std().item() == pytest.approx(value.shape[1] ** -0.5, rel=0.2)
torch.distributed.destroy_process_group()
