"""`q4_0-full`: all tokens, in a cache of fewer bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from laserkv_gguf.api import LaserKV
from laserkv_gguf.conversation.conversation import Conversation
from laserkv_gguf.evaluation import measure
from laserkv_gguf.evaluation.peers.base import Case, Peer

TYPE = "q4_0"


class Quantised(Peer):
    """The full cache with keys and values of llama.cpp's type q4_0 (-ctk q4_0 -ctv q4_0).

    It has one size: the ratio it stands at is its bytes over those of a full cache of the types
    that the policies run with. It needs a context of its own.
    """

    name: ClassVar[str] = f"{TYPE}-full"

    def __init__(self) -> None:
        self._own: LaserKV | None = None

    def ratios(self, engine: LaserKV, asked: Sequence[float]) -> list[float]:
        return [round(engine.model.cell_bytes(TYPE, TYPE) / engine.cell_bytes, 4)]

    def check(self, case: Case) -> None:
        self._conversation(case).check(case.question)

    def read(self, case: Case) -> Conversation:
        talk = self._conversation(case)
        talk.read(question=case.question)
        return talk

    def _conversation(self, case: Case) -> Conversation:
        engine, settings = self._engine(case.engine), case.engine.settings
        engine.configure(block_size=settings.block_size)
        return measure.conversation(engine, case.task, case.sample, case.predict)

    def _engine(self, engine: LaserKV) -> LaserKV:
        if self._own is None:
            options = engine.options
            # a quantised V needs flash attention
            flash = "auto" if options.flash_attn == "off" else options.flash_attn
            self._own = LaserKV(
                engine.model,
                ctx_size=engine.ctx_size,
                context=replace(options, type_k=TYPE, type_v=TYPE, flash_attn=flash),
                seed=engine.seed,
                policy="full",
                ratio=1.0,
                block_size=engine.settings.block_size,
            )
        return self._own

    def close(self) -> None:
        if self._own:
            self._own.close()
            self._own = None
