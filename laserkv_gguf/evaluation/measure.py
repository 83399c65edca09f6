"""What one sample gives under one policy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.api import LaserKV
from laserkv_gguf.conversation.conversation import Conversation
from laserkv_gguf.conversation.framing import Framing
from laserkv_gguf.conversation.generation import Reply
from laserkv_gguf.evaluation.samples import Sample, Tokens
from laserkv_gguf.evaluation.tasks import Task
from laserkv_gguf.evaluation.tasks.fidelity import Fidelity, agreement, divergence, mean_of

Row = dict[str, Any]


def conversation(
    engine: LaserKV, task: Task, sample: Sample, predict: int, document: Tokens | None = None
) -> Conversation:
    """A conversation about a sample that has not been read yet.

    Args:
        document: tokens between the instructions; None for the sample's.
    """
    tokenize = engine.model.tokenize
    tokens = sample.tokens if document is None else document
    parts = (tokenize(sample.before), tokens, tokenize(sample.after))
    # the right answer must fit too, for its likelihood
    room = max(predict, len(tokenize(sample.answer)))
    return Conversation(
        engine,
        document=np.concatenate(parts).astype(np.int32),
        max_tokens=room,
        framing=Framing(plain=isinstance(task, Fidelity), answer_prefix=sample.prefix),
    )


def question(task: Task, sample: Sample) -> str | None:
    """What the document is read for; `fidelity` reads without a question."""
    return None if isinstance(task, Fidelity) else sample.question


def _reply(talk: Conversation, asked: str, predict: int) -> Reply:
    talk.max_tokens = predict
    stream = talk.ask(asked)
    for _ in stream:
        pass
    return stream.reply


def _read(talk: Conversation, sample: Sample) -> Row:
    """What was read and kept."""
    reading = talk.reading
    assert reading is not None
    return {
        "document_tokens": len(sample.tokens),
        "read_tokens": len(reading.tokens),
        "kept_tokens": len(reading.kept),
    }


def answered(task: Task, sample: Sample, talk: Conversation, predict: int) -> Row:
    """Asks the question of a document that has been read; with recall, recalls for it before."""
    talk.recall(sample.question)
    likelihood = talk.log_likelihood(sample.question, sample.answer)
    reply = _reply(talk, sample.question, predict)
    return {
        **_read(talk, sample),
        "gold": list(sample.golds),
        "prediction": reply.text,
        "score": task.score(sample, reply.text),
        **task.beside(sample, reply.text),
        "gold_logprob": likelihood,
        "finish_reason": reply.finish_reason,
    }


@dataclass(frozen=True)
class Reference:
    """What the full cache predicts of a sample's continuation, and its own answer."""

    predictions: NDArray[np.float32]
    answer: Tokens
    text: str


def _predictions(sample: Sample, talk: Conversation) -> NDArray[np.float32]:
    assert sample.following is not None
    return talk.log_probabilities(sample.following[:1], sample.following[1:])


def reference(sample: Sample, talk: Conversation, predict: int) -> Reference:
    """Of the full cache, which has read the document; the conversation is left at its start."""
    predictions = _predictions(sample, talk)
    reply = _reply(talk, sample.question, predict)
    talk.reset()
    return Reference(predictions, np.array(reply.tokens, np.int32), reply.text)


def compared(sample: Sample, talk: Conversation, full: Reference) -> Row:
    """How far the predictions of a document that has been read are from the full cache's."""
    assert sample.following is not None
    predictions = _predictions(sample, talk)
    likelihood = None
    if len(full.answer):
        asked = talk.engine.model.tokenize(sample.question)
        likelihood = mean_of(talk.log_probabilities(asked, full.answer), full.answer)
    same = agreement(full.predictions, predictions)
    return {
        **_read(talk, sample),
        "gold": full.text,
        "prediction": "",
        "score": same,
        "gold_logprob": likelihood,
        "divergence": divergence(full.predictions, predictions),
        "agreement": same,
        "perplexity": math.exp(-mean_of(predictions, sample.following[1:])),
    }
