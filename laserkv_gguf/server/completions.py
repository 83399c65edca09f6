"""`/v1/completions`: texts or token ids that the model goes on from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from laserkv_gguf.llama.sampler import Likelihood
from laserkv_gguf.reading.reader import Progress
from laserkv_gguf.server import prompt, replies
from laserkv_gguf.server.errors import refused
from laserkv_gguf.server.guard import owner
from laserkv_gguf.server.serving import Serving
from laserkv_gguf.server.stream import EventStream, collected
from laserkv_gguf.server.wire import CompletionRequest
from laserkv_gguf.server.work import Done, Ended, Event, Job, Order, Text


@dataclass
class _Asked:
    """One prompt of a request, and what came of it."""

    order: Order
    scored: list[Likelihood]


async def answer(serving: Serving, wanted: CompletionRequest, http: HttpRequest) -> Response:
    """Goes on from every prompt of a request."""
    if wanted.echo and wanted.stream:
        raise refused("echo", "echo is not supported with stream; leave one of them out")
    if wanted.question is not None:
        raise refused("question", "question is not supported here; use /v1/chat/completions")
    who = owner(http.state)
    asked = await serving.apart(lambda: _prepared(serving, wanted, who))
    choices = wanted.n or 1

    def work(job: Job) -> None:
        for number, one in enumerate(asked):
            if wanted.echo and wanted.logprobs is not None:
                one.scored = serving.works.score(job, one.order, wanted.logprobs)
            if wanted.max_tokens != 0:
                serving.works.answer(job, one.order, first=number * choices)

    job = serving.works.start(work)
    limit = serving.settings.request_seconds
    if wanted.stream:
        chunks = _Chunks(serving, wanted, asked)
        return EventStream(job, chunks, seconds=limit, pause=serving.settings.keep_alive)
    events = await collected(job, http.receive, limit)
    return JSONResponse(_whole(serving, wanted, asked, events))


def _prepared(serving: Serving, wanted: CompletionRequest, who: str) -> list[_Asked]:
    model, asked = serving.engine.model, []
    for given in wanted.prompts:
        if not isinstance(given, str) and any(not 0 <= t < model.vocab_size for t in given):
            raise refused("prompt", f"a token id is not in 0 to {model.vocab_size - 1}")
        request = prompt.of_text(model, given, serving.limits, special=bool(wanted.parse_special))
        if len(request) < (1 if wanted.max_tokens == 0 else 2):
            raise refused("prompt", f"the prompt has {len(request)} tokens; give at least 2")
        order = serving.order(wanted, request, who)
        if wanted.logprobs is not None:
            sampling = replace(order.sampling, top_logprobs=wanted.logprobs)
            order = replace(order, sampling=sampling)
        asked.append(_Asked(order, []))
    return asked


class _Chunks:
    """The objects of a stream."""

    def __init__(self, serving: Serving, wanted: CompletionRequest, asked: list[_Asked]) -> None:
        self.serving, self.wanted, self.asked = serving, wanted, asked
        self.head = replies.Head("text_completion", serving.model, "cmpl")
        self.done: list[Done] = []

    def __call__(self, event: Event) -> Iterator[dict[str, Any]]:
        model, choices = self.serving.engine.model, self.wanted.n or 1
        if isinstance(event, Progress) and self.wanted.return_progress:
            progress = {"total": event.total, "cache": 0, "processed": event.read}
            yield self.head.of(choices=[], prompt_progress=progress)
        elif isinstance(event, Text):
            found = None
            if self.wanted.logprobs is not None:
                alive = [one for one in event.likelihoods if not model.ends_generation(one.token)]
                found = replies.text_logprobs(model, alive)
            if event.text or (found and found["tokens"]):
                yield self.head.of(choices=[_choice(event.choice, event.text, None, found)])
        elif isinstance(event, Done):
            self.done.append(event)
            tokens = len(self.asked[event.choice // choices].order.request)
            self.serving.metrics.done(event, tokens)
            yield {
                **self.head.of(
                    choices=[_choice(event.choice, "", event.reply.finish_reason, None)]
                ),
                "timings": replies.timings(tokens, event),
                replies.ACCOUNT: replies.account(
                    tokens, event, self.asked[event.choice // choices].order.max_tokens
                ),
            }
        elif isinstance(event, Ended):
            options = self.wanted.stream_options
            if options is not None and options.include_usage:
                total = sum(len(one.order.request) for one in self.asked)
                yield self.head.of(choices=[], usage=replies.usage(total, self.done))


def _choice(index: int, text: str, reason: str | None, logprobs: Any) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def _whole(
    serving: Serving, wanted: CompletionRequest, asked: list[_Asked], events: list[Event]
) -> dict[str, Any]:
    model, choices = serving.engine.model, wanted.n or 1
    answers = {event.choice: event for event in events if isinstance(event, Done)}
    made = []
    for number, one in enumerate(asked):
        tokens = one.order.request.tokens
        before = model.text(tokens, special=True) if wanted.echo else ""
        for choice in range(number * choices, (number + 1) * choices):
            done = answers.get(choice)
            text = before + (done.reply.text if done else "")
            found: list[Likelihood | int] = []
            if wanted.echo and wanted.logprobs is not None:
                found = [int(tokens[0]), *one.scored]
            if done is not None:
                serving.metrics.done(done, len(tokens))
                found += [
                    each
                    for each in done.reply.likelihoods
                    if not model.ends_generation(each.token) or wanted.echo
                ]
            logprobs = None
            if wanted.logprobs is not None:
                logprobs = replies.text_logprobs(model, found)
            reason = done.reply.finish_reason if done else "length"
            made.append(_choice(choice, text, reason, logprobs))
    total = sum(len(one.order.request) for one in asked)
    head = replies.Head("text_completion", serving.model, "cmpl")
    whole = head.of(choices=made, usage=replies.usage(total, list(answers.values())))
    if answers:
        last = answers[max(answers)]
        order = asked[last.choice // choices].order
        whole["timings"] = replies.timings(len(order.request), last)
        whole[replies.ACCOUNT] = replies.account(len(order.request), last, order.max_tokens)
    return whole
