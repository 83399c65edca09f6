"""The text as its own probe: what is decoded behind it, what that pays it, the cells it takes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny import Tiny, TinySpec, forward, make, random_tokens

from laserkv_gguf import LaserKV
from laserkv_gguf.llama.chat import CHATML, SEPARATOR, ChatTemplate
from laserkv_gguf.llama.context import Context, ContextOptions
from laserkv_gguf.llama.model import Model
from laserkv_gguf.llama.sequence import MAIN, PROBE, Sequence
from laserkv_gguf.reading import repeating
from laserkv_gguf.reading.repeating import RepeatPrompt, largest_attention

SPEC = TinySpec(heads=6, kv_heads=2, chat_template=CHATML, ctx_train=2048)
OPTIONS = ContextOptions(
    batch_size=64, ubatch_size=16, type_k="f32", type_v="f32", flash_attn="off", threads=1
)
DOCUMENT = "A story that is long enough for a few blocks, told by nobody to nobody. " * 6


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Tiny, Model]]:
    tiny = make(tmp_path_factory.mktemp("repeating"), spec=SPEC)
    model = Model(tiny.path, gpu_layers=0, extra_buffers=False)
    yield tiny, model
    model.close()


def test_the_prompt_is_a_turn_of_the_template(loaded: tuple[Tiny, Model]) -> None:
    model = loaded[1]
    prompt = RepeatPrompt.of(ChatTemplate(model))
    end = model.tokenize("<|im_end|>\n<|im_start|>assistant\n", special=True).tolist()
    tokens = np.arange(300, 350, dtype=np.int32)
    whole = prompt.before(tokens, 0).tolist()
    assert whole == [*model.tokenize(SEPARATOR + repeating.WHOLE).tolist(), *end]
    later = prompt.before(tokens, 30).tolist()
    assert later == [*model.tokenize(SEPARATOR + repeating.PART).tolist(), *range(322, 330), *end]
    assert prompt.before(tokens, 4).tolist() == whole  # too little to be found by
    assert len(prompt) == max(len(whole), len(later))


@pytest.mark.parametrize("split", [0, 13])
def test_what_a_repetition_pays_is_the_model_s_softmax(
    split: int, loaded: tuple[Tiny, Model]
) -> None:
    """Against a forward pass over text and repetition; part of the text may stand before it."""
    tiny, model = loaded
    ids = random_tokens(90, tiny.spec).astype(np.int32)
    text, again = ids[:60], np.concatenate((ids[60:70], ids[20:60]))
    truth = forward(tiny.weights, tiny.spec, np.concatenate((text, again))).attention
    paid = truth[:, :, 60:, split:60].reshape(tiny.spec.layers, 2, -1, len(again), 60 - split)
    with Context(model, 256, OPTIONS) as context:
        keys = context.probe.new("keys", 60)
        with context.probe.armed(keys=(keys, 0)):
            context.decode(text, 0, MAIN)
        Sequence(context, MAIN).share_with(Sequence(context, PROBE))
        got = largest_attention(
            context,
            again,
            60,
            keys[:, split:],
            context.probe.new("keys", len(again)),
            context.probe.new("queries", 16),
            [keys[:, :split]] if split else [],
        )
    assert np.abs(got - paid.max(axis=(2, 3))).max() < 1e-5


@pytest.mark.parametrize("shares", ["one", "equal", "whole"])
def test_the_cells_of_a_plan_are_enough(
    shares: str, loaded: tuple[Tiny, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With just these every chunk is repeated whole, and no token twice."""
    sizes: list[int] = []

    def measured(context: Context, tokens: NDArray[Any], *rest: Any) -> NDArray[np.float32]:
        sizes.append(len(tokens))
        return largest_attention(context, tokens, *rest)

    monkeypatch.setattr(repeating, "largest_attention", measured)
    settings: dict[str, Any] = {
        "policy": "kvzip",
        "policy_options": {"shares": shares, "chunk": 40},
        "block_size": 64,
        "ratio": 0.3,
    }
    context = ContextOptions(64, 16, threads=1)
    path = loaded[0].path
    with LaserKV(path, context=context, **settings) as engine:
        talk = engine.conversation(document=DOCUMENT, max_tokens=1)
        tokens, _, _ = talk.to_read()
        cells = engine.plan(len(tokens), 0, 1, question_known=False).cells
        prompt = len(RepeatPrompt.of(engine.template))
    with LaserKV(path, context=context, ctx_size=cells, **settings) as engine:
        talk = engine.conversation(document=DOCUMENT, max_tokens=1)
        budget = talk.read().budget
    first, end = budget.anchors, budget.blocks[-1].candidates[1]
    assert max(sizes) <= 40 + prompt
    assert end - first < sum(sizes) <= end - first + len(sizes) * prompt
    whole = sum(size > 40 for size in sizes)
    assert whole >= (end - first) // 40 - len(budget.blocks)
    if shares == "whole":
        assert len(sizes) == -(-(end - first) // 40)


def test_a_document_that_follows_another_is_repeated_by_itself(tmp_path: Path) -> None:
    """Its keys are all that is scored; what stands before it takes its part of the softmax."""
    path = make(tmp_path, spec=SPEC).path
    with LaserKV(
        path,
        context=ContextOptions(128, 64, threads=1),
        policy="kvzip",
        block_size=64,
        ratio=0.4,
    ) as engine:
        talk = engine.conversation(document=DOCUMENT, max_tokens=2)
        talk.read()
        added = talk.add("more", DOCUMENT[::-1])
        assert added.kept <= 0.45 * added.tokens
        stream = talk.ask("why?")
        assert "".join(stream) == stream.reply.text
