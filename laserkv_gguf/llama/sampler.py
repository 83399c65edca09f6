"""llama.cpp's own samplers: what is ruled out, what is made less likely, and the choice."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import llama_cpp as L
import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.errors import LaserKVError
from laserkv_gguf.llama.grammar import make

if TYPE_CHECKING:
    from laserkv_gguf.llama.model import Model

_REMEMBERED = 1 << 14  # tokens of the answer that penalties look back at
_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


@dataclass(frozen=True)
class Sampling:
    """llama.cpp's sampling parameters.

    In this order: grammar, biases, penalties, top-k, top-p, min-p, temperature. A temperature of 0
    or less is greedy: the most likely token, whatever the seed.

    Attributes:
        frequency_penalty: taken off a token's logit for each time the answer has it already.
        presence_penalty: taken off once.
        repeat_penalty: such a logit is divided by this where positive, else multiplied; 1 for none.
        logit_bias: (token, number) pairs; the number is added to the token's logit.
        grammar: in GBNF, of which the answer is a sentence; empty for none.
        top_logprobs: how many of the likeliest tokens are told with every token, beside its own
            log-probability; None for nothing of this.
    """

    temperature: float = 0.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    seed: int = 0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repeat_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    grammar: str = ""
    top_logprobs: int | None = None

    @property
    def penalises(self) -> bool:
        return bool(self.frequency_penalty or self.presence_penalty or self.repeat_penalty != 1)


@dataclass(frozen=True)
class Likelihood:
    """What the model thought of a token that was chosen.

    Attributes:
        logprob: natural logarithm of its probability, before anything was ruled out.
        top: the likeliest tokens at its place with theirs, the likeliest first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """A sampler chain; close it.

    Args:
        model: whose tokens they are.

    Raises:
        UserError: a grammar that cannot be read.
    """

    def __init__(self, sampling: Sampling, model: Model) -> None:
        self.sampling, self.chain, self._grammar = sampling, None, None
        self.last: Likelihood | None = None
        if sampling.grammar:
            self._grammar = make(model, sampling.grammar)
        self.chain = L.llama_sampler_chain_init(L.llama_sampler_chain_default_params())
        for sampler in _samplers(sampling, model.vocab_size):
            L.llama_sampler_chain_add(self.chain, sampler)

    def sample(self, context: int, index: int = -1) -> int:
        """Chooses and accepts a token from the logits of output `index` (-1: the last).

        `last` has its likelihood afterwards, where that was asked for.

        Raises:
            LaserKVError: they are no numbers (a saved file or a model may be damaged), by which
                llama.cpp would sort tokens out of bounds; or the grammar allows none.
        """
        vocab = L.llama_model_get_vocab(L.llama_get_model(context))
        logits = np.ctypeslib.as_array(
            L.llama_get_logits_ith(context, index), (L.llama_vocab_n_tokens(vocab),)
        )
        if np.isnan(logits).any():
            raise LaserKVError(
                "the model computed no numbers here: what it read, or its file, is damaged"
            )
        if self._grammar is None:
            token = int(L.llama_sampler_sample(self.chain, context, index))
        else:
            token = self._in_grammar(logits)
        if self.sampling.top_logprobs is not None:
            self.last = likelihood(logits, token, self.sampling.top_logprobs)
        return token

    def _in_grammar(self, logits: NDArray[np.float32]) -> int:
        """As llama.cpp does it: the grammar looks at one token, and at all where that is wrong."""
        token = self._choose(logits, None)
        one = np.array([(token, 0.0, 0.0)], _CANDIDATE)
        L.llama_sampler_apply(self._grammar, ctypes.byref(_array(one)))
        if not np.isfinite(one["logit"][0]):
            token = self._choose(logits, self._grammar)
        L.llama_sampler_accept(self._grammar, token)
        L.llama_sampler_accept(self.chain, token)
        return token

    def _choose(self, logits: NDArray[np.float32], first: Any) -> int:
        found = np.empty(len(logits), _CANDIDATE)
        found["id"], found["logit"], found["p"] = np.arange(len(logits)), logits, 0
        array = _array(found)
        if first is not None:
            L.llama_sampler_apply(first, ctypes.byref(array))
            # llama.cpp ends the process over a token that its grammar does not know
            if not np.isfinite(found["logit"]).any():
                raise LaserKVError("the grammar allows none of the model's tokens here")
        L.llama_sampler_apply(self.chain, ctypes.byref(array))
        return int(array.data[array.selected].id)

    def close(self) -> None:
        for sampler in (self.chain, self._grammar):
            if sampler:
                L.llama_sampler_free(sampler)
        self.chain = self._grammar = None

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def likelihood(logits: NDArray[np.float32], token: int, top: int) -> Likelihood:
    """What (vocab,) logits say of a token, and of the `top` likeliest ones."""
    scores = logits.astype(np.float64)
    scores -= scores.max()
    scores -= np.log(np.exp(scores).sum())
    top = min(top, len(scores))
    best = np.argpartition(-scores, top - 1)[:top] if top else np.empty(0, np.int64)
    best = best[np.argsort(-scores[best], kind="stable")]
    return Likelihood(
        int(token), float(scores[token]), tuple((int(one), float(scores[one])) for one in best)
    )


def _samplers(sampling: Sampling, vocab: int) -> list[Any]:
    made = []
    if sampling.logit_bias:
        count = len(sampling.logit_bias)
        pairs = [L.llama_logit_bias(token, bias) for token, bias in sampling.logit_bias]
        biases = (L.llama_logit_bias * count)(*pairs)
        made.append(L.llama_sampler_init_logit_bias(vocab, count, biases))
    if sampling.penalises:
        made.append(
            L.llama_sampler_init_penalties(
                vocab,
                _REMEMBERED,
                sampling.repeat_penalty,
                sampling.frequency_penalty,
                sampling.presence_penalty,
            )
        )
    if sampling.temperature <= 0:
        return [*made, L.llama_sampler_init_greedy()]
    return [
        *made,
        L.llama_sampler_init_top_k(sampling.top_k),
        L.llama_sampler_init_top_p(sampling.top_p, 1),
        L.llama_sampler_init_min_p(sampling.min_p, 1),
        L.llama_sampler_init_temp(sampling.temperature),
        L.llama_sampler_init_dist(sampling.seed & 0xFFFFFFFF),
    ]


def _array(found: NDArray[Any]) -> Any:
    """llama.cpp's view of candidates, which must live as long as it."""
    data = found.ctypes.data_as(L.llama_token_data_p)
    return L.llama_token_data_array(data=data, size=len(found), selected=-1, sorted=False)
