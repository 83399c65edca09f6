"""What the arrays of a saved file may hold: shapes, ranges, and what must agree with what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf import policies
from laserkv_gguf.budget import Budget
from laserkv_gguf.conversation.ledger import DOCUMENT, SYSTEM, TURN
from laserkv_gguf.engine.engine import Engine
from laserkv_gguf.files import archive
from laserkv_gguf.llama import rows
from laserkv_gguf.llama.model import row_bytes
from laserkv_gguf.planning.settings import BITS
from laserkv_gguf.saving.fields import POSITION
from laserkv_gguf.saving.file import WHOLE, Saved
from laserkv_gguf.saving.kinds import need, refuse, shown

if TYPE_CHECKING:
    from laserkv_gguf.llama.model import Model


def _budget(about: dict[str, Any]) -> Budget:
    return Budget(**about["budget"])


def _shaped(found: Saved, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> None:
    """An array that must be there, of one of these types and of that shape."""
    entry = found.tensors.get(name)
    said = f"array {name!r}"
    if entry is None:
        refuse(said, "is missing")
    need(entry.dtype in dtypes, said, f"is of {entry.dtype}, not {' or '.join(dtypes)}")
    need(entry.shape == shape, said, f"is of shape {list(entry.shape)}, not {list(shape)}")


def _length(found: Saved, name: str) -> int:
    """How long an array of one axis is."""
    entry = found.tensors.get(name)
    if entry is None or len(entry.shape) != 1:
        refuse(f"array {name!r}", "is missing, or has not one axis")
    return entry.shape[0]


def _ascending(values: NDArray[np.int64], low: int, high: int, said: str) -> None:
    """Whole numbers from low to high - 1, each larger than the one before."""
    if len(values):
        need(low <= int(values[0]) and int(values[-1]) < high, said, "goes out of bounds")
        # differences could overflow
        need(bool((values[1:] > values[:-1]).all()), said, "is not in ascending order")


def _within(values: NDArray[np.int64], low: int, high: int, said: str) -> None:
    if values.size:
        inside = low <= int(values.min()) and int(values.max()) < high
        need(inside, said, f"has values that are not from {low} to {high - 1}")


def _only(found: Saved, names: set[str]) -> None:
    for name in found.tensors:
        need(name in names, f"array {shown(name)!r}", "is none that is known")


def _tokens(found: Saved, name: str, count: int, model: Model) -> None:
    _shaped(found, name, ("I32",), (count,))
    _within(found.whole(name), 0, model.vocab_size, f"array {name!r}")


def _row_shapes(engine: Engine, count: int) -> dict[str, tuple[int, ...]]:
    """Of keys and values of so many tokens."""
    model, options = engine.model, engine.options
    key = row_bytes(options.type_k, model.kv_heads * model.head_dim)
    value = row_bytes(options.type_v, model.kv_heads * model.value_dim)
    return {"keys": (model.layers, count, key), "values": (model.layers, count, value)}


def _document(found: Saved, engine: Engine) -> None:
    """The arrays of a document agree with its budget and the model."""
    about, model = found.about, engine.model
    budget, parked = _budget(about), about["parked"]
    need(budget.tokens > 0, "budget.tokens", "is 0")
    need(not (parked and budget.keeps_all), "budget", "keeps everything, so nothing is parked")
    _tokens(found, "tokens", budget.tokens, model)
    count = _length(found, "kept")
    _shaped(found, "kept", WHOLE, (count,))
    kept = found.whole("kept")
    _kept(kept, budget, "array 'kept'", protected=parked)
    need(len(about["kept_per_block"]) <= len(budget.blocks), "kept_per_block", "is too long")
    names = {"tokens", "kept", "held", "positions", "keys", "values"}
    held = budget.tokens if parked else count
    _shaped(found, "held", WHOLE, (held,))
    every = np.arange(budget.tokens) if parked else kept
    need(np.array_equal(found.whole("held"), every), "array 'held'", "is not what rows are for")
    if parked:
        names |= _rows(found, engine, "", budget, 0, about["compact"])
        _only(found, names)
        return
    where = np.arange(count) if about["compact"] else kept
    _shaped(found, "positions", ("I32",), (count,))
    need(np.array_equal(found.whole("positions"), where), "array 'positions'", "does not fit kept")
    end = int(where[-1]) + 1
    need(about["next_position"] == end, "next_position", f"is not {end}, where kept ends")
    for name, shape in _row_shapes(engine, count).items():
        _shaped(found, name, ("U8",), shape)
    _only(found, names)


def _kept(kept: NDArray[np.int64], budget: Budget, said: str, *, protected: bool) -> None:
    """Tokens in the cache: ascending, no more than the budget has, the last one among them.

    Args:
        protected: whether all anchors and the window must be there, as recalling takes for granted.
    """
    _ascending(kept, 0, budget.tokens, said)
    need(0 < len(kept) <= budget.kept, said, f"has {len(kept)} tokens, not 1 to {budget.kept}")
    need(int(kept[-1]) == budget.tokens - 1, said, "is without the last token")
    if protected:
        first, last = _protected(budget)
        inside = np.zeros(budget.tokens, bool)
        inside[kept] = True
        ends = inside[:first].all() and inside[last:].all()
        need(bool(ends), said, "is without some anchors or tokens of the window")


def _protected(budget: Budget) -> tuple[int, int]:
    """Tokens between the anchors and the last window, half-open."""
    return budget.anchors, max(budget.anchors, budget.tokens - budget.window)


def _rows(
    found: Saved, engine: Engine, prefix: str, budget: Budget, offset: int, compact: bool
) -> set[str]:
    """Parked rows and what finds them; returns their names."""
    need(not budget.keeps_all, "budget", "keeps everything, so nothing is parked")
    need(offset + budget.tokens <= POSITION, f"{prefix}offset", "is too large")
    model, count = engine.model, budget.tokens
    said = f"array {prefix + 'positions'!r}"
    _shaped(found, f"{prefix}positions", ("I32",), (count,))
    stood, read_at = found.whole(f"{prefix}positions"), offset + np.arange(count)
    if compact:
        need(bool(((stood >= 0) & (stood <= read_at)).all()), said, "goes out of bounds")
    else:
        need(np.array_equal(stood, read_at), said, "is not where they were read")
    for name, shape in _row_shapes(engine, count).items():
        _shaped(found, prefix + name, ("U8",), shape)
    names = {f"{prefix}{name}" for name in ("positions", "keys", "values")}
    signed = {f"{prefix}signatures", f"{prefix}centre"}
    if signed & found.tensors.keys():
        words = found.about["settings"].get("recall_bits", BITS) // 64
        heads = (model.layers, model.kv_heads)
        _shaped(found, f"{prefix}signatures", ("U64",), (*heads, words, count))
        _shaped(found, f"{prefix}centre", ("F32",), (*heads, model.head_dim))
        names |= signed
    if f"{prefix}units" in found.tensors:
        names |= {f"{prefix}units", *_index(found, engine, prefix, count)}
    return names


def _index(found: Saved, engine: Engine, prefix: str, count: int) -> Iterator[str]:
    """What a policy noted of units of tokens, as it would note it here."""
    name = f"{prefix}units"
    units = _length(found, name)
    _shaped(found, name, WHOLE, (units,))
    starts = found.whole(name)
    need(units > 0 and starts[0] == 0, f"array {name!r}", "does not begin with the first token")
    _ascending(starts, 0, count, f"array {name!r}")
    begins = f"{prefix}{INDEX}"
    notes = {tensor: entry for tensor, entry in found.tensors.items() if tensor.startswith(begins)}
    for tensor, entry in notes.items():
        fits = len(entry.shape) > 1 and entry.shape[:2] == (engine.model.layers, units)
        need(fits, f"array {shown(tensor)!r}", "is not of these layers and units")
    if found.about["settings"]["policy"] == engine.policy.name and engine.policy.unit:
        wanted = _notes(engine)
        need(
            {begins + one for one in wanted} == notes.keys(),
            f"array {shown(begins)!r}",
            "is not what the policy notes",
        )
        for one, array in wanted.items():
            shape = (array.shape[0], units, *array.shape[2:])
            _shaped(found, begins + one, (archive.TYPES[str(array.dtype)],), shape)
    return iter(notes)


def _notes(engine: Engine) -> dict[str, NDArray[Any]]:
    """What the engine's policy notes of one unit of tokens, for the shapes."""
    model = engine.model
    dtype = np.float32 if engine.options.type_k == "f32" else np.float16
    tokens = np.arange(min(engine.policy.unit, 4096))
    keys = np.zeros((model.layers, len(tokens), model.kv_heads, model.head_dim), dtype)
    asked = np.zeros((model.layers, 0, model.heads, model.head_dim), dtype)
    queries = asked if engine.policy.needs.block_queries else None
    seen = policies.Candidates(tokens, (0, len(tokens)), keys=keys, block_queries=queries)
    return engine.policy.index(seen)


INDEX = "index."  # how the names of a policy's own notes begin


def prefix_of(number: int) -> str:
    """How the names of a conversation's parked rows begin, by the number of their document."""
    return f"parked {number}."


def _conversation(found: Saved, engine: Engine) -> None:
    """Segments, rows of the ledger, cells and parked rows of a conversation agree."""
    about, model = found.about, engine.model
    segments = {segment[0]: segment for segment in about["segments"]}
    _segments(about, segments)
    names = {"state", "rows", "tokens", "pools", "pending"}
    _tokens(found, "tokens", sum(segment[3] for segment in segments.values()), model)
    _shaped(found, "pools", ("I8",), (sum(segment[4] for segment in segments.values()),))
    _within(found.whole("pools"), 0, 3, "array 'pools'")
    pending = _length(found, "pending")
    need(pending <= 1, "array 'pending'", "has more than one token")
    _tokens(found, "pending", pending, model)
    spoken = any(segment[1] == TURN for segment in segments.values())
    need(not pending or spoken, "array 'pending'", "has a token of no turn")
    for number in range(len(about["names"])):
        name = f"text {number}"
        _shaped(found, name, ("U8",), (_length(found, name),))
        try:
            found.array(name).tobytes().decode("utf-8")
        except UnicodeDecodeError:
            refuse(f"array {name!r}", "is no UTF-8")
        names.add(name)
    _ledger(found, segments)
    _state(found, engine)
    entries = about.get("parked", [])
    numbers = [entry["number"] for entry in entries]
    need(len(set(numbers)) == len(numbers), "parked", "has a document twice")
    if entries:
        parts = _Parts.of(found, segments)
        for entry in entries:
            names |= _parked(found, engine, parts, entry)
    _only(found, names)


def _segments(about: dict[str, Any], segments: dict[int, Any]) -> None:
    need(len(segments) == len(about["segments"]), "segments", "has a number twice")
    numbers = [segment[0] for segment in about["segments"]]
    need(numbers == sorted(numbers), "segments", "is not in ascending order")
    kinds = [segment[1] for segment in segments.values()]
    need(kinds[:1] == [SYSTEM], "segments", "does not begin with what opens the conversation")
    need(kinds.count(SYSTEM) == 1, "segments", "has several openings")
    documents = [segment[2] for segment in segments.values() if segment[1] == DOCUMENT]
    known = set(about["names"])
    need(len(known) == len(about["names"]), "names", "has a name twice")
    need(len(set(documents)) == len(documents), "segments", "has a document twice")
    need(known.issuperset(documents), "segments", "has a document without a text")
    for number, segment in segments.items():
        pools = segment[3] if segment[1] == DOCUMENT else 0
        need(segment[4] == pools, f"segments {number}", f"has {segment[4]} pools, not {pools}")
    turns = kinds.count(TURN)
    need(about["turns"] <= turns, "turns", f"is {about['turns']}, with {turns} that were said")
    opened = about["turn_open"]
    need(opened is None or segments.get(opened, [0, 0])[1] == TURN, "turn_open", "is no turn")


def _ledger(found: Saved, segments: dict[int, Any]) -> None:
    """Every row is a token of a segment, in the order of both."""
    said = "array 'rows'"
    shape = found.tensors["rows"].shape if "rows" in found.tensors else ()
    need(len(shape) == 2, said, "is missing, or has not two axes")
    _shaped(found, "rows", WHOLE, (3, shape[1]))
    segment, index, position = found.whole("rows")
    _ascending(position, 0, POSITION, f"{said}, positions")
    numbers = np.array(list(segments), np.int64)
    lengths = np.array([one[3] for one in segments.values()], np.int64)
    at = np.minimum(np.searchsorted(numbers, segment), len(numbers) - 1)
    need(bool((numbers[at] == segment).all()), said, "has tokens of no segment")
    inside = (index >= 0) & (index < lengths[at])
    need(bool(inside.all()), said, "has tokens out of their segment's bounds")
    order = np.argsort(segment, kind="stable")
    segment, index = segment[order], index[order]
    follows = (index[1:] > index[:-1]) | (segment[1:] != segment[:-1])
    need(bool(follows.all()), said, "has a segment's tokens not in ascending order")


def _state(found: Saved, engine: Engine) -> None:
    """What llama.cpp's loader is given is a state as it writes them, of just these positions."""
    size = _length(found, "state")
    _shaped(found, "state", ("U8",), (size,))
    try:
        positions = rows.checked(engine.model, engine.options, found.array("state"))
    except ValueError as error:
        refuse("array 'state'", str(error))
    same = np.array_equal(np.sort(positions), found.whole("rows")[2])
    need(same, "array 'state'", "holds other positions than 'rows'")


@dataclass(frozen=True)
class _Parts:
    """The tokens of a conversation's opening and documents, by the numbers of their segments."""

    opening: int
    documents: dict[int, NDArray[np.int64]]
    head: NDArray[np.int64]

    @staticmethod
    def of(found: Saved, segments: dict[int, Any]) -> _Parts:
        tokens = found.whole("tokens")
        starts = np.cumsum([0, *(segment[3] for segment in segments.values())])
        parts = {
            number: tokens[start : start + segment[3]]
            for (number, segment), start in zip(segments.items(), starts, strict=False)
            if segment[1] != TURN
        }
        opening = next(iter(segments))
        return _Parts(opening, parts, parts.pop(opening))


def _parked(found: Saved, engine: Engine, parts: _Parts, entry: dict[str, Any]) -> set[str]:
    """The parked rows of one document agree with what the ledger says of it."""
    number, budget = entry["number"], _budget(entry)
    said, prefix = f"parked {number}", prefix_of(number)
    need(number in parts.documents, said, "is no document")
    leads = number == next(iter(parts.documents))
    begins = entry["offset"] == 0
    need(leads or not begins, said, "stands in the wrong place")
    need(entry.get("first", begins) == begins, said, "stands in the wrong place")
    # what stands at the beginning was read together with what opens the conversation
    opening = parts.head if begins else parts.head[:0]
    own = np.concatenate((opening, parts.documents[number]))
    head, read = len(opening), len(own)
    need(budget.tokens == read, f"{said}, budget.tokens", f"is {budget.tokens}, not {read}")
    names = _rows(found, engine, prefix, budget, entry["offset"], entry["compact"])
    _tokens(found, f"{prefix}tokens", read, engine.model)
    same = np.array_equal(found.whole(f"{prefix}tokens"), own)
    need(same, f"{said}, tokens", "are not the document's")
    start, last = _protected(budget)
    least = read - (last - start)
    fits = least <= entry["most"] <= budget.kept
    need(fits, f"{said}, most", f"is {entry['most']}, not {least} to {budget.kept}")
    for name in ("kept", "read"):
        _shaped(found, prefix + name, WHOLE, (_length(found, prefix + name),))
        _kept(found.whole(prefix + name), budget, f"{said}, {name}", protected=True)
    _shaped(found, f"{prefix}where", WHOLE, (read,))
    where, kept = found.whole(f"{prefix}where"), found.whole(f"{prefix}kept")
    need(np.array_equal(np.flatnonzero(where != -1), kept), f"{said}, where", "is not of 'kept'")
    _ascending(where[kept], entry["offset"], POSITION, f"{said}, where")
    segment, index, position = found.whole("rows")
    for part, low, high in ((parts.opening, 0, head), (number, head, read)):
        if low == high:
            continue
        rows = segment == part
        there = kept[(kept >= low) & (kept < high)]
        same = np.array_equal(index[rows], there - low) and np.array_equal(
            position[rows], where[there]
        )
        need(same, f"{said}, where", "is not what 'rows' says")
    return names | {prefix + name for name in ("tokens", "kept", "read", "where")}


CONTENT = {archive.DOCUMENT: _document, archive.CONVERSATION: _conversation}
