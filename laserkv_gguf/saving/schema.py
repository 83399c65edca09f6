"""What a saved file may hold, and the one function that reads it.

A saved file is data that may come from anybody, and a digest keeps out accidents, not forgers. So
everything in it is compared with what is written down in `fields` and `contents` before the engine
is touched: types, ranges, lengths that agree, tokens of the vocabulary, places in order and within
bounds. What is not allowed is refused in one line. Nothing is imported or opened because a file
names it, and nothing is allocated or counted through that the file's own size does not explain.
"""

from __future__ import annotations

from pathlib import Path

from laserkv_gguf import policies
from laserkv_gguf.engine.engine import Engine
from laserkv_gguf.errors import UserError
from laserkv_gguf.saving.contents import CONTENT
from laserkv_gguf.saving.file import Saved, opened, unusable
from laserkv_gguf.saving.identity import made_with
from laserkv_gguf.saving.kinds import Refused, shown


def read(path: str | Path | Saved, engine: Engine | None = None, kind: str | None = None) -> Saved:
    """Reads a saved file, which is compared with all that is written down here.

    Args:
        path: the file, or one that was read without an engine before.
        engine: that it is for: its model, build and cache must be those it was made with. None to
            see what it says of itself first; it can be used when it was read with an engine.
        kind: one of `archive.KINDS` that it must be; None for any.

    Returns:
        The open file; the caller closes it.

    Raises:
        UserError: no such file, not a regular one, of another kind or version, damaged, made with
            another model, build or cache, or with something in it that is not allowed. Nothing has
            changed then.
    """
    found = path if isinstance(path, Saved) else opened(Path(path))
    try:
        if kind not in (None, found.kind):
            raise UserError(
                f"{found.path} holds a {found.kind}, not a {kind}; "
                f"ask --load {found.path} takes both"
            )
        if engine is not None:
            _compare(found, engine)
            try:
                CONTENT[found.kind](found, engine)
            except Refused as error:
                raise unusable(found.path, error) from None
    except BaseException:
        if found is not path:
            found.close()
        raise
    return found


def _compare(found: Saved, engine: Engine) -> None:
    """Refuses a file of another model, build or form of the cache."""
    about, path = found.about, found.path
    here, was = made_with(engine), about["model"]
    model = here["model"]
    if (model["samples"], model["bytes"]) != (was["samples"], was["bytes"]):
        raise UserError(
            f"{path} was saved with another model: {shown(was['name'])} of {was['bytes']} bytes, "
            f"not {shown(model['name'])} of {model['bytes']}; "
            f"give that one with --model{_named(was['bytes'])}"
        )
    if about["build"] != here["build"]:
        raise UserError(
            f"{path} was saved with {shown(about['build'])}, this is {here['build']}, whose rows "
            "may differ; read the document again"
        )
    if about["cache"] != here["cache"]:
        raise UserError(
            f"{path} was saved with {shown(about['cache'])}, this is {here['cache']}; load it with "
            "the settings it was saved with"
        )


def _named(size: int) -> str:
    """What `--model` calls a file of that size, if models.txt knows it."""
    from laserkv_gguf import models

    found = [entry.name for entry in models.entries().values() if entry.size == size]
    return f" {found[0]}" if len(found) == 1 else ""


def check_policy(found: Saved, given: str) -> None:
    """Refuses a file whose policy is neither known by name here nor the one that was given.

    What `module:Class` names would be imported, and a file must not choose what is run.

    Args:
        found: the file, from `read`.
        given: the user's `--policy`.

    Raises:
        UserError: which flag to give, if it is the user's own.
    """
    name = found.about["settings"]["policy"]
    if name != given and name not in policies.registered():
        raise UserError(
            f"{found.path} was read with --policy {shown(name)}, which is not installed here, and "
            "no file chooses what is run; if it is yours, give the same --policy"
        )
