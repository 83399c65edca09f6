"""`/v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from laserkv_gguf.errors import UserError
from laserkv_gguf.reading.reader import Progress
from laserkv_gguf.server import prompt, replies
from laserkv_gguf.server.errors import refused
from laserkv_gguf.server.guard import owner
from laserkv_gguf.server.serving import Serving
from laserkv_gguf.server.stream import EventStream, collected
from laserkv_gguf.server.uploads import decoded, text_of
from laserkv_gguf.server.wire import ChatRequest, FilePart, Message
from laserkv_gguf.server.work import Done, Ended, Event, Order, Text


async def answer(serving: Serving, wanted: ChatRequest, http: HttpRequest) -> Response:
    """Answers a conversation, at once or as it comes."""
    who = owner(http.state)
    order: Order | None = None

    def prepared() -> Order:
        request = _request(serving, wanted, who)
        made = serving.order(wanted, request, who)
        if wanted.logprobs:
            sampling = replace(made.sampling, top_logprobs=wanted.top_logprobs or 0)
            made = replace(made, sampling=sampling)
        return made

    order = await serving.apart(prepared)
    job = serving.works.start(lambda job: serving.works.answer(job, order))
    limit = serving.settings.request_seconds
    if wanted.stream:
        chunks = _Chunks(serving, wanted, order)
        return EventStream(job, chunks, seconds=limit, pause=serving.settings.keep_alive)
    events = await collected(job, http.receive, limit)
    return JSONResponse(_whole(serving, wanted, order, events))


def _request(serving: Serving, wanted: ChatRequest, who: str) -> prompt.Request:
    messages = []
    for message in wanted.messages:
        role = "system" if message.role == "developer" else message.role
        messages.append((role, _texts(serving, message, who)))
    try:
        return prompt.of_messages(serving.engine, messages, serving.limits, wanted.question or None)
    except UserError as error:
        raise refused("messages", str(error)) from None


def _texts(serving: Serving, message: Message, who: str) -> list[str]:
    """A message's documents and texts, in their order."""
    if isinstance(message.content, str):
        return [message.content]
    texts, files = [], 0
    for part in message.content:
        if isinstance(part, FilePart):
            files += 1
            file = part.file
            if file.file_id is not None:
                texts.append(serving.uploads.text(who, file.file_id))
            else:
                name = file.filename or "document"
                texts.append(text_of(name, decoded(file.file_data or "")))
        else:
            texts.append(part.text)
    if not texts:
        raise refused("messages", "a message has no parts; give it a text")
    if isinstance(message.content[-1], FilePart):
        if files == len(texts):
            raise refused("messages", "a message has documents alone; put the question beside them")
        # a document behind its question is read before it
        at = max(n for n, part in enumerate(message.content) if not isinstance(part, FilePart))
        texts.append(texts.pop(at))
    return texts


class _Chunks:
    """The objects of a stream."""

    def __init__(self, serving: Serving, wanted: ChatRequest, order: Order) -> None:
        self.serving, self.wanted, self.order = serving, wanted, order
        self.head = replies.Head("chat.completion.chunk", serving.model)
        self.done: list[Done] = []
        self._begun: set[int] = set()

    def __call__(self, event: Event) -> Iterator[dict[str, Any]]:
        prompt_tokens = len(self.order.request)
        if isinstance(event, Progress) and self.wanted.return_progress:
            progress = {
                "total": event.total,
                "cache": 0,
                "processed": event.read,
                "time_ms": event.seconds * 1000,
            }
            yield self.head.of(choices=[], prompt_progress=progress)
        elif isinstance(event, Text):
            yield from self._begin(event.choice)
            found = None
            if self.wanted.logprobs:
                found = replies.chat_logprobs(self.serving.engine.model, event.likelihoods)
            if event.text or (found and found["content"]):
                yield self._choice(event.choice, {"content": event.text}, None, found)
        elif isinstance(event, Done):
            yield from self._begin(event.choice)
            self.done.append(event)
            self.serving.metrics.done(event, prompt_tokens)
            yield {
                **self._choice(event.choice, {}, event.reply.finish_reason, None),
                "timings": replies.timings(prompt_tokens, event),
                replies.ACCOUNT: replies.account(prompt_tokens, event, self.order.max_tokens),
            }
        elif isinstance(event, Ended):
            options = self.wanted.stream_options
            if options is not None and options.include_usage:
                yield self.head.of(choices=[], usage=replies.usage(prompt_tokens, self.done))

    def _begin(self, choice: int) -> Iterator[dict[str, Any]]:
        if choice not in self._begun:
            self._begun.add(choice)
            yield self._choice(choice, {"role": "assistant", "content": ""}, None, None)

    def _choice(
        self, choice: int, delta: dict[str, Any], reason: str | None, logprobs: Any
    ) -> dict[str, Any]:
        return self.head.of(
            choices=[
                {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
            ]
        )


def _whole(
    serving: Serving, wanted: ChatRequest, order: Order, events: list[Event]
) -> dict[str, Any]:
    """The object of an answer that is not streamed."""
    prompt_tokens, model = len(order.request), serving.engine.model
    answers = [event for event in events if isinstance(event, Done)]
    choices = []
    for done in answers:
        serving.metrics.done(done, prompt_tokens)
        logprobs = None
        if wanted.logprobs:
            logprobs = replies.chat_logprobs(model, done.reply.likelihoods)
        choices.append(
            {
                "index": done.choice,
                "message": {"role": "assistant", "content": done.reply.text, "refusal": None},
                "logprobs": logprobs,
                "finish_reason": done.reply.finish_reason,
            }
        )
    return replies.Head("chat.completion", serving.model).of(
        choices=choices,
        usage=replies.usage(prompt_tokens, answers),
        timings=replies.timings(prompt_tokens, answers[-1]),
        **{replies.ACCOUNT: replies.account(prompt_tokens, answers[-1], order.max_tokens)},
    )
