"""What the routes share: the engine, the documents, the threads, and what a request comes to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from laserkv_gguf.api import LaserKV
from laserkv_gguf.conversation.question import Limits
from laserkv_gguf.errors import UserError
from laserkv_gguf.llama import grammar
from laserkv_gguf.llama.sampler import Sampling
from laserkv_gguf.server.disk import DiskCache
from laserkv_gguf.server.errors import refused
from laserkv_gguf.server.metrics import Metrics
from laserkv_gguf.server.prompt import Request
from laserkv_gguf.server.reports import Reports
from laserkv_gguf.server.settings import ServerSettings
from laserkv_gguf.server.store import Store, salt_of
from laserkv_gguf.server.uploads import Uploads
from laserkv_gguf.server.wire import ChatRequest, Common, ResponseFormat
from laserkv_gguf.server.work import Order, Works

_LONGEST = 8192  # tokens of an answer


class Serving:
    """A server's parts.

    Args:
        engine: with as many residents as there are workers, and something aside.

    Raises:
        LaserKVError: the folder for documents cannot be made.
    """

    def __init__(self, engine: LaserKV, settings: ServerSettings) -> None:
        self.engine, self.settings = engine, settings
        folder = settings.cache_dir
        disk = None
        if folder is not None and settings.cache_bytes:
            disk = DiskCache(engine, folder, settings.cache_bytes)
        self.store = Store(engine, most=settings.conversations, memory=settings.memory, disk=disk)
        self.works = Works(engine, self.store, workers=settings.workers, queue=settings.queue)
        self.reports = Reports(self.store)
        self.metrics = Metrics(self.works, self.store)
        self.uploads = Uploads(
            None if folder is None else folder / "files", max(settings.cache_bytes, settings.body)
        )
        self._small = ThreadPoolExecutor(2, thread_name_prefix="laserkv-prepare")
        self.limits = Limits.of_block(engine.settings.block_size)

    @property
    def model(self) -> str:
        return self.settings.model_name or self.engine.model.name

    @property
    def longest(self) -> int:
        """Tokens of an answer that a conversation's cells have room for."""
        share = self.engine.share
        return _LONGEST if share is None else max(1, min(_LONGEST, share // 4))

    async def apart(self, work: Callable[[], Any]) -> Any:
        """Does what takes a while (tokens of a long text) in a thread, so that others go on."""
        return await asyncio.get_running_loop().run_in_executor(self._small, work)

    def close(self) -> None:
        """Ends the threads, once all requests have ended."""
        self.works.close()
        self._small.shutdown(wait=True)

    def order(self, wanted: Common, request: Request, owner: str) -> Order:
        """What a request comes to.

        Raises:
            ApiError: something in it is not supported, named.
        """
        settings = self.engine.settings
        if wanted.ratio is not None and wanted.ratio != settings.ratio:
            raise refused(
                "ratio",
                f"this server keeps {settings.ratio:g} of a document; start one with "
                f"--ratio {wanted.ratio:g}",
            )
        if wanted.policy is not None and wanted.policy != settings.policy:
            raise refused(
                "policy",
                f"this server chooses by {settings.policy}; start another with --policy",
            )
        limit = wanted.limit if isinstance(wanted, ChatRequest) else wanted.max_tokens
        limit = self.settings.max_tokens if limit is None else limit
        anew = wanted.cache_prompt is False
        return Order(
            request,
            self._sampling(wanted),
            min(max(limit, 1), self.longest),
            wanted.stops,
            salt_of(owner, wanted.cache_salt or ""),
            owner,
            anew,
            wanted.n or 1,
            self.engine.model.text(request.tokens[request.asked : len(request) - request.ending]),
        )

    def _sampling(self, wanted: Common) -> Sampling:
        given = {
            name: value
            for name in ("temperature", "top_p", "top_k", "min_p", "seed")
            if (value := getattr(wanted, name)) is not None
        }
        penalties = {
            name: value
            for name in ("frequency_penalty", "presence_penalty", "repeat_penalty")
            if (value := getattr(wanted, name)) is not None
        }
        biases = []
        for name, bias in (wanted.logit_bias or {}).items():
            if int(name) >= self.engine.model.vocab_size:
                raise refused("logit_bias", f"{name} is no token of this model")
            biases.append((int(name), bias))
        return replace(
            self.settings.sampling,
            **given,
            **penalties,
            logit_bias=tuple(biases),
            grammar=self._grammar(wanted),
        )

    def _grammar(self, wanted: Common) -> str:
        form: ResponseFormat | None = getattr(wanted, "response_format", None)
        shaped = form is not None and form.type != "text"
        if sum((shaped, wanted.grammar is not None, wanted.json_schema is not None)) > 1:
            raise refused("response_format", "give one of response_format, json_schema and grammar")
        where = "response_format" if shaped else "json_schema"
        try:
            if wanted.grammar is not None:
                where = "grammar"
                grammar.check(self.engine.model, wanted.grammar)
                return wanted.grammar
            if shaped or wanted.json_schema is not None:
                schema = wanted.json_schema
                if form is not None and form.type == "json_schema":
                    schema = form.json_schema.schema_ if form.json_schema else None
                elif form is not None and form.type == "json_object":
                    schema = form.schema_
                made = grammar.of_schema(schema)
                grammar.check(self.engine.model, made)
                return made
        except UserError as error:
            raise refused(where, str(error)) from None
        return ""
