"""How documents are compressed: what the command line's flags and the Python API's keywords set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from laserkv_gguf import policies
from laserkv_gguf.budget import RATIO, check_settings
from laserkv_gguf.errors import UserError
from laserkv_gguf.recall import RecallSettings

POSITIONS = ("auto", "original", "compact")
SCORING = ("host", "device")


@dataclass(frozen=True)
class Settings:
    """How documents are compressed; the command line's flags of the same names.

    Attributes:
        policy: a name of `laserkv_gguf.policies`, or `module:Class`.
        ratio: fraction of the tokens to keep, in (0, 1]. Where it is not given but `ctx_size` is,
            `LaserKV` takes the largest that fits instead.
        keep: tokens of a sequence to keep, whatever its length, instead of a ratio.
        block_size: tokens read at a time (S).
        protection_divisor: n; anchors and window get ``B // n`` tokens each.
        alpha, pool, hash_bits, hash_tables: see `policies.laser.Laser`; None for its defaults.
        lookahead: tokens drafted after the question to ask with; None for the policy's own number.
        probe_tokens: of the question, the last so many ask, 0 for all; None for the policy's own.
        positions: "original", "compact", or "auto": compact only beyond the trained context.
        scoring: where attention is computed: "host", or "device": where the cache is.
        policy_options: fields of the policy's class, as `policies.parse` gives them.
        recall: "ram" or "disk" to park rows of evicted tokens there and to choose anew among all
            of the document for every question of a conversation; "off" to lose them.
        recall_mode, recall_file, recall_bits, recall_shortlist, recall_share, recall_first: see
            `recall.RecallSettings`.
    """

    policy: str = "laser"
    ratio: float = RATIO
    block_size: int = 4096
    protection_divisor: int = 4
    alpha: float | None = None
    pool: int | None = None
    hash_bits: int | None = None
    hash_tables: int | None = None
    lookahead: int | None = None
    probe_tokens: int | None = None
    positions: str = "auto"
    scoring: str = "host"
    policy_options: Mapping[str, Any] = field(default_factory=dict)
    recall: str = "off"
    recall_mode: str | None = None
    recall_file: str | None = None
    recall_bits: int = 128
    recall_shortlist: float = 2.0
    recall_share: str = "all"
    recall_first: str = "keydiff"
    keep: int | None = None

    @property
    def recalling(self) -> RecallSettings:
        return RecallSettings(
            self.recall,
            self.recall_mode,
            self.recall_file,
            self.recall_bits,
            self.recall_shortlist,
            self.recall_share,
            self.recall_first,
        )

    def check(self) -> None:
        """Refuses unusable values.

        Raises:
            UserError: with the remedy in one line.
        """
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
        self.recalling.check()

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

    def make_policy(self, seed: int) -> policies.Policy:
        given = {
            "alpha": self.alpha,
            "pool": self.pool,
            "hash_bits": self.hash_bits,
            "hash_tables": self.hash_tables,
            "seed": seed & 0xFFFFFFFF,
        }
        given = {key: value for key, value in given.items() if value is not None}
        return policies.make(self.policy, **{**given, **self.policy_options})
