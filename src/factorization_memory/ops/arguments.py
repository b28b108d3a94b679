"""Argument checks of the functions of `ops`. Each error names the argument, the value and what is accepted.

Shapes: B sequences, T tokens, H heads, M memory states, K states that a token updates, R that it merges, D value width
of a head, N packed sequences.
"""

from __future__ import annotations

import reprlib
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from factorization_memory.ops.precision import state_dtype

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INDEX_DTYPES = (torch.int64, torch.int32, torch.int16)


def check_tensors(**arguments: object) -> None:
    """Raises ValueError, naming it, for the first argument that is neither a tensor nor None."""
    for name, value in arguments.items():
        if value is not None and not isinstance(value, Tensor):
            raise ValueError(f"{name}: got {type(value).__name__} {reprlib.repr(value)}, takes a tensor")


def check_weights(
    update: Tensor,
    merge: Tensor,
    value: Tensor,
    indices: Tensor | None,
    merge_indices: Tensor | None,
    num_states: int | None,
    *,
    time: bool,
) -> int:
    """Checks the arguments that both functions share; returns M."""
    check_tensors(update=update, merge=merge, value=value, indices=indices, merge_indices=merge_indices)
    letters = "B, T, H" if time else "B, H"
    dims = 4 if time else 3
    if value.dim() != dims:
        raise ValueError(f"value: got shape {tuple(value.shape)}, takes [{letters}, D]")
    for name, tensor in (("update", update), ("merge", merge)):
        if tensor.dim() != dims or tensor.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"{name}: got shape {tuple(tensor.shape)}, takes [{letters}, M] (or K) with [{letters}] = "
                f"{list(value.shape[:-1])} as in value"
            )
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{name}: got dtype {tensor.dtype}, takes float64, float32, bfloat16 or float16")
        if tensor.device != value.device:
            raise ValueError(f"{name}: is on {tensor.device}, value on {value.device}; move them to one device")
    if value.dtype not in FLOATS:
        raise ValueError(f"value: got dtype {value.dtype}, takes float64, float32, bfloat16 or float16")
    if merge_indices is not None and indices is None:
        raise ValueError(
            f"merge_indices: got {tuple(merge_indices.shape)} without indices; pass the updated states as indices, "
            "or neither for the dense form"
        )
    if merge_indices is None and merge.shape != update.shape:
        raise ValueError(f"merge: got shape {tuple(merge.shape)}, takes the shape of update, {tuple(update.shape)}")
    if indices is None:
        if num_states is not None and num_states != update.shape[-1]:
            raise ValueError(f"num_states: got {num_states}, takes update's last dimension {update.shape[-1]} without indices")
        return update.shape[-1]
    if num_states is None:
        raise ValueError("num_states: got None, takes the number of states M together with indices")
    for name, chosen, weights, of in (("indices", indices, update, "update"), ("merge_indices", merge_indices, merge, "merge")):
        if chosen is None:
            continue
        if chosen.shape != weights.shape:
            raise ValueError(f"{name}: got shape {tuple(chosen.shape)}, takes the shape of {of}, {tuple(weights.shape)}")
        if chosen.dtype not in INDEX_DTYPES:
            raise ValueError(f"{name}: got dtype {chosen.dtype}, takes int64, int32 or int16")
        if chosen.device != value.device:
            raise ValueError(f"{name}: is on {chosen.device}, value on {value.device}; move them to one device")
    return num_states


COMPARED = 2**28
"""Number of index pairs up to which all pairs are compared; beyond it, indices are sorted."""


def check_indices(indices: Tensor, num_states: int, name: str = "indices") -> None:
    """Raises ValueError unless each token's states are distinct and below M. Reads the values, so it synchronizes with a
    GPU."""
    if indices.numel() == 0:
        return
    if indices.numel() * indices.shape[-1] <= COMPARED:
        repeated = (indices[..., None] == indices[..., None, :]).sum() - indices.numel()
    else:
        ordered = indices.sort(dim=-1).values
        repeated = (ordered[..., 1:] == ordered[..., :-1]).sum()
    low, high, repeats = torch.stack((indices.min(), indices.max(), repeated)).tolist()  # one synchronization
    if low < 0 or high >= num_states:
        raise ValueError(f"{name}: got values from {low} to {high}, takes 0 to num_states - 1 = {num_states - 1}")
    if repeats:
        raise ValueError(f"{name}: got the same state twice for one token, takes distinct states")


_READ = WeakTensorKeyDictionary()
"""Borders read from a GPU: tensor -> its version and the borders, to synchronize once and not in every layer."""


def check_borders(cu_seqlens: Tensor, batch: int, length: int) -> None:
    """Raises ValueError if the borders of packed sequences, `[N + 1]`, do not fit B = `batch`, T = `length`.

    Does not check their values under `torch.compile`.
    """
    check_tensors(cu_seqlens=cu_seqlens)
    if batch != 1:
        raise ValueError(f"cu_seqlens: got B = {batch}, takes B = 1 with packed sequences")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"cu_seqlens: got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}, takes N + 1 >= 2 int32 or int64 numbers"
        )
    if torch.compiler.is_compiling():
        return
    borders = read_borders(cu_seqlens)
    if borders[0] != 0 or borders[-1] != length or any(a > b for a, b in pairwise(borders)):
        raise ValueError(f"cu_seqlens: got {borders}, takes a non-decreasing sequence from 0 to T = {length}")


def read_borders(cu_seqlens: Tensor) -> list[int]:
    """The borders of packed sequences as a list."""
    # Only tensors on a GPU are worth caching, and inference tensors have no version counter to validate the cache.
    if torch.compiler.is_compiling() or not cu_seqlens.is_cuda or cu_seqlens.is_inference():
        return cu_seqlens.tolist()
    known = _READ.get(cu_seqlens)
    if known is None or known[0] != cu_seqlens._version:
        known = _READ[cu_seqlens] = cu_seqlens._version, cu_seqlens.tolist()
    return known[1]


def check_places(places: Tensor, sequences: int, state: Tensor) -> None:
    """Raises ValueError unless `places` are valid slots of `sequences` sequences in `state`; reads their values only on a
    CPU."""
    if places.shape != (sequences,) or places.dtype not in (torch.int64, torch.int32) or places.device != state.device:
        got = f"{places.dtype} {tuple(places.shape)} on {places.device}"
        raise ValueError(f"places: got {got}, takes int32 or int64 ({sequences},) on {state.device}")
    if places.is_cuda or torch.compiler.is_compiling():
        return
    known, count = places.tolist(), state.shape[0]
    there = [place for place in known if place != -1]
    if any(not 0 <= place < count for place in there) or len(set(there)) < len(there):
        raise ValueError(f"places: got {known}, takes distinct numbers from 0 to {count - 1}, or -1")


def check_writable(state: Tensor) -> None:
    """Raises ValueError for a state that cannot be updated in place here."""
    if not torch.compiler.is_compiling() and state.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError("state: created under torch.inference_mode() and cannot be updated outside it; use state.clone()")


def check_state(state: Tensor, name: str, shape: tuple[int, ...], value: Tensor, dtype: torch.dtype | None = None) -> None:
    """Raises ValueError unless a memory has this shape, the dtype that matches `value` (or the given one), and its device."""
    check_tensors(**{name: state})
    if tuple(state.shape) != shape:
        raise ValueError(f"{name}: got shape {tuple(state.shape)}, takes {shape}")
    dtype = dtype or state_dtype(value)
    if state.dtype != dtype:
        raise ValueError(f"{name}: got dtype {state.dtype}, takes {dtype} with values of {value.dtype}")
    if state.device != value.device and not value.is_meta:  # offloaded weights are on meta
        raise ValueError(f"{name}: is on {state.device}, value on {value.device}; move them to one device")
