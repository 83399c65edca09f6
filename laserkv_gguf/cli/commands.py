"""What begins with a slash in a chat."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laserkv_gguf.cli import documents, terminal
from laserkv_gguf.errors import UserError
from laserkv_gguf.shown import counted, one_line

if TYPE_CHECKING:
    from laserkv_gguf.cli.loop import Loop


LONGEST = 40  # characters of a mistyped word that are repeated


def run(loop: Loop, line: str) -> bool:
    """Runs a slash command; False ends the chat."""
    name, _, rest = line.partition(" ")
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.4)
        short = name if len(name) <= LONGEST else f"{name[:LONGEST]}…"
        terminal.note(f"{short} is unknown; did you mean {near[0] if near else '/help'}?")
        return True
    return COMMANDS[name](loop, rest.strip()) is not False


# their first lines are what /help says


def _help(_loop: Loop, _rest: str) -> None:
    """List the commands."""
    for name, command in COMMANDS.items():
        first = (command.__doc__ or "").strip().splitlines()[0]
        terminal.note(f"{name:<9} {first}")
    terminal.note('Alt-Enter, a \\ at the end of a line or """ around several: more than one line')


def _add(loop: Loop, rest: str) -> None:
    """Read one more document: /add FILE."""
    if not rest:
        raise UserError("name a file: /add FILE")
    path = _path(rest)
    if str(path) == documents.STANDARD_INPUT:  # quoted, or as ./-
        raise UserError("chat reads what you type from standard input; /add a file")
    short, long = one_line(path.name), one_line(str(path))
    loop.add(short if short not in loop.talk.texts else long, documents.read(str(path)))


def _drop(loop: Loop, rest: str) -> None:
    """Take a document out of the cache: /drop NUMBER or NAME."""
    name = _named(loop, rest)
    loop.talk.drop(name)
    terminal.note(f"{name} is gone")


def _docs(loop: Loop, _rest: str) -> None:
    """List the documents and what is kept of them."""
    found = loop.talk.documents
    if not found:
        terminal.note("there is no document; /add FILE reads one")
    for number, document in enumerate(found, 1):
        share = f" ({document.kept / document.tokens:.1%})" if document.tokens else ""
        said = f"kept {document.kept:,} of {document.tokens:,} tokens{share}"
        terminal.note(f"{number:>2}  {document.name}  {said if document.tokens else 'not read'}")


def _kept(loop: Loop, rest: str) -> None:
    """Show a document, kept tokens bright: /kept NUMBER or NAME; /kept only leaves out the rest."""
    from laserkv_gguf.cli import kept

    first, _, others = rest.partition(" ")
    only = first == "only" and rest not in loop.talk.texts
    name = _named(loop, others.strip() if only else rest)
    if not next(d for d in loop.talk.documents if d.name == name).tokens:
        raise UserError(f"{name} is not read; /read reads it")
    typed = kept.show(loop.talk, name, loop.lines.key, only=only)
    if typed:
        loop.lines.put_back(typed)


def _read(loop: Loop, rest: str) -> None:
    """Read the documents again; /read QUESTION reads with it in mind and answers it."""
    if not loop.talk.texts:
        terminal.note("there is no document; /add FILE reads one")
    elif rest:
        loop.read_for(rest)
    else:
        loop.read()


def _stats(loop: Loop, rest: str) -> None:
    """Show what the last answer took; /stats all has every figure."""
    from laserkv_gguf.cli import stats

    if rest not in ("", "all"):
        raise UserError("/stats alone has six lines, /stats all every figure")
    if loop.last is None:
        terminal.note("nothing has been answered yet")
        return
    shown = stats.figures if rest else stats.lines
    width = 26 if rest else 8
    for name, said in shown(loop.last.account, loop.talk):
        terminal.note(f"{name:<{width}} {said}")


def _set(loop: Loop, rest: str) -> None:
    """Change how answers are made: /set NAME VALUE; /set alone lists what there is."""
    name, _, value = rest.partition(" ")
    if not name:
        for known, setting in SETTINGS.items():
            terminal.note(f"{known:<8} {setting.get(loop)!s:<8} {setting.about}")
        return
    name = name.lstrip("-").replace("_", "-")
    if name not in SETTINGS:
        near = difflib.get_close_matches(name, SETTINGS, n=1, cutoff=0.4)
        remedy = f"did you mean {near[0]}?" if near else "/set alone lists what there is"
        raise UserError(f"{name} cannot be set; {remedy}")
    setting = SETTINGS[name]
    if not value.strip():
        raise UserError(f"{name} is {setting.get(loop)}; give a value: /set {name} VALUE")
    setting.put(loop, setting.parse(name, value.strip()))
    terminal.note(f"{name} is {setting.get(loop)}{setting.when}")


def _report(loop: Loop, rest: str) -> None:
    """Write a page of what is kept and why: /report FILE.html."""
    from laserkv_gguf.retention import page, spans

    if not rest:
        raise UserError("name a file: /report FILE.html")
    path, talk = _path(rest), loop.talk
    size = page.write(path, [spans.of(talk)])
    terminal.note(f"written to {path} ({terminal.size(size)}); open it in a browser")
    if not talk.watches:
        talk.watches = True
        terminal.note("from the next answer on, /report also shows what answers looked at")


def _save(loop: Loop, rest: str) -> None:
    """Write the conversation to a file: /save FILE."""
    if not rest:
        raise UserError("name a file: /save FILE")
    path = _path(rest)
    size = loop.talk.save(path)
    terminal.note(f"saved to {path} ({terminal.size(size)}); /load {path} goes on")


def _load(loop: Loop, rest: str) -> None:
    """Go on with a saved conversation in place of this one: /load FILE."""
    from laserkv_gguf.saving import conversation as saved_talk

    if not rest:
        raise UserError("name a file: /load FILE")
    before, path = loop.talk, _path(rest)
    loop.talk = saved_talk.load(
        loop.engine, path, sampling=before.sampling, max_tokens=before.max_tokens
    )
    loop.last = None
    names = ", ".join(loop.talk.texts) or "no documents"
    terminal.note(
        f"loaded: {counted(loop.talk.turns, 'turn')}, {names}, {loop.talk.cells_used:,} cells"
    )


def _reset(loop: Loop, _rest: str) -> None:
    """Forget the turns; the documents stay as they were read."""
    loop.talk.reset()
    terminal.note("the turns are forgotten")


def _quit(_loop: Loop, _rest: str) -> bool:
    """Leave; so does Ctrl-D, or Ctrl-C twice."""
    return False


COMMANDS: dict[str, Callable[[Loop, str], bool | None]] = {
    "/help": _help,
    "/add": _add,
    "/drop": _drop,
    "/docs": _docs,
    "/kept": _kept,
    "/report": _report,
    "/read": _read,
    "/stats": _stats,
    "/set": _set,
    "/save": _save,
    "/load": _load,
    "/reset": _reset,
    "/quit": _quit,
}


def _path(text: str) -> Path:
    """A path as people type it: perhaps quoted, perhaps from their home.

    Raises:
        UserError: no file can be called that.
    """
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    if "\0" in text:
        raise UserError("a file's name cannot hold a NUL; type the name anew")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(f"{text}: there is no such user; give the whole path") from None


def _named(loop: Loop, text: str) -> str:
    """The document that a number or a name means; the only one where nothing is said."""
    names = list(loop.talk.texts)
    if not names:
        raise UserError("there is no document; /add FILE reads one")
    if not text:
        if len(names) > 1:
            raise UserError("which one? /docs lists them with their numbers")
        return names[0]
    if text in names:
        return text
    if text.isdecimal() and len(text) < 10 and 1 <= int(text) <= len(names):
        return names[int(text) - 1]
    near = difflib.get_close_matches(text, names, n=1, cutoff=0.4)
    remedy = f"did you mean {near[0]}?" if near else "/docs lists them"
    raise UserError(f"there is no document {text}; {remedy}")


# what /set changes


@dataclass(frozen=True)
class Setting:
    """A number that can be changed while talking."""

    about: str
    kind: type[int] | type[float]
    fits: Callable[[Any], bool]
    wanted: str
    get: Callable[[Loop], Any]
    put: Callable[[Loop, Any], None]
    when: str = ""

    def parse(self, name: str, text: str) -> Any:
        """The value.

        Raises:
            UserError: no number, or one that does not fit.
        """
        value: Any = None
        try:
            value = self.kind(text)
            finite = math.isfinite(value)
        except (ValueError, OverflowError):  # no number, or one of thousands of digits
            finite = False
        if not finite or not self.fits(value):
            raise UserError(f"{name} {text}: give {self.wanted}")
        return value


LARGEST = 2**31 - 1  # what llama.cpp takes


def _sampled(field: str, *rest: Any) -> Setting:
    def put(loop: Loop, value: Any) -> None:
        loop.talk.sampling = dataclasses.replace(loop.talk.sampling, **{field: value})

    about, kind, fits, wanted = rest
    return Setting(about, kind, fits, wanted, lambda loop: getattr(loop.talk.sampling, field), put)


def _put_predict(loop: Loop, value: int) -> None:
    loop.talk.max_tokens = value


def _put_ratio(loop: Loop, value: float) -> None:
    loop.engine.settings = dataclasses.replace(loop.engine.settings, ratio=value, keep=None)


SETTINGS = {
    "temp": _sampled(
        "temperature",
        "temperature; 0: always the likeliest token",
        float,
        lambda value: value >= 0,
        "a number of 0 or more, such as 0.7",
    ),
    "top-k": _sampled(
        "top_k",
        "sample from the k likeliest; 0: all",
        int,
        lambda value: 0 <= value <= LARGEST,
        "a whole number of 0 or more, such as 40",
    ),
    "top-p": _sampled(
        "top_p",
        "sample from this much probability",
        float,
        lambda value: 0 < value <= 1,
        "a fraction above 0 and at most 1, such as 0.95",
    ),
    "min-p": _sampled(
        "min_p",
        "drop tokens below this share of the likeliest",
        float,
        lambda value: 0 <= value <= 1,
        "a fraction from 0 to 1, such as 0.05",
    ),
    "seed": _sampled("seed", "of the sampler", int, lambda _: True, "a whole number"),
    "predict": Setting(
        "most tokens of an answer",
        int,
        lambda value: 1 <= value <= LARGEST,
        "a whole number of at least 1, such as 512",
        lambda loop: loop.talk.max_tokens,
        _put_predict,
    ),
    "ratio": Setting(
        "fraction of a document's tokens to keep, from the next reading on",
        float,
        lambda value: 0 < value <= 1,
        "a fraction above 0 and at most 1, such as 0.25",
        lambda loop: loop.engine.settings.ratio,
        _put_ratio,
        " from the next /add or /read on",
    ),
}
