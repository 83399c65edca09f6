"""What one more document needs beside what a conversation holds already."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from laserkv_gguf.budget import Budget
from laserkv_gguf.conversation.ageing import Growing, free
from laserkv_gguf.conversation.intake import Reads, recall_is_off, recall_is_open
from laserkv_gguf.conversation.ledger import TURN
from laserkv_gguf.conversation.space import SHORT_ANSWER
from laserkv_gguf.errors import UserError
from laserkv_gguf.planning.demand import TURNS

LEAST_BLOCK = 64  # tokens; smaller blocks than this read too badly to be worth trying


class Adds(Growing, Reads, Protocol):
    """A conversation, as it takes one more document."""


@dataclass(frozen=True)
class Addition:
    """How a document is read.

    Attributes:
        cells: that the conversation needs with it.
        compact: whether positions are moved together.
    """

    budget: Budget
    cells: int
    compact: bool


def addition(conversation: Adds, name: str, tokens: int, glue: int) -> Addition:
    """How one more document is read; rows are parked only if the cells allow it.

    Args:
        glue: tokens that are decoded before it.

    Raises:
        UserError: it does not fit.
    """
    try:
        return _addition(conversation, name, tokens, glue)
    except UserError:
        if not recall_is_open(conversation) or conversation.parks == "off":
            raise
        before, conversation.parks = conversation.parks, "off"
        try:
            found = _addition(conversation, name, tokens, glue)
        except UserError:
            conversation.parks = before
        else:
            recall_is_off(conversation, f"the cells have no room for it beside {name}")
            return found
        raise


def _addition(conversation: Adds, name: str, tokens: int, glue: int) -> Addition:
    """The same with rows where `parks` says.

    Where the cells are given, smaller blocks are tried before turns must make room.
    """
    engine, cells, sources = conversation.engine, conversation.cells, conversation.sources
    settings, trained = engine.settings, engine.model.trained_context
    beyond = 0 < trained < cells.position + glue + tokens + conversation.max_tokens
    compact = engine.demand_with(conversation.parks).moves(beyond=beyond)
    limits = [(engine.share, "cells")] if engine.share else []
    limits += [(trained - _gaps(conversation), "positions")] if compact else []
    limit, of = min(limits, default=(None, ""))
    space, used = conversation.space, cells.used
    stays = space.system + space.documents
    turn = 2 * min(conversation.max_tokens, SHORT_ANSWER) + SHORT_ANSWER

    def extra(budget: Budget) -> int:
        own = engine.recall_cells(budget, conversation.parks)
        return max(sources.extra_cells(conversation.drafts), own)

    def needed(budget: Budget, used: int) -> int:
        later = stays + budget.kept + extra(budget) + turn
        return max(used + glue + budget.cells(engine.demand.probing(budget), 0, 0), later)

    def planned(ratio: float, used: int) -> Budget | None:
        size = settings.block_size
        while size >= min(LEAST_BLOCK, settings.block_size):
            divisor = settings.protection_divisor
            budget = engine.policy.budget(tokens, size, ratio, divisor)
            if limit is None or needed(budget, used) <= limit:
                return budget
            size //= 2
        return None

    movable = sources.first_movable if compact else 0
    turns = conversation.turns_from(movable)
    history = turns.aged + sum(turns.whole)
    settings.check_keep(tokens)
    ratio = engine.budget(tokens).ratio if settings.keep else settings.ratio
    budget = planned(ratio, used)
    if budget is None:
        budget = planned(ratio, used - history // 2)
        if budget is not None and limit is not None:
            numbers = conversation.ledger.numbers(TURN)
            free(conversation, needed(budget, used) - limit, numbers, movable)
    if budget is None:
        remedy = "start with a larger --ctx-size"
        if of == "positions":  # parked documents do not move
            shorter = "--positions compact" if sources.parked else "a lower --ratio"
            remedy = f"start with {shorter}"
        for thousandths in range(int(ratio * 1000), 0, -1):
            if planned(thousandths / 1000, used - history // 2):
                remedy = f"/set ratio {thousandths / 1000:g} keeps less, or {remedy}"
                break
        raise UserError(
            f"{name} ({tokens} tokens) does not fit beside what is here into {limit} {of}; "
            f"/drop a document, or {remedy}"
        )
    room = max(TURNS, 2 * conversation.max_tokens) + extra(budget)
    wanted = max(needed(budget, cells.used), stays + budget.kept + room)
    return Addition(budget, wanted if limit is None else min(wanted, limit), compact)


def _gaps(conversation: Adds) -> int:
    """Positions without a token that cannot be closed: parked documents keep them."""
    fixed = conversation.sources.first_movable
    return fixed - int((conversation.ledger.position < fixed).sum())
