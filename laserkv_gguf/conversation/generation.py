"""One answer while it is generated: its sampler, its text, and where it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from laserkv_gguf.conversation.account import Account
from laserkv_gguf.errors import UserError
from laserkv_gguf.llama.model import PieceDecoder
from laserkv_gguf.llama.sampler import Likelihood, Sampler

if TYPE_CHECKING:
    from laserkv_gguf.llama.model import Model
    from laserkv_gguf.llama.sampler import Sampling


@dataclass
class Reply:
    """An answer.

    Attributes:
        text: what the model said, without the string that stopped it.
        finish_reason: "stop" where it ended by itself or with a stop string, "length" where the
            limit ended it.
        account: what it cost.
        tokens: the generated tokens.
        likelihoods: of each of them, where `Sampling.top_logprobs` asks for them; and of the token
            that ended the answer.
    """

    text: str = ""
    finish_reason: str = ""
    account: Account = field(default_factory=Account)
    tokens: list[int] = field(default_factory=list)
    likelihoods: list[Likelihood] = field(default_factory=list)


class Generation:
    """Takes one token after the other until the answer ends; for `ask`, `chat` and `batch` alike.

    Args:
        model: whose tokens they are.
        sampling: of the sampler; every generation has its own.
        limit: most tokens, at least 1.
        stop: the answer ends in front of the first of these strings that it would contain.
        ignore_end: generate on past the end of the answer (llama.cpp's --ignore-eos).

    Attributes:
        reply: the answer so far; `text` ends where no stop string can begin any more.
    """

    def __init__(
        self,
        model: Model,
        sampling: Sampling,
        limit: int,
        *,
        stop: Sequence[str] = (),
        ignore_end: bool = False,
        reply: Reply | None = None,
    ) -> None:
        self.reply = Reply() if reply is None else reply
        self.stop, self.limit = check_stop(stop), limit
        self._model, self._ignore_end = model, ignore_end
        self._decoder = PieceDecoder(model)
        self._held = ""  # text that may be the beginning of a stop string
        self._sampler = Sampler(sampling, model)

    @property
    def ended(self) -> bool:
        return bool(self.reply.finish_reason)

    @property
    def last(self) -> int:
        """The token to decode next."""
        return self.reply.tokens[-1]

    def sample(self, handle: Any, row: int = -1) -> str:
        """Samples the next token; returns the text that is certain now.

        Args:
            handle: of the context that has decoded the last token.
            row: of its logits.
        """
        token = self._sampler.sample(handle, row)
        if self._sampler.last is not None:
            self.reply.likelihoods.append(self._sampler.last)
        return self.take(token)

    def take(self, token: int) -> str:
        """Adds a token to the answer, or ends it; returns the text that is certain now."""
        reply = self.reply
        if self._model.ends_generation(token) and not self._ignore_end:
            reply.finish_reason = "stop"
        else:
            reply.tokens.append(token)
            self._held += self._decoder.feed(token)
            if len(reply.tokens) >= self.limit:
                reply.finish_reason = "length"
        if self.ended:
            self._held += self._decoder.finish()
        found = [at for at in map(self._held.find, self.stop) if at >= 0]
        if found:
            self._held, reply.finish_reason = self._held[: min(found)], "stop"
        certain = len(self._held)
        if not self.ended:
            certain -= max((_overlap(self._held, stop) for stop in self.stop), default=0)
        text, self._held = self._held[:certain], self._held[certain:]
        reply.text += text
        return text

    def close(self) -> None:
        self._sampler.close()

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _overlap(text: str, stop: str) -> int:
    """How much of a text's end is the beginning of a stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def check_stop(stop: Sequence[str]) -> tuple[str, ...]:
    """Refuses what cannot stop an answer.

    Raises:
        UserError: a string in place of several, or an empty one.
    """
    if isinstance(stop, str) or not all(isinstance(one, str) and one for one in stop):
        raise UserError('stop is a list of texts, none of them empty, such as ["\\n\\n"]')
    return tuple(stop)
