"""The text itself as the probe: the model says it again, and looks at what it says again.

KVzip (arXiv 2505.23416): while a text is in the cache, a prompt to repeat it and the text itself
are decoded behind it. What no query of the repetition looks at, no question will need either. It
costs about as much as reading did, so it is decoded and looked at a micro-batch at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.llama.chat import ChatTemplate
from laserkv_gguf.llama.context import Context
from laserkv_gguf.llama.model import Tokens
from laserkv_gguf.llama.sequence import PROBE, Sequence
from laserkv_gguf.reading.asking import Arrays
from laserkv_gguf.timings import step

# The authors' prompts: for a text from its beginning, and for a later part of it, which is found by
# the last few tokens before it.
WHOLE = "Repeat the previous context exactly."
PART = "Repeat the part of the previous context exactly, starting with "
QUOTED = 8

LEAST = 64  # tokens repeated at a time, also where that passes what the model was trained for
_AT_ONCE = 64  # queries whose own keys are looked at as a matrix


@dataclass(frozen=True)
class RepeatPrompt:
    """What asks for a repetition, as int32 token ids.

    Attributes:
        whole: for the text from its beginning.
        part: for a later part, in front of the tokens that are quoted.
        ending: what the chat template puts between a question and its answer.
    """

    whole: Tokens
    part: Tokens
    ending: Tokens

    @classmethod
    def of(cls, template: ChatTemplate) -> RepeatPrompt:
        """In the form of the model's chat template.

        Raises:
            UserError: the template cannot be rendered.
        """
        whole, part = (template.opening(words).after for words in (WHOLE, PART))
        count = len(whole) - whole.ending
        return cls(
            whole.tokens[:count], part.tokens[: len(part) - part.ending], whole.tokens[count:]
        )

    def before(self, tokens: Tokens, start: int) -> Tokens:
        """What is decoded before tokens[start:] are repeated."""
        quoted = tokens[max(start - QUOTED, 0) : start]
        late = start > QUOTED
        parts = (self.part, quoted, self.ending) if late else (self.whole, self.ending)
        return np.concatenate(parts).astype(np.int32)

    def __len__(self) -> int:
        """The most tokens there are before what is repeated."""
        return max(len(self.whole), len(self.part) + QUOTED) + len(self.ending)


class Repeater:
    """Repeats what a sequence holds, in a scratch sequence that shares its cells.

    Args:
        context: that holds it.
        sequence: what is repeated.
        prompt: what asks for it; None for nothing.
    """

    def __init__(self, context: Context, sequence: Sequence, prompt: RepeatPrompt | None) -> None:
        self.context, self.main, self.prompt = context, sequence, prompt
        self.scratch = Sequence(context, PROBE)
        self._arrays = Arrays(context, precise=True)

    def size(self, most: int, free: int, position: int) -> int:
        """Tokens that are repeated at a time.

        Args:
            most: of the policy.
            free: cells.
            position: where the prompt will stand.
        """
        prompt, trained = 0 if self.prompt is None else len(self.prompt), self.trained
        most = min(most, free - prompt)
        if trained > 0:
            most = min(most, max(trained - position - prompt, LEAST))
        return max(most, 1)

    @property
    def trained(self) -> int:
        """Positions the model was trained for; 0 for any number."""
        return self.context.model.trained_context

    def paid(
        self,
        tokens: Tokens,
        span: tuple[int, int],
        position: int,
        keys: NDArray[Any],
        before: Iterable[NDArray[Any]],
    ) -> NDArray[np.float32]:
        """What the repetition of tokens[start:end] pays each key; see `largest_attention`.

        Args:
            tokens: of the document.
            position: right after what the sequence holds.
            keys: of what it holds of the document.
            before: keys of what else it holds.
        """
        start, end = span
        part = tokens[start:end]
        if self.prompt is not None:
            part = np.concatenate((self.prompt.before(tokens, start), part))
        own = self._arrays.of("own_keys", len(part))
        queries = self._arrays.of("queries", min(self.context.ubatch_size, len(part)))
        self.main.share_with(self.scratch)
        try:
            return largest_attention(self.context, part, position, keys, own, queries, before)
        finally:
            self.scratch.remove()


def largest_attention(
    context: Context,
    tokens: Tokens,
    position: int,
    keys: NDArray[Any],
    own: NDArray[np.float32],
    queries: NDArray[np.float32],
    before: Iterable[NDArray[Any]] = (),
) -> NDArray[np.float32]:
    """Decodes tokens in the scratch sequence; the most that any of them pays each key of a text.

    The softmax is the model's own: over the text, what stands `before` it, and of the tokens
    themselves those up to the one that asks.

    Args:
        tokens: of the prompt and the repetition, to stand at `position` and after.
        keys: (layers, n, kv_heads, head_dim), of what the scratch sequence holds of the text.
        own: (layers, at least len(tokens), kv_heads, head_dim), to work in.
        queries: (layers, at least one micro-batch, heads, head_dim), to work in.
        before: keys of what else the scratch sequence holds.

    Returns:
        (layers, kv_heads, n) float32: over the tokens, and over the heads that share a key.

    Raises:
        Cancelled, KeyboardInterrupt, LaserKVError, CaptureError: as of decoding.
    """
    from laserkv_gguf import kernels

    layers, count, kv_heads, _ = keys.shape
    found = np.zeros((layers, kv_heads, count), np.float32)
    size = min(context.ubatch_size, queries.shape[1])
    for first in range(0, len(tokens), size):
        part = tokens[first : first + size]
        end = first + len(part)
        asked = queries[:, : len(part)]
        with context.probe.armed(queries=(asked, 0), keys=(own[:, first:end], 0)):
            context.decode(part, position + first, PROBE)
        with step("score"), kernels.threads(context.threads):
            for start in range(0, len(part), _AT_ONCE):
                some = np.ascontiguousarray(asked[:, start : start + _AT_ONCE])
                seen = first + start + 1 + np.arange(some.shape[1])
                beside = kernels.log_sums(some, own[:, : seen[-1]], visible=seen)
                for others in before:
                    beside = np.logaddexp(beside, kernels.log_sums(some, others))
                kernels.attention_peaks(some, keys, found, outside=beside)
    return found
