"""What a GGUF file's header says: metadata and the tensors' shapes, and never a weight.

`gguf.GGUFReader` maps the tensors' data too, so it refuses a file that is not complete, and it
makes an array of every token's text (12 s for Llama 3's vocabulary). Here the header of a download
that has only begun will do.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from laserkv_gguf.errors import UserError

_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9
_LONGEST = 4096  # arrays of more numbers (a vocabulary's scores) are counted, not kept
_PLAIN = ("llama", "qwen2", "qwen3")
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True)
class Tensor:
    """A tensor of the file; dimensions in ggml's order, the row's length first."""

    name: str
    dims: tuple[int, ...]
    type_name: str
    size: int


@dataclass(frozen=True)
class Length:
    """Stands for an array that was only counted: a vocabulary."""

    count: int


class Header:
    """A GGUF's header.

    Attributes:
        metadata: by key; long arrays and arrays of strings as `Length`.
        tensors: in the file's order; of a split file those of all its parts.

    Raises:
        UserError: not a GGUF, or one whose header is incomplete, damaged or has no use here.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metadata, self.tensors = _read(self.path)
        for part in self._further_parts():
            self.tensors += _read(part)[1]
        self._check()

    def _check(self) -> None:
        """Refuses what the engine would refuse; llama.cpp ignores a Llama's or Qwen's window."""
        windowed = self._number("attention.sliding_window") and self.architecture not in _PLAIN
        generates = self.metadata.get(f"{self.architecture}.attention.causal", True)
        latent = self._number("attention.kv_lora_rank")
        if not self.layers or not any(self.kv_heads) or windowed or latent or not generates:
            raise UserError(
                f"{self.path.name} is a {self.architecture} model, whose cache does not hold one "
                "key and value a token; use one with plain attention such as Llama 3 or SmolLM2"
            )

    def _further_parts(self) -> list[Path]:
        count = int(self.metadata.get("split.count", 1) or 1)
        found = _SPLIT.search(self.path.name)
        if count < 2 or not found:
            return []
        stem = self.path.name[: found.start()]
        names = [f"{stem}-{i:05d}-of-{count:05d}.gguf" for i in range(1, count + 1)]
        return [self.path.with_name(name) for name in names if name != self.path.name]

    def _numbers(self, key: str) -> list[float]:
        """A number or an array of them, `{architecture}.` in front of the key."""
        value = self.metadata.get(f"{self.architecture}.{key}")
        if isinstance(value, list):
            return value
        return [value] if isinstance(value, (int, float)) else []

    def _number(self, key: str, default: int = 0) -> int:
        return int(max(self._numbers(key), default=default))

    def _by_layer(self, key: str, default: Sequence[int]) -> tuple[int, ...]:
        values = [int(value) for value in self._numbers(key)]
        if len(values) == 1:
            values *= self.layers
        return tuple(values if len(values) == self.layers else default)

    @cached_property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", "unknown"))

    @cached_property
    def name(self) -> str:
        return str(self.metadata.get("general.name", self.path.stem))

    @cached_property
    def layers(self) -> int:
        return self._number("block_count")

    @cached_property
    def width(self) -> int:
        """Of the residual stream (n_embd)."""
        return self._number("embedding_length")

    @cached_property
    def heads(self) -> int:
        return self._number("attention.head_count")

    @cached_property
    def kv_heads(self) -> tuple[int, ...]:
        """Of every layer."""
        return self._by_layer("attention.head_count_kv", [self.heads] * self.layers)

    @cached_property
    def key_dim(self) -> int:
        return self._number("attention.key_length", self.width // max(self.heads, 1))

    @cached_property
    def value_dim(self) -> int:
        return self._number("attention.value_length", self.width // max(self.heads, 1))

    @cached_property
    def feed_forward(self) -> int:
        """Width of the feed-forward network's middle, of all experts that a token uses."""
        experts = self._number("expert_used_count")
        if experts:
            width = self._number("expert_feed_forward_length", self._number("feed_forward_length"))
            return experts * width
        return self._number("feed_forward_length")

    @cached_property
    def context(self) -> int:
        """Tokens the model was trained for."""
        return self._number("context_length")

    @cached_property
    def vocab(self) -> int:
        for tensor in self.tensors:
            if tensor.name == "token_embd.weight":
                return tensor.dims[-1]
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        return tokens.count if isinstance(tokens, Length) else self._number("vocab_size")

    # bytes

    @cached_property
    def weights(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.size for tensor in self.tensors)

    @cached_property
    def layer_weights(self) -> tuple[int, ...]:
        """Bytes of every layer's tensors."""
        sizes = [0] * self.layers
        for tensor in self.tensors:
            found = re.match(r"blk\.(\d+)\.", tensor.name)
            if found and int(found[1]) < self.layers:
                sizes[int(found[1])] += tensor.size
        return tuple(sizes)

    @cached_property
    def output_weights(self) -> int:
        """Bytes of the output layer; where it is tied to the embedding, of the embedding."""
        sizes = {tensor.name: tensor.size for tensor in self.tensors}
        tied = sizes.get("token_embd.weight", 0)
        return sizes.get("output.weight", tied) + sizes.get("output_norm.weight", 0)

    @cached_property
    def largest_matrix(self) -> int:
        return max((tensor.size for tensor in self.tensors), default=0)

    def cell_bytes(self, type_k: str, type_v: str) -> tuple[int, ...]:
        """Bytes of one cell of the KV cache, in every layer."""
        return tuple(
            row_bytes(type_k, heads * self.key_dim) + row_bytes(type_v, heads * self.value_dim)
            for heads in self.kv_heads
        )


def row_bytes(type_name: str, values: int) -> int:
    """Bytes of `values` numbers of a ggml type such as q8_0, whole blocks of them."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[type_name.upper()]]
    return -(-values // block) * size


def _read(path: Path) -> tuple[dict[str, Any], list[Tensor]]:
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise UserError(f"{path.name} is not a GGUF file; download a GGUF")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Cursor(data, 4).header()
    except FileNotFoundError:
        raise UserError(f"no model at {path}; give the path of a GGUF file") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; give the GGUF file in it") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (struct.error, IndexError, KeyError, UnicodeDecodeError) as error:
        raise UserError(
            f"the header of {path.name} is incomplete or damaged; download more of it, or it again"
        ) from error


class _Cursor:
    """Reads values one after the other."""

    def __init__(self, data: mmap.mmap, at: int) -> None:
        self.data, self.at = data, at

    def header(self) -> tuple[dict[str, Any], list[Tensor]]:
        version, tensors, keys = self.take("<I"), self.take("<Q"), self.take("<Q")
        if version not in (2, 3):  # a big-endian file's version is a huge number
            raise KeyError(version)
        metadata = {}
        for _ in range(keys):
            key = self.string()
            metadata[key] = self.value(self.take("<I"))
        return metadata, [self.tensor() for _ in range(tensors)]

    def take(self, form: str) -> Any:
        value = struct.unpack_from(form, self.data, self.at)[0]
        self.at += struct.calcsize(form)
        return value

    def string(self) -> str:
        return self.skip(self.take("<Q")).decode("utf-8")

    def skip(self, size: int) -> bytes:
        """The next bytes."""
        start = self.at
        self._move(size)
        return self.data[start : self.at]

    def _move(self, size: int) -> None:
        self.at += size
        if self.at > len(self.data):
            raise IndexError(self.at)

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.take(_SCALARS[kind])
        kind, count = self.take("<I"), self.take("<Q")
        if kind == _STRING:
            self._move_over_strings(count)
        elif kind == _ARRAY:
            for _ in range(count):
                self.value(_ARRAY)
        elif count <= _LONGEST:
            return [self.take(_SCALARS[kind]) for _ in range(count)]
        else:
            self._move(count * struct.calcsize(_SCALARS[kind]))
        return Length(count)

    def _move_over_strings(self, count: int) -> None:
        length, data, at = struct.Struct("<Q").unpack_from, self.data, self.at
        for _ in range(count):
            at += 8 + length(data, at)[0]
        self.at = at
        self._move(0)

    def tensor(self) -> Tensor:
        name = self.string()
        dims = tuple(self.take("<Q") for _ in range(self.take("<I")))
        number = self.take("<I")
        self.take("<Q")  # where its data begin
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise UserError(
                f"tensor {name} has a type ({number}) that this gguf does not know; upgrade gguf"
            ) from None
        rows = math.prod(dims[1:])
        return Tensor(name, dims, kind.name, rows * row_bytes(kind.name, dims[0] if dims else 1))
