"""P, Q, K and G of chunks (see chunked.py) from a binary tree over each chunk's tokens, and their backward.

Shapes: n chunks of C tokens, w tokens per block, M memory states.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class DecayTree:
    """P, Q, K, G of every chunk, and what backward needs.

    Attributes:
        inner: P `[n, C, C]`, zero above the diagonal.
        read: Q `[n, C, M]`.
        write: K `[n, C, M]`.
        total: G `[n, M]`.
        levels: per level, Q of the right and K of the left blocks before merging, and both blocks' total decays.
    """

    inner: Tensor
    read: Tensor
    write: Tensor
    total: Tensor
    levels: list[tuple[Tensor, Tensor, Tensor, Tensor]]

    @classmethod
    def build(cls, update: Tensor, merge: Tensor, keep_levels: bool) -> DecayTree:
        """Builds the tree of `update`, `merge` `[n, C, M]`; C is a power of two."""
        n, chunk, num_states = update.shape
        total = 1 - update
        read, write = merge * total, update.clone()
        inner = update.new_zeros(n, chunk, chunk)
        inner.diagonal(dim1=1, dim2=2).copy_((merge * update).sum(-1))
        levels = []
        form = torch.contiguous_format
        width = 1
        while width < chunk:
            blocks = chunk // (2 * width)
            pairs = (n, blocks, 2, width, num_states)
            reads, writes = read.view(pairs)[:, :, 1], write.view(pairs)[:, :, 0]
            totals = total.view(n, blocks, 2, num_states)
            left, right = totals[:, :, 0], totals[:, :, 1]
            if keep_levels:
                # Copies: what backward needs is about to be overwritten.
                levels.append((reads.clone(memory_format=form), writes.clone(memory_format=form), left, right))
            meet = _outer(reads.flatten(0, 1), writes.flatten(0, 1))
            _corners(inner, width).copy_(meet.view(n, blocks, width, width))
            reads.mul_(left[:, :, None])
            writes.mul_(right[:, :, None])
            total = (left * right).reshape(n, blocks * num_states)
            width *= 2
        return cls(inner, read, write, total.view(n, num_states), levels)

    def chunks(self, count: int) -> tuple[tuple[Tensor, ...], ...]:
        """P `[L, C, C]`, Q, K `[L, C, M]` and G `[L, M, 1]`, each for the `count` chunks that the tree was built from."""
        parts = (self.inner, self.read, self.write, self.total[..., None])
        return tuple(x.unflatten(0, (count, -1)).unbind() for x in parts)

    def empty_like(self) -> DecayTree:
        """Allocates the gradients of P, Q, K, G."""
        inner, read, write, total = (torch.empty_like(x) for x in (self.inner, self.read, self.write, self.total))
        return DecayTree(inner, read, write, total, levels=[])

    def backward(self, update: Tensor, merge: Tensor, gradients: DecayTree) -> tuple[Tensor, Tensor]:
        """Gradients of `update` and `merge` from those of P, Q, K, G; overwrites those of Q and K."""
        n, chunk, num_states = update.shape
        d_inner, d_read, d_write, d_total = gradients.inner, gradients.read, gradients.write, gradients.total
        width = chunk // 2
        for right_reads, left_writes, left, right in reversed(self.levels):
            blocks = chunk // (2 * width)
            pairs = (n, blocks, 2, width, num_states)
            d_reads, d_writes = d_read.view(pairs)[:, :, 1], d_write.view(pairs)[:, :, 0]
            d_total = d_total.view(n, blocks, num_states)
            d_left = torch.addcmul((d_reads * right_reads).sum(2), d_total, right)
            d_right = torch.addcmul((d_writes * left_writes).sum(2), d_total, left)
            d_meet = _corners(d_inner, width).reshape(-1, width, width)
            through_writes = _inner(d_meet, left_writes.view(-1, width, num_states)).view(right_reads.shape)
            through_reads = _inner(d_meet.transpose(1, 2), right_reads.view(-1, width, num_states)).view(right_reads.shape)
            torch.addcmul(through_writes, d_reads, left[:, :, None], out=d_reads)
            torch.addcmul(through_reads, d_writes, right[:, :, None], out=d_writes)
            d_total = torch.stack((d_left, d_right), dim=2)
            width //= 2
        diagonal = d_inner.diagonal(dim1=1, dim2=2)[..., None]
        d_decay = d_total.view(n, chunk, num_states).addcmul(d_read, merge)
        d_update = torch.addcmul(d_write, diagonal, merge).sub_(d_decay)
        d_merge = (d_read * (1 - update)).addcmul_(diagonal, update)
        return d_update, d_merge


def _corners(inner: Tensor, width: int) -> Tensor:
    """View of the lower left corners `[n, C / 2w, w, w]` of the diagonal blocks of 2w tokens of `inner` `[n, C, C]`."""
    n, chunk, _ = inner.shape
    blocks = chunk // (2 * width)
    return inner.view(n, blocks, 2, width, blocks, 2, width)[:, :, 1, :, :, 0].diagonal(dim1=1, dim2=3).movedim(-1, 1)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """`a b^T` of `[N, w, M]` each; for tiny w a sum of elementwise products is faster than tiny matmuls."""
    return (a * b).sum(-1, keepdim=True) if a.shape[1] == 1 else torch.bmm(a, b.transpose(1, 2))


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """`a b` of `[N, w, w]` and `[N, w, M]`; elementwise for tiny w, as in `_outer`."""
    width = a.shape[1]
    if width > 2:
        return torch.bmm(a, b)
    result = a[:, :, :1] * b[:, :1]
    return result if width == 1 else result.addcmul_(a[:, :, 1:], b[:, 1:])
