"""Tiny random models in GGUF, and a NumPy forward pass that says what llama.cpp must compute.

Models are written in GGUF's own layout and the forward pass follows llama.cpp's conventions, so its
queries, keys, values, attention and logits are the ground truth for what the code under test reads.
Nothing here needs llama.cpp.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import gguf
import numpy as np
from numpy.typing import ArrayLike, NDArray

Weights: TypeAlias = dict[str, NDArray[np.float32]]
"""GGUF tensor name -> weights, a matrix as (outputs, inputs)."""

Variant = Literal["mamba", "gemma2", "bert", "truncated", "garbage"]
FileType = Literal["F32", "F16", "Q8_0"]

UNK, BOS, EOS = 0, 1, 2
FIRST_BYTE = 3
FIRST_ASCII = FIRST_BYTE + 256
FIRST_LETTER = FIRST_ASCII + 95
SPACE = "\u2581"  # SentencePiece writes a space so

# Llama 3's rope scaling, with an original context so short that a few dozen tokens feel all of it.
ROPE_FACTOR, ROPE_LOW, ROPE_HIGH, ROPE_ORIGINAL_CONTEXT = 8.0, 1.0, 4.0, 64


@dataclass(frozen=True)
class TinySpec:
    """What a tiny model looks like.

    The default head_dim of 32 is the least at which llama.cpp takes a quantised KV cache. It
    rotates quantised keys (Hadamard) from 64 on, and CUDA's flash attention wants 64 too.
    """

    arch: Literal["llama", "qwen2"] = "llama"
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    n_ff: int = 192
    vocab: int = 384
    ctx_train: int = 512
    rope_base: float = 10000.0
    rms_eps: float = 1e-5
    seed: int = 0
    qkv_bias: bool | None = None
    """None: as the architecture has it, that is for qwen2 only."""
    rope_freqs: bool = False
    ftype: FileType = "F32"
    chat_template: str | None = None

    def __post_init__(self) -> None:
        if self.arch not in ("llama", "qwen2"):
            raise ValueError(f"unknown architecture {self.arch!r}")
        if self.heads % self.kv_heads or self.head_dim % 2:
            raise ValueError("heads must be a multiple of kv_heads, and head_dim even")
        # Further letters would reach SPACE, and llama.cpp aborts the process on a token met twice.
        if not FIRST_LETTER <= self.vocab <= 4096:
            raise ValueError(f"the vocabulary must have from {FIRST_LETTER} to 4096 tokens")
        if self.rope_freqs and self.arch != "llama":
            raise ValueError("llama.cpp reads rope_freqs.weight for the llama architecture only")
        if self.ftype == "Q8_0" and (self.n_embd % 32 or self.n_ff % 32):
            raise ValueError("Q8_0 needs rows of a multiple of 32")

    @property
    def n_embd(self) -> int:
        """The width of the residual stream. qwen2 allows no other in llama.cpp."""
        return self.heads * self.head_dim

    @property
    def has_bias(self) -> bool:
        """Whether queries, keys and values have a bias."""
        return self.arch == "qwen2" if self.qkv_bias is None else self.qkv_bias


class Tiny(NamedTuple):
    """A model on disk with what it was made from."""

    path: Path
    spec: TinySpec
    weights: Weights


class Forward(NamedTuple):
    """What a forward pass computed, in float64; queries and keys are after RoPE."""

    logits: NDArray[np.float64]
    """(n, vocab)"""
    queries: NDArray[np.float64]
    """(layers, n, heads, head_dim)"""
    keys: NDArray[np.float64]
    """(layers, n, kv_heads, head_dim)"""
    values: NDArray[np.float64]
    """(layers, n, kv_heads, head_dim)"""
    attention: NDArray[np.float64]
    """(layers, heads, n, n), the rows' softmax; 0 where a token is not visible"""


# ---- the vocabulary ----------------------------------------------------------------------------


def vocabulary(size: int) -> tuple[list[str], list[int]]:
    """Tokens and their types: control, 256 bytes, printable ASCII, then letters from U+00C0 on.

    No token has two characters, so a printable ASCII text has as many tokens as characters.
    """
    tokens = ["<unk>", "<s>", "</s>"]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    tokens += [SPACE] + [chr(code) for code in range(0x21, 0x7F)]
    letters = size - len(tokens)
    tokens += [chr(0xC0 + i) for i in range(letters)]
    types = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    types += [gguf.TokenType.BYTE] * 256
    types += [gguf.TokenType.NORMAL] * (95 + letters)
    return tokens, [int(kind) for kind in types]


def token_of(char: str) -> int:
    """The token of one printable ASCII character."""
    if not " " <= char <= "~":
        raise ValueError(f"{char!r} is no printable ASCII character")
    return FIRST_ASCII + ord(char) - 0x20


def random_tokens(n: int, spec: TinySpec, seed: int = 0) -> NDArray[np.int64]:
    """BOS and n - 1 random tokens that are not control tokens."""
    rng = np.random.default_rng([seed, 1])
    tokens = rng.integers(FIRST_BYTE, spec.vocab, n)
    tokens[0] = BOS
    return tokens


def _add_vocabulary(writer: gguf.GGUFWriter, size: int, chat_template: str | None) -> None:
    tokens, types = vocabulary(size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * size)
    writer.add_token_types(types)
    writer.add_unk_token_id(UNK)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    # Else the tokenizer puts a space before every text, and lengths and round trips are off by one.
    writer.add_add_space_prefix(False)
    if chat_template is not None:
        writer.add_chat_template(chat_template)


# ---- weights -----------------------------------------------------------------------------------


def rope_factors(spec: TinySpec) -> NDArray[np.float32]:
    """What each pair's rotation is divided by: Llama 3's scaling, as llama.cpp converts it."""
    frequencies = spec.rope_base ** -(np.arange(0, spec.head_dim, 2) / spec.head_dim)
    turns = ROPE_ORIGINAL_CONTEXT * frequencies / (2 * math.pi)
    smooth = np.clip((turns - ROPE_LOW) / (ROPE_HIGH - ROPE_LOW), 0, 1)
    return (1 / ((1 - smooth) / ROPE_FACTOR + smooth)).astype(np.float32)


def _random_weights(spec: TinySpec) -> Weights:
    rng = np.random.default_rng([spec.seed, 0])

    def matrix(outputs: int, inputs: int, scale: float = 1.0) -> NDArray[np.float32]:
        """Weights that turn inputs of unit variance into outputs of deviation `scale`."""
        deviation = scale / math.sqrt(inputs)
        return rng.normal(0, deviation, (outputs, inputs)).astype(np.float32)

    def vector(size: int, mean: float, deviation: float) -> NDArray[np.float32]:
        return rng.normal(mean, deviation, size).astype(np.float32)

    width, kv_width = spec.n_embd, spec.kv_heads * spec.head_dim
    weights = {"token_embd.weight": matrix(spec.vocab, width, math.sqrt(width))}
    for layer in range(spec.layers):
        block = f"blk.{layer}."
        weights[block + "attn_norm.weight"] = vector(width, 1, 0.1)
        # q·k/√d of random q and k has the deviation 1.25², about 1.5: attention far from uniform.
        weights[block + "attn_q.weight"] = matrix(width, width, 1.25)
        weights[block + "attn_k.weight"] = matrix(kv_width, width, 1.25)
        # An average over tokens shrinks the values: larger ones keep attention felt downstream.
        weights[block + "attn_v.weight"] = matrix(kv_width, width, 1.5)
        weights[block + "attn_output.weight"] = matrix(width, width)
        if spec.has_bias:
            weights[block + "attn_q.bias"] = vector(width, 0, 0.5)
            weights[block + "attn_k.bias"] = vector(kv_width, 0, 0.5)
            weights[block + "attn_v.bias"] = vector(kv_width, 0, 0.5)
        weights[block + "ffn_norm.weight"] = vector(width, 1, 0.1)
        weights[block + "ffn_gate.weight"] = matrix(spec.n_ff, width)
        weights[block + "ffn_up.weight"] = matrix(spec.n_ff, width)
        weights[block + "ffn_down.weight"] = matrix(width, spec.n_ff)
    weights["output_norm.weight"] = vector(width, 1, 0.1)
    output = matrix(spec.vocab, width, 2.0)
    # Control tokens get the logit 0, never the highest: greedy answers are as long as was asked.
    output[[UNK, BOS, EOS]] = 0
    weights["output.weight"] = output
    if spec.rope_freqs:
        weights["rope_freqs.weight"] = rope_factors(spec)
    return weights


# ---- writing -----------------------------------------------------------------------------------


def write(path: str | os.PathLike[str], spec: TinySpec) -> Weights:
    """Write a model and return its weights as llama.cpp sees them, that is dequantised."""
    writer = gguf.GGUFWriter(path, spec.arch)
    writer.add_name(f"tiny-{spec.arch}-{spec.seed}")
    _add_shape(writer, spec)
    writer.add_layer_norm_rms_eps(spec.rms_eps)
    writer.add_file_type(int(gguf.LlamaFileType[_FILE_TYPES[spec.ftype]]))
    _add_vocabulary(writer, spec.vocab, spec.chat_template)
    weights = _random_weights(spec)
    for name, values in weights.items():
        # As llama.cpp's own converter does: matrices are quantised, norms and biases are not.
        kind = gguf.GGMLQuantizationType[spec.ftype if values.ndim == 2 else "F32"]
        packed = gguf.quants.quantize(values, kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
        weights[name] = gguf.quants.dequantize(packed, kind)
    _finish(writer)
    return weights


_FILE_TYPES: dict[FileType, str] = {
    "F32": "ALL_F32",
    "F16": "MOSTLY_F16",
    "Q8_0": "MOSTLY_Q8_0",
}


def make(
    directory: str | os.PathLike[str],
    name: str = "tiny.gguf",
    *,
    spec: TinySpec | None = None,
    **changes: Any,
) -> Tiny:
    """Write a model of `spec` (default: TinySpec()) with `changes` to its fields."""
    spec = replace(spec or TinySpec(), **changes)
    path = Path(directory) / name
    return Tiny(path, spec, write(path, spec))


def _add_shape(writer: gguf.GGUFWriter, spec: TinySpec) -> None:
    writer.add_context_length(spec.ctx_train)
    writer.add_embedding_length(spec.n_embd)
    writer.add_block_count(spec.layers)
    writer.add_feed_forward_length(spec.n_ff)
    writer.add_head_count(spec.heads)
    writer.add_head_count_kv(spec.kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_rope_freq_base(spec.rope_base)
    writer.add_vocab_size(spec.vocab)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---- models that can't be used -----------------------------------------------------------------


def write_variant(path: str | os.PathLike[str], kind: Variant) -> None:
    """Write a model that the project must refuse.

    llama.cpp loads "mamba" (recurrent: no tokens to evict), "gemma2" (a sliding window of 64 in
    every second layer) and "bert" (embeddings only, not causal, no KV cache); it refuses
    "truncated" (cut in the tensor data) and "garbage" (no GGUF).
    """
    path = Path(path)
    if kind == "garbage":
        path.write_bytes(np.random.default_rng(0).bytes(4096))
    elif kind == "truncated":
        write(path, TinySpec())
        os.truncate(path, path.stat().st_size * 2 // 3)
    elif kind == "mamba":
        _write_mamba(path)
    elif kind == "gemma2":
        _write_gemma2(path)
    elif kind == "bert":
        _write_bert(path)
    else:
        raise ValueError(f"unknown kind {kind!r}: one of {', '.join(get_args(Variant))}")


def _add_random(writer: gguf.GGUFWriter, shapes: Mapping[str, Sequence[int]]) -> None:
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        scale = 1 / math.sqrt(shape[-1])
        writer.add_tensor(name, rng.normal(0, scale, shape).astype(np.float32))


def _write_mamba(path: Path, layers: int = 2, width: int = 32, vocab: int = 384) -> None:
    inner, state, rank, kernel = 2 * width, 8, 2, 4  # llama.cpp takes no inner width but twice
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_context_length(512)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_ssm_conv_kernel(kernel)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(state)
    writer.add_ssm_time_step_rank(rank)
    writer.add_layer_norm_rms_eps(1e-5)
    _add_vocabulary(writer, vocab, None)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (vocab, width),
        "output_norm.weight": (width,),
    }
    for layer in range(layers):
        block = f"blk.{layer}."
        shapes |= {
            block + "attn_norm.weight": (width,),
            block + "ssm_in.weight": (2 * inner, width),
            block + "ssm_conv1d.weight": (inner, kernel),
            block + "ssm_conv1d.bias": (inner,),
            block + "ssm_x.weight": (rank + 2 * state, inner),
            block + "ssm_dt.weight": (inner, rank),
            block + "ssm_dt.bias": (inner,),
            block + "ssm_a": (inner, state),
            block + "ssm_d": (inner,),
            block + "ssm_out.weight": (width, inner),
        }
    _add_random(writer, shapes)
    _finish(writer)


def _write_gemma2(path: Path) -> None:
    spec = TinySpec(layers=2)
    width, kv_width = spec.n_embd, spec.kv_heads * spec.head_dim
    writer = gguf.GGUFWriter(path, "gemma2")
    _add_shape(writer, spec)
    writer.add_layer_norm_rms_eps(spec.rms_eps)
    writer.add_sliding_window(64)
    writer.add_attn_logit_softcapping(50.0)
    writer.add_final_logit_softcapping(30.0)
    _add_vocabulary(writer, spec.vocab, None)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (spec.vocab, width),
        "output_norm.weight": (width,),
    }
    for layer in range(spec.layers):
        block = f"blk.{layer}."
        shapes |= {
            block + "attn_norm.weight": (width,),
            block + "attn_q.weight": (width, width),
            block + "attn_k.weight": (kv_width, width),
            block + "attn_v.weight": (kv_width, width),
            block + "attn_output.weight": (width, width),
            block + "post_attention_norm.weight": (width,),
            block + "ffn_norm.weight": (width,),
            block + "ffn_gate.weight": (spec.n_ff, width),
            block + "ffn_up.weight": (spec.n_ff, width),
            block + "ffn_down.weight": (width, spec.n_ff),
            block + "post_ffw_norm.weight": (width,),
        }
    _add_random(writer, shapes)
    _finish(writer)


def _write_bert(path: Path) -> None:
    spec = TinySpec(layers=2, kv_heads=4)
    width = spec.n_embd
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_context_length(spec.ctx_train)
    writer.add_embedding_length(width)
    writer.add_block_count(spec.layers)
    writer.add_feed_forward_length(spec.n_ff)
    writer.add_head_count(spec.heads)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    _add_vocabulary(writer, spec.vocab, None)
    writer.add_token_type_count(1)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (spec.vocab, width),
        "token_types.weight": (1, width),
        "position_embd.weight": (spec.ctx_train, width),
        "token_embd_norm.weight": (width,),
        "token_embd_norm.bias": (width,),
    }
    for layer in range(spec.layers):
        block = f"blk.{layer}."
        for name, (outputs, inputs) in {
            "attn_q": (width, width),
            "attn_k": (width, width),
            "attn_v": (width, width),
            "attn_output": (width, width),
            "ffn_up": (spec.n_ff, width),
            "ffn_down": (width, spec.n_ff),
        }.items():
            shapes[f"{block}{name}.weight"] = (outputs, inputs)
            shapes[f"{block}{name}.bias"] = (outputs,)
        for name in ("attn_output_norm", "layer_output_norm"):
            shapes[f"{block}{name}.weight"] = (width,)
            shapes[f"{block}{name}.bias"] = (width,)
    _add_random(writer, shapes)
    _finish(writer)


# ---- the forward pass --------------------------------------------------------------------------


def visibility(n: int, evicted: Mapping[int, int] | None = None) -> NDArray[np.bool_]:
    """The (n, n) matrix of which token (row) may attend to which (column).

    Causal, less the evicted: `evicted` maps a token's index to the index of the first token that
    no longer sees it.
    """
    visible = np.tri(n, dtype=np.bool_)
    for token, since in (evicted or {}).items():
        if not 0 <= token < since:
            raise ValueError(f"token {token} can't be evicted at {since}: it must see itself")
        visible[since:, token] = False
    return visible


def forward(
    weights: Mapping[str, NDArray[np.float32]],
    spec: TinySpec,
    tokens: ArrayLike,
    positions: ArrayLike | None = None,
    visible: NDArray[np.bool_] | None = None,
) -> Forward:
    """What llama.cpp computes for a sequence, in float64.

    `positions` default to 0..n-1. `visible[i, j]` says whether token i may attend to token j; the
    default is causal, and with eviction it is what `visibility` returns.
    """
    ids = np.asarray(tokens, dtype=np.int64)
    n = len(ids)
    where = np.arange(n) if positions is None else np.asarray(positions)
    seen = visibility(n) if visible is None else visible
    if where.shape != (n,) or seen.shape != (n, n):
        raise ValueError(f"positions and visible must be of shape ({n},) and ({n}, {n})")
    if not seen.any(axis=1).all():
        raise ValueError("a token that sees nothing, not even itself, has no softmax")

    wide = {name: values.astype(np.float64) for name, values in weights.items()}
    angles = _angles(spec, where, wide.get("rope_freqs.weight"))
    group = spec.heads // spec.kv_heads
    recorded: list[tuple[NDArray[np.float64], ...]] = []

    stream = wide["token_embd.weight"][ids]
    for layer in range(spec.layers):
        block = f"blk.{layer}."
        normed = _rms_norm(stream, wide[block + "attn_norm.weight"], spec.rms_eps)
        q, k, v = (
            _linear(wide, f"{block}attn_{name}", normed).reshape(n, heads, spec.head_dim)
            for name, heads in (("q", spec.heads), ("k", spec.kv_heads), ("v", spec.kv_heads))
        )
        q, k = _rope(spec, q, angles), _rope(spec, k, angles)
        # Query head h reads kv head h // group. From here on heads come first, for the products.
        shared_k, shared_v = (np.repeat(x, group, axis=1).swapaxes(0, 1) for x in (k, v))
        scores = q.swapaxes(0, 1) @ shared_k.swapaxes(1, 2) / math.sqrt(spec.head_dim)
        probabilities = _softmax(np.where(seen, scores, -np.inf))
        mixed = (probabilities @ shared_v).swapaxes(0, 1).reshape(n, -1)
        stream = stream + _linear(wide, block + "attn_output", mixed)

        normed = _rms_norm(stream, wide[block + "ffn_norm.weight"], spec.rms_eps)
        gate, up = (_linear(wide, f"{block}ffn_{name}", normed) for name in ("gate", "up"))
        stream = stream + _linear(wide, block + "ffn_down", gate / (1 + np.exp(-gate)) * up)

        recorded.append((q, k, v, probabilities))

    logits = _rms_norm(stream, wide["output_norm.weight"], spec.rms_eps) @ wide["output.weight"].T
    queries, keys, values, attention = (np.stack(layers) for layers in zip(*recorded, strict=True))
    return Forward(logits, queries, keys, values, attention)


def _linear(
    weights: Mapping[str, NDArray[np.float64]], name: str, x: NDArray[np.float64]
) -> NDArray[np.float64]:
    result: NDArray[np.float64] = x @ weights[name + ".weight"].T
    bias = weights.get(name + ".bias")
    return result if bias is None else result + bias


def _rms_norm(
    x: NDArray[np.float64], weight: NDArray[np.float64], eps: float
) -> NDArray[np.float64]:
    scaled: NDArray[np.float64] = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)
    return scaled * weight


def _softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    exponents = np.exp(scores - scores.max(axis=-1, keepdims=True))
    result: NDArray[np.float64] = exponents / exponents.sum(axis=-1, keepdims=True)
    return result


def _angles(
    spec: TinySpec, positions: NDArray[np.int64], factors: NDArray[np.float64] | None
) -> NDArray[np.float64]:
    """(n, head_dim / 2): by how much each pair of channels is rotated."""
    frequencies = spec.rope_base ** -(np.arange(0, spec.head_dim, 2) / spec.head_dim)
    if factors is not None:
        frequencies = frequencies / factors
    return np.multiply.outer(positions.astype(np.float64), frequencies)


def _rope(
    spec: TinySpec, x: NDArray[np.float64], angles: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Rotate (n, heads, head_dim); llama pairs neighbours (NORM), qwen2 the halves (NEOX)."""
    half = spec.head_dim // 2
    if spec.arch == "llama":
        first, second = slice(0, None, 2), slice(1, None, 2)
    else:
        first, second = slice(0, half), slice(half, None)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    rotated = np.empty_like(x)
    rotated[..., first] = x[..., first] * cos - x[..., second] * sin
    rotated[..., second] = x[..., first] * sin + x[..., second] * cos
    return rotated
