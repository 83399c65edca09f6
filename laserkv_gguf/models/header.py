"""What a GGUF file's header says: metadata and the tensors' shapes, and never a weight.

`gguf.GGUFReader` maps the tensors' data too, so it refuses a file that is not complete, and it
makes an array of every token's text (12 s for Llama 3's vocabulary). Here the header of a download
that has only begun will do.

A header is data from elsewhere: what it says is held against the file's own size and against what
any model has, before anything is counted up to it, and else is refused in one line.
"""

from __future__ import annotations

import math
import mmap
import re
import stat
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from laserkv_gguf.errors import UserError
from laserkv_gguf.shown import short

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
# No model comes near these. They keep a header from asking for more work than its size explains.
_KEYS = _TENSORS = 1 << 17
_STRINGS = 1 << 24  # in one array: vocabularies and their merges have less than a million
_NAME, _TEXT, _TEXTS = 1 << 16, 1 << 26, 1 << 28  # bytes of a key, of a text, of all that is kept
_HEADER = 1 << 30  # bytes in front of the tensors' data
_DIMS, _ELEMENTS = 4, 1 << 62
_MOST = {
    "block_count": 512,  # llama.cpp's LLAMA_MAX_LAYERS
    "context_length": 1 << 32,
    "embedding_length": 1 << 20,
    "feed_forward_length": 1 << 24,
    "expert_feed_forward_length": 1 << 24,
    "expert_used_count": 1 << 10,  # LLAMA_MAX_EXPERTS
    "vocab_size": 1 << 24,
}
_MOST_ELSE = 1 << 16  # heads and their dimensions
_LONGEST = 4096  # arrays of more numbers (a vocabulary's scores) are counted, not kept
PLAIN = ("llama", "qwen2", "qwen3")
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True)
class Tensor:
    """A tensor as the file describes it.

    Attributes:
        dims: in ggml's order, the row's length first.
        size: in bytes.
        offset: from where the tensors' data begin, in bytes.
    """

    name: str
    dims: tuple[int, ...]
    kind: GGMLQuantizationType
    size: int
    offset: int

    @property
    def type_name(self) -> str:
        return self.kind.name


@dataclass(frozen=True)
class Length:
    """Stands for an array that was only counted: a vocabulary."""

    count: int


class Header:
    """A GGUF's header.

    Attributes:
        metadata: by key; long arrays and arrays of strings as `Length`.
        tensors: in the file's order; of a split file those of all its parts.

    Counts are whole numbers within what any model has; another one is refused when it is asked for,
    and those of the cache's shape when the header is read.

    Raises:
        UserError: not a GGUF, or one whose header is incomplete, damaged or has no use here.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metadata, self.tensors = _read(self.path)
        for part in parts(self.path, self.metadata):
            self.tensors += _read(part)[1]
        self._check()

    def _check(self) -> None:
        """Refuses what the engine would refuse; llama.cpp ignores a Llama's or Qwen's window."""
        windowed = self._number("attention.sliding_window") and self.architecture not in PLAIN
        generates = self.metadata.get(f"{self.architecture}.attention.causal", True)
        latent = self._number("attention.kv_lora_rank")
        if not self.layers or not any(self.kv_heads) or windowed or latent or not generates:
            raise UserError(
                f"{self.path.name} is a {self.architecture} model, whose cache does not hold one "
                "key and value a token; use one with plain attention such as Llama 3 or SmolLM2"
            )

    def _numbers(self, key: str) -> list[int]:
        """A count or an array of them, `{architecture}.` in front of the key."""
        value = self.metadata.get(f"{self.architecture}.{key}")
        values = value if isinstance(value, list) else [value]
        most = _MOST.get(key, _MOST_ELSE)
        for one in values:
            if one is not None and not (isinstance(one, int) and 0 <= one <= most):
                raise UserError(
                    f"{self.path.name} is damaged: it says {self.architecture}.{key} is "
                    f"{short(one)}; download it again"
                )
        return [int(one) for one in values if one is not None]

    def _number(self, key: str, default: int = 0) -> int:
        return max(self._numbers(key), default=default)

    def _by_layer(self, key: str, default: Sequence[int]) -> tuple[int, ...]:
        values = self._numbers(key)
        if len(values) == 1:
            values *= self.layers
        return tuple(values if len(values) == self.layers else default)

    @cached_property
    def architecture(self) -> str:
        return short(self.metadata.get("general.architecture", "unknown"))

    @cached_property
    def name(self) -> str:
        name = self.metadata.get("general.name")
        return name if isinstance(name, str) else self.path.stem

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
    def rope_scale(self) -> float:
        """What frequencies are scaled by; 1 for not at all."""
        for key in ("rope.scaling.factor", "rope.scale_linear"):
            value = self.metadata.get(f"{self.architecture}.{key}")
            if isinstance(value, float | int) and value > 0:
                return 1 / float(value)
        return 1.0

    @cached_property
    def vocab(self) -> int:
        for tensor in self.tensors:
            if tensor.name == "token_embd.weight" and tensor.dims:
                return tensor.dims[-1]
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        return tokens.count if isinstance(tokens, Length) else self._number("vocab_size")

    # bytes

    @cached_property
    def weights(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.size for tensor in self.tensors)

    def place(
        self,
        where: Sequence[int | None],
        overrides: Sequence[tuple[str, str]],
        devices: Mapping[str, int],
    ) -> dict[int | None, int]:
        """Bytes of weights by place, as llama.cpp puts them there.

        Args:
            where: of every layer, the output layer last; None for RAM.
            overrides: (pattern, device) of tensors that go elsewhere; the first that matches.
            devices: places by name; what is none of these is RAM.
        """
        found: dict[int | None, int] = {}
        tied = not any(tensor.name == "output.weight" for tensor in self.tensors)
        for tensor in self.tensors:
            place, copy = self._layer_of(tensor, where), None
            if tensor.name == "token_embd.weight" and tied:
                copy = where[-1]  # the output layer has a copy of its own, if it is elsewhere
            for pattern, device in overrides:
                if re.search(pattern, tensor.name):
                    place = copy = devices.get(device)
                    break
            for one in {place, place if copy is None else copy}:
                found[one] = found.get(one, 0) + tensor.size
        return found

    def _layer_of(self, tensor: Tensor, where: Sequence[int | None]) -> int | None:
        layer = re.match(r"blk\.(\d{1,9})\.", tensor.name)
        if layer:
            return where[int(layer[1])] if int(layer[1]) < self.layers else None
        return where[-1] if tensor.name.startswith("output") else None

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


def parts(path: Path, metadata: Mapping[str, Any]) -> list[Path]:
    """The further files of a split model, whose first one is given; they need not be there.

    Raises:
        UserError: the file's name and what it says of its parts do not agree.
    """
    count = metadata.get("split.count", 1)
    found = _SPLIT.search(path.name)
    if not found or count in (0, 1):
        return []
    if count != int(found[2]):
        raise UserError(f"{path.name} says it has {short(count)} parts; download its parts again")
    stem = path.name[: found.start()]
    names = [f"{stem}-{i:05d}-of-{count:05d}.gguf" for i in range(1, count + 1)]
    return [path.with_name(name) for name in names if name != path.name]


def _read(path: Path) -> tuple[dict[str, Any], list[Tensor]]:
    with opened(path) as data:
        found = data.header()
        return found.metadata, found.tensors


def check_plain(path: Path) -> None:
    """Refuses pipes and devices, which may have neither data nor an end.

    Raises:
        UserError: in one line.
        OSError: nothing is there.
    """
    kind = path.stat().st_mode
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
        raise UserError(f"{path} is no plain file; give the path of a GGUF file")


@contextmanager
def opened(path: Path) -> Iterator[Cursor]:
    """A GGUF's bytes, behind its magic number.

    Raises:
        UserError: missing, unreadable, not a GGUF; or what the block met in it cannot be, as an
            incomplete header.
    """
    try:
        check_plain(path)
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise UserError(f"{path.name} is not a GGUF file; download a GGUF")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                yield Cursor(data, 4)
    except FileNotFoundError:
        raise UserError(f"no model at {path}; give the path of a GGUF file") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; give the GGUF file in it") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except Impossible as error:
        raise UserError(f"{path.name} is damaged: {error}; download it again") from None
    except (struct.error, IndexError, KeyError, OverflowError) as error:
        raise Incomplete(
            f"the header of {path.name} is incomplete or damaged; download more of it, or it again"
        ) from error


class Incomplete(UserError):
    """A header that ends too early, or holds what cannot be."""


class Impossible(Exception):
    """What no model has."""


@dataclass(frozen=True)
class Contents:
    """All of a header.

    Attributes:
        metadata: by key; long arrays and arrays of strings as `Length`.
        kinds: GGUF's numbers of the values' types, of arrays those of their elements plus 256.
        starts: where arrays' elements begin in the file, in bytes.
        tensors: in the file's order.
        end: where the header ends, in bytes.
    """

    metadata: dict[str, Any]
    kinds: dict[str, int]
    starts: dict[str, int]
    tensors: list[Tensor]
    end: int


ARRAY_OF = 256


class Cursor:
    """Reads values one after the other, and nothing that the file is too short for."""

    def __init__(self, data: mmap.mmap, at: int) -> None:
        self.data, self.at = data, at
        self._kept = 0

    def header(self) -> Contents:
        version, tensors, keys = self.take("<I"), self.take("<Q"), self.take("<Q")
        if version not in (2, 3):  # a big-endian file's version is a huge number
            raise KeyError(version)
        if keys > _KEYS or tensors > _TENSORS:
            raise Impossible(f"it says it has {keys} keys and {tensors} tensors")
        metadata: dict[str, Any] = {}
        kinds: dict[str, int] = {}
        starts: dict[str, int] = {}
        for _ in range(keys):
            key = self.string(_NAME)
            if key in metadata:
                raise Impossible(f"it has the key {short(key)} twice")
            kind = self.take("<I")
            if kind == _ARRAY:
                element, count = self.take("<I"), self.take("<Q")
                kinds[key], starts[key] = ARRAY_OF + element, self.at
                metadata[key] = self._array(key, element, count)
            else:
                kinds[key] = kind
                metadata[key] = self.string() if kind == _STRING else self.take(_SCALARS[kind])
        found = [self._tensor() for _ in range(tensors)]
        return Contents(metadata, kinds, starts, found, self.at)

    def take(self, form: str) -> Any:
        value = struct.unpack_from(form, self.data, self.at)[0]
        self.at += struct.calcsize(form)
        return value

    def string(self, most: int = _TEXT) -> str:
        """A text; what is not UTF-8 in it is replaced, as llama.cpp takes any bytes."""
        size, start = self.take("<Q"), self.at
        self._move(size)
        self._kept += size
        if size > most or self._kept > _TEXTS:
            raise Impossible(f"it has a text of {size} bytes")
        return self.data[start : self.at].decode("utf-8", "replace")

    def strings(self, start: int, count: int) -> Iterator[bytes]:
        """The texts of an array that the header was found to hold whole."""
        length, data, at = struct.Struct("<Q").unpack_from, self.data, start
        for _ in range(count):
            size = length(data, at)[0]
            at += 8 + size
            yield data[at - size : at]

    def _move(self, size: int) -> None:
        self.at += size
        if self.at > len(self.data):
            raise IndexError(self.at)
        if self.at > _HEADER:
            raise Impossible("its header is over 1 GiB long")

    def _array(self, key: str, kind: int, count: int) -> Any:
        if kind == _STRING:
            if count > _STRINGS:
                raise Impossible(f"it says {short(key)} has {count} texts")
            self._move_over_strings(count)
        elif kind == _ARRAY:
            raise Impossible(f"{short(key)} is an array of arrays")
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

    def _tensor(self) -> Tensor:
        name = self.string(_NAME)
        count = self.take("<I")
        if count > _DIMS:
            raise Impossible(f"tensor {short(name)} has {count} dimensions")
        dims = tuple(self.take("<Q") for _ in range(count))
        number, offset = self.take("<I"), self.take("<Q")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise UserError(
                f"tensor {short(name)} has a type ({number}) that this gguf does not know; "
                "upgrade gguf"
            ) from None
        if math.prod(dims) > _ELEMENTS:
            raise Impossible(f"tensor {short(name)} has {math.prod(dims)} elements")
        rows = math.prod(dims[1:])
        size = rows * row_bytes(kind.name, dims[0] if dims else 1)
        return Tensor(name, dims, kind, size, offset)
