"""How documents are compressed: what the command line's flags and the Python API's keywords set."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, TypedDict

from laserkv_gguf import policies
from laserkv_gguf.budget import RATIO, check_settings
from laserkv_gguf.errors import UserError, check_type

POSITIONS = ("auto", "original", "compact")
SCORING = ("auto", "host", "device")
WHERE = ("auto", "ram", "disk", "off")
MODES = ("replay", "shortlist")
RECALL_POLICY = "keydiff"  # what chooses before there is a question to recall for
BLOCK = 4096  # tokens read at a time, where the cells hold more than that
LEAST_BLOCK = 512  # however few cells there are: a question has to be shorter than a block
BITS = 128  # of a parked token's signature, per layer and kv head


@dataclass(frozen=True)
class RecallSettings:
    """How evicted tokens come back.

    Attributes:
        where: "ram" or "disk" to park rows in, "off" for no recall; "auto": for conversations,
            where there is room (see `parking`).
        mode: "replay" or "shortlist"; None for the policy's own way.
        file: of rows on disk; None for one of our own.
    """

    where: str = "off"
    mode: str | None = None
    file: str | None = None

    def check(self) -> None:
        """Refuses unusable values.

        Raises:
            UserError: with the remedy in one line.
        """
        if self.where not in WHERE:
            raise UserError(f"--recall {self.where} is unknown; use {', '.join(WHERE)}")
        if self.mode is not None and self.mode not in MODES:
            raise UserError(f"--recall-mode {self.mode} is unknown; use {' or '.join(MODES)}")
        if self.file is not None and self.where not in ("auto", "disk"):
            raise UserError("--recall-file is where --recall disk parks rows; give that too")

    def check_policy(self, policy: policies.Policy) -> None:
        """Refuses policies that recall cannot serve, and one that is nothing without it.

        Raises:
            UserError: with the remedy in one line.
        """
        needs, name = policy.needs, policy.name
        if self.where == "off":
            if needs.recall:
                raise UserError(
                    f"--policy {name} needs recall: it fetches evicted tokens for every question; "
                    "add --recall ram, or --recall disk"
                )
            return
        if policy.budget(8, 2, 0.5, 4).keeps_all:  # `full`: there will be nothing to recall
            return
        if self.where == "auto" and not needs.recall:  # where it cannot be, it is off
            return
        if not needs.queries:
            raise UserError(
                f"--policy {name} does not look at the question, so nothing would be recalled "
                "for it; use --policy laser, or --recall off"
            )
        if needs.values or ((needs.visible or needs.block_queries) and not policy.unit):
            raise UserError(
                f"--policy {name} needs more of a token than the keys that are parked; "
                "use --policy laser, or --recall off"
            )
        if needs.recall and self.mode == "replay":
            raise UserError(
                f"--policy {name} looks all of the document up at once; "
                "use --recall-mode shortlist, or leave it out"
            )

    def mode_for(self, policy: policies.Policy) -> str:
        """The mode that was asked for, or the policy's own."""
        return self.mode or ("shortlist" if policy.unit else "replay")

    def votes_for(self, policy: policies.Policy) -> bool:
        """Whether signatures find what a question needs."""
        return self.where != "off" and self.mode_for(policy) == "shortlist" and not policy.unit


@dataclass(frozen=True)
class Settings:
    """How documents are compressed; the command line's flags of the same names.

    Attributes:
        policy: a name of `laserkv_gguf.policies`, or `module:Class`.
        ratio: fraction of the tokens to keep, in (0, 1]. Where it is not given but `ctx_size` is,
            `LaserKV` takes the largest that fits instead.
        keep: tokens of a sequence to keep, whatever its length, instead of a ratio.
        block_size: tokens read at a time (S). Where it is not given but `ctx_size` is, `LaserKV`
            takes `block_for` it.
        protection_divisor: n; anchors and window get ``B // n`` tokens each.
        alpha, pool, hash_bits, hash_tables: see `policies.laser.Laser`; None for its defaults.
        lookahead: tokens drafted after the question to ask with; None for the policy's own number.
        probe_tokens: of the question, the last so many ask, 0 for all; None for the policy's own.
        positions: "original", "compact", or "auto": compact beyond the trained context, and with
            a policy that was published so, where keys can be moved.
        scoring: where attention is computed: "host"; "device": where the cache is; "auto": there
            if that is not the host's memory.
        policy_options: fields of the policy's class, as `policies.parse` gives them.
        recall: "ram" or "disk" to park rows of evicted tokens there and to choose anew among all
            of the document for every question; "off" to lose them; "auto": as a conversation with
            turns has room for them, and where one document is asked several questions. A single
            question needs none.
        recall_limit: most bytes of parked rows in memory; None for a quarter of what is free.
        recall_mode, recall_file: see `RecallSettings`.
        read_policy: what chooses while no question is known, with options as in "kvzip chunk=512":
            in a chat that begins with reading, for questions that share one reading, and before
            recall. "same": `policy`, which the last tokens of each block ask where it looks at a
            question; "auto": the same, but `RECALL_POLICY` before recall.
    """

    policy: str = "laser"
    ratio: float = RATIO
    block_size: int = BLOCK
    protection_divisor: int = 4
    alpha: float | None = None
    pool: int | None = None
    hash_bits: int | None = None
    hash_tables: int | None = None
    lookahead: int | None = None
    probe_tokens: int | None = None
    positions: str = "auto"
    scoring: str = "auto"
    policy_options: Mapping[str, Any] = field(default_factory=dict)
    recall: str = "auto"
    recall_mode: str | None = None
    recall_file: str | None = None
    read_policy: str = "auto"
    keep: int | None = None
    recall_limit: int | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Settings:
        """What keywords say.

        Raises:
            UserError: an unknown name, or a value of another type; the message says which.
        """
        for name in given:
            _check_name(name)
        return cls(**given)

    @property
    def recalling(self) -> RecallSettings:
        """The settings that are recall's."""
        return RecallSettings(
            self.recall,
            self.recall_mode,
            self.recall_file,
        )

    def check(self) -> None:
        """Refuses unusable values.

        Raises:
            UserError: with the remedy in one line.
        """
        for name, hint in _hints().items():
            check_type(name, getattr(self, name), hint)
        check_settings(self.ratio, self.block_size, self.protection_divisor)
        if self.keep is not None and self.keep < 1:
            raise UserError(f"--keep is {self.keep}; give a number of tokens such as 2000")
        if self.lookahead is not None and not 0 <= self.lookahead <= self.block_size:
            raise UserError(
                f"--lookahead is {self.lookahead}; give 0 to a block's {self.block_size} tokens"
            )
        if self.probe_tokens is not None and self.probe_tokens < 0:
            raise UserError(f"--probe-tokens is {self.probe_tokens}; give a number, or 0 for all")
        if self.positions not in POSITIONS:
            raise UserError(f"--positions {self.positions} is unknown; use {', '.join(POSITIONS)}")
        if self.scoring not in SCORING:
            raise UserError(f"--scoring {self.scoring} is unknown; use {', '.join(SCORING)}")
        if self.recall_limit is not None and self.recall_limit < 0:
            raise UserError(
                f"--recall-limit is {self.recall_limit}; give the memory for parked rows, such as "
                "4GiB, or 0 to park on disk"
            )
        self.recalling.check()
        self._check_read_policy()

    def _check_read_policy(self) -> None:
        if self.read_policy in ("auto", "same"):
            return
        policy = policies.named(self.read_policy)
        needs = policy.needs
        if needs.recall or needs.every_block or policy.budget(8, 2, 0.5, 4).keeps_all:
            raise UserError(
                f"--read-policy {policy.name} cannot choose block by block; "
                "use auto, same, or a policy such as keydiff or kvzip"
            )

    def check_keep(self, tokens: int) -> None:
        """Refuses to keep more tokens than there are.

        Args:
            tokens: of a document, with the template and a system prompt in front of it.

        Raises:
            UserError: with the remedy in one line.
        """
        if self.keep is not None and self.keep > tokens:
            raise UserError(
                f"--keep {self.keep} is more than the {tokens} tokens of the document; "
                f"give at most {tokens}, or --ratio 1 to keep all"
            )

    def make_read_policy(self, policy: policies.Policy, seed: int) -> policies.Policy:
        """What chooses while no question is known.

        Args:
            policy: what chooses once one is.
            seed: as of `make_policy`.
        """
        name = self.read_policy
        if name == "auto":
            name = "same" if self.recall == "off" else RECALL_POLICY
        if name in ("auto", "same") or (self.recall != "off" and policy.needs.recall):
            return policy
        return policies.named(name, seed=seed & 0xFFFFFFFF)

    def make_policy(self, seed: int) -> policies.Policy:
        """The policy with its options.

        Raises:
            UserError: there is no such policy.
        """
        given = {
            "alpha": self.alpha,
            "pool": self.pool,
            "hash_bits": self.hash_bits,
            "hash_tables": self.hash_tables,
            "seed": seed & 0xFFFFFFFF,
        }
        given = {key: value for key, value in given.items() if value is not None}
        return policies.make(self.policy, **{**given, **self.policy_options})


def block_for(cells: int | None, *, part: int = 2, least: int = LEAST_BLOCK) -> int:
    """The block that suits so many cells: a part of them at most, so that something can stay.

    Args:
        cells: of a conversation; None for as many as needed.
        part: of the cells, 1 / part; half of them.
        least: tokens that a block has however few cells there are.
    """
    block = BLOCK
    while cells is not None and block > least and part * block > cells:
        block //= 2
    return block


class Keywords(TypedDict, total=False):
    """The fields of `Settings` as keywords, so that type checkers know them."""

    policy: str
    ratio: float | None
    block_size: int | None
    protection_divisor: int
    alpha: float | None
    pool: int | None
    hash_bits: int | None
    hash_tables: int | None
    lookahead: int | None
    probe_tokens: int | None
    positions: str
    scoring: str
    policy_options: Mapping[str, Any]
    recall: str
    recall_mode: str | None
    recall_file: str | None
    read_policy: str
    keep: int | None
    recall_limit: int | None


def _check_name(name: str) -> None:
    known = [one.name for one in fields(Settings)]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        remedy = f"did you mean {near[0]}?" if near else "help(LaserKV) lists them"
        raise UserError(f"there is no setting {name}; {remedy}")


@cache
def _hints() -> dict[str, Any]:
    return typing.get_type_hints(Settings)
