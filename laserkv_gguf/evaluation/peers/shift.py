"""`shift`: llama.cpp's own context shift in as many cells."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.conversation.conversation import Conversation
from laserkv_gguf.errors import UserError
from laserkv_gguf.evaluation.peers.base import Case, Peer
from laserkv_gguf.llama import rope
from laserkv_gguf.llama.sequence import Sequence
from laserkv_gguf.reading.reader import Reading
from laserkv_gguf.timings import Timings

SPARE = 4  # cells that never belong to the first tokens that stay, as in llama-server
LEAST = 8  # cells


class Shift(Peer):
    """What llama-cli and llama-server do with --context-shift when the context is full.

    The first n_keep tokens stay, the older half of the others is dropped, and the younger half
    moves up; reading goes on behind it. n_keep is what stands before the document, as with
    --keep -1 (llama.cpp's own default keeps the beginning-of-text token alone). The context has as
    many cells as a policy would keep tokens, so that between half and all of that is there when
    the question comes, which has cells of its own.
    """

    name: ClassVar[str] = "shift"

    def check(self, case: Case) -> None:
        if case.tokens < LEAST:
            raise UserError(
                f"shift needs a context of at least {LEAST} tokens, not {case.tokens}; "
                "use a larger --ratio"
            )
        rope.check(case.engine.model, case.engine.options)

    def read(self, case: Case) -> Conversation:
        self.check(case)
        engine, talk, cells = case.engine, case.conversation(), case.tokens
        tokens, asked, reply = talk.to_read(case.question)
        behind = len(engine.model.tokenize(case.sample.after))
        front = len(tokens) - len(case.sample.tokens) - behind
        keep = min(front, cells - SPARE)
        with engine.access.alone():
            run = engine.prepare(
                talk,
                cells,
                len(asked) if asked else 0,
                reply,
                question_known=asked is not None,
                compact=True,
            )
            run.reader.forget()
            context, main = run.reader.context, run.reader.main
            kept, timings = np.empty(0, np.int64), Timings()
            try:
                done = 0
                with timings.spent("decode"):
                    while done < len(tokens):
                        if len(kept) == cells:
                            kept = self._shift(main, kept, keep)
                        # token by token gives the same: none sees what comes after it
                        count = min(len(tokens) - done, cells - len(kept))
                        context.decode(tokens[done : done + count], len(kept), main.number)
                        kept = np.concatenate((kept, np.arange(done, done + count)))
                        done += count
            except BaseException:
                engine.leave(talk)
                raise
            timings.total = timings.decode
            talk.adopt(run, Reading(tokens, run.budget, kept, len(kept), timings), None)
        return talk

    @staticmethod
    def _shift(main: Sequence, kept: NDArray[np.int64], keep: int) -> NDArray[np.int64]:
        """Drops the older half of what is behind the first `keep`; returns what is left."""
        held = len(kept)
        discard = (held - keep) // 2
        main.remove(keep, keep + discard)
        main.compact(np.arange(keep + discard, held), keep)
        return np.delete(kept, np.s_[keep : keep + discard])
