"""`pull`: a model of models.txt, checked by its hash."""

from __future__ import annotations

from typing import Annotated, Optional

from rich.table import Table
from typer import Argument, Option

from laserkv_gguf.cli import streams, terminal
from laserkv_gguf.cli.options import log_to_stderr


def pull(
    name: Annotated[
        Optional[str],  # noqa: UP045
        Argument(help="Of models.txt; without it the models are listed."),
    ] = None,
    offline: Annotated[bool, Option("--offline", help="Look into the caches only.")] = False,
    debug: Annotated[bool, Option("--debug", help="Tracebacks.")] = False,
) -> None:
    """Download a model; without a name, list those that are known."""
    log_to_stderr(debug)
    from laserkv_gguf import models
    from laserkv_gguf.models import hub

    if name is None:
        _list()
        return
    entry = models.named(name)
    size = f", {terminal.size(entry.size)}" if entry.size else ""
    terminal.dim(f"{entry.file} of {entry.source}{size}, licence {entry.licence}")
    try:
        place, fetched = hub.pull(entry, offline=offline)
    except KeyboardInterrupt:
        terminal.note(f"stopped; pull {entry.name} again and it goes on where it was")
        raise
    verified = "" if entry.sha256 else " (models.txt lists no hash of it)"
    terminal.dim(f"{'downloaded' if fetched else 'already here'}, verified{verified}:")
    streams.say(terminal.printable(str(place)), end="\n")


def _list() -> None:
    from laserkv_gguf import models

    # a name cut off at 80 columns could not be copied
    table = Table("name", "size", "context", "licence", "here", show_edge=False, pad_edge=False)
    table.columns[0].no_wrap = True
    for entry in models.entries().values():
        here = "yes" if models.present(entry) else "begun" if models.unfinished(entry) else ""
        size = terminal.size(entry.size) if entry.size else "?"
        table.add_row(entry.name, size, f"{entry.context:,}", entry.licence, here)
    terminal.Console(highlight=False).print(table)
    terminal.dim("python -m laserkv_gguf pull NAME gets one; --model NAME uses it")
