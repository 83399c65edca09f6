"""What an answer cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from laserkv_gguf.machine import size
from laserkv_gguf.shown import counted
from laserkv_gguf.timings import OVERHEAD, STEPS

if TYPE_CHECKING:
    from laserkv_gguf.planning.settings import Settings
    from laserkv_gguf.reading.reader import Reading


@dataclass
class Account:
    """What one answer cost: counts in tokens and cells, sizes in bytes, times in seconds.

    Attributes:
        policy, ratio, block_size, protection_divisor, seed: the settings that it was made with.
        document_tokens: all tokens read before the question, the template's and the system prompt's
            included.
        kept_tokens: how many of them are in the cache when the answer starts; kept_fraction:
            the share of them.
        text_tokens: those of the documents alone; text_kept: how many of them could be seen.
        blocks: how many the document was read in; kept_per_block: tokens kept of each.
        budget: tokens that may be kept, made up of anchors, window and long_term, the pools.
        ctx_cells: cells that the run was planned for.
        used_cells: how many of them are taken when the answer ends; used_bytes: the same in bytes.
        kv_bytes: llama.cpp's allocation, which it rounds up to a multiple of 256 cells.
        full_kv_bytes: what all tokens of document, question and answer would take.
        prefill_seconds: reading; of these decode_seconds, probe_seconds, lookahead_seconds,
            score_seconds, select_seconds, evict_seconds and park_seconds in the steps of
            the block loop (`timings.Timings`).
        first_token_seconds: from the start of reading to the first token of the answer.
        prompt_tokens: the question's, with the template around it.
        generated_tokens: the answer's; decode_tokens_per_second: after the first one.
        positions: "original" or "compact"; scoring: where, "host" or "device".
        recall: where rows of evicted tokens are parked, "ram", "disk" or "off"; recall_mode:
            "replay" or "shortlist", empty without.
        parked_tokens: tokens whose rows are parked; parked_bytes: what these take, with what finds
            them.
        recalled_tokens: tokens that came in for this question; recall_seconds, recall_calls: the
            time, and the state calls, that this took.
    """

    policy: str = ""
    document_tokens: int = 0
    kept_tokens: int = 0
    kept_fraction: float = 1.0
    blocks: int = 0
    budget: int = 0
    anchors: int = 0
    window: int = 0
    long_term: int = 0
    ctx_cells: int = 0
    kv_bytes: int = 0
    full_kv_bytes: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    probe_seconds: float = 0.0
    lookahead_seconds: float = 0.0
    score_seconds: float = 0.0
    select_seconds: float = 0.0
    evict_seconds: float = 0.0
    park_seconds: float = 0.0
    first_token_seconds: float = 0.0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    decode_tokens_per_second: float = 0.0
    seed: int = 0
    ratio: float = 1.0
    block_size: int = 0
    protection_divisor: int = 0
    positions: str = "original"
    scoring: str = "host"
    kept_per_block: list[int] = field(default_factory=list)
    recall: str = "off"
    recall_mode: str = ""
    parked_tokens: int = 0
    parked_bytes: int = 0
    recalled_tokens: int = 0
    recall_calls: int = 0
    recall_seconds: float = 0.0
    used_cells: int = 0
    used_bytes: int = 0
    text_tokens: int = 0
    text_kept: int = 0

    @property
    def overhead_share(self) -> float:
        """Share of prefill spent on probing, scoring and evicting: on all but decoding blocks."""
        extra = sum(getattr(self, f"{step}_seconds") for step in OVERHEAD)
        return extra / self.prefill_seconds if self.prefill_seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """The attributes by name, as `--json` prints them."""
        return asdict(self)


def fill(
    account: Account, reading: Reading, settings: Settings, *, seconds: float, **known: Any
) -> None:
    """Completes an account.

    Args:
        reading: of the document.
        seconds: from the first token to the end.
        known: fields of the account.
    """
    budget, timings = reading.budget, reading.timings
    known |= {f"{step}_seconds": getattr(timings, step) for step in STEPS}
    known |= {
        "kept_fraction": known["kept_tokens"] / max(known["document_tokens"], 1),
        "blocks": len(budget.blocks),
        "budget": budget.block,
        "anchors": budget.anchors,
        "window": budget.window,
        "long_term": budget.long_term,
        "prefill_seconds": timings.total,
        "decode_tokens_per_second": known["generated_tokens"] / seconds if seconds > 0 else 0.0,
        "block_size": settings.block_size,
        "protection_divisor": settings.protection_divisor,
        "kept_per_block": reading.kept_per_block,
    }
    for name, value in known.items():
        setattr(account, name, value)


def lines(account: Mapping[str, Any]) -> list[tuple[str, str]]:
    """An account in words: what each line is about, and what it says.

    Args:
        account: as `Account.as_dict` has it.
    """
    read, kept, blocks = (account[f] for f in ("text_tokens", "text_kept", "blocks"))
    said = [
        ("policy", f"{account['policy']}, ratio {account['ratio']:g}"),
        ("kept", f"{kept:,} of {read:,} tokens ({kept / read:.1%})" if read else "no document"),
        (
            "read in",
            f"{counted(blocks, 'block')} of up to {account['block_size']:,} tokens",
        ),
        (
            "KV cache",
            f"{account['used_cells']:,} of {account['ctx_cells']:,} cells used, "
            f"{size(account['used_bytes'])}",
        ),
        ("with all kept", size(account["full_kv_bytes"])),
        ("first token", f"after {account['first_token_seconds']:.2f} s"),
        (
            "answer",
            f"{counted(account['generated_tokens'], 'token')}, "
            f"{account['decode_tokens_per_second']:.1f} a second",
        ),
    ]
    if account["recall"] != "off":
        said.append(
            (
                "recall",
                f"{account['recalled_tokens']:,} tokens put back in "
                f"{account['recall_seconds']:.2f} s; {account['parked_tokens']:,} parked, "
                f"{size(account['parked_bytes'])} ({account['recall']})",
            )
        )
    return said
