"""Memory use on a single text: which memory states each token updates and reads, layer by layer.

`inspect_text` returns a JSON-ready record; `reports.inspection_html` displays it.

    tokens        token ids of the text
    pieces        the text in whole characters: {text, start, end}, the text of tokens start <= t < end; one token each, unless
                  a character spans several
    num_states    M
    update_lag    0: a token writes into the states that it reads. L: into those read by the token L before it, so a state is
                  written after a piece of text, stores what followed it, and is read when that piece occurs again
    layers        the memory layers, in order: {layer, heads: [{head, writes, reads, states}]}, layer the number of the block
      writes      {states, weights}: for each token, the states with the largest update weights, and these weights
      reads       the same for the merge weights
      states      the states by decreasing share of updates: {state, write_share, read_share, memory_length, pieces}; pieces
                  are those that write into the state most: {text, count, weight}, weight being the mean update weight. With
                  a lag, also written_after, the pieces after which the state is written, and read_at, those that read it,
                  weight being the mean merge weight
"""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

import numpy as np
import torch

from factorization_memory.evaluation.loss import evaluating
from factorization_memory.models.routing import memory_layers, observe_routing

if TYPE_CHECKING:
    from factorization_memory.data.tokenizer import Tokenizer
    from factorization_memory.models import LanguageModel
    from factorization_memory.runs.inspection_record import (
        HeadInspection,
        InspectionRecord,
        LayerInspection,
        Piece,
        StatePiece,
        StateUse,
        TokenStates,
    )

MAX_TOKENS = 4096
"""Maximum number of tokens of an inspected text: a longer one would give an unreadable picture."""


def inspect_text(
    model: LanguageModel, tokenizer: Tokenizer, text: str, *, strongest: int = 3, pieces_per_state: int = 8
) -> InspectionRecord:
    """Record how a model uses its memory on a text, read from an empty memory.

    Args:
        strongest: states kept per token; those with weight zero are omitted.
        pieces_per_state: pieces of text listed per state.

    Returns the record described in the module docstring. Raises ValueError for a text without tokens or with more than
    `MAX_TOKENS`, or a model without memory layers.
    """
    numbers = list(memory_layers(model))
    if not numbers:
        raise ValueError(f"model.mixers={model.config.mixers!r}: no memory layer to inspect; use a model that has one")
    tokens = tokenizer.encode(text)
    if not tokens:
        raise ValueError(f"text={text!r}: empty; give at least one character")
    if len(tokens) > MAX_TOKENS:
        raise ValueError(f"text: {len(tokens)} tokens; give a shorter text, of at most {MAX_TOKENS}")
    pieces = whole_pieces(tokenizer, tokens)
    with evaluating(model) as device, observe_routing(model) as observed:
        model(torch.tensor([tokens], device=device))
    layers: list[LayerInspection] = []
    for index, (routing,) in zip(numbers, observed, strict=True):
        # The only row, [T, H, M].
        update, merge = (weights[0].double().cpu().numpy() for weights in routing.of_all_states())
        heads: list[HeadInspection] = [
            {
                "head": head,
                "writes": _strongest(update[:, head], strongest),
                "reads": _strongest(merge[:, head], strongest),
                "states": _states(update[:, head], merge[:, head], pieces, pieces_per_state, model.config.update_lag),
            }
            for head in range(update.shape[1])
        ]
        layers.append({"layer": index, "heads": heads})
    return {
        "tokens": tokens,
        "pieces": pieces,
        "num_states": model.config.num_states,
        "update_lag": model.config.update_lag,
        "layers": layers,
    }


def whole_pieces(tokenizer: Tokenizer, tokens: list[int]) -> list[Piece]:
    """The text cut wherever a token and a character end together: `{text, start, end}`; every token is in some piece."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    pieces: list[Piece] = []
    text, start = "", 0
    for end, token in enumerate(tokens, start=1):
        text += decoder.decode(tokenizer.token_bytes[token], final=end == len(tokens))
        if not decoder.getstate()[0]:
            pieces.append({"text": text, "start": start, "end": end})
            text, start = "", end
    return pieces


def _strongest(weights: np.ndarray, count: int) -> TokenStates:
    """For each token, the states with the largest weights [T, M], and the weights, largest first."""
    order = np.argsort(-weights, axis=1, kind="stable")[:, :count]
    values = np.take_along_axis(weights, order, axis=1)
    keep = [row[row > 0] for row in values]
    return {
        "states": [states[: len(row)].tolist() for states, row in zip(order, keep, strict=True)],
        "weights": [[round(float(w), 4) for w in row] for row in keep],
    }


def _states(update: np.ndarray, merge: np.ndarray, pieces: list[Piece], count: int, lag: int) -> list[StateUse]:
    """The use of each state of one head, from update and merge weights [T, M]."""
    write_share = update.sum(axis=0) / max(update.sum(), 1e-30)
    read_share = merge.sum(axis=0) / max(merge.sum(), 1e-30)
    written = _pieces_of_states(update, pieces, count)
    uses: list[StateUse] = [
        {
            "state": int(state),
            "write_share": round(float(write_share[state]), 5),
            "read_share": round(float(read_share[state]), 5),
            "memory_length": memory_length(update[:, state]),
            "pieces": written[state],
        }
        for state in np.argsort(-write_share, kind="stable")
    ]
    if lag:
        after = np.zeros_like(update)
        after[: max(len(update) - lag, 0)] = update[lag:]
        written_after, read_at = (_pieces_of_states(weights, pieces, count) for weights in (after, merge))
        for use in uses:
            use["written_after"], use["read_at"] = written_after[use["state"]], read_at[use["state"]]
    return uses


def _pieces_of_states(weights: np.ndarray, pieces: list[Piece], count: int) -> list[list[StatePiece]]:
    """For each state, the pieces of text whose tokens have the largest mean weights [T, M]."""
    texts, piece_of = np.unique([piece["text"] for piece in pieces], return_inverse=True)
    text_of_token = np.repeat(piece_of, [piece["end"] - piece["start"] for piece in pieces])
    times = np.bincount(piece_of, minlength=len(texts))
    totals = np.zeros((len(texts), weights.shape[1]))
    np.add.at(totals, text_of_token, weights)
    spelled = np.bincount(text_of_token, minlength=len(texts))
    # A mean over few occurrences is noisy: shrink it towards zero, as if there were two more with weight zero.
    score = totals / (spelled + 2)[:, None]
    result: list[list[StatePiece]] = []
    for state in range(weights.shape[1]):
        best = [i for i in np.argsort(-score[:, state], kind="stable")[:count] if totals[i, state] > 0]
        result.append(
            [
                {"text": str(texts[i]), "count": int(times[i]), "weight": round(float(totals[i, state] / spelled[i]), 4)}
                for i in best
            ]
        )
    return result


def memory_length(update: np.ndarray) -> float | None:
    """Tokens after which a state with these update weights [T] retains 1/e of its content; None if it is never updated."""
    # A full overwrite forgets everything at once; the floor keeps its logarithm finite.
    decay = float(-np.log1p(-np.minimum(update, 1 - 1e-6)).mean())
    return round(1 / decay, 1) if decay > 0 else None
