"""Saved files as a forger makes them: anything in them changed, and the digest right all the same.

The layout is written down here once more, from the safetensors format and what a digest is of, so
that no code under test helps to make what it must refuse.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

DTYPES = {
    "I8": "<i1",
    "U8": "<u1",
    "I32": "<i4",
    "I64": "<i8",
    "U64": "<u8",
    "F16": "<f2",
    "F32": "<f4",
}
HUGE = [2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 10**9, 10**12, 1e308]
VALUES: list[Any] = [
    *(0, -1, 1, 2, 255, 0.5, 0.0, 1e-300, -(2**31), -(2**63), -1e308),
    *HUGE,
    *(float("nan"), float("inf"), None, True, False, [], {}, [1], [[1]], [0] * 500),
    *("", "x", "A" * 5000, "\0", "\ud800", "\x1b[2J\u202e", "../../etc/passwd", "/dev/zero"),
    *("laser", "full", "random", "infllm", "quest", "dbudgetkv", "evil:Policy"),
    *("finch", "recursive", "one-shot", "disk", "ram", "off", "replay", "shortlist"),
    *("compact", "original", "device", "q8_0", "document", "turn", "system"),
]
NUMBERS = [0, -1, 1, 2, 255, 300, 383, 384, 1009, 10**6, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63)]


class Forged:
    """A saved file taken apart: change what you like and write it.

    Attributes:
        about: what it says of itself.
        arrays: by name.
    """

    def __init__(self, data: bytes) -> None:
        length = int.from_bytes(data[:8], "little")
        header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
        metadata = header.pop("__metadata__")
        self.format, self.about = metadata["format"], json.loads(metadata["about"])
        self.arrays: dict[str, np.ndarray] = {}
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            array = np.frombuffer(body[first:last], DTYPES[entry["dtype"]])
            self.arrays[name] = array.reshape(entry["shape"]).copy()

    def copy(self) -> Forged:
        return copy.deepcopy(self)

    def header(self) -> tuple[dict[str, Any], bytes]:
        """What describes the arrays, and their bytes."""
        entries, body = {}, b""
        kinds = {np.dtype(dtype): kind for kind, dtype in DTYPES.items()}
        for name, array in sorted(self.arrays.items(), key=lambda item: -item[1].itemsize):
            data = np.ascontiguousarray(array).tobytes()
            entries[name] = {
                "dtype": kinds[array.dtype],
                "shape": list(array.shape),
                "data_offsets": [len(body), len(body) + len(data)],
            }
            body += data
        return entries, body

    def bytes(self, entries: Any = None, about: str | None = None) -> bytes:
        """The file, with other descriptions of its arrays or another text about it if given."""
        own, body = self.header()
        digest = "0" * 64
        metadata = {
            "format": self.format,
            "digest": digest,
            "about": json.dumps(self.about) if about is None else about,
        }
        text = json.dumps({"__metadata__": metadata, **(own if entries is None else entries)})
        return sealed(text.encode(), body)

    def write(self, path: Path, **changes: Any) -> Path:
        path.write_bytes(self.bytes(**changes))
        return path


def sealed(header: bytes, body: bytes) -> bytes:
    """A file of this header, whose digest is 64 zeros so far, with the right one."""
    header += b" " * (-len(header) % 8)
    whole = len(header).to_bytes(8, "little") + header + body
    return whole.replace(b"0" * 64, hashlib.sha256(whole).hexdigest().encode(), 1)


# ---- ways to change one ------------------------------------------------------------------------


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every field, object and item of lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:40])
    for key, one in items:
        yield (*path, key)
        if isinstance(one, dict | list):
            yield from places(one, (*path, key))


def put(value: Any, path: tuple[Any, ...], new: Any) -> None:
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = new


def take(value: Any, path: tuple[Any, ...]) -> None:
    for key in path[:-1]:
        value = value[key]
    del value[path[-1]]


def change_about(file: Forged, random: Random) -> bytes:
    """One or two fields get another value, a new name or none."""
    for _ in range(random.choice([1, 1, 1, 2])):
        path = random.choice(list(places(file.about)))
        how = random.randrange(12)
        if how == 0:
            take(file.about, path)
        elif how == 1:
            extra = ("model", "recall_file", "threads", "debug", "x")[random.randrange(5)]
            put(file.about, (*path[:-1], extra) if isinstance(path[-1], str) else path, "/dev/zero")
        else:
            put(file.about, path, copy.deepcopy(random.choice(VALUES)))
    if random.randrange(20) == 0:
        text = json.dumps(file.about)
        half = random.randrange(len(text))
        deep = "[" * 100_000
        return file.bytes(about=random.choice([text[:half], text + text, deep, text + "\0"]))
    return file.bytes()


def change_tensor(file: Forged, random: Random) -> bytes:
    """What describes an array is not what it is."""
    entries, _ = file.header()
    name = random.choice(sorted(entries))
    entry = entries[name]
    how = random.randrange(8)
    if how == 0:
        entry["dtype"] = random.choice([*DTYPES, "F64", "BOOL", "BF16", "X", None])
    elif how == 1:
        entry["shape"] = [random.choice([0, 1, -1, 2**31, 2**62, n]) for n in entry["shape"]]
    elif how == 2:
        shape = entry["shape"]
        entry["shape"] = random.choice([shape[::-1], [math.prod(shape)], [1, *shape], [1] * 99])
    elif how == 3:
        first, last = entry["data_offsets"]
        entry["data_offsets"] = [
            random.choice([0, 1, -1, 2**40, last, first]),
            random.choice([0, 2**40, 2**63, last, first]),
        ]
    elif how == 4:
        del entries[name]
    elif how == 5:
        entries[random.choice(["zz", "parked 7.keys", "text 9"])] = entries.pop(name)
    elif how == 6:
        other = random.choice(sorted(entries))
        entries[name], entries[other] = entries[other], entries[name]
    else:
        entries[name] = random.choice([None, [], {}, {"dtype": "U8"}, "x"])
    return file.bytes(entries)


def change_size(file: Forged, random: Random) -> bytes:
    """An array is cut or grown, and described as what it then is."""
    name = random.choice(sorted(file.arrays))
    array = file.arrays[name]
    axis = random.randrange(array.ndim)
    size = array.shape[axis]
    wanted = random.choice([0, 1, size // 2, max(0, size - 1), size + 1, size * 2])
    places = np.resize(np.arange(max(size, 1)), wanted)
    file.arrays[name] = (
        np.take(array, places, axis)
        if size
        else np.zeros((*array.shape[:axis], wanted, *array.shape[axis + 1 :]), array.dtype)
    )
    return file.bytes()


def change_data(file: Forged, random: Random) -> bytes:
    """Numbers that mean something are others, in their right places."""
    small = [
        name
        for name, array in file.arrays.items()
        if array.size and not name.endswith(("keys", "values", "state"))
    ]
    name = random.choice(sorted(small))
    flat = file.arrays[name].reshape(-1)
    how = random.randrange(5)
    with np.errstate(over="ignore"):
        value = np.array(random.choice(NUMBERS)).astype(flat.dtype)
    if how < 2:
        flat[random.randrange(len(flat))] = value
    elif how == 2:
        flat[:] = value
    elif how == 3:
        a, b = random.randrange(len(flat)), random.randrange(len(flat))
        flat[a], flat[b] = flat[b], flat[a]
    else:
        raw = flat.view(np.uint8)
        for _ in range(random.randrange(1, 8)):
            raw[random.randrange(len(raw))] = random.randrange(256)
    file.arrays[name] = flat.reshape(file.arrays[name].shape)
    return file.bytes()


def change_state(file: Forged, random: Random) -> bytes:
    """llama.cpp's own state: its head, its cells, what it says of a layer, or any of its bytes."""
    state = file.arrays["state"]
    cells = int(state[12:16].view("<u4")[0])
    layers = 16 + 12 * cells
    how = random.randrange(6)
    at = [
        4 * random.randrange(4),
        16 + 4 * random.randrange(3 * cells),
        16 + 4 * random.randrange(3 * cells),
        layers + 4 * random.randrange(5),
        random.randrange(len(state) - 4),
        random.randrange(len(state) - 4),
    ][how]
    value = random.choice([*NUMBERS, 7, 511, cells + 1, cells - 1, 0x7FC00000, 0xFF800000])
    state[at : at + 4] = np.frombuffer((value & 0xFFFFFFFF).to_bytes(4, "little"), np.uint8)
    if how == 5:  # rows that are no numbers, from some place on
        state[random.randrange(layers + 20, len(state)) :] = 0xFF
    return file.bytes()


def change_a_little(file: Forged, random: Random) -> bytes:
    """Values that could well be: one more, twice as much, what another field says, not true."""
    words = [
        *("laser", "quest", "infllm", "random", "dbudgetkv", "accumulating", "recursive"),
        *("one-shot", "ram", "disk", "off", "replay", "shortlist", "all", "block"),
        *("auto", "original", "compact", "system", "document", "turn", "f16", "f32"),
    ]
    for _ in range(random.choice([1, 1, 2, 4])):
        if random.randrange(3) == 0:
            small = sorted(n for n, a in file.arrays.items() if a.size and a.dtype.kind == "i")
            flat = file.arrays[random.choice(small)].reshape(-1)
            at = random.randrange(len(flat))
            to = random.choice([flat[at] + 1, flat[at] - 1, flat[random.randrange(len(flat))]])
            flat[at] = np.array(to).astype(flat.dtype)
            continue
        path = random.choice(list(places(file.about)))
        value = file.about
        for key in path:
            value = value[key]
        if isinstance(value, bool):
            put(file.about, path, not value)
        elif isinstance(value, int):
            others = [value + 1, value - 1, 2 * value, value // 2, random.randrange(1, 500)]
            put(file.about, path, random.choice(others))
        elif isinstance(value, float):
            put(file.about, path, random.choice([value / 2, min(1.0, value * 2), 1.0, 0.05]))
        elif isinstance(value, str):
            put(file.about, path, random.choice(words))
        elif value is None:
            put(file.about, path, random.choice([1, 15, 0.5, "replay", "shortlist"]))
        elif isinstance(value, list) and value:
            how = random.randrange(3)
            one = random.randrange(len(value))
            if how == 0:
                del value[one]
            elif how == 1:
                value.append(copy.deepcopy(value[one]))
            else:
                value[0], value[one] = value[one], value[0]
    return file.bytes()


def change_bytes(file: Forged, random: Random) -> bytes:
    """Damage, with the digest that was right before: a bit, many bytes, cut, grown."""
    data = bytearray(file.bytes())
    head = 8 + int.from_bytes(data[:8], "little")
    how = random.randrange(6)
    if how == 0:
        data[random.randrange(8)] ^= random.randrange(1, 256)
    elif how == 1:
        data[random.randrange(8, head)] ^= 1 << random.randrange(8)
    elif how == 2:
        data[random.randrange(head, len(data))] ^= 1 << random.randrange(8)
    elif how == 3:
        del data[random.randrange(len(data)) :]
    elif how == 4:
        data += bytes(random.randrange(256) for _ in range(random.randrange(1, 50)))
    else:
        for _ in range(20):
            data[random.randrange(len(data))] ^= random.randrange(1, 256)
    return bytes(data)


CHANGES: dict[str, Callable[[Forged, Random], bytes]] = {
    "about": change_about,
    "tensor": change_tensor,
    "resize": change_size,
    "data": change_data,
    "state": change_state,
    "little": change_a_little,
    "flip": change_bytes,
}
