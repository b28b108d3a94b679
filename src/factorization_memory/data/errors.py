"""What is wrong with text or a packed corpus."""

from __future__ import annotations


class CorpusError(ValueError):
    """Unusable text or an unusable packed corpus; the message names the file, the place in it and the remedy."""
