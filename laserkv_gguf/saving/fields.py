"""What a saved file says of itself: every field, its type and its range."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from laserkv_gguf.budget import SHAPES
from laserkv_gguf.conversation.ledger import DOCUMENT, SYSTEM, TURN
from laserkv_gguf.errors import UserError
from laserkv_gguf.files import archive
from laserkv_gguf.llama.model import CACHE_TYPES
from laserkv_gguf.planning.settings import MODES, POSITIONS, SCORING, WHERE
from laserkv_gguf.saving.kinds import (
    Fields,
    Flag,
    Kind,
    Maybe,
    Number,
    One,
    Refused,
    Row,
    Several,
    Text,
    Whole,
    need,
    shown,
)
from laserkv_gguf.timings import STEPS

POSITION = 1 << 30  # no position is larger: llama.cpp counts on from there in 32 bits
_BLOCKS = 1 << 16  # of a budget, which are gone through one by one
_TEXT = 1 << 24


_SEED = Whole(-(1 << 63), 1 << 64)
_HASH_BITS, _HASH_TABLES = Whole(1, 16), Whole(1, 4096)

OPTIONS: Mapping[str, Kind] = {
    "seed": _SEED,
    "hash_bits": _HASH_BITS,
    "hash_tables": _HASH_TABLES,
    "sketch": Whole(1, 4096),
    "future": Whole(1, 1 << 16),
    "representatives": Whole(1, 4096),
}
"""Options of policies that memory or time grows with."""


class Options(Kind):
    """What a policy was given: plain values by name, in ranges that cost no more than they should.

    Which names a policy has, it says itself (`policies.parse`).
    """

    def check(self, value: Any, where: str) -> None:
        need(isinstance(value, dict), where, "is no object")
        need(len(value) <= 64, where, "has more than 64 values")
        for name, one in value.items():
            said = shown(f"{where}.{name}")
            need(name.isidentifier() and len(name) <= 64, said, "is no option")
            if name in OPTIONS:
                OPTIONS[name].check(one, said)
            elif isinstance(one, bool) or one is None:
                continue
            elif isinstance(one, str):
                Text(64).check(one, said)
                need(one.isprintable(), said, "is no plain text")
            else:
                Number(-(1 << 20), 1 << 20).check(one, said)


SETTINGS: Mapping[str, Kind] = {
    "policy": Text(200),
    "policy_options": Options(),
    "ratio": Number(1e-9, 1),
    "keep": Maybe(Whole(1)),
    "block_size": Whole(1, 1 << 20),
    "protection_divisor": Whole(3),
    "alpha": Maybe(Number(0, 1)),
    "pool": Maybe(Whole(1, 4097)),
    "hash_bits": Maybe(_HASH_BITS),
    "hash_tables": Maybe(_HASH_TABLES),
    "lookahead": Maybe(Whole(0, 1024)),
    "probe_tokens": Maybe(Whole(0, 1 << 20)),
    "positions": One(POSITIONS),
    "recall": One(WHERE),
    "recall_mode": Maybe(One(MODES)),
}
"""Those of `Settings` that a file carries: how its document was read, and no more.

What is not listed here, such as a path or where something is computed, never comes out of a file.
"""

_NOT_USED: Mapping[str, Kind] = {
    "scoring": One(SCORING),
    "recall_first": Text(200),
    "recall_file": One((None,)),
    "recall_share": One(("all", "block")),
    "recall_bits": One(tuple(range(64, 1025, 64))),
    "recall_shortlist": Number(1, 1024),
}  # older files have them

BUDGET = Fields(
    {
        "tokens": Whole(),
        "block_size": Whole(1),
        "ratio": Number(1e-9, 1),
        "divisor": Whole(3),
        "shape": One(SHAPES),
        "sinks": Whole(),
        "recent": Whole(),
        "protected": Whole(),
        "grows": Flag(),
    },
    frozenset({"grows"}),
)

_TYPE = One(tuple(CACHE_TYPES))
_COMMON: Mapping[str, Kind] = {
    "version": Text(100),
    "model": Fields({"name": Text(), "bytes": Whole(0, 1 << 62), "samples": Text(64)}),
    "build": Text(1000),
    "cache": Text(200),
    "settings": Fields({**SETTINGS, **_NOT_USED}, frozenset({*_NOT_USED, "keep"})),
    "context": Fields({"type_k": _TYPE, "type_v": _TYPE, "flash_attn": One(("on", "off", "auto"))}),
    "budget": BUDGET,
    "compact": Flag(),
    "system": Maybe(Text(_TEXT)),
}
_SECONDS = {step: Number(0, 1e12) for step in (*STEPS, "total")}
_PARKED = Fields(
    {
        "number": Whole(),
        "budget": BUDGET,
        "offset": Whole(0, POSITION),
        "most": Whole(),
        "compact": Flag(),
        "first": Flag(),  # in older files: the offset says it
    },
    frozenset({"first"}),
)
ABOUT: Mapping[str, Fields] = {
    archive.DOCUMENT: Fields(
        {
            **_COMMON,
            "parked": Flag(),
            "next_position": Whole(0, POSITION),
            "kept_per_block": Several(Whole()),
            "timings": Fields(_SECONDS, frozenset(_SECONDS)),
        }
    ),
    archive.CONVERSATION: Fields(
        {
            **_COMMON,
            "segments": Several(
                Row(
                    (
                        Whole(),
                        One((SYSTEM, DOCUMENT, TURN)),
                        Text(path=True),
                        Whole(),
                        Whole(),
                        Flag(),
                    )
                )
            ),
            "names": Several(Text(path=True)),
            "turns": Whole(),
            "thinnings": Whole(),
            "turn_open": Maybe(Whole()),
            "unread": Flag(),
            "cells": Whole(1),
            "max_tokens": Whole(1),
            "parked": Several(_PARKED),
        },
        frozenset({"parked"}),
    ),
}
"""What files of each kind say of themselves, in JSON."""


def check_about(kind: str, about: Mapping[str, Any]) -> None:
    """Refuses to write what could not be read again.

    Args:
        kind: one of `archive.KINDS`.
        about: what will be said.

    Raises:
        UserError: which setting no file can carry.
    """
    try:
        check_fields(kind, json.loads(json.dumps(about)))
    except (Refused, TypeError, ValueError) as error:
        raise UserError(f"cannot save: {error}, which no saved file can hold") from None


def check_fields(kind: str, about: Any) -> None:
    """Refuses what no file of a kind says of itself.

    Raises:
        Refused: which field, and why.
    """
    ABOUT[kind].check(about, "")
    parked = about["parked"] if kind == archive.CONVERSATION and "parked" in about else []
    for budget in (about["budget"], *(entry["budget"] for entry in parked)):
        blocks = -(-budget["tokens"] // budget["block_size"])
        need(blocks <= _BLOCKS, "budget", f"has {blocks} blocks, more than {_BLOCKS}")
