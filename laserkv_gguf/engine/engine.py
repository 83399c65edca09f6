"""The model, its context and its settings: makes readers and recallers for conversations."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs

from laserkv_gguf import policies
from laserkv_gguf.budget import LOW_RATIO, Budget, ratio_keeping
from laserkv_gguf.engine.access import QUEUE, Access
from laserkv_gguf.engine.residents import Aside, Place, Resident, Residents, sequence_count
from laserkv_gguf.errors import OutOfMemory, UserError, check_type
from laserkv_gguf.llama import rope, rows, trial
from laserkv_gguf.llama.chat import ChatTemplate
from laserkv_gguf.llama.context import Context, ContextOptions
from laserkv_gguf.llama.model import Model
from laserkv_gguf.llama.placement import Placement
from laserkv_gguf.llama.sequence import Sequence
from laserkv_gguf.machine import free_ram, human
from laserkv_gguf.planning import parking
from laserkv_gguf.planning.demand import Demand
from laserkv_gguf.planning.settings import BITS, Keywords, Settings, block_for
from laserkv_gguf.reading.asking import ProbeSettings
from laserkv_gguf.reading.reader import Reader
from laserkv_gguf.reading.repeating import RepeatPrompt
from laserkv_gguf.recall.recaller import Recaller
from laserkv_gguf.recall.signatures import warm_up
from laserkv_gguf.recall.store import held

if TYPE_CHECKING:
    from typing_extensions import Unpack

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """What a reading was planned for, and where it lies.

    Attributes:
        cells: that it needs; `reader.limit` are those the conversation may take in all.
        reader: reads in the conversation's sequence.
        compact: whether positions are moved together.
    """

    budget: Budget
    cells: int
    reader: Reader
    compact: bool


@dataclass(frozen=True)
class Needed:
    """What a run needs, before anything is made."""

    budget: Budget
    cells: int
    compact: bool


class Engine:
    """A model and a context that several conversations can stand in, one asked at a time.

    `api.LaserKV` is the engine with questions and conversations on top; its docstring has the
    arguments.
    """

    def __init__(
        self,
        model: str | Path | Model,
        *,
        gpu_layers: int | None = None,
        ctx_size: int | None = None,
        context: ContextOptions | None = None,
        seed: int = 0,
        placement: Placement | None = None,
        residents: int = 1,
        aside: int | None = None,
        parallel: int = 1,
        queue: int = QUEUE,
        lookup: int = 0,
        threads: int | None = None,
        **settings: Unpack[Keywords],
    ) -> None:
        for name, value, hint in (
            ("model", model, str | Path | Model),
            ("gpu_layers", gpu_layers, int | None),
            ("ctx_size", ctx_size, int | None),
            ("context", context, ContextOptions | None),
            ("seed", seed, int),
            ("placement", placement, Placement | None),
            ("residents", residents, int),
            ("aside", aside, int | None),
            ("parallel", parallel, int),
            ("queue", queue, int),
            ("lookup", lookup, int),
            ("threads", threads, int | None),
        ):
            check_type(name, value, hint)
        if parallel < 1:
            raise UserError(f"parallel is {parallel}; give at least 1 request at a time")
        if lookup < 0:
            raise UserError(f"lookup is {lookup}; give the most tokens guessed at a time, or 0")
        self.parallel, self.lookup = parallel, lookup
        self.ctx_size, self.seed = ctx_size, seed
        if settings.get("ratio", 0.0) is None:
            del settings["ratio"]
        if settings.get("block_size") is None:
            settings["block_size"] = block_for(ctx_size and ctx_size // max(residents, parallel, 1))
        wanted = Settings.of(settings)
        given = "ratio" in settings or settings.get("keep") is not None
        self.fills_cells = ctx_size is not None and not given
        self.options = context or ContextOptions()
        if threads is not None:
            self.options = replace(self.options, threads=threads)
        self.options.check()
        if self.options.batch_size is None:
            self.options = replace(
                self.options, batch_size=max(wanted.block_size, self.options.batch)
            )
        self.residents = _residents(residents, aside, parallel)
        residents = self.residents.most
        if residents > 1:
            needed = sequence_count(residents) + (residents if parallel > 1 else 0)
            self.options = replace(self.options, sequences=max(self.options.sequences, needed))
            self.options.check()
        self._use(wanted)
        self._said_recall_off: set[str] = set()
        self.ignore_end = False  # llama.cpp's --ignore-eos: generate on past the answer's end
        self._owns_model = not isinstance(model, Model)
        self.model = (
            model
            if isinstance(model, Model)
            else Model(
                model,
                gpu_layers=gpu_layers,
                extra_buffers=trial.extra_buffers_work(),
                placement=placement,
            )
        )
        self.options = self.options.on(self.model)
        self.template = ChatTemplate(self.model)
        self._context: Context | None = None
        self._readers: dict[tuple[int, bool], Reader] = {}  # by sequence, and whether it compacts
        self._warming: threading.Thread | None = None
        self.access = Access(self, parallel, queue)  # who may use all this

    def _use(self, settings: Settings) -> None:
        settings.check()
        if settings.block_size > self.options.batch:
            raise UserError(
                f"a block of {settings.block_size} tokens is larger than the batch of "
                f"{self.options.batch} it is decoded in; "
                f"use -b {settings.block_size}, or --block-size {self.options.batch}"
            )
        policy = settings.make_policy(self.seed)
        settings.recalling.check_policy(policy)
        self.policy, self.settings = policy, settings
        self._read_policies: dict[str, policies.Policy] = {}

    def configure(self, **changes: Unpack[Keywords]) -> None:
        """Changes settings; what was read stays readable only in the answers already given.

        The context stays, so that several policies can be compared without making it anew.

        Raises:
            UserError: unusable settings; the old ones stay.
            Closed: the engine is closed.
        """
        with self.access.alone():
            self._use(Settings.of({**vars(self.settings), **changes}))
            self.residents.all_leave()
            self._readers = {}
            if self._warming:
                self._warming.join()
                self._warming = None

    def save(self, conversation: Any, path: str | Path) -> int:
        """Writes a conversation to a file; `LaserKV` knows how."""
        raise NotImplementedError

    # the engine's life

    def close(self) -> None:
        """Frees the context, and the model if it was loaded here.

        From any thread, at any moment, also twice. What is under way is stopped first: it raises
        `Closed`, as does every call that waits, and every one that comes later. Called by what the
        engine calls back it returns at once, and frees when that has returned. The end of the
        process closes, too; a process that was forked off has nothing to close.
        """
        self.access.close()

    def free(self) -> None:
        """Gives all native memory back; `close` calls it once nobody is inside."""
        if self._warming:
            self._warming.join()
        self.residents.all_leave()
        self._close_context()
        if self._owns_model:
            self.model.close()

    def cancel(self) -> None:
        """Stops all reading and answering under way, from any thread: it raises Cancelled.

        Calls of other threads that wait for their turn are not stopped, and with nothing under way
        nothing is. The engine can be used as before.
        """
        self.access.cancel()

    # what a run needs

    @property
    def share(self) -> int | None:
        """Cells of --ctx-size that one conversation may take; None for what each run needs."""
        return None if self.ctx_size is None else self.ctx_size // self.residents.most

    @property
    def _limit(self) -> int | None:
        """Cells of --ctx-size that one run may need; None for any number.

        Where several run together and say themselves how much they keep, others make room for it.
        """
        if self.parallel > 1 and not self.fills_cells:
            return self.ctx_size
        return self.share

    @property
    def demand(self) -> Demand:
        """How documents are read, as it is counted."""
        return self.demand_with(None)

    def demand_with(self, recall: str | None) -> Demand:
        """The same where rows go to "ram", "disk" or, "off", nowhere; None for what settings say.

        They leave it open with "auto": then a single question is meant, which needs no recall.
        """
        settings = self.settings
        if recall is None:
            alone = "ram" if self.policy.needs.recall else "off"
            recall = alone if settings.recall == "auto" else settings.recall
        read_policy = self.read_policy(recall)
        repeating = self._repeating(read_policy) or self._repeating(self.policy)
        return Demand(
            self.policy,
            settings.block_size,
            settings.protection_divisor,
            settings.lookahead,
            settings.positions,
            recall,
            settings.recalling.mode_for(self.policy),
            movable=rope.movable(self.model, self.options),
            exact_keys=self.options.type_k in ("f16", "f32"),
            any_cells=self.ctx_size is None,
            read_policy=read_policy,
            repeat_prompt=0 if repeating is None else len(repeating),
        )

    @property
    def probe_settings(self) -> ProbeSettings:
        return ProbeSettings(self.settings.probe_tokens, self.settings.lookahead)

    @property
    def drafts(self) -> int:
        """Lookahead tokens that a question drafts."""
        return self.demand.drafts

    def budget(self, tokens: int, protected: int = 0) -> Budget:
        """What of so many tokens is kept, at the settings' ratio or number of tokens."""
        self.access.check()
        keep, ratio = self.settings.keep, self.settings.ratio
        if keep is not None:
            make = self.demand.budget
            ratio = ratio_keeping(keep, tokens, lambda ratio: make(tokens, ratio, protected))
        return self.demand.budget(tokens, ratio, protected)

    def recall_cells(self, budget: Budget, recall: str | None = None) -> int:
        """Cells beside what is kept and the conversation that recalling needs; 0 without."""
        return self.demand_with(recall).recall_cells(budget)

    def plan(
        self,
        tokens: int,
        prompt: int,
        reply: int,
        *,
        question_known: bool = True,
        extra_cells: int = 0,
        protected: int = 0,
        budget: Budget | None = None,
        compact: bool | None = None,
        recall: str | None = None,
    ) -> Needed:
        """What a run needs; nothing is made.

        Args:
            tokens: to be read before the question.
            prompt: the question's, with the template around it.
            reply: cells for what follows the document: question, answer, later turns.
            question_known: whether the question is known while reading.
            extra_cells: for answers to other questions, generated at the same time.
            protected: first tokens that stay whole (a system prompt).
            budget, compact: of a document that was read before; None for what the settings say.
            recall: where rows go; as of `demand_with`.

        Raises:
            UserError: the question does not fit a block, the cells do not fit --ctx-size, or the
                positions do not fit what the model was trained for.
        """
        self.access.check()
        settings, trained = self.settings, self.model.trained_context
        demand = self.demand_with(recall)
        is_read = budget is not None

        def needed(budget: Budget) -> int:
            return demand.cells(
                budget, prompt, reply, question_known=question_known, is_read=is_read
            )

        if prompt > settings.block_size < tokens:  # else nothing is evicted, and nothing asks
            raise UserError(
                f"the question has {prompt} tokens, more than a block of {settings.block_size}; "
                "shorten it, put the long part into a --document, or use a larger --block-size"
            )
        if budget is None:
            budget = self.budget(tokens, protected)
            if self.fills_cells:
                ratio = self._largest_ratio(demand, tokens, reply, protected, needed)
                budget = demand.budget(tokens, ratio, protected)
        cells = needed(budget)
        if compact is None:
            compact = demand.compacts(budget, tokens + reply, trained)
        if compact:
            rope.check(self.model, self.options)
        if compact and cells > trained:
            largest = demand.largest_ratio(lambda b: needed(b) <= trained, tokens, protected)
            if largest:
                remedy = f"use --ratio {largest:g} or less"
            elif budget.shape == "one-shot":
                remedy = f"{settings.policy} reads all of it before it frees any: use laser"
            else:
                remedy = "use a smaller --block-size"
            raise UserError(
                f"keeping {budget.ratio:g} of {tokens} tokens needs {cells} positions, more than "
                f"the {trained} this model was trained for; {remedy}"
            )
        cells = max(cells, budget.kept + reply + extra_cells)
        if self._limit is not None and cells > self._limit:
            enough = cells if self._limit == self.ctx_size else cells * self.residents.most
            raise UserError(
                f"--ctx-size {self.ctx_size} is too small for what must be kept: this run "
                f"needs {cells} cells; use --ctx-size {enough}, a lower --ratio "
                "or a smaller --block-size"
            )
        return Needed(budget, cells, compact)

    def _largest_ratio(
        self, demand: Demand, tokens: int, reply: int, protected: int, needed: Any
    ) -> float:
        """The largest ratio whose run fits --ctx-size; the least there is where none does."""
        cells, trained = self.share or 0, self.model.trained_context
        if self.settings.positions != "original" and tokens + reply > trained > 0:
            cells = min(cells, trained)
        ratio = demand.largest_ratio(lambda b: needed(b) <= cells, tokens, protected)
        if 0 < ratio < LOW_RATIO:
            log.warning(
                "--ctx-size %d leaves room for %g of %d tokens: expect poor answers",
                self.ctx_size,
                ratio,
                tokens,
            )
        return ratio or 0.001

    # the context

    @property
    def context(self) -> Context | None:
        """llama.cpp's context, once a run has needed one."""
        return self._context

    @property
    def cell_bytes(self) -> int:
        return self.model.cell_bytes(self.options.type_k, self.options.type_v)

    def prepare(
        self,
        resident: Resident,
        tokens: int,
        prompt: int,
        reply: int,
        *,
        keep_all_cells: bool = False,
        **planned: Any,
    ) -> Run:
        """Plans a run and makes room for it; other arguments and errors as of `plan`.

        Args:
            resident: the conversation that will read.
            keep_all_cells: with cells for all tokens beside the reply, if --ctx-size has them.
        """
        plan = self.plan(tokens, prompt, reply, **planned)
        cells, trained = plan.cells, self.model.trained_context
        if keep_all_cells and tokens + reply <= (self._limit or tokens + reply):
            cells = max(cells, tokens + reply)
        if not plan.compact and tokens + reply > trained > 0:
            log.warning(
                "%d positions are more than the %d this model was trained for: expect nonsense",
                tokens + reply,
                trained,
            )
        run = self.place(resident, plan.budget, cells, plan.compact)
        if not plan.budget.keeps_all:
            self.warm_up_beside()
        return run

    def place(self, resident: Resident, budget: Budget, cells: int, compact: bool) -> Run:
        """Finds cells for a conversation that has nothing in the cache; others may have to leave.

        Raises:
            UserError: the cache does not fit into memory.
            Cancelled: the engine was told to stop.
        """
        residents = self.residents
        self.leave(resident)
        self.access.works_with(resident)
        wanted = self.share or cells
        if self.parallel > 1 and (resident.one_turn or not self.share or self.share < cells):
            # as many as it needs, with those for what it copies
            drafts = self.policy.needs.most_drafts(self.settings.lookahead) - self.drafts
            wanted = min(cells + drafts, self.ctx_size or sys.maxsize)
        self._make_room(wanted)
        context = self._context
        assert context is not None
        limit = context.cells if residents.most == 1 else wanted
        place = Place(residents.free_sequence(), limit, compact)
        residents.enter(resident, place)
        return Run(budget, cells, self._reader(place), compact)

    def give_back(self, resident: Resident, cells: int) -> None:
        """Leaves others the cells that a conversation needed for reading alone.

        Args:
            cells: that it goes on to need; of --ctx-size a conversation keeps at least its part.
        """
        if self.parallel == 1 or self.ctx_size is None:
            return
        place = self.residents.inside[resident]
        if not resident.one_turn:
            cells = max(cells, self.share or 0)
        if cells < place.cells:
            self.residents.inside[resident] = replace(place, cells=cells)
            self._reader(self.residents.inside[resident])
            self.access.turns.cells_are_free()

    def reader_for(self, resident: Resident, compact: bool) -> Reader:
        """The reader of a conversation's place, from now on with these positions."""
        place = replace(self.residents.inside[resident], compact=compact)
        self.residents.inside[resident] = place
        return self._reader(place)

    def reader_at(self, reader: Reader, compact: bool) -> Reader:
        """The reader of the same sequence that compacts positions, or does not."""
        return self._reader(Place(reader.main.number, reader.limit, compact))

    def come_back(self, resident: Resident) -> None:
        """Has a conversation in the cache that was put aside.

        Raises:
            UserError: it has lost its cells.
            LaserKVError: its file cannot be read.
        """
        self.access.works_with(resident)
        if self.residents.holds(resident):
            self.residents.touch(resident)
            return
        saved, place = self.residents.saved(resident)
        residents = self.residents
        self._make_room(place.cells)
        place = replace(place, sequence=residents.free_sequence())
        self._put(resident, place, saved)
        residents.leave(resident)
        residents.enter(resident, place)

    def leave(self, resident: Resident) -> None:
        """A conversation has nothing in the cache any more, nor aside."""
        place = self.residents.leave(resident)
        if place is not None:
            self._clear(place)

    def grow(self, resident: Resident, cells: int) -> None:
        """Sets more cells aside for a conversation, in a larger context where this has no more.

        Raises:
            UserError: the cache does not fit into memory; all is as before.
        """
        others = sum(p.cells for r, p in self.residents.inside.items() if r is not resident)
        while others + cells > self._now and any(
            self.access.holds_elsewhere(one) for one in self.residents.inside
        ):
            self.access.wait_for_cells(others + cells)
            others = sum(p.cells for r, p in self.residents.inside.items() if r is not resident)
        before = self.residents.inside[resident]
        self.residents.inside[resident] = replace(before, cells=cells)
        try:
            self._make_context(others + cells)
        except BaseException:
            self.residents.inside[resident] = before
            raise

    def _make_room(self, cells: int) -> None:
        """Has cells for one more conversation; those asked longest ago leave for it.

        Where those that may not leave have the cells, it waits for one of them.
        """
        while not self._has_room(cells):
            self.access.wait_for_cells(cells)
        self.access.turns.cells_are_free()  # those behind it may have room, too

    def _has_room(self, cells: int) -> bool:
        whole = nullcontext() if self._context is None else self._context.at_once()
        with whole:  # whoever is put aside must not be asked meanwhile
            residents, inside = self.residents, self.residents.inside
            busy = [one for one in inside if self.access.holds_elsewhere(one)]
            idle = [one for one in inside if one not in busy]
            limit = self._now if busy else self.ctx_size or sys.maxsize
            if self.access.turns_before or self._taken(busy) + cells > limit:
                return False
            while len(inside) >= residents.most or self._taken(inside) + cells > limit:
                if not idle:
                    return False
                self._clear(residents.displace(idle.pop(0)))
            needed = self._taken(inside) + cells
            ahead = needed if inside else max(needed, cells * self._at_a_time(cells))
            try:
                self._make_context(ahead)
            except OutOfMemory:
                if ahead == needed:
                    raise
                self._make_context(needed)
            return True

    def _at_a_time(self, cells: int) -> int:
        """For how many calls of this size a new context is made, as half of the memory holds."""
        free = free_ram()
        if free is None or self.model.gpu_layers != 0:
            return self.parallel
        return max(1, min(self.parallel, free // 2 // (cells * self.cell_bytes)))

    def _taken(self, residents: Iterable[Resident]) -> int:
        """Cells that some of those inside have."""
        return sum(self.residents.inside[one].cells for one in residents)

    @property
    def _now(self) -> int:
        """Cells of the context as it is."""
        return 0 if self._context is None else self._context.cells

    def _clear(self, place: Place) -> None:
        if self._context is None:
            return
        if self._context.doubtful and not self.residents.inside:
            self._context.clear()  # also overwrites what came from a file
        else:
            Sequence(self._context, place.sequence).remove()

    @contextmanager
    def room_for_a_file(self, resident: Resident) -> Iterator[None]:
        """Lets a conversation take cells that a file fills.

        Others go on meanwhile where they lose nothing by it; else the engine is its alone.

        Raises:
            LaserKVError: as of `keeping_others`.
        """
        settings = self.settings
        as_it_is = settings.recall not in ("off", "auto") and settings.recall_file is None
        if self.parallel > 1 and self.residents.aside is not None and as_it_is:
            with self.access.inside(resident):
                yield
        else:
            with self.access.alone(), self.keeping_others():
                yield

    @contextmanager
    def keeping_others(self) -> Iterator[None]:
        """Lets a file take cells; whoever must leave for it comes back where that fails.

        The engine must be the caller's alone. Parked rows stay where they are: only those in a
        file that the user named go before, as there is no second one of that name.

        Raises:
            LaserKVError: the cells of the others cannot be held; nothing has changed.
        """
        settings, residents = self.settings, self.residents
        before, aside = list(residents.inside), residents.aside
        gone = settings.recall_file is not None and any(one.parked_tokens for one in before)
        if gone:
            for one in before:
                one.lose_cells()
        if aside is None:
            residents.aside = Aside(sys.maxsize, _folder())
        try:
            yield
        except BaseException:
            self.settings = settings
            self.access.check()  # one that is being closed holds nothing any more
            self.access.forget_cancelled()
            for one in before:
                if residents.can_come_back(one):
                    self.come_back(one)
            if gone:
                log.warning(
                    "what was parked in %s is gone, so nothing is recalled until the documents "
                    "are read again",
                    settings.recall_file,
                )
            raise
        else:
            for one in before if aside is None else []:
                if not residents.holds(one):
                    self.leave(one)
                    one.lose_cells()
        finally:
            if residents.aside is not None and aside is None:
                residents.aside.clear()
            residents.aside = aside

    def _make_context(self, cells: int) -> None:
        """Has a context of at least so many cells; what stands in it moves along."""
        cells = self.ctx_size or cells
        if self._context is None:
            self._open_context(cells)
        elif self._context.cells < cells or self._context.options != self.options:
            self._remake(cells)
        context = self._context
        assert context is not None
        context.resume()
        self.access.check_cancelled()

    def _remake(self, cells: int) -> None:
        old = self._context
        assert old is not None
        before, options = old.cells, old.options
        inside = list(self.residents.inside.items())
        saved = [resident.take_out() for resident, _ in inside]
        doubtful = old.doubtful
        self._close_context()
        try:
            self._open_context(max(cells, before))
        except UserError:
            self.options = options
            self._open_context(before)
            raise
        finally:
            if self._context is not None:
                self._context.doubtful = doubtful
            for (resident, place), state in zip(inside, saved, strict=True):
                self._put(resident, place, state)

    def _put(self, resident: Resident, place: Place, saved: Any) -> None:
        """Puts a state into a place, whose conversation goes on there."""
        assert self._context is not None
        resident.put_back(saved, self._reader(place))

    def _open_context(self, cells: int) -> None:
        self._context = Context(self.model, cells, self.options)
        self._context.turns = self.access.turns
        self._readers = {}

    def _close_context(self) -> None:
        if self._context:
            self._context.close()
        self._context, self._readers = None, {}

    def _reader(self, place: Place) -> Reader:
        assert self._context is not None
        key = (place.sequence, place.compact)
        if key not in self._readers:
            self._readers[key] = Reader(
                self._context,
                self.policy,
                self.probe_settings,
                compact=place.compact,
                scoring=self.settings.scoring,
                sequence=place.sequence,
                repeating=self._repeating(self.policy),
            )
        reader = self._readers[key]
        reader.limit = self._context.cells if self.residents.most == 1 else place.cells
        return reader

    def reader_without_question(self, run: Run, recall: str) -> Reader:
        """The reader of a document while no question is known; `recall`: where its rows go."""
        policy = self.read_policy(recall)
        if policy is self.policy:
            return run.reader
        reader = Reader(
            run.reader.context,
            policy,
            self.probe_settings,
            compact=run.compact,
            scoring=self.settings.scoring,
            sequence=run.reader.main.number,
            repeating=self._repeating(policy),
        )
        reader.limit = run.reader.limit
        return reader

    def read_policy(self, recall: str) -> policies.Policy:
        """What chooses while no question is known, where rows go to "ram", "disk" or nowhere."""
        if recall not in self._read_policies:
            settings = replace(self.settings, recall=recall, recall_file=None)
            made = settings.make_read_policy(self.policy, self.seed)
            self._read_policies[recall] = made
        return self._read_policies[recall]

    def hears(self, recall: str) -> tuple[bool, policies.Policy | None]:
        """Whether a question may come while a document is read, and the policy until it does.

        A policy that must see all of it without a question hears none; None: the own policy.
        """
        policy = self.read_policy(recall)
        if policy is self.policy:
            return True, None
        return not (policy.needs.repeat or policy.needs.every_block), policy

    def _repeating(self, policy: policies.Policy) -> RepeatPrompt | None:
        """What asks for a repetition, if the policy wants one."""
        return RepeatPrompt.of(self.template) if policy.needs.repeat else None

    def warm_up_beside(self) -> None:
        """Compiles the policy's kernels in a thread, while the first block is decoded."""
        if self._warming is None:
            self._warming = threading.Thread(target=self._warm_up, name="laserkv-compile")
            self._warming.start()

    def _warm_up(self) -> None:
        try:
            reading = self.read_policy("off" if self.settings.recall == "off" else "ram")
            for policy in {id(one): one for one in (self.policy, reading)}.values():
                policy.warm_up()
            if self.settings.recalling.votes_for(self.policy):
                warm_up()
        except Exception as error:  # the block loop will meet it too, and say so
            log.debug("cannot compile ahead: %s", error)

    # recall

    def room_for_rows(self, cells: int = 0) -> parking.Room:
        """What there is for parked rows, beside a cache of so many cells."""
        there = self._context.kv_bytes if self._context else 0
        settings = self.settings
        return parking.room(
            settings.recall_limit,
            held=held(),
            coming=max(0, cells * self.cell_bytes - there),
            file=settings.recall_file,
        )

    def row_bytes(self, tokens: int) -> int:
        """What the rows of so many tokens take, with what finds them again."""
        beside = 0
        if self.settings.recalling.votes_for(self.policy):
            beside = BITS // 8
        if self.policy.needs.value_norms != "none":
            beside += 4
        model = self.model
        return tokens * (self.cell_bytes + model.layers * model.kv_heads * beside)

    def place_rows(self, tokens: int, cells: int = 0) -> str:
        """Where rows of so many tokens go: as the settings say, or where there is room.

        Args:
            cells: of the cache that will stand beside them.
        """
        if self.settings.recall != "auto":
            return self.settings.recall
        if not self.can_recall():
            return "off"
        size = self.row_bytes(tokens)
        place = self.room_for_rows(cells).place(size)
        if place == "off":
            self.say_recall_is_off(
                f"parking {tokens} tokens takes {human(size)}, more than memory and disk can spare"
            )
        return place

    def can_recall(self) -> bool:
        """Whether a question can choose anew, with this policy."""
        try:
            replace(self.settings.recalling, where="ram", file=None).check_policy(self.policy)
        except UserError:
            return False
        return True

    def recaller(
        self, run: Run, offset: int = 0, number: int = 0, recall: str | None = None
    ) -> Recaller | None:
        """What parks and recalls the document of a run; None without recall, or nothing to recall.

        Where the settings leave open where rows go ("auto"), what memory cannot hold goes to disk,
        and what neither can hold is not parked, which is told.

        Args:
            offset: the position where it begins.
            number: of the document where others are parked beside it, for its file's name.
            recall: where rows go; as of `demand_with`.

        Raises:
            UserError: neither memory nor disk hold the rows, or they cannot be compacted.
        """
        demand = self.demand_with(recall)
        if not demand.parks(run.budget):
            return None
        try:
            form = rows.known(run.reader.context)
        except rows.FormatError as error:
            log.warning("recall is off: %s; evicted tokens are lost", error)
            return None
        settings = self.settings.recalling
        file = settings.file
        if number and file is not None:
            file = f"{file}.{number}"
        wants = self.settings.recall == "auto"
        places = [demand.recall] if not wants or demand.recall == "disk" else ["ram", "disk"]
        for place in places:
            settings = replace(settings, where=place, file=file if place == "disk" else None)
            try:
                return Recaller(run.reader, run.budget, form, settings, offset)
            except (UserError, MemoryError) as error:
                if not wants:
                    raise
                refused = error
        self.say_recall_is_off(str(refused) or "the memory is full")
        return None

    def say_recall_is_off(self, why: str) -> None:
        """Tells, in one line, that a conversation goes on without, and what follows from that."""
        if why in self._said_recall_off:
            return
        self._said_recall_off.add(why)
        log.warning(
            "recall is off (%s): what reading evicts stays away from every question; "
            "/read QUESTION reads with one in mind",
            why,
        )

    def try_row_format(self, reader: Reader) -> None:
        """Tries the form of the rows while cells are free for that."""
        try:
            rows.known(reader.context)
        except rows.FormatError as error:
            log.debug("rows cannot be read: %s", error)

    def turn_recall_on(self, saved: Mapping[str, Any]) -> None:
        """Recalls from now on, as a saved document's settings have it, unless it does already.

        Raises:
            UserError: not with this policy.
        """
        self.access.check()
        if self.settings.recall in ("off", "auto"):
            where = "ram" if self.settings.recall == "off" else "auto"
            settings = replace(self.settings, recall=where, recall_mode=saved["recall_mode"])
            replace(settings.recalling, where="ram", file=None).check_policy(self.policy)
            self.settings = settings
            self._read_policies = {}


def _folder() -> Path:
    return Path(platformdirs.user_cache_dir("laserkv-gguf")) / "aside"


def _residents(most: int, aside: int | None, parallel: int) -> Residents:
    if most < 1:
        raise UserError(f"residents is {most}; give at least 1 conversation")
    if aside is not None and aside < 0:
        raise UserError(f"aside is {aside}; give the bytes of memory for conversations put aside")
    return Residents(max(most, parallel), None if aside is None else Aside(aside, _folder()))
