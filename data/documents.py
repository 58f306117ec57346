"""Interleaved documents: captioned images and passages of text in random order, then EOD."""

from collections.abc import Iterator, Sequence

import torch

from coterie.core.random import fold_in, key, uniform
from coterie.data.digits import Digits, caption
from coterie.data.order import permutation, shuffled
from coterie.data.text import Document, passages
from coterie.data.vocabulary import Tokens, Vocabulary


def image_pieces(digits: Digits, vocabulary: Vocabulary) -> list[Tokens]:
    """``caption BOI codes EOI`` of every digit."""
    return [
        vocabulary.captioned(image_HW, caption(int(label)))
        for image_HW, label in zip(digits.image_NHW, digits.label_N, strict=True)
    ]


def text_pieces(documents: Sequence[Document], limit: int, vocabulary: Vocabulary) -> list[Tokens]:
    """Every passage that is not blank, ended by one newline, in at most ``limit`` tokens."""
    cut = (passage for doc in documents for passage in passages(doc.text, limit - 1))
    return [vocabulary.encode_text(p.strip("\n").rstrip() + "\n") for p in cut if p.strip()]


def draw(pieces: Sequence[Tokens], count: int, *parts: int | str) -> list[Tokens]:
    """``count`` pieces in keyed order: all of them once, then all of them again, and so on."""
    if not count:
        return []
    return [pieces[i] for i in shuffled(len(pieces), 0, count, *parts)]


def blend(
    first: Sequence[Tokens], second: Sequence[Tokens], share: float, count: int, *parts: int | str
) -> list[Tokens]:
    """``count`` pieces, each from ``second`` with probability ``share``, else from ``first``."""
    keys_N = fold_in(torch.tensor(key("blend", *parts)), torch.arange(count))
    from_second = (uniform(keys_N, 1, double=True).squeeze(-1) < share).numpy()
    chosen_second = int(from_second.sum())
    queue = {
        False: iter(draw(first, count - chosen_second, "first", *parts)),
        True: iter(draw(second, chosen_second, "second", *parts)),
    }
    return [next(queue[bool(which)]) for which in from_second]


def interleave(
    images: Sequence[Tokens],
    texts: Sequence[Tokens],
    count: int,
    vocabulary: Vocabulary,
    *parts: int | str,
) -> Iterator[Tokens]:
    """``count`` documents, using up ``images`` and ``texts`` in order, evenly.

    Each holds ``len(images) // count`` images and ``len(texts) // count`` passages in an order
    keyed by ``parts`` and the document's number, then EOD.
    """
    per_image, per_text = len(images) // count, len(texts) // count
    for n in range(count):
        pieces = [
            *images[n * per_image : (n + 1) * per_image],
            *texts[n * per_text : (n + 1) * per_text],
        ]
        order = permutation(len(pieces), "document", *parts, n)
        yield vocabulary.join([pieces[i] for i in order])
