"""The layer alone: a drop-in module for any model, its carried state, packed sequences and padding."""

import torch

from factorization_memory import FactorizationMemory

torch.manual_seed(0)
layer = FactorizationMemory(hidden_size=64, num_states=32, top_k=8)
x = torch.nn.functional.rms_norm(torch.randn(2, 100, 64), (64,))  # the layer expects normalised input

# A whole sequence, or the same in two parts with the state carried between them.
y, state = layer(x)
first, carried = layer(x[:, :60])
second, carried = layer(x[:, 60:], carried)
print("split in two, same output:", torch.allclose(torch.cat((first, second), 1), y, atol=1e-5))

# One token at a time, at constant cost and memory; the state is updated in place.
carried = carried.apply(torch.detach)
step = layer.step(x[:, 0], carried)
print("one step:", tuple(step.shape), "state:", tuple(carried.memory.shape))

# Sequences of 30, 50 and 20 tokens packed into one row, each from an empty memory.
packed, states = layer(x[:1], cu_seqlens=torch.tensor([0, 30, 80, 100]))
alone, _ = layer(x[:1, 30:80])
print("packed, same output:", torch.allclose(packed[:, 30:80], alone, atol=1e-5))

# Padding anywhere leaves the memory as it is.
mask = torch.rand(2, 100) > 0.3
padded, _ = layer(x, padding_mask=mask)
alone, _ = layer(x[:1, mask[0]])
print("padded, same output:", torch.allclose(padded[0, mask[0]], alone[0], atol=1e-5))
