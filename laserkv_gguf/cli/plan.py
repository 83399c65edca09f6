"""`plan`: what fits, before anything is downloaded or loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

from rich.table import Table
from typer import Option

from laserkv_gguf.cli import documents, streams, terminal
from laserkv_gguf.cli.options import (
    EngineOptions,
    log_to_stderr,
    parse_size,
    tokens_of,
    with_options,
)
from laserkv_gguf.errors import UserError

if TYPE_CHECKING:
    from laserkv_gguf.llama.placement import Placement
    from laserkv_gguf.planning.fits import Memory, Plan, Run, Share
    from laserkv_gguf.planning.settings import RecallSettings
    from laserkv_gguf.policies import Policy


def _tokens(text: str) -> int:
    """The value of --tokens.

    Raises:
        UserError: it is no number of tokens.
    """
    try:
        return tokens_of(str(text))
    except ValueError:
        raise UserError(f"--tokens {text}: give a number such as 32768 or 32k") from None


@with_options(EngineOptions, hide=("lookup",))
def plan(
    options: EngineOptions,
    tokens: Annotated[
        int,
        Option(
            "--tokens",
            metavar="<int>",
            parser=_tokens,
            help="Length of the document, such as 32768 or 32k; 0: what the model was trained for.",
        ),
    ] = 0,
    document: Annotated[
        Optional[list[str]],  # noqa: UP045
        Option("-d", "--document", help="Text, Markdown or PDF whose tokens are counted instead."),
    ] = None,
    vram: Annotated[
        Optional[str],  # noqa: UP045
        Option("--vram", help="Memory of the card, or of each: 8 (GiB), 8G,6000MB; else what is."),
    ] = None,
    predict: Annotated[
        int, Option("-n", "--predict", "--n-predict", help="Most tokens of an answer.")
    ] = 512,
    question_tokens: Annotated[
        int, Option("--question-tokens", help="Tokens of the question, the template's included.")
    ] = 64,
    as_json: Annotated[bool, Option("--json", help="Print one object.")] = False,
) -> int:
    """Say whether a document fits, and what it takes, before anything is loaded."""
    log_to_stderr(options.debug)
    from laserkv_gguf.budget import ratio_keeping
    from laserkv_gguf.models.header import Header
    from laserkv_gguf.planning import fits as planning

    if predict < 1 or question_tokens < 1:
        raise UserError("-n and --question-tokens must be at least 1")
    if tokens < 0 or (tokens and document):
        raise UserError("give the document's --tokens, a number above 0, or a --document to count")
    path = _header_file(options.model)
    header = Header(path)
    placement = options.placement()
    if vram is not None:
        memory = _cards(vram, placement)
    else:
        memory = _this_machine(options.gpu_layers, placement)
    run = _run(options, memory.card, predict, question_tokens)
    if document:
        tokens = _count(path, document)
    elif not tokens:
        room = planning.positions_of(header, run) - run.reply
        tokens = min(max(room, 1), planning.most_tokens(run.block_size))
    ratio = options.ratio
    if options.keep is not None:
        if options.keep > tokens:
            raise UserError(f"--keep {options.keep} is more than the {tokens} tokens to read")
        ratio = ratio_keeping(options.keep, tokens, lambda ratio: run.budget(tokens, ratio))
    made = planning.make(header, run, memory, tokens=tokens, ratio=ratio)
    if as_json:
        said = json.dumps(made.as_dict(), ensure_ascii=False)
        streams.say(terminal.printable(said), end="\n")
    else:
        _print(made, memory.card, ratio is None, run.recall)
    return 0 if made.fits else 1


def _header_file(model: str | None) -> Path:
    """A file with the model's header: its own, or what the hub sends of one that is not here."""
    from laserkv_gguf import models
    from laserkv_gguf.models import hub

    try:
        return models.find(model, begun=True)
    except UserError:
        entry = models.entries().get((model or models.EMBEDDED).lower())
        if entry is None or entry.package or hub.is_offline():
            raise
    return hub.header(entry)


def _run(options: EngineOptions, card: bool, predict: int, question: int) -> Run:
    """The run the flags ask for, checked as `ask` checks them."""
    from laserkv_gguf.llama.context import ContextOptions
    from laserkv_gguf.planning import parking
    from laserkv_gguf.planning.fits import Run
    from laserkv_gguf.planning.settings import BITS, Settings

    given = options.settings()
    settings = Settings(**{key: value for key, value in given.items() if value is not None})
    settings.check()
    policy, recalling = settings.make_policy(options.seed), settings.recalling
    recalling.check_policy(policy)
    context = ContextOptions(
        ubatch_size=options.ubatch_size or None,
        type_k=options.cache_type_k,
        type_v=options.cache_type_v,
        flash_attn=options.flash_attn,
    )
    context.check()
    if options.ctx_size < 0:
        raise UserError(f"--ctx-size {options.ctx_size}: give a number of cells, 0 for any")
    if question > settings.block_size:
        raise UserError(
            f"a question of {question} tokens is more than a block of {settings.block_size}; "
            "use a larger --block-size"
        )
    flash = context.flash_attn == "on" or context.quantised_v
    return Run(
        policy=policy,
        block_size=settings.block_size,
        divisor=settings.protection_divisor,
        type_k=context.type_k,
        type_v=context.type_v,
        flash=flash or (context.flash_attn == "auto" and card),
        ubatch=context.micro_batch(card),
        predict=predict,
        question=question,
        ctx_size=options.ctx_size or None,
        gpu_layers=options.gpu_layers if options.gpu_layers >= 0 else None,
        probe_tokens=settings.probe_tokens,
        lookahead=settings.lookahead,
        positions=settings.positions,
        recall=("ram" if policy.needs.recall else "off")
        if recalling.where == "auto"
        else recalling.where,
        chat_recall=recalling.where if _can_recall(recalling, policy) else "off",
        room=parking.room(settings.recall_limit, file=recalling.file),
        recall_mode=recalling.mode_for(policy),
        read_policy=settings.make_read_policy(policy, options.seed),
        signature_bits=BITS if recalling.votes_for(policy) else 0,
        placement=options.placement(),
    )


def _can_recall(recalling: RecallSettings, policy: Policy) -> bool:
    try:
        replace(recalling, where="ram", file=None).check_policy(policy)
    except UserError:
        return False
    return True


def _count(path: Path, names: list[str]) -> int:
    from laserkv_gguf.llama.vocabulary import count_tokens

    text = documents.load(names)
    assert text is not None
    return max(count_tokens(path, text), 1)


def _by_device(shares: list[Share]) -> Table:
    """What each device gets."""
    table, size = Table("", "layers", "weights", "KV cache", "compute", "in all"), terminal.size
    for column in table.columns[1:]:
        column.justify = "right"
    for share in shares:
        whole = size(share.bytes)
        table.add_row(
            share.name,
            str(share.layers),
            size(share.weights_bytes),
            size(share.kv_bytes),
            size(share.compute_bytes),
            f"{whole} of {size(share.memory_bytes)}" if share.memory_bytes else whole,
        )
    return table


def _cards(vram: str, placement: Placement) -> Memory:
    """Cards of given sizes, one or several with commas between them."""
    from laserkv_gguf.planning.fits import Card, Memory

    said = [part.strip() for part in vram.split(",")]
    sizes = [parse_size("--vram", part) for part in said]
    names = [f"{part}{'' if part[-1].isalpha() else ' GiB'}" for part in said]
    if placement.device and len(placement.device) != len(sizes):
        raise UserError(f"--vram {vram:.40}: give the memory of each --device, one after the other")
    devices = placement.device or tuple(f"GPU{number}" for number in range(len(sizes)))
    placement.check_devices(devices, wanted=True)
    cards = tuple(Card(name, size) for name, size in zip(devices, sizes, strict=True))
    if placement.split_mode == "none":
        cards = (cards[placement.main_gpu],)
        names = [names[placement.main_gpu]]
    a_card = "a card" if len(names) == 1 else "cards"
    return Memory(
        sum(card.size for card in cards), True, f"{a_card} of {' and '.join(names)}", cards
    )


def _this_machine(gpu_layers: int, placement: Placement) -> Memory:
    """The memory of the devices that llama.cpp can use here, else the RAM that is free."""
    from laserkv_gguf.llama import devices, rpc
    from laserkv_gguf.machine import free_ram
    from laserkv_gguf.planning.fits import Card, Memory

    rpc.add(placement.rpc)
    found = devices.used(placement)
    if gpu_layers != 0 and found:
        host = free_ram() or 0
        cards = tuple(Card(one.name, one.device.free or host) for one in found)
        names = ", ".join(one.device.description for one in found)
        return Memory(sum(card.size for card in cards), True, f"free on {names}", cards)
    if gpu_layers > 0:
        raise UserError(
            f"--gpu-layers {gpu_layers} asks for a GPU, and llama.cpp finds none here; "
            "say what card to plan for with --vram 8GiB"
        )
    free = free_ram() or max((device.total for device in devices.listed()), default=0)
    return Memory(free, False, "free RAM")


def _print(made: Plan, card: bool, derived: bool, recall: str) -> None:

    size, console = terminal.size, terminal.Console(highlight=False)
    table = Table(show_header=False, title=f"{made.model}, policy {made.policy}")
    table.add_column()
    table.add_column(justify="right")
    table.add_column(style="dim")
    ratio = "the largest that fits" if derived and made.largest_ratio else "--ratio"
    table.add_row("document", f"{made.document_tokens:,} tokens", f"{made.blocks} blocks")
    table.add_row("ratio", f"{made.ratio:g}", ratio if made.fits or not derived else "")
    table.add_row("kept", f"{made.kept_tokens:,} tokens", f"{made.kept_fraction:.1%}")
    table.add_row("cells", f"{made.ctx_cells:,}", f"positions {made.positions}")
    if made.parked_bytes:
        table.add_row("of them to recall", f"{made.recall_cells:,}", "while a question chooses")
    table.add_row("weights", size(made.weights_bytes), f"{made.layers} layers")
    table.add_row("KV cache", size(made.kv_bytes), f"full {size(made.full_kv_bytes)}")
    table.add_row("compute buffers", size(made.compute_bytes), "estimated")
    table.add_row("for scoring", size(made.capture_bytes), "keys and queries, in RAM")
    places = {"ram": "in RAM", "disk": "on disk", "off": ""}
    if made.parked_bytes:
        table.add_row("parked", size(made.parked_bytes), places[recall])
    parks = f"{size(made.chat_parked_bytes)} parked {places[made.chat_recall]}"
    said = parks if made.chat_parked_bytes else "nothing parked"
    table.add_row("chat about it", f"{made.chat_cells:,} cells", f"with room for turns; {said}")
    where = ("on the cards" if len(made.devices) > 2 else "on the card") if card else "in RAM"
    table.add_row(f"in all, {where}", size(made.device_bytes), f"of {size(made.memory_bytes)}")
    console.print(table)
    if len(made.devices) > 2:
        console.print(_by_device(made.devices))
    if card:
        most = made.layers + 1
        fit = "all layers fit" if made.gpu_layers == most else f"{made.gpu_layers} of {most} fit"
        where = "the card" if len(made.devices) <= 2 else "the cards"
        console.print(f"layers on {where}: {fit} (-ngl {made.gpu_layers})")
    longest = made.longest_document_tokens
    said = f"{longest:,} tokens" if longest else "none"
    console.print(f"longest document that fits at --ratio {made.ratio:g}: {said}")
    verdict = f"fits ({made.memory})" if made.fits else f"does not fit: {made.reason}"
    console.print(verdict, style="bold", soft_wrap=True)
    for note in made.notes:
        terminal.note(note)
