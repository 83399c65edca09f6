"""What a run will take, from a model's header alone: cells, bytes, layers on a card, what fits.

Weights and KV cache are sums. The compute buffers are an estimate: llama.cpp lays the tensors of a
graph out so that those of one step take the place of the step before, and the fullest step counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from laserkv_gguf.budget import LOW_RATIO, RATIO, Budget, padded
from laserkv_gguf.errors import UserError
from laserkv_gguf.llama.placement import AS_IT_COMES, Placement, assigned
from laserkv_gguf.models.header import Header
from laserkv_gguf.planning.demand import Demand
from laserkv_gguf.planning.parking import Room

OUTPUTS, SEQUENCES = 64, 8  # as llama.context asks for
QUESTION = 64  # tokens of a question with the template around it, where nobody says
ENDING = 5  # tokens of the template after a question: Llama 3's
ENDLESS = 1 << 26  # tokens nobody has
MOST_BLOCKS = 1 << 12  # a budget is computed block by block, and a plan tries some fifty budgets
FLOAT = 4
COPIES = 4  # GGML_SCHED_MAX_COPIES


@dataclass(frozen=True)
class Card:
    """A device with memory of its own, or the RAM; `size` in bytes."""

    name: str
    size: int

    @property
    def usable(self) -> int:
        """Without what driver and process take for themselves: a sixteenth, at most 512 MiB."""
        return self.size - min(self.size // 16, 512 << 20)


@dataclass(frozen=True)
class Memory:
    """What there is, in bytes.

    Attributes:
        size: of all cards, or the free RAM.
        card: whether it is devices' own.
        said: where that is known from.
        cards: the devices, in the order in which layers go to them; () for one of that size.
    """

    size: int
    card: bool
    said: str = ""
    cards: tuple[Card, ...] = ()

    @property
    def parts(self) -> tuple[Card, ...]:
        """The devices, or the RAM alone."""
        return self.cards or (Card("the card" if self.card else "RAM", self.size),)

    @property
    def usable(self) -> int:
        """What a run may take of all of them."""
        return sum(card.usable for card in self.parts)


@dataclass(frozen=True)
class Share:
    """What a device gets, or the RAM beside devices; sizes in bytes.

    Attributes:
        layers: of the model, the output layer counted as one.
        kv_bytes: of the cache.
        compute_bytes: estimated.
        capture_bytes: of keys and queries that are held to choose by, and parked rows; in RAM only.
        bytes: all of it.
        memory_bytes: what there is; 0 where that is not known.
    """

    name: str
    layers: int
    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    capture_bytes: int
    memory_bytes: int

    @property
    def bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.compute_bytes + self.capture_bytes


@dataclass(frozen=True)
class Run(Demand):
    """How documents will be read; the fields are flags' names.

    Attributes:
        flash: whether flash attention is on.
        predict: tokens of the answer.
        question: tokens of the question with the template around it, of which `ending` come after
            the question itself.
        ctx_size: most cells; None for what the run needs.
        gpu_layers: None for as many as fit.
        probe_tokens: None for the policy's own.
        signature_bits: of a parked token, per layer and kv head.
        placement: what goes where.
        chat_recall: where a conversation parks rows: "auto" for where `room` says.
    """

    type_k: str = "f16"
    type_v: str = "f16"
    flash: bool = False
    ubatch: int = 512
    predict: int = 512
    question: int = QUESTION
    ending: int = ENDING
    ctx_size: int | None = None
    gpu_layers: int | None = None
    probe_tokens: int | None = None
    signature_bits: int = 0
    placement: Placement = AS_IT_COMES
    chat_recall: str = "off"
    room: Room | None = None

    @property
    def reply(self) -> int:
        return self.question + self.predict

    def run_cells(self, budget: Budget) -> int:
        """Cells the run needs; with a policy that reads by repeating, also before a question."""
        cells = self.cells(budget, self.question, self.reply)
        if self.read_policy is not None and self.read_policy.needs.repeat:
            cells = max(cells, self.cells(budget, 0, self.reply, question_known=False))
        return cells

    def asking(self) -> int:
        """Tokens of the question whose queries are captured."""
        wanted = self.probe_tokens
        wanted = self.policy.needs.probe_tokens if wanted is None else wanted
        return min(wanted + self.ending, self.question) if wanted else self.question


@dataclass
class Plan:
    """What a run takes and whether it fits. Counts in tokens and cells, sizes in bytes.

    Attributes:
        ctx_cells: cells the run needs; `kv_bytes` is what llama.cpp allocates for them, or for
            --ctx-size.
        full_kv_bytes: what all tokens of document, question and answer would take.
        weights_bytes: of all tensors, once. Where llama.cpp repacks some for the CPU, that copy is
            what it works on, and the system drops the file's pages when memory is short.
        compute_bytes: llama.cpp's buffers for what it computes, estimated.
        recall_cells: of `ctx_cells`, what --recall needs while it looks at parked tokens again.
        capture_bytes: keys and queries held on the host to choose by.
        chat_cells, chat_kv_bytes: of a conversation about the document, with room for turns.
        chat_recall, chat_parked_bytes: where such a conversation parks rows of all tokens ("ram",
            "disk" or "off"), and what they take.
        parked_bytes: rows of all tokens that --recall holds in RAM or on disk, with signatures;
            without what `quest` and `infllm` note to find pages and chunks by.
        gpu_layers: layers that fit on the card, counted as llama.cpp counts them: the output layer
            is one more; 0 without a card.
        device_bytes: of all that, what must fit into `memory_bytes`; with cards what lies on them.
        devices: what each device gets, in order, and the RAM last where there are devices.
        largest_ratio: the largest ratio that fits; 0 for none.
        longest_document_tokens: the longest document that fits at `ratio`; 0 for none.
        fits: whether all of it fits, with all layers (or --gpu-layers of them) on the card.
        reason: the first thing that does not, in words; empty where it fits.
        notes: what to do about it, and what else there is to know.
    """

    model: str
    policy: str
    document_tokens: int
    ratio: float
    block_size: int
    protection_divisor: int
    blocks: int
    budget: int
    anchors: int
    window: int
    long_term: int
    kept_tokens: int
    kept_fraction: float
    positions: str
    ctx_cells: int
    recall_cells: int
    kv_bytes: int
    full_kv_bytes: int
    weights_bytes: int
    compute_bytes: int
    capture_bytes: int
    parked_bytes: int
    chat_cells: int
    chat_kv_bytes: int
    chat_recall: str
    chat_parked_bytes: int
    gpu_layers: int
    layers: int
    device_bytes: int
    memory_bytes: int
    memory: str
    largest_ratio: float
    longest_document_tokens: int
    fits: bool
    reason: str = ""
    notes: list[str] = field(default_factory=list)
    devices: list[Share] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        shares = [{**asdict(share), "bytes": share.bytes} for share in self.devices]
        return {**asdict(self), "devices": shares}


def positions_of(header: Header, run: Run) -> int:
    """Positions that the model takes, scaled as the flags say."""
    return run.placement.rope.positions(header.context, header.rope_scale)


def most_tokens(block_size: int) -> int:
    """Tokens of the longest document that is planned for."""
    return min(ENDLESS, block_size * MOST_BLOCKS)


def compute_bytes(
    header: Header, cells: int, *, ubatch: int = 512, flash: bool = False, outputs: int = OUTPUTS
) -> int:
    """llama.cpp's compute and output buffers, estimated.

    The graph is reserved for a whole micro-batch over all cells (`llama_context::sched_reserve`).
    Throughout it there are the mask and the indices of cells. Beside them come, one after another,
    the attention (without flash attention all heads' scores at once), the feed-forward network and
    the logits.
    """
    tokens, cells = min(ubatch, cells), padded(cells)
    rows = min(tokens, max(SEQUENCES, min(outputs, cells)))
    width, inner = header.width, header.heads * header.key_dim
    values = max(header.kv_heads) * header.value_dim
    mask = cells * tokens * (2 if flash else FLOAT)
    indices = tokens * 8 * (1 if flash else values)  # without it V is transposed: one for each
    if flash:
        attention = tokens * FLOAT * (3 * width + 2 * inner + 2 * values)
        # a middle no wider than the stream fits where tensors of the stream have been
        around = 4 if header.feed_forward > width else 2
        feed_forward = tokens * FLOAT * (3 * header.feed_forward + around * width)
    else:
        attention = tokens * FLOAT * (cells * header.heads + 4 * width + inner)
        feed_forward = tokens * FLOAT * (3 * header.feed_forward + 3 * width)
    logits = FLOAT * (rows * (header.vocab + width) + 2 * tokens * width)
    outputs_kept = FLOAT * header.vocab * SEQUENCES
    return max(mask + indices + max(attention, feed_forward), logits) + outputs_kept


def capture_bytes(header: Header, run: Run, budget: Budget) -> int:
    """What the engine holds on the host to choose by: keys, values and queries.

    Keys of a block and of what it looks back at, float16 unless the policy needs them precise;
    queries of the probe in float32, and its keys where the policy counts them.
    """
    needs = run.policy.needs
    if not any(block.evicts for block in budget.blocks):
        return 0
    item = FLOAT if needs.precise else 2
    per_key = header.layers * max(header.kv_heads) * header.key_dim
    per_query = header.layers * header.heads * header.key_dim
    rows = needs.rows(budget)
    total = (needs.host_keys + needs.values) * rows * per_key * item
    if needs.value_norms != "none" and not needs.values:
        total += rows * header.layers * max(header.kv_heads) * FLOAT
    if needs.queries:
        total += (run.asking() + run.drafts) * per_query * FLOAT
    if needs.queries and needs.outside:
        total += (run.question + run.drafts) * per_key * FLOAT  # of the question and drafts
    if needs.block_queries:
        asked = min(run.block_size, budget.tokens)
        total += min(needs.recent_queries or asked, asked) * per_query * item
    if needs.repeat:
        own = min(needs.repeat, budget.block_size, budget.tokens) + run.repeat_prompt
        total += own * per_key * FLOAT + run.ubatch * per_query * FLOAT
        total += rows * header.layers * max(header.kv_heads) * FLOAT
    return total


def make(
    header: Header, run: Run, memory: Memory, *, tokens: int, ratio: float | None = None
) -> Plan:
    """Plans a run.

    Args:
        header: of the model.
        run: how documents are read.
        memory: what there is.
        tokens: of the document, with all that stands before the question.
        ratio: of the tokens to keep; None for the largest that fits (0.25 where none does).

    Raises:
        UserError: more tokens than `most_tokens`.
    """
    most = most_tokens(run.block_size)
    if tokens > most:
        raise UserError(
            f"--tokens {tokens}: give at most {most} in blocks of {run.block_size}, "
            "or a larger --block-size"
        )
    exact = run.type_k in ("f16", "f32")
    turns = run.type_k != "bf16" and header.key_dim % 64 == 0  # see `rope.check`
    any_cells = run.ctx_size is None
    run = replace(run, exact_keys=exact, movable=exact or turns, any_cells=any_cells)
    return _Planner(header, run, memory).plan(tokens, ratio)


@dataclass(frozen=True)
class _Planner:
    header: Header
    run: Run
    memory: Memory
    _placings: dict[int, tuple[list[int | None], dict[int | None, int]]] = field(
        default_factory=dict
    )

    def plan(self, tokens: int, ratio: float | None) -> Plan:
        header, run = self.header, self.run
        largest = self.largest_ratio(tokens)
        chosen = (largest or RATIO) if ratio is None else ratio
        budget = run.budget(tokens, chosen)
        cells, layers = run.run_cells(budget), self.layers(budget)
        cell = sum(header.cell_bytes(run.type_k, run.type_v))
        chat = self._chat(budget)
        return Plan(
            model=header.name,
            policy=run.policy.name,
            document_tokens=tokens,
            ratio=chosen,
            block_size=run.block_size,
            protection_divisor=run.divisor,
            blocks=len(budget.blocks),
            budget=budget.block,
            anchors=budget.anchors,
            window=budget.window,
            long_term=budget.long_term,
            kept_tokens=budget.kept,
            kept_fraction=budget.kept_fraction,
            positions="compact" if self._compacts(budget) else "original",
            ctx_cells=cells,
            recall_cells=run.recall_cells(budget),
            kv_bytes=self._allocated(cells) * cell,
            full_kv_bytes=(tokens + run.reply) * cell,
            weights_bytes=header.weights,
            compute_bytes=self._compute(cells),
            capture_bytes=capture_bytes(header, run, budget),
            parked_bytes=self._parked(budget),
            chat_cells=chat[1],
            chat_kv_bytes=self._allocated(chat[1]) * cell,
            chat_recall=chat[0],
            chat_parked_bytes=self._rows(budget) if chat[0] != "off" else 0,
            gpu_layers=layers,
            layers=header.layers,
            device_bytes=self.device_bytes(budget, layers),
            devices=self.shares(budget, layers) if self.memory.card else [],
            memory_bytes=self.memory.size,
            memory=self.memory.said,
            largest_ratio=largest,
            longest_document_tokens=self.longest(chosen),
            fits=self.fits(budget),
            reason=self._reason(budget),
            notes=self._notes(budget, largest, ratio is not None),
        )

    def _allocated(self, cells: int) -> int:
        return padded(self.run.ctx_size or cells)

    def _compute(self, cells: int) -> int:
        cells = self.run.ctx_size or cells
        return compute_bytes(self.header, cells, ubatch=self.run.ubatch, flash=self.run.flash)

    def _compacts(self, budget: Budget) -> bool:
        run = self.run
        return run.compacts(budget, budget.tokens + run.reply, self._positions)

    def _beyond(self, budget: Budget) -> bool:
        """Whether positions pass what the model was trained for, unless they are compacted."""
        return budget.tokens + self.run.reply > self._positions > 0

    def _parked(self, budget: Budget) -> int:
        """What is parked: a cell a token, its signatures, and the lengths of its values."""
        return self._rows(budget) if self.run.parks(budget) else 0

    def _chat(self, budget: Budget) -> tuple[str, int]:
        """Where a conversation parks rows, and the cells it has."""
        run, recall = self.run, self.run.chat_recall
        size = self._rows(budget)
        if recall == "auto":
            recall = "off" if run.room is None else run.room.place(size)
        if not replace(run, recall="ram").parks(budget) or self._cannot_park(budget, recall):
            recall = "off"
        talk = replace(run, recall=recall)
        turns = talk.turns(budget, run.predict, self.header.context)
        cells = talk.cells(budget, 0, turns, question_known=False)
        if recall != "off" and run.ctx_size is not None and cells > run.ctx_size:
            talk = replace(run, recall="off")
            turns = talk.turns(budget, run.predict, self.header.context)
            return "off", talk.cells(budget, 0, turns, question_known=False)
        return recall, cells

    def _rows(self, budget: Budget) -> int:
        """Rows of all tokens, with what finds them."""
        header, run = self.header, self.run
        signatures = sum(header.kv_heads) * run.signature_bits // 8
        if run.policy.needs.value_norms != "none":
            signatures += sum(header.kv_heads) * FLOAT
        return budget.tokens * (sum(header.cell_bytes(run.type_k, run.type_v)) + signatures)

    def _cannot_park(self, budget: Budget, recall: str | None = None) -> bool:
        """Whether keys would have to be turned that cannot be."""
        run = self.run if recall is None else replace(self.run, recall=recall)
        return run.parks(budget) and self._compacts(budget) and run.type_k not in ("f16", "f32")

    def _cells_fit(self, budget: Budget) -> bool:
        cells, run = self.run.run_cells(budget), self.run
        if self._cannot_park(budget):
            return False
        if self._compacts(budget) or (run.positions != "original" and self._beyond(budget)):
            positions = budget.tokens + run.reply if budget.keeps_all else cells
            if positions > self._positions:
                return False
        return run.ctx_size is None or cells <= run.ctx_size

    @property
    def _positions(self) -> int:
        """That the model takes."""
        return positions_of(self.header, self.run)

    @property
    def _all_layers(self) -> int:
        """Layers wanted on the card; the output layer is one more."""
        if not self.memory.card:
            return 0
        most = self.header.layers + 1
        return most if self.run.gpu_layers is None else min(self.run.gpu_layers, most)

    def device_bytes(self, budget: Budget, layers: int) -> int:
        """What must fit: all of it, or on cards that of `layers` layers, the last ones."""
        if self.memory.card:
            return sum(share.bytes for share in self.shares(budget, layers)[:-1])
        header, run = self.header, self.run
        kv = self._allocated(run.run_cells(budget)) * sum(self._by_layer)
        compute = self._compute(run.run_cells(budget))
        parked = self._parked(budget) if run.recall == "ram" else 0
        return header.weights + kv + compute + capture_bytes(header, run, budget) + parked

    @cached_property
    def _by_layer(self) -> tuple[int, ...]:
        return self.header.cell_bytes(self.run.type_k, self.run.type_v)

    def shares(self, budget: Budget, layers: int) -> list[Share]:
        """What every card gets with so many layers on cards, and the RAM."""
        header, run, cards = self.header, self.run, self.memory.parts
        where, weights = self._placed(layers)
        cells = self._allocated(run.run_cells(budget))
        kv: dict[int | None, int] = {}
        for place, size in zip(where, self._by_layer, strict=False):
            place = place if run.placement.kv_offload else None
            kv[place] = kv.get(place, 0) + size * cells
        compute = self._compute(run.run_cells(budget)) + self._copies(budget, layers)
        busy = {place for place in where[:-1] if place is not None}
        # a micro-batch's products with weights that stay in RAM are computed on the first card
        visits = min(busy, default=-1) if None in where[:-1] else -1
        found = [
            Share(
                card.name,
                where.count(number),
                weights.get(number, 0),
                kv.get(number, 0),
                (compute if number in busy else self._logits if number == where[-1] else 0)
                + (header.largest_matrix if number == visits else 0),
                0,
                card.size,
            )
            for number, card in enumerate(cards)
        ]
        held = capture_bytes(header, run, budget)
        held += self._parked(budget) if run.recall == "ram" else 0
        here = compute if None in where[:-1] else 0
        return [
            *found,
            Share("RAM", where.count(None), weights.get(None, 0), kv.get(None, 0), here, held, 0),
        ]

    @property
    def _logits(self) -> int:
        """Compute buffers of a card that has the output layer alone, estimated."""
        return OUTPUTS * FLOAT * (self.header.vocab + 4 * self.header.width)

    def _copies(self, budget: Budget, layers: int) -> int:
        """What each card holds more where llama.cpp has several micro-batches under way.

        It does with all layers on two cards or more (`llama_context`, pipeline parallelism): four
        copies of what a micro-batch brings, as its mask, and a stream that comes and one that goes.
        """
        run, header = self.run, self.header
        placement = run.placement
        all_there = layers == header.layers + 1 and len(self.memory.parts) > 1
        plain = placement.split_mode == "layer" and placement.kv_offload
        if not (all_there and plain) or placement.overrides:
            return 0
        cells = self._allocated(run.run_cells(budget))
        tokens = min(run.ubatch, cells)
        mask = cells * tokens * (2 if run.flash else FLOAT)
        return (COPIES - 1) * mask + 2 * tokens * header.width * FLOAT

    def _placed(self, layers: int) -> tuple[list[int | None], dict[int | None, int]]:
        """Where every layer goes (the output layer last), and the bytes of weights by place."""
        if layers not in self._placings:
            run, header, cards = self.run, self.header, self.memory.parts
            shares = run.placement.tensor_split or tuple(card.size for card in cards)
            where = assigned(header.layers, layers, shares)
            names = {card.name: number for number, card in enumerate(cards)}
            placed = header.place(where, run.placement.overrides, names)
            self._placings[layers] = where, placed
        return self._placings[layers]

    def layers(self, budget: Budget) -> int:
        """How many of the wanted layers fit on the cards."""
        for layers in range(self._all_layers, 0, -1):
            if self._holds(budget, layers):
                return layers
        return 0

    def _holds(self, budget: Budget, layers: int) -> bool:
        """Whether every card has room for what it gets."""
        if not self.memory.card:
            return self.device_bytes(budget, layers) <= self.memory.usable
        shares = self.shares(budget, layers)
        return all(
            share.bytes <= card.usable
            for share, card in zip(shares, self.memory.parts, strict=False)
        )

    def fits(self, budget: Budget) -> bool:
        return self._cells_fit(budget) and self._holds(budget, self._all_layers)

    def largest_ratio(self, tokens: int) -> float:
        run = self.run
        return run.largest_ratio(self.fits, tokens)

    def longest(self, ratio: float) -> int:
        """The longest document that fits: one of several blocks, else of one."""

        def fits(tokens: int) -> bool:
            return self.fits(self.run.budget(tokens, ratio))

        size = self.run.block_size
        most = most_tokens(size)
        if fits(size + 1):
            return _last(fits, size + 1, most)
        return min(_last(fits, 1, most), size) if fits(1) else 0

    def _reason(self, budget: Budget) -> str:
        """The first thing that does not fit."""
        run, cells = self.run, self.run.run_cells(budget)
        if self.fits(budget):
            return ""
        if run.ctx_size is not None and cells > run.ctx_size:
            return f"it needs {cells:,} cells, more than --ctx-size {run.ctx_size}"
        if self._cannot_park(budget):
            return "rows of quantised keys cannot be parked with compacted positions"
        if not self._cells_fit(budget):
            positions = budget.tokens + run.reply if budget.keeps_all else cells
            return (
                f"it needs {positions:,} positions, more than the {self._positions:,} "
                "the model was trained for"
            )
        needed, there = self.device_bytes(budget, self._all_layers), self.memory.usable
        shares = self.shares(budget, self._all_layers)
        cards = self.memory.cards
        for share, card in zip(shares, cards, strict=False) if len(cards) > 1 else ():
            if share.bytes > card.usable:
                return (
                    f"{card.name} gets {share.layers} layers that need {_gib(share.bytes)}, "
                    f"and has {_gib(card.usable)} for them"
                )
        layers = f" with {self._all_layers} layers" if self.memory.card else ""
        return (
            f"it needs {_gib(needed)}{layers}, and {self.memory.said or 'the memory'} "
            f"has {_gib(there)} for it"
        )

    def _notes(self, budget: Budget, largest: float, given: bool) -> list[str]:
        notes, fits = [], self.fits(budget)
        if not fits and self._cannot_park(budget):
            notes.append("use -ctk f16, --positions original or --recall off")
        elif not fits and largest and given:
            notes.append(f"the largest ratio that fits is {largest:g}")
        elif not fits and not self._cells_fit(budget):
            notes.append("no ratio fits; use a smaller --block-size")
        elif not fits:
            notes.append("no ratio fits; use -ctk q8_0 -ctv q8_0, or a smaller --block-size")
        if not given and 0 < largest < LOW_RATIO:
            notes.append(f"a ratio of {largest:g} is below {LOW_RATIO:g}: expect poor answers")
        return notes


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _last(fits: Callable[[int], bool], low: int, most: int) -> int:
    """The largest number, from `low` which fits, before one that does not; at most `most`."""
    step = low
    while low + step < most and fits(low + step):
        low, step = low + step, 2 * step
    high = min(low + step, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
