"""README's picture: a question about the packaged story, and what of its text was kept for it.

    python scripts/picture.py --model FILE.gguf --out docs/images/kept.svg

Asks as `laserkv-gguf ask` does and draws what `retention.spans` says of the run; nothing in the
picture is made up. It suits a light and a dark page.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np

from laserkv_gguf import LaserKV, models
from laserkv_gguf.conversation.account import Account
from laserkv_gguf.files import text as text_file
from laserkv_gguf.machine import size
from laserkv_gguf.retention import spans
from laserkv_gguf.retention.spans import ANCHOR, EVICTED, WINDOW, Retention
from laserkv_gguf.shown import one_line

STORY = Path(__file__).resolve().parents[1] / "laserkv_gguf" / "data" / "sample.txt"
COLUMNS, ROWS, ADVANCE, HEIGHT, MARGIN = 92, 16, 7.8, 19, 16
LEVELS = (0.5, 0.65, 0.75, 0.85, 0.92, 0.97)  # of a block's scores; a shade each
STYLE = """
  text { font: 13px ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; fill: #1b1b1b; white-space: pre; }
  .ground { fill: #ffffff; stroke: #d4d4d4; } .out { fill: #8a8a8a; } .dim { fill: #666666; } .head { font-weight: 600; }
  .line { stroke: #1b1b1b; } .s1 { fill: #e9f1fa; } .s2 { fill: #d3e4f4; } .s3 { fill: #b9d5ee; }
  .s4 { fill: #9cc3e6; } .s5 { fill: #7fb1de; } .s6 { fill: #5f9ed5; }
  @media (prefers-color-scheme: dark) {
    text { fill: #ececec; } .ground { fill: #16181b; stroke: #3a3d42; } .out { fill: #7d7d7d; } .dim { fill: #9a9a9a; }
    .line { stroke: #ececec; } .s1 { fill: #1a2530; } .s2 { fill: #1c3145; } .s3 { fill: #1e3f5b; }
    .s4 { fill: #204d71; } .s5 { fill: #235c88; } .s6 { fill: #266da1; }
  }
"""  # noqa: E501


def main() -> None:
    """Asks, and draws."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="GGUF file or name; else the embedded model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--question", default="What was the supply ship called?")
    parser.add_argument("--characters", type=int, default=9000, help="of the story")
    parser.add_argument("--block-size", type=int, default=512)
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--threads", type=int, default=0)
    given = parser.parse_args()
    text = STORY.read_text("utf-8")[: given.characters]
    from laserkv_gguf.llama.context import ContextOptions

    with LaserKV(
        models.find(given.model),
        ratio=given.ratio,
        block_size=given.block_size,
        context=ContextOptions(threads=given.threads or None),
    ) as engine:
        stream = engine.stream(given.question, document=text, max_tokens=32)
        for _ in stream:
            pass
        shown = spans.of(stream.conversation)
        # how long it took is another on every machine, and no part of a picture
        line = said_of(stream.reply.account)
    text_file.write(given.out, drawn(shown, line))
    print(f"{''.join(shown.answer)}\n{line}\n{given.out}")


def said_of(account: Account) -> str:
    """What the answer could see, and what it took of the cache."""
    return (
        f"saw {account.text_kept:,} of {account.text_tokens:,} tokens of the document "
        f"({account.text_kept / account.text_tokens:.0%}) · cache {size(account.used_bytes)}, "
        f"with everything kept {size(account.full_kv_bytes)}"
    )


def drawn(report: Retention, account: str) -> str:
    """The picture as SVG."""
    lines: list[str] = []
    y = MARGIN + HEIGHT
    command = f'$ laserkv-gguf ask -d story.txt -q "{report.question}"'
    for said, kind in (
        (command, "head"),
        (one_line("".join(report.answer)), ""),
        *((part, "dim") for part in textwrap.wrap(one_line(account), COLUMNS)),
    ):
        lines.append(_text(said, 0, y, kind))
        y += HEIGHT
    y += HEIGHT // 2
    for row in _rows(report):
        for start, words, state, level in row:
            x, width = MARGIN + start * ADVANCE, len(words) * ADVANCE
            if level:
                lines.append(
                    f'<rect class="s{level}" x="{x:.1f}" y="{y - 14}" width="{width:.1f}" '
                    'height="18"/>'
                )
            if state != EVICTED:
                dash = ' stroke-dasharray="2 2"' if state == WINDOW else ""
                twice = (4, 6) if state == ANCHOR else (4,)
                lines += [
                    f'<path class="line" d="M{x:.1f} {y + below}h{width:.1f}"{dash}/>'
                    for below in twice
                ]
            lines.append(_text(words, start, y, "out" if state == EVICTED else ""))
        y += HEIGHT
    y += HEIGHT // 2
    legend = "underlined: kept (twice: anchor, dots: window) · grey: evicted · blue: score"
    lines.append(_text(legend, 0, y, "dim"))
    width, height = 2 * MARGIN + COLUMNS * ADVANCE, y + MARGIN
    ground = (
        f'<rect class="ground" x=".5" y=".5" width="{width - 1:.0f}" height="{height - 1}" rx="6"/>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" '
        f'width="{width:.0f}" height="{height}" role="img">\n'
        "<title>A question, its answer, and which tokens of the text were kept for it</title>\n"
        f"<style>{STYLE}</style>\n{ground}\n" + "\n".join(lines) + "\n</svg>\n"
    )


def _text(words: str, column: int, y: int, kind: str) -> str:
    words = words[:COLUMNS]
    fits = (
        f' textLength="{len(words) * ADVANCE:.1f}" lengthAdjust="spacingAndGlyphs"' if words else ""
    )
    name = f' class="{kind}"' if kind else ""
    return f'<text{name} x="{MARGIN + column * ADVANCE:.1f}" y="{y}"{fits}>{escape(words)}</text>'


def _rows(report: Retention) -> Iterator[Sequence[tuple[int, str, int, int]]]:
    """Lines of the text's beginning: stretches of one state and shade, by column."""
    part = report.parts[-1]
    levels = _levels(report)
    row: list[tuple[int, str, int, int]] = []
    column = count = ended = 0
    for token in range(part.start, part.end):
        state, level = int(report.states[token]), int(levels[token])
        piece = report.pieces[token]
        for at, words in enumerate(piece.split("\n")):
            ended += at > 0
            if not words:
                continue
            if ended == 1 and column:  # the story's own line ends where ours need not
                words = " " + words
            if ended > 1 or column + len(words) > COLUMNS:
                yield row
                count += 1
                row, column, words = [], 0, words.lstrip()
                if count == ROWS:
                    return
            ended = 0
            row.append((column, words, state, level))
            column += len(words)


def _levels(report: Retention) -> np.ndarray:
    """(n,) a shade, 0 to 6: how many of a block's tokens score less."""
    levels = np.zeros(len(report), np.int64)
    starts = report.parts[-1].blocks
    for start, end in zip(starts, (*starts[1:], report.parts[-1].end), strict=True):
        scores = report.scores[start:end]
        known = scores[~np.isnan(scores)]
        if len(known):
            limits = np.quantile(known, LEVELS)
            levels[start:end] = np.where(np.isnan(scores), 0, np.searchsorted(limits, scores))
    return levels


if __name__ == "__main__":
    main()
