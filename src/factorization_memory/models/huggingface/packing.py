"""Converts padding and packed sequences as `transformers` passes them (attention masks, position ids, sequence indices) to the
masks and borders of our blocks.

Shapes: B sequences, T tokens, S tokens of a mask, d hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def padding_mask(mask: Tensor | None, x: Tensor, seen: int) -> Tensor | None:
    """The part of an attention mask for these tokens, bool `[B, T]`; None if there is no padding."""
    if mask is None:
        return None
    batch, tokens = x.shape[:2]
    if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] not in (tokens, seen + tokens):
        sizes = f"[{batch}, {tokens}]" + (f" or [{batch}, {seen + tokens}]" if seen else "")
        raise ValueError(f"attention_mask: got shape {tuple(mask.shape)}, takes {sizes}, 0 for padding")
    mask = mask[:, -tokens:] != 0
    return None if not torch.compiler.is_compiling() and bool(mask.all()) else mask


@dataclass
class Rows:
    """Rows of a batch, concatenated into one.

    Attributes:
        like: a tensor `[B, T, ...]`.
        real: indices of the tokens read among all B T, int64; None means all.
    """

    like: Tensor
    real: Tensor | None = None

    def joined(self, x: Tensor) -> Tensor:
        """Concatenates the rows of x `[B, T, d]` to `[1, B T, d]`, or fewer tokens."""
        flat = x.flatten(0, 1)
        return (flat if self.real is None else flat[self.real.to(x.device)])[None]

    def apart(self, x: Tensor) -> Tensor:
        """The inverse, to rows `[B, T, d]`; zero for tokens that were not read."""
        shape = (*self.like.shape[:2], x.shape[-1])
        if self.real is None:
            return x.view(shape)
        return x.new_zeros(shape).flatten(0, 1).index_copy(0, self.real.to(x.device), x[0]).view(shape)


def borders_of_positions(position_ids: Tensor, x: Tensor, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The borders of the sequences in the concatenated rows, from positions that restart, skipping padding; None if each row
    is one sequence. And the indices of tokens that are not padding; None means all."""
    if position_ids.dim() != 2 or position_ids.shape[1] != x.shape[1] or position_ids.shape[0] not in (1, x.shape[0]):
        raise ValueError(f"position_ids: got shape {tuple(position_ids.shape)}, takes {list(x.shape[:2])}")
    position = position_ids.expand(x.shape[0], -1).flatten()
    row = torch.arange(position.numel(), device=position.device) // x.shape[1]
    real = None if mask is None else mask.flatten().nonzero()[:, 0]
    if real is not None:
        position, row = position[real], row[real]
    anew, other = position.diff() <= 0, row.diff() > 0
    if not bool((anew & ~other).any()):
        return None, None
    starts = torch.cat((anew.new_ones(1), anew | other))
    return torch.cat((starts.nonzero()[:, 0], row.new_tensor([len(starts)]))).to(torch.int32), real


def borders_of_numbers(seq_idx: Tensor, x: Tensor) -> Tensor | None:
    """The borders from each token's sequence index; None if each row is one sequence."""
    if seq_idx.shape != x.shape[:2]:
        raise ValueError(f"seq_idx: got shape {tuple(seq_idx.shape)}, takes {list(x.shape[:2])}")
    starts = seq_idx.diff(dim=1) != 0
    if not bool(starts.any()):
        return None
    starts = torch.cat((torch.ones_like(starts[:, :1]), starts), dim=1).flatten()
    return torch.cat((starts.nonzero()[:, 0], starts.new_tensor([starts.numel()], dtype=torch.int64))).to(torch.int32)
