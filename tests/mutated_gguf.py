"""GGUF files taken apart, damaged and put together again, and a process that tries them.

A damaged header is tried where it can do no harm: a server forks a child for each file, so that
what kills a process (an assertion in native code) is an answer like any other. Run as a program
this module is that server.
"""

from __future__ import annotations

import json
import os
import select
import signal
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SCALARS = dict(zip((*range(8), 10, 11, 12), "BbHhIifBQqd", strict=True))
STRING, ARRAY, RAW = 8, 9, -1
U32, F32, BOOL = 4, 6, 7
PATIENCE = 120.0
"""Seconds after which a file is said to hang; on a quiet machine each takes some milliseconds."""


# ---- taken apart and put together ---------------------------------------------------------------


@dataclass(frozen=True)
class Value:
    """A value as the file has it: its type's number, and for arrays that of the elements.

    Of the kind RAW it is bytes, the type's number included.
    """

    kind: int
    value: Any
    element: int = 0
    count: int | None = None
    """What the file says of an array's length; None for the truth."""


@dataclass(frozen=True)
class Info:
    """What the file says of a tensor."""

    name: bytes
    dims: tuple[int, ...]
    kind: int
    offset: int


@dataclass
class Gguf:
    """A file's parts. Counts that are None are the true ones."""

    keys: list[tuple[bytes, Value]] = field(default_factory=list)
    tensors: list[Info] = field(default_factory=list)
    data: bytes = b""
    version: int = 3
    keys_said: int | None = None
    tensors_said: int | None = None

    def copy(self) -> Gguf:
        return replace(self, keys=list(self.keys), tensors=list(self.tensors))

    def find(self, key: str) -> int:
        return next(i for i, (name, _) in enumerate(self.keys) if name == key.encode())

    def set(self, key: str, kind: int, value: Any, **more: Any) -> Gguf:
        """A copy with a key of that value, in its place or behind the others."""
        made = self.copy()
        entry = (key.encode(), Value(kind, value, **more))
        for at, (name, _) in enumerate(made.keys):
            if name == key.encode():
                made.keys[at] = entry
                return made
        made.keys.append(entry)
        return made

    def without(self, key: str) -> Gguf:
        made = self.copy()
        del made.keys[made.find(key)]
        return made

    def value(self, key: str) -> Any:
        return self.keys[self.find(key)][1].value


def parse(raw: bytes) -> Gguf:
    """Takes a sound file apart."""
    at = 4

    def take(form: str) -> Any:
        nonlocal at
        size = struct.calcsize("<" + form)
        (found,) = struct.unpack_from("<" + form, raw, at)
        at += size
        return found

    def string() -> bytes:
        nonlocal at
        size = take("Q")
        at += size
        return raw[at - size : at]

    made = Gguf(version=take("I"))
    tensors, keys = take("Q"), take("Q")
    for _ in range(keys):
        name, kind = string(), take("I")
        if kind == ARRAY:
            element, count = take("I"), take("Q")
            read = string if element == STRING else None
            items = [read() if read else take(SCALARS[element]) for _ in range(count)]
            made.keys.append((name, Value(kind, items, element)))
        else:
            value = string() if kind == STRING else take(SCALARS[kind])
            made.keys.append((name, Value(kind, value)))
    for _ in range(tensors):
        name = string()
        dims = tuple(take("Q") for _ in range(take("I")))
        made.tensors.append(Info(name, dims, take("I"), take("Q")))
    made.data = raw[at + -at % 32 :]
    return made


def build(file: Gguf, alignment: int = 32) -> bytes:
    """Puts a file together, whatever it says."""
    out = bytearray(b"GGUF")

    def put(form: str, value: Any) -> None:
        if form in "fd":
            out.extend(struct.pack("<" + form, value))
        else:
            size = struct.calcsize("<" + form)
            out.extend((int(value) % (1 << 8 * size)).to_bytes(size, "little"))

    def string(value: bytes) -> None:
        put("Q", len(value))
        out.extend(value)

    def element(kind: int, value: Any) -> None:
        if kind == STRING:
            string(value)
        elif kind == ARRAY:
            array(value)
        else:
            put(SCALARS.get(kind, "I"), value)

    def array(value: Value) -> None:
        put("I", value.element)
        put("Q", len(value.value) if value.count is None else value.count)
        for item in value.value:
            element(value.element, item)

    put("I", file.version)
    put("Q", len(file.tensors) if file.tensors_said is None else file.tensors_said)
    put("Q", len(file.keys) if file.keys_said is None else file.keys_said)
    for name, value in file.keys:
        string(name)
        if value.kind == RAW:
            out.extend(value.value)
            continue
        put("I", value.kind)
        if value.kind == ARRAY:
            array(value)
        else:
            element(value.kind, value.value)
    for info in file.tensors:
        string(info.name)
        put("I", len(info.dims))
        for dim in info.dims:
            put("Q", dim)
        put("I", info.kind)
        put("Q", info.offset)
    out.extend(b"\0" * (-len(out) % alignment))
    return bytes(out) + file.data


# ---- damage -------------------------------------------------------------------------------------

NUMBERS = [
    *(0, 1, 2, 3, 5, 7, 9, 31, 33, 255, 511, 512, 513, 1024, 2**16, 2**20, 2**24, 10**7, 10**9),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**32, 10**12, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1),
]
FLOATS = [0.0, -0.0, 1.0, -1.0, 1e-45, 1e38, -1e38, float("inf"), float("-inf"), float("nan")]
TEXTS = [
    *(b"", b"llama", b"qwen2", b"qwen3", b"gemma2", b"mamba", b"clip", b"bert", b"t5", b"gpt2"),
    *(b"none", b"no_vocab", b"rwkv", b"test", b"plamo2", b"whitespace", b"hybriddna", b"gemma4"),
    *(b"linear", b"yarn", b"longrope", b"su", b"default", b"llama-bpe", b"qwen2", b"deepseek-llm"),
    *(b"\xff\xfe", b"\0", b"x" * 100_000, b"%s%n", b"deepseek2", b"phi3", b"gemma3", b"starcoder2"),
]
EXTRA: list[tuple[str, int, Sequence[Any]]] = [
    ("expert_count", U32, (1, 2, 8, 1024, 1025, 2**32 - 1)),
    ("expert_used_count", U32, (0, 1, 2, 8, 2**32 - 1)),
    ("expert_group_count", U32, (1, 2, 8)),
    ("nextn_predict_layers", U32, (1, 2, 3, 4, 2**32 - 1)),
    ("rope.scaling.type", STRING, (b"", b"none", b"linear", b"yarn", b"longrope", b"nonsense")),
    ("rope.scaling.factor", F32, FLOATS),
    ("rope.scaling.original_context_length", U32, NUMBERS),
    ("rope.scaling.attn_factor", F32, FLOATS),
    ("attention.sliding_window", U32, (0, 1, 256)),
    ("attention.causal", BOOL, (0, 1)),
    ("attention.scale", F32, FLOATS),
    ("attention.clamp_kqv", F32, FLOATS),
    ("attention.max_alibi_bias", F32, FLOATS),
    ("attention.layer_norm_epsilon", F32, FLOATS),
    ("embedding_length_out", U32, NUMBERS),
    ("pooling_type", U32, (0, 1, 2, 3, 4, 99, 2**32 - 1)),
    ("logit_scale", F32, FLOATS),
    ("residual_scale", F32, FLOATS),
    ("embedding_scale", F32, FLOATS),
    ("vocab_size", U32, NUMBERS),
    ("decoder_start_token_id", U32, NUMBERS),
]
GENERAL: list[tuple[str, int, Sequence[Any]]] = [
    ("general.alignment", U32, (0, 1, 2, 3, 16, 33, 64, 2**20, 2**31)),
    ("split.count", 2, (0, 1, 2, 3, 65535)),
    ("split.no", 2, (0, 1, 65535)),
    ("split.tensors.count", 5, (0, 1, -1, 2**31 - 1)),
    ("general.quantization_version", U32, (0, 1, 2, 99)),
    *(
        (f"tokenizer.ggml.{name}_token_id", U32, NUMBERS)
        for name in ("bos", "eos", "unknown", "eot", "eom", "padding", "mask", "fim_pad")
    ),
    ("tokenizer.ggml.add_space_prefix", BOOL, (0, 1)),
    ("tokenizer.ggml.pre", STRING, TEXTS),
    ("tokenizer.ggml.merges", ARRAY, ([], [b"a b"], [b" "], [b""], [b"ab"])),
    ("tokenizer.ggml.precompiled_charsmap", ARRAY, ([], [1], [255] * 16)),
    ("tokenizer.chat_template", STRING, (*TEXTS, b"{{ messages }}", b"{{ 1 / 0 }}", b"{% if %}")),
]


def damaged(sound: Gguf, dice: Random) -> tuple[bytes, str]:
    """One or two mutations of a file; with what they were."""
    made, said = sound.copy(), []
    alignment = 32
    for _ in range(dice.choice((1, 1, 1, 2))):
        kind = dice.choice(list(_DAMAGES))
        made, what = _DAMAGES[kind](made, dice)
        said.append(f"{kind}: {what}")
    raw = build(made, alignment)
    if dice.random() < 0.05:
        raw = raw[: dice.randrange(4, len(raw))]
        said.append(f"cut to {len(raw)}")
    if dice.random() < 0.05:
        data, at = bytearray(raw), dice.randrange(4, max(5, len(raw) - len(made.data)))
        if at < len(data):
            data[at] ^= 1 << dice.randrange(8)
            said.append(f"bit of byte {at}")
        raw = bytes(data)
    return raw, "; ".join(said)


def _number(kind: int, dice: Random) -> Any:
    if kind in (6, 12):
        return dice.choice(FLOATS)
    return dice.choice(NUMBERS)


def _key(made: Gguf, dice: Random) -> tuple[Gguf, str]:
    """Another value of the same type."""
    at = dice.randrange(len(made.keys))
    name, old = made.keys[at]
    if old.kind == RAW:
        return made, "nothing"
    if old.kind == STRING:
        new = replace(old, value=dice.choice(TEXTS))
    elif old.kind == ARRAY:
        return _array(made, dice, at)
    else:
        new = replace(old, value=_number(old.kind, dice))
    made.keys[at] = (name, new)
    return made, f"{name.decode()} = {new.value!r:.60}"


def _array(made: Gguf, dice: Random, at: int | None = None) -> tuple[Gguf, str]:
    arrays = [i for i, (_, value) in enumerate(made.keys) if value.kind == ARRAY]
    at = dice.choice(arrays) if at is None else at
    name, old = made.keys[at]
    items, how = list(old.value), dice.choice(("item", "item", "short", "long", "count", "element"))
    new = replace(old, value=items)
    if how == "item" and items:
        place = dice.randrange(len(items))
        items[place] = (
            dice.choice((*TEXTS, items[0], items[-1], b"<0x", b"<0xZZ>"))
            if old.element == STRING
            else _number(old.element, dice)
        )
    elif how == "short":
        del items[dice.randrange(len(items) + 1) :]
    elif how == "long":
        items.extend(items[-1:] * dice.choice((1, 2, 300)))
    elif how == "count":
        new = replace(new, count=dice.choice(NUMBERS))
    else:
        new = replace(new, element=dice.choice((*SCALARS, ARRAY, 13, 2**32 - 1)), value=[])
    made.keys[at] = (name, new)
    return made, f"{how} of {name.decode()}"


def _retype(made: Gguf, dice: Random) -> tuple[Gguf, str]:
    """A value of another type."""
    at = dice.randrange(len(made.keys))
    name, _ = made.keys[at]
    kind = dice.choice((*SCALARS, STRING, ARRAY))
    if kind == STRING:
        new = Value(kind, dice.choice(TEXTS))
    elif kind == ARRAY:
        element = dice.choice((4, 5, 6, 7, 8))
        length = dice.choice((0, 1, 2, 3, 4, 600))
        item = b"x" if element == STRING else _number(element, dice)
        new = Value(kind, [item] * length, element)
    else:
        new = Value(kind, _number(kind, dice))
    made.keys[at] = (name, new)
    return made, f"{name.decode()} has type {kind}"


def _lost(made: Gguf, dice: Random) -> tuple[Gguf, str]:
    name, _ = made.keys.pop(dice.randrange(len(made.keys)))
    return made, name.decode()


def _twice(made: Gguf, dice: Random) -> tuple[Gguf, str]:
    made.keys.append(dice.choice(made.keys))
    return made, made.keys[-1][0].decode()


def _extra(made: Gguf, dice: Random) -> tuple[Gguf, str]:
    """A key that the file did not have."""
    name, kind, values = dice.choice((*EXTRA, *GENERAL))
    if "." not in name or (name, kind, values) in EXTRA:
        known = {key: value.value for key, value in made.keys if value.kind == STRING}
        name = f"{known.get(b'general.architecture', b'llama').decode('latin1')}.{name}"
    value = dice.choice(list(values))
    element = 0
    if kind == ARRAY:
        element = STRING if value and isinstance(value[0], bytes) else 1
    return made.set(name, kind, value, element=element), f"{name} = {value!r:.60}"


def _nested(made: Gguf, dice: Random) -> tuple[Gguf, str]:
    """Arrays in arrays."""
    depth = dice.choice((1, 2, 10, 2000, 100_000))
    inner = struct.pack("<IQ", ARRAY, 1) * depth + struct.pack("<IQ", U32, 0)
    made.keys.append((b"deep", Value(RAW, struct.pack("<I", ARRAY) + inner)))
    return made, f"depth {depth}"


def _counts(made: Gguf, dice: Random) -> tuple[Gguf, str]:
    which = dice.choice(("keys_said", "tensors_said", "version"))
    value = dice.choice(NUMBERS)
    return replace(made, **{which: value}), f"{which} {value}"


def _tensor(made: Gguf, dice: Random) -> tuple[Gguf, str]:
    if not made.tensors:
        return made, "none left"
    at = dice.randrange(len(made.tensors))
    old = made.tensors[at]
    how = dice.choice(("dim", "dims", "type", "type", "offset", "name", "lost", "twice", "swapped"))
    said = f"{how} of {old.name.decode('latin1')}"
    new = old
    if how == "dim" and old.dims:
        place = dice.randrange(len(old.dims))
        dim = dice.choice((*NUMBERS, old.dims[place] - 1, old.dims[place] + 1, old.dims[place] * 2))
        new = replace(old, dims=(*old.dims[:place], dim, *old.dims[place + 1 :]))
        said += f" {dim}"
    elif how == "dims":
        count = dice.choice((0, 1, 2, 3, 4, 5, 8, 1000))
        new = replace(old, dims=(old.dims * 1000)[:count])
    elif how == "type":
        new = replace(old, kind=dice.choice((*range(45), 255, 2**31, 2**32 - 1)))
        said += f" {new.kind}"
    elif how == "offset":
        new = replace(old, offset=dice.choice((*NUMBERS, old.offset + 32, old.offset + 1)))
    elif how == "name":
        names = [
            b"",
            b"x" * 64,
            b"x" * 100_000,
            b"blk.999.attn_q.weight",
            b"\xff",
            b"output.weight",
        ]
        new = replace(old, name=dice.choice(names))
    elif how == "lost":
        del made.tensors[at]
        return made, said
    elif how == "twice":
        made.tensors.append(old)
        return made, said
    elif how == "swapped":
        other = dice.randrange(len(made.tensors))
        new = replace(old, name=made.tensors[other].name)
        made.tensors[other] = replace(made.tensors[other], name=old.name)
    made.tensors[at] = new
    return made, said


_DAMAGES = {
    "key": _key,
    "value": _key,
    "number": _key,
    "array": _array,
    "retyped": _retype,
    "lost": _lost,
    "twice": _twice,
    "extra": _extra,
    "another": _extra,
    "nested": _nested,
    "count": _counts,
    "tensor": _tensor,
    "weight": _tensor,
}


def reads(path: Path) -> bool:
    """Whether the header is read; where it is not, that must be said in one line."""
    from laserkv_gguf.errors import UserError
    from laserkv_gguf.models.header import Header

    said = ""
    try:
        Header(path)
    except UserError as error:
        said = str(error)
        if len(said.splitlines()) != 1 or len(said) > 400:
            raise AssertionError(said) from error
    return not said


# ---- tried in a child ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What became of a file: "answered", "refused" (in one line), "raw", "died" or "hung"."""

    how: str
    said: str = ""

    @property
    def sound(self) -> bool:
        return self.how in ("answered", "refused")


class Server:
    """Plans with a model and asks it, each in a child of its own."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "tried.gguf"
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"},
            text=True,
        )

    def ask(self, raw: bytes) -> Outcome:
        """What becomes of a file with these bytes."""
        self._file.write_bytes(raw)
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{self._file}\n")
        process.stdin.flush()
        return Outcome(**json.loads(process.stdout.readline()))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _use(path: str) -> dict[str, str]:
    """Loads a model as every command does, reads a document with it and answers."""
    from laserkv_gguf import ContextOptions, LaserKV
    from laserkv_gguf.errors import LaserKVError

    try:
        context = ContextOptions(threads=1)
        with LaserKV(path, context=context, policy="keydiff", block_size=256) as engine:
            engine.ask("why?", document="tin and ore. " * 50, max_tokens=3)
    except LaserKVError as error:
        said = str(error)
        short = len(said.splitlines()) == 1 and len(said) <= 400
        return {"how": "refused" if short else "raw", "said": said[:1000]}
    except BaseException as error:
        return {"how": "raw", "said": f"{type(error).__name__}: {error}"}
    return {"how": "answered", "said": ""}


def _child(path: str) -> dict[str, str]:
    """A child's verdict, or how it ended without one."""
    heard, tell = os.pipe()
    complaints = (
        os.memfd_create("stderr") if hasattr(os, "memfd_create") else os.open(os.devnull, 1)
    )
    number = os.fork()
    if not number:
        try:
            import resource

            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.dup2(complaints, 1)
            os.dup2(complaints, 2)
            os.write(tell, json.dumps(_use(path)).encode()[:60_000])
            os._exit(0)
        finally:
            os._exit(99)
    os.close(tell)
    ready, _, _ = select.select([heard], [], [], PATIENCE)
    if not ready:
        os.kill(number, signal.SIGKILL)
    said = b""
    while part := os.read(heard, 65536):
        said += part
    os.close(heard)
    code = os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
    os.lseek(complaints, 0, os.SEEK_SET)
    complaint = os.read(complaints, 4000).decode("utf-8", "replace")
    os.close(complaints)
    if not ready:
        return {"how": "hung", "said": complaint}
    if code or not said:
        return {"how": "died", "said": f"exit {code}: {complaint}"}
    if "Traceback" in complaint or "GGML_" in complaint:
        return {"how": "raw", "said": complaint}
    found: dict[str, str] = json.loads(said)
    return found


def serve() -> None:
    """Answers each path on standard input with what became of the file."""
    import laserkv_gguf.api
    import laserkv_gguf.conversation.conversation
    import laserkv_gguf.kernels
    import laserkv_gguf.policies
    from laserkv_gguf.llama import capture as probe
    from laserkv_gguf.llama import trial

    laserkv_gguf.policies.available()
    probe.Probe(1, 1, 1, 32).callback  # noqa: B018 - what Numba compiles is loaded once
    trial.extra_buffers_work()
    for line in sys.stdin:
        print(json.dumps(_child(line.rstrip("\n"))), flush=True)


if __name__ == "__main__":
    serve()
