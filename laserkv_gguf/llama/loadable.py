"""Whether llama.cpp can be given a GGUF at all: what it would end the process over is found before.

llama.cpp refuses most damaged files, and says why. Some numbers of a header it takes at their word
and asserts later, while loading or at the first decode, which aborts the process; these are
checked here, from the header alone. What an architecture other than those in `header.PLAIN`
asserts of its own keys is not known here.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.models.header import (
    ARRAY_OF,
    PLAIN,
    Contents,
    Cursor,
    Impossible,
    Length,
    Tensor,
    opened,
    parts,
)
from laserkv_gguf.shown import short

MOST_LAYERS, MOST_EXPERTS = 512, 1024  # LLAMA_MAX_LAYERS, LLAMA_MAX_EXPERTS
_MOST_WIDTH = 1 << 24
_SCALINGS = ("none", "linear", "yarn", "longrope")
_STRING, _INT32 = 8, 5
_BYTE, _BYTES = 6, 256  # llama.cpp's type of a token that stands for a byte
_ALIGNMENT = 32  # ggml's TENSOR_ALIGNMENT, and GGUF's default
_NOT_WEIGHTS = ("I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K")  # nothing multiplies by these
_ATTENTION = re.compile(r"blk\.(\d{1,4})\.attn_([qkv])\.weight")
_VECTORS = ("norm.weight", ".bias", "rope_freqs.weight")  # ggml wants them in F32


def check(path: Path) -> list[str]:
    """Refuses a GGUF that llama.cpp would abort on.

    Args:
        path: of the file, or of the first of a split model's.

    Returns:
        The names of its tensors.

    Raises:
        UserError: in one line; also for what is missing, incomplete or no GGUF.
    """
    with opened(path) as data:
        contents = data.header()
        shape = _Shape(contents)
        shape.check()
        _check_vocabulary(contents, data)
        _check_tensors(contents, shape)
    names = [tensor.name for tensor in contents.tensors]
    for part in parts(path, contents.metadata):
        with opened(part) as data:
            more = data.header()
            _check_tensors(more, shape)
            names += [tensor.name for tensor in more.tensors]
    return names


class _Shape:
    """The numbers of a header, as llama.cpp reads them."""

    def __init__(self, contents: Contents) -> None:
        self.metadata, self.kinds = contents.metadata, contents.kinds
        self.architecture = str(self.metadata.get("general.architecture", ""))
        self.plain = self.architecture in PLAIN
        self.rows: dict[str, list[int]] = {}  # of the attention's matrices, by layer

    def values(self, key: str) -> list[Any]:
        """Of a key of the architecture: one, those of an array, or none."""
        value = self.metadata.get(f"{self.architecture}.{key}")
        values = value if isinstance(value, list) else [value]
        return [one for one in values if one is not None]

    def numbers(self, key: str, most: int) -> list[int]:
        """Whole numbers of 0 to `most`.

        Raises:
            Impossible: others.
        """
        found = self.values(key)
        for one in found:
            self.must(isinstance(one, int) and 0 <= one <= most, key, one)
        return [int(one) for one in found]

    def number(self, key: str, default: int, most: int, least: int = 0) -> int:
        found = self.numbers(key, most)
        number = max(found, default=default)
        self.must(number >= least, key, number)
        return number

    def must(self, right: bool, key: str, value: Any) -> None:
        """Refuses a value.

        Raises:
            Impossible: it is not right.
        """
        if not right:
            raise Impossible(f"it says {short(self.architecture)}.{key} is {short(value)}")

    def by_layer(self, key: str, layers: int) -> list[int]:
        """One number for every layer, or none; llama.cpp says itself that others are missing."""
        found = self.numbers(key, _MOST_WIDTH)
        return found * layers if len(found) == 1 else found[:layers]

    def check(self) -> None:
        """As `llama_model::load_hparams` and the graphs assert.

        Raises:
            Impossible: llama.cpp would abort.
        """
        layers = self.number("block_count", 1, MOST_LAYERS, least=1)
        self.number("nextn_predict_layers", 0, layers)
        self.number("embedding_length", 1, _MOST_WIDTH, least=1)
        self._check_experts()
        self._check_heads(layers)
        scaling = self.metadata.get(f"{self.architecture}.rope.scaling.type", "linear")
        self.must(scaling in _SCALINGS, "rope.scaling.type", scaling)
        for key in ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"):
            for value in self.values(key):
                small = isinstance(value, float) and math.isfinite(value) and value >= 0
                self.must(small, key, value)

    def _check_experts(self) -> None:
        experts = self.number("expert_count", 0, MOST_EXPERTS)
        used = self.number("expert_used_count", 0, experts)
        groups = self.number("expert_group_count", 0, max(experts - 1, 0))
        if experts:
            self.must(used > 0, "expert_used_count", used)
        if groups > 1:
            self.must(experts % groups == 0, "expert_group_count", groups)
            self.number("expert_group_used_count", 0, groups - 1, least=1)

    def _check_heads(self, layers: int) -> None:
        heads = self.by_layer("attention.head_count", layers)
        kv_heads = self.by_layer("attention.head_count_kv", layers) or heads
        for query, key in zip(heads, kv_heads, strict=False):
            if key:
                self.must(query > 0 and query % key == 0, "attention.head_count_kv", key)
            elif self.plain:
                self.must(False, "attention.head_count_kv", key)
        if self.plain:
            self.must(bool(heads), "attention.head_count", "missing")
        if not heads or not heads[0]:
            return
        width = self.number("embedding_length", 1, _MOST_WIDTH)
        key_dim = self.number("attention.key_length", width // heads[0], _MOST_WIDTH)
        value_dim = self.number("attention.value_length", width // heads[0], _MOST_WIDTH)
        rotated = self.number("rope.dimension_count", key_dim, _MOST_WIDTH)
        if self.values("rope.dimension_count") or self.plain:
            even = rotated % 2 == 0 and rotated <= key_dim
            self.must(even, "rope.dimension_count", rotated)
        if self.plain:
            self.must(key_dim > 0, "attention.key_length", key_dim)
            self.must(value_dim == key_dim, "attention.value_length", value_dim)
            self.must(rotated == key_dim, "rope.dimension_count", rotated)
            self.rows["q"] = [count * key_dim for count in heads]
            self.rows["k"] = self.rows["v"] = [count * key_dim for count in kv_heads]

    def check_rows(self, tensor: Tensor) -> None:
        """Whether a matrix makes as many queries, keys or values as there are heads.

        A Qwen's queries llama.cpp holds against the width alone.

        Raises:
            Impossible: it does not.
        """
        found = _ATTENTION.fullmatch(tensor.name)
        rows = self.rows.get(found[2], []) if found else []
        if found and int(found[1]) < len(rows):
            wanted = rows[int(found[1])]
            if len(tensor.dims) > 1 and tensor.dims[1] != wanted:
                raise Impossible(f"tensor {tensor.name} has {tensor.dims[1]} rows, not {wanted}")


def _check_vocabulary(contents: Contents, data: Cursor) -> None:
    """As `llama_vocab::impl::load` and the tokenizers assert.

    Raises:
        Impossible: llama.cpp would abort, or throw what nobody catches.
    """
    kind = contents.metadata.get("tokenizer.ggml.model")
    if kind in ("none", "no_vocab"):
        raise Impossible("it has no vocabulary to read texts with")
    if kind == "rwkv":
        raise Impossible("its vocabulary is that of a recurrent model")
    key = "tokenizer.ggml.tokens"
    if contents.kinds.get(key) != ARRAY_OF + _STRING:
        return  # llama.cpp says so
    count = _length(contents.metadata[key])
    if not count:
        raise Impossible("its vocabulary is empty")
    texts = set()
    for number, text in enumerate(data.strings(contents.starts[key], count)):
        text = text or b"[EMPTY_%d]" % number
        if text in texts:
            raise Impossible(f"its vocabulary has {short(text.decode('utf-8', 'replace'))} twice")
        texts.add(text)
    if kind == "bert" and _BYTE in _types(contents, data):
        raise Impossible("its vocabulary has bytes, which one of this kind cannot write")
    if kind == "llama":
        # what is no token is written as bytes, and a byte that is none ends the process
        for byte in range(_BYTES):
            if b"<0x%02X>" % byte not in texts and bytes([byte]) not in texts:
                raise Impossible(f"its vocabulary cannot write byte 0x{byte:02X}")


def _types(contents: Contents, data: Cursor) -> NDArray[np.int32]:
    """Of the vocabulary's tokens, int32; none where the file does not say."""
    key = "tokenizer.ggml.token_type"
    if contents.kinds.get(key) != ARRAY_OF + _INT32:
        return np.empty(0, np.int32)
    start, size = contents.starts[key], 4 * _length(contents.metadata[key])
    return np.frombuffer(data.data[start : start + size], "<i4")


def _length(value: Any) -> int:
    return value.count if isinstance(value, Length) else len(value)


def _check_tensors(contents: Contents, shape: _Shape) -> None:
    """As ggml's operations and buffers assert of the weights they are given.

    Raises:
        Impossible: it would abort.
    """
    padded = contents.metadata.get("general.alignment", _ALIGNMENT)
    start = -(-contents.end // padded) * padded if isinstance(padded, int) and padded > 0 else 0
    for tensor in contents.tensors:
        if (start + tensor.offset) % _ALIGNMENT:
            raise Impossible(f"tensor {short(tensor.name)} begins at no multiple of {_ALIGNMENT}")
        if not all(tensor.dims):
            raise Impossible(f"tensor {short(tensor.name)} is empty")
        shape.check_rows(tensor)
        kind = tensor.type_name
        if tensor.name.endswith(_VECTORS):
            right = kind == "F32"
        else:
            right = kind not in _NOT_WEIGHTS or "tid2eid" in tensor.name
        if not right:
            raise Impossible(f"tensor {short(tensor.name)} is of type {kind}")
