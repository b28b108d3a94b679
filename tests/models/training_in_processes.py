"""What each of the two processes of `test_training_in_processes` does. Arguments: its rank, and a folder where they meet."""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from factorization_memory import LanguageModel
from factorization_memory.config import ModelConfig

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
torch.manual_seed(0)
config = ModelConfig(vocab_size=40, hidden_size=16, num_layers=2, num_states=8, top_k=3)
alone, copied, sharded = (LanguageModel(config) for _ in range(3))
for model in (copied, sharded):
    model.load_state_dict(alone.state_dict())
tokens = torch.randint(0, 40, (4, 13))
targets, mine = tokens.roll(-1, 1), slice(2 * rank, 2 * rank + 2)
alone(tokens, targets)[0].backward()
mesh = init_device_mesh("cpu", (2,))
for block in sharded.blocks:
    fully_shard(block, mesh=mesh)
fully_shard(sharded, mesh=mesh)
parallel: list[nn.Module] = [DistributedDataParallel(copied), sharded]
for model in parallel:
    model(tokens[mine], targets[mine], keep_state=False)[0].backward()
for (name, one), two, expected in zip(copied.named_parameters(), sharded.parameters(), alone.parameters(), strict=True):
    torch.testing.assert_close(one.grad, expected.grad, rtol=1e-5, atol=1e-6, msg=f"copied: {name}")
    torch.testing.assert_close(two.grad.full_tensor(), expected.grad, rtol=1e-5, atol=1e-6, msg=f"sharded: {name}")  # type: ignore[union-attr]
with torch.no_grad():
    _, state = sharded(tokens[:, :5])
    logits, _ = sharded.step(tokens[:, 5], state)
    torch.testing.assert_close(logits, alone(tokens)[0][:, 5], rtol=1e-5, atol=1e-6)
torch.distributed.destroy_process_group()
