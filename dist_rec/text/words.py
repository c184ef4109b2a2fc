"""Texts with words dropped: what sequence models read in the augmented copies of sequences.

A word is what stands between white space. Each is dropped with probability P, by a draw that depends on the seed, the
text's key and the word's place alone, so that a text always loses the same words, on any rank and in any order; where
all would go, the one with the highest draw stays. What is left is joined by single spaces.
"""

from __future__ import annotations

import numpy as np

# Keys these draws apart from others of the same seed.
_DRAW = 0xD2


def drop_words(text: str, key: int, share: float, seed: int) -> str:
    """The text without some of its words.

    Args:
        key: of the text as it is.
        share: P, 0 <= P < 1.
        seed: >= 0.
    """
    words = text.split()
    if not words:
        return text
    draws = np.random.default_rng([seed, key % 2**64, _DRAW]).random(len(words))
    stays = draws >= share
    stays[draws.argmax()] = True
    return " ".join(word for word, kept in zip(words, stays, strict=True) if kept)
