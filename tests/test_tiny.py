"""The tiny models and their NumPy forward pass against llama.cpp itself.

Everything goes through llama.cpp's C API as it is, so that what the other tests call the truth does
not rest on the code they test.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny import (
    BOS,
    EOS,
    FIRST_BYTE,
    TinySpec,
    Variant,
    forward,
    make,
    random_tokens,
    token_of,
    visibility,
    write,
    write_variant,
)

llama_cpp: Any = pytest.importorskip("llama_cpp")

N = 40
# In standard deviations of what is compared; about 3e-6 is seen.
TOLERANCE = 1e-4
SPECS = {
    "grouped": TinySpec(),
    "one-kv-head": TinySpec(kv_heads=1, seed=1),
    "all-kv-heads": TinySpec(kv_heads=4, head_dim=16, seed=2),
    "wide-heads": TinySpec(layers=2, heads=2, kv_heads=1, head_dim=64, rope_base=5e5, seed=3),
    "qwen2": TinySpec(arch="qwen2", seed=4),
    "rope-freqs": TinySpec(rope_freqs=True, seed=5),
}


@contextmanager
def loaded(path: Path) -> Iterator[Any]:
    """A model's handle, None when llama.cpp refuses the file."""
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    # On some virtual machines with AMX the extra buffers crash the process.
    params.use_extra_bufts = False
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    try:
        yield model
    finally:
        if model:
            llama_cpp.llama_model_free(model)


@contextmanager
def context(model: Any, callback: Any = None) -> Iterator[Any]:
    """A context with an exact (f32) cache."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 512
    params.n_seq_max = 2
    params.kv_unified = True
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
    params.n_threads = params.n_threads_batch = 1  # threads that wait for each other cost more
    if callback is not None:
        params.cb_eval = callback
    handle = llama_cpp.llama_init_from_model(model, params)
    assert handle
    try:
        yield handle
    finally:
        llama_cpp.llama_free(handle)


def decode(
    handle: Any, tokens: Sequence[int] | NDArray[np.int64], positions: Sequence[int]
) -> NDArray[np.float32]:
    """Decode tokens in sequence 0 and return the logits of all of them."""
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    try:
        batch.n_tokens = len(tokens)
        for i, (token, position) in enumerate(zip(tokens, positions, strict=True)):
            batch.token[i] = int(token)
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = 1
        assert llama_cpp.llama_decode(handle, batch) == 0
    finally:
        llama_cpp.llama_batch_free(batch)
    vocab = llama_cpp.llama_model_get_vocab(llama_cpp.llama_get_model(handle))
    size = llama_cpp.llama_vocab_n_tokens(vocab)
    pointer = llama_cpp.llama_get_logits(handle)
    logits: NDArray[np.float32] = np.ctypeslib.as_array(pointer, shape=(len(tokens), size)).copy()
    return logits


def remove(handle: Any, first: int, end: int) -> None:
    """Evict the positions first to end - 1."""
    memory = llama_cpp.llama_get_memory(handle)
    assert llama_cpp.llama_memory_seq_rm(memory, 0, first, end)


def error(computed: NDArray[Any], expected: NDArray[Any]) -> float:
    """The largest difference, in standard deviations of what is expected."""
    return float(np.abs(computed - expected).max() / expected.std())


@pytest.mark.parametrize("name", SPECS)
def test_logits_equal_llama_cpps(name: str, tmp_path: Path) -> None:
    path, spec, weights = make(tmp_path, spec=SPECS[name])
    tokens = random_tokens(N, spec)
    expected = forward(weights, spec, tokens)
    with loaded(path) as model, context(model) as handle:
        assert error(decode(handle, tokens, range(N)), expected.logits) < TOLERANCE


@pytest.mark.parametrize(("ftype", "tolerance"), [("F16", 0.01), ("Q8_0", 0.1)])
def test_quantised_weights_come_back_dequantised(
    ftype: Any, tolerance: float, tmp_path: Path
) -> None:
    # llama.cpp rounds the activations too before such a product: no more than near can be asked.
    path, spec, weights = make(tmp_path, ftype=ftype)
    tokens = random_tokens(N, spec)
    expected = forward(weights, spec, tokens)
    with loaded(path) as model, context(model) as handle:
        assert error(decode(handle, tokens, range(N)), expected.logits) < tolerance


@pytest.mark.parametrize("name", SPECS)
def test_captured_queries_keys_and_values_equal_the_forward_pass(name: str, tmp_path: Path) -> None:
    path, spec, weights = make(tmp_path, spec=SPECS[name])
    tokens = random_tokens(N, spec)
    expected = forward(weights, spec, tokens)
    captured, callback = recorder()
    with loaded(path) as model, context(model, callback) as handle:
        decode(handle, tokens, range(N))
    for kind, truth in (("Q", expected.queries), ("K", expected.keys), ("V", expected.values)):
        for layer in range(spec.layers):
            rows = captured[f"{kind}cur-{layer}"].reshape(truth[layer].shape)
            assert error(rows, truth[layer]) < TOLERANCE


def recorder() -> tuple[dict[str, NDArray[np.float32]], Any]:
    """A dict and the eval callback that fills it with the nodes Qcur, Kcur and Vcur by name.

    Several nodes of a layer bear one name, and the last, which stays, is the one after RoPE.
    """
    from llama_cpp._ggml import libggml as ggml

    ggml.ggml_get_name.restype = ctypes.c_char_p
    ggml.ggml_nbytes.restype = ctypes.c_size_t
    captured: dict[str, NDArray[np.float32]] = {}
    wanted = re.compile(r"[QKV]cur-\d+")

    def on_node(tensor: int, ask: bool, _: object) -> bool:
        node = ctypes.c_void_p(tensor)
        name = ggml.ggml_get_name(node).decode()
        if ask:
            return wanted.fullmatch(name) is not None
        size = ggml.ggml_nbytes(node)
        data = np.empty(size // 4, np.float32)
        ggml.ggml_backend_tensor_get(
            node, data.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(0), ctypes.c_size_t(size)
        )
        captured[name] = data
        return True  # False would end the computation here

    return captured, llama_cpp.ggml_backend_sched_eval_callback(on_node)


@pytest.mark.parametrize("name", ["grouped", "qwen2", "rope-freqs"])
def test_logits_after_eviction_equal_the_forward_pass(name: str, tmp_path: Path) -> None:
    path, spec, weights = make(tmp_path, spec=SPECS[name])
    tokens = random_tokens(N, spec)
    evicted = dict.fromkeys((3, 4, 5, 9, 13, 14), 16) | dict.fromkeys((6, 20, 21), 28)
    expected = forward(weights, spec, tokens, visible=visibility(N, evicted)).logits
    with loaded(path) as model, context(model) as handle:
        parts = [decode(handle, tokens[:16], range(16))]
        for run in ((3, 6), (9, 10), (13, 15)):
            remove(handle, *run)
        parts.append(decode(handle, tokens[16:28], range(16, 28)))
        for run in ((6, 7), (20, 22)):
            remove(handle, *run)
        parts.append(decode(handle, tokens[28:], range(28, N)))
    assert error(np.concatenate(parts), expected) < TOLERANCE
    # And eviction is felt, or the comparison would show nothing.
    assert error(forward(weights, spec, tokens).logits[16:], expected[16:]) > 0.1


def test_positions_are_followed(tmp_path: Path) -> None:
    path, spec, weights = make(tmp_path)
    tokens = random_tokens(N, spec)
    positions = range(100, 100 + N)
    expected = forward(weights, spec, tokens, positions=positions)
    captured, callback = recorder()
    with loaded(path) as model, context(model, callback) as handle:
        logits = decode(handle, tokens, positions)
    assert error(logits, expected.logits) < TOLERANCE
    # Logits depend on distances alone, so only the keys tell where the tokens stand.
    at_zero = forward(weights, spec, tokens)
    for layer in range(spec.layers):
        keys = captured[f"Kcur-{layer}"].reshape(expected.keys[layer].shape)
        assert error(keys, expected.keys[layer]) < TOLERANCE
        assert error(at_zero.keys[layer], expected.keys[layer]) > 0.1


def test_attention_and_logits_are_far_from_uniform(tmp_path: Path) -> None:
    for spec in SPECS.values():
        tokens = random_tokens(200, spec)
        result = forward(write(tmp_path / "tiny.gguf", spec), spec, tokens)
        log_attention = np.log(result.attention[:, :, -1, :])
        assert 1 < log_attention.std(axis=-1).mean() < 2.5
        assert result.logits.std() > 1
        assert result.attention.sum(axis=-1) == pytest.approx(1)


def test_the_same_spec_gives_the_same_file(tmp_path: Path) -> None:
    first, again, other = (
        make(tmp_path, name, seed=seed).path.read_bytes()
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == again
    assert first != other


def test_no_answer_ends_by_itself(tmp_path: Path) -> None:
    _, spec, weights = make(tmp_path)
    logits = forward(weights, spec, random_tokens(N, spec)).logits
    assert (logits.argmax(axis=-1) >= FIRST_BYTE).all()


# ---- the tokenizer -----------------------------------------------------------------------------


def tokenize(vocab: Any, text: str, add_special: bool = False) -> list[int]:
    raw = text.encode()
    tokens = (llama_cpp.llama_token * (len(raw) + 8))()
    n = llama_cpp.llama_tokenize(vocab, raw, len(raw), tokens, len(tokens), add_special, True)
    assert n >= 0
    return list(tokens[:n])


def detokenize(vocab: Any, tokens: Sequence[int]) -> str:
    text = b""
    for token in tokens:
        piece = ctypes.create_string_buffer(32)
        size = llama_cpp.llama_token_to_piece(vocab, token, piece, len(piece), 0, True)
        text += piece.raw[:size]
    return text.decode()


def test_ascii_gives_one_token_a_character_and_comes_back(tmp_path: Path) -> None:
    path = make(tmp_path).path
    printable = "".join(map(chr, range(0x20, 0x7F)))
    texts = [printable, " two  spaces ", "<unk", "The quick brown fox."]
    with loaded(path) as model:
        vocab = llama_cpp.llama_model_get_vocab(model)
        for text in texts:
            assert tokenize(vocab, text) == [token_of(char) for char in text]
            assert detokenize(vocab, tokenize(vocab, text)) == text
        assert tokenize(vocab, "hi", add_special=True) == [BOS, token_of("h"), token_of("i")]
        assert llama_cpp.llama_vocab_is_eog(vocab, EOS)


@pytest.mark.parametrize(
    "text", ["a\nb\tc\r\n", "naïve café", "日本語 🎉 e\u0301", "\x00\x7f\ufeff"]
)
def test_any_text_comes_back(text: str, tmp_path: Path) -> None:
    path = make(tmp_path, vocab=512).path
    with loaded(path) as model:
        vocab = llama_cpp.llama_model_get_vocab(model)
        assert detokenize(vocab, tokenize(vocab, text)) == text


def test_the_chat_template_is_written(tmp_path: Path) -> None:
    template = "{{ messages[0]['content'] }}"
    with loaded(make(tmp_path, chat_template=template).path) as model:
        assert llama_cpp.llama_model_chat_template(model, None).decode() == template
    with loaded(make(tmp_path).path) as model:
        assert not llama_cpp.llama_model_chat_template(model, None)


# ---- what must be refused ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["truncated", "garbage"])
def test_broken_files_do_not_load(kind: Variant, tmp_path: Path) -> None:
    write_variant(tmp_path / "model.gguf", kind)
    with loaded(tmp_path / "model.gguf") as model:
        assert not model


def test_unusable_models_load_and_are_what_they_say(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_variant(path, "mamba")
    with loaded(path) as model, context(model):
        assert llama_cpp.llama_model_is_recurrent(model)
    write_variant(path, "gemma2")
    with loaded(path) as model, context(model) as handle:
        assert llama_cpp.llama_model_n_swa(model) == 64
        assert np.isfinite(decode(handle, range(3, 20), range(17))).all()
    write_variant(path, "bert")
    with loaded(path) as model, context(model) as handle:
        assert not llama_cpp.llama_get_memory(handle)


def test_unknown_kinds_and_impossible_specs_are_errors(tmp_path: Path) -> None:
    assert set(get_args(Variant)) == {"mamba", "gemma2", "bert", "truncated", "garbage"}
    with pytest.raises(ValueError, match="unknown kind"):
        write_variant(tmp_path / "model.gguf", "gpt5")  # type: ignore[arg-type]
    for changes in ({"kv_heads": 3}, {"vocab": 100}, {"arch": "qwen2", "rope_freqs": True}):
        with pytest.raises(ValueError):
            TinySpec(**changes)
    with pytest.raises(ValueError, match="must see itself"):
        visibility(4, {2: 2})
