"""Texts of an exact number of tokens.

A document is composed as text and tokenised whole, as a user's would be, so that no token is one
the model would never see. Its last stretch of filler is cut where a token ends until the count is
right; where a cut changes how its neighbours merge, so that no cut gives the count, full stops are
added at the very end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.errors import LaserKVError, UserError
from laserkv_gguf.evaluation.samples import Source, Tokens

PAD, ENDINGS = " .", ("", ".", "\n")  # where a pad has two tokens, an ending makes up for one
MOST_PADS = 40
MARGIN = 1.25  # of filler, because neighbours merge


def fit(
    source: Source, compose: Callable[[int], str], tokens: int, units: int, most: int, cost: float
) -> tuple[str, Tokens]:
    """The text `compose(n)` that has exactly so many tokens.

    Args:
        compose: makes a text with n units of filler.
        tokens: wanted.
        units: first guess of n.
        most: largest n.
        cost: tokens a unit has, about.

    Raises:
        UserError: all units together have too few tokens.
        LaserKVError: there is none, which takes a very odd tokenizer.
    """
    tokenize = source.tokenizer.tokenize
    low, high = (0, 0), (most + 1, 0)  # (units, tokens): too few, and too many
    units = max(1, min(units, most))
    while low[0] < units < high[0]:
        text = compose(units)
        found = tokenize(text)
        missing = tokens - len(found)
        if missing == 0:
            return text, found
        low, high = ((units, len(found)), high) if missing > 0 else (low, (units, len(found)))
        if high[1] and low[0]:
            share = (tokens - low[1]) / (high[1] - low[1])
            step = round(share * (high[0] - low[0]))
            units = low[0] + max(1, min(step, high[0] - low[0] - 1))
        else:
            units += round(missing / cost) or (1 if missing > 0 else -1)
            units = max(1, min(units, most))
    if low[0] == most and tokens - low[1] > MOST_PADS:
        raise too_short(source, tokens, low[1])
    for units in range(low[0], max(low[0] - MOST_PADS, -1), -1):
        for ending in ENDINGS:
            text = compose(units) + ending
            for _ in range(MOST_PADS):
                found = tokenize(text)
                if len(found) == tokens:
                    return text, found
                if len(found) > tokens:
                    break
                text += PAD
    raise LaserKVError(f"this model's tokenizer makes no text of exactly {tokens} tokens of it")


def interspersed(
    source: Source,
    sentences: Sequence[str],
    hidden: Sequence[str],
    random: Random,
    tokens: int,
    *,
    join: str = " ",
    counts: NDArray[np.int64] | None = None,
    form: Callable[[list[str]], str] | None = None,
) -> tuple[str, Tokens]:
    """Sentences with others hidden among them, in order, at random places.

    Args:
        sentences: filler, used from the first one on; the last one used is cut.
        hidden: what must be in the text, once each.
        tokens: of the whole text, exactly.
        join: stands between sentences.
        counts: tokens of each sentence with `join` in front, if known.
        form: makes one text of them all, where that is more than joining.

    Raises:
        UserError: no room for what is hidden, or too little filler.
    """
    if counts is None:
        counts = np.array([source.count(join + sentence) for sentence in sentences], np.int64)
    room = tokens - sum(source.count(join + text) for text in hidden)
    if room < 1:
        raise UserError(
            f"{tokens} tokens have no room for what must be hidden in them "
            f"({tokens - room}); use a larger --lengths"
        )
    ends = np.cumsum(counts)
    if not len(ends) or ends[-1] < room:
        raise too_short(source, tokens, int(ends[-1]) if len(ends) else 0)
    among = int(np.searchsorted(ends, room)) + 1
    places = sorted(random.randrange(among + 1) for _ in hidden)

    def compose(filler: int) -> str:
        whole = int(np.searchsorted(ends, filler, side="right"))
        used = list(sentences[:whole])
        rest = filler - (int(ends[whole - 1]) if whole else 0)
        if rest and whole < len(sentences):
            used.append(_cut(source, join, sentences[whole], rest))
        for shift, (place, text) in enumerate(zip(places, hidden, strict=True)):
            used.insert(min(place, whole) + shift, text)
        return form(used) if form else join.join(used)

    return fit(source, compose, tokens, room, int(ends[-1]), 1.0)


def _cut(source: Source, join: str, sentence: str, tokens: int) -> str:
    """The beginning of a sentence; half a character is left out."""
    ids = source.tokenizer.tokenize(join + sentence)[:tokens]
    return source.tokenizer.text(ids).replace("\ufffd", "").removeprefix(join).strip()


def too_short(source: Source, tokens: int, found: int) -> UserError:
    """The background has fewer tokens than are needed."""
    return UserError(
        f"{source.background.name} is too short for {tokens} tokens, it has about {found}; "
        "give longer texts with --background, or use smaller --lengths"
    )


def stretch(
    source: Source, random: Random, tokens: int, *, least: int = 1
) -> tuple[list[str], NDArray[np.int64]]:
    """Consecutive sentences of the background from a random one on, with their token counts.

    Args:
        tokens: that they have at least, a quarter more where there is so much.
        least: sentences with fewer tokens are left out.

    Raises:
        UserError: the background is too short.
    """
    counts = source.sentence_tokens()
    usable = np.flatnonzero(counts >= least)
    ends = np.cumsum(counts[usable])
    if not len(ends) or ends[-1] < tokens:
        raise too_short(source, tokens, int(ends[-1]) if len(ends) else 0)
    # neighbours may merge into fewer tokens: some more than that
    ample = round(tokens * MARGIN)
    # the last sentence after which enough is left
    last = int(np.searchsorted(ends, max(int(ends[-1]) - ample, 0), side="right"))
    usable = usable[random.randrange(last + 1) :]
    usable = usable[: int(np.searchsorted(np.cumsum(counts[usable]), ample)) + 1]
    return [source.background.sentences[index] for index in usable], counts[usable]
