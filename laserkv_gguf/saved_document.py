"""Read documents that stay: one safetensors file, refused unless it fits in every respect.

The file holds the tokens, which of them are kept, the rows of all parked tokens (or, without
recall, of the kept ones) with the positions their keys are turned for, signatures, and as metadata
what it was made with: model, build, row format, settings, account. A digest over all of it stands
in the metadata; nothing in the file is ever executed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from laserkv_gguf import __version__
from laserkv_gguf.budget import Budget
from laserkv_gguf.engine import Reading
from laserkv_gguf.errors import LaserKVError, UserError
from laserkv_gguf.llama import library, rows
from laserkv_gguf.llama.context import Context
from laserkv_gguf.llama.model import CACHE_TYPES, Model
from laserkv_gguf.llama.sequence import MAIN, PROBE, SPARE, Sequence
from laserkv_gguf.recall import Recaller
from laserkv_gguf.store import human
from laserkv_gguf.timings import STEPS, Timings

if TYPE_CHECKING:
    from laserkv_gguf.session import Conversation, LaserKV, Sampling

log = logging.getLogger(__name__)

FORMAT = "laserkv-gguf document 1"
_NO_DIGEST = "0" * 64
_TYPES = {"int32": "I32", "int64": "I64", "uint8": "U8", "uint64": "U64"} | {
    "float16": "F16",
    "float32": "F32",
}
_CHUNK = 1 << 24
_INDEX = "index."
_SAMPLES, _SAMPLE = 64, 1 << 16  # of a model's file, to tell it from others


def check_target(path: str | Path) -> Path:
    """A path that a file can be written to, before hours are spent on what goes into it.

    Raises:
        UserError: no such folder, or one that cannot be written to.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"--save {path} is a folder; give a file in it")
    if not path.parent.is_dir():
        raise UserError(f"--save {path}: there is no folder {path.parent}; make it first")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"--save {path}: {path.parent} cannot be written to")
    return path


# ---- saving ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tensor:
    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: Iterator[NDArray[Any]]

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


def save(conversation: Conversation, path: str | Path) -> int:
    """Writes a conversation's document as it lies in the cache; its turns are not written.

    Beside the target first, then renamed: an old file stays whole until the new one is.

    Returns:
        Bytes written.

    Raises:
        UserError: nothing has been read, or the target cannot be written to.
        LaserKVError: the disk is full; nothing is left behind.
    """
    path = check_target(path)
    with conversation.engine._alone():
        if conversation.reading is None:
            raise UserError("there is no read document to save; read one first")
        conversation._check_owner()
        tensors = list(_tensors(conversation))
        about = _about(conversation)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w+b") as file:
                _write(file, tensors, about)
                file.flush()
                os.fsync(file.fileno())
                size = file.tell()
            Path(name).replace(path)
        except BaseException as error:
            with suppress(OSError):
                Path(name).unlink()
            if isinstance(error, OSError):
                needed = sum(tensor.bytes for tensor in tensors)
                raise LaserKVError(
                    f"cannot save {human(needed)} to {path}: {error.strerror}"
                ) from error
            raise
    return size


def _about(conversation: Conversation) -> dict[str, Any]:
    """What a file must agree with to be loaded, and what else was known."""
    reading, run, engine = conversation.reading, conversation._run, conversation.engine
    assert reading is not None
    assert run is not None
    return {
        "version": __version__,
        "model": model_identity(engine.model),
        "build": library.version(),
        "rows": asdict(_form(conversation)),
        "budget": asdict(reading.budget),
        "compact": run.compact,
        "system": conversation.system,
        "parked": conversation._recaller is not None,
        "next_position": reading.next_position,
        "kept_per_block": reading.kept_per_block,
        "timings": {step: getattr(reading.timings, step) for step in (*STEPS, "total")},
        "settings": asdict(engine.settings) | {"recall_file": None},
        "context": {
            name: getattr(engine.options, name) for name in ("type_k", "type_v", "flash_attn")
        },
    }


def _form(conversation: Conversation) -> rows.Format:
    if conversation._recaller:
        return conversation._recaller.form
    assert conversation._run is not None
    return conversation.engine.row_format(conversation._run.reader.context)


def _tensors(conversation: Conversation) -> Iterator[_Tensor]:
    reading, recaller = conversation.reading, conversation._recaller
    assert reading is not None
    yield _whole("tokens", reading.tokens)
    yield _whole("kept", reading.kept)
    form = _form(conversation)
    if recaller is None:
        yield from _cached(conversation, form)
        return
    store = recaller.store
    yield _whole("held", np.arange(store.tokens))
    yield _whole("positions", store.positions)
    for name, array in (("keys", store._keys), ("values", store._values)):
        yield _Tensor(name, "uint8", array.shape, iter(array))
    if recaller.signatures is not None and recaller.signatures.centre is not None:
        yield _whole("centre", recaller.signatures.centre)
        codes = recaller.signatures.codes
        yield _Tensor("signatures", "uint64", codes.shape, iter(codes))
    if recaller.index:
        yield _whole("units", recaller.units)
        for name, array in recaller.index.items():
            yield _whole(_INDEX + name, array)


def _whole(name: str, array: NDArray[Any]) -> _Tensor:
    return _Tensor(name, str(array.dtype), array.shape, iter((array,)))


def _cached(conversation: Conversation, form: rows.Format) -> Iterator[_Tensor]:
    """The kept rows, taken out of the cache."""
    reading, run = conversation.reading, conversation._run
    assert reading is not None
    assert run is not None
    context = run.reader.context
    main, spare = Sequence(context, MAIN), Sequence(context, SPARE)
    positions = np.arange(len(reading.kept)) if run.compact else reading.kept
    # keys that were moved are turned when something is decoded next
    try:
        context.decode(reading.tokens[:1], 0, PROBE)
    finally:
        Sequence(context, PROBE).remove()
    count = len(positions)
    keys = np.empty((form.layers, count, form.key_bytes), np.uint8)
    values = np.empty((form.layers, count, form.value_bytes), np.uint8)
    for first in range(0, count, form.per_call):
        part = positions[first : first + form.per_call]
        try:
            main.share_with(spare, int(part[0]), int(part[-1]) + 1)
            taken = rows.take(context, form, SPARE)
        finally:
            spare.remove()
        order = np.argsort(taken.positions)
        into = slice(first, first + len(part))
        keys[:, into] = taken.keys[:, order]
        values[:, into] = taken.values[:, order].reshape(form.layers, len(part), -1)
    yield _whole("held", reading.kept)
    yield _whole("positions", positions.astype(np.int32))
    yield _whole("keys", keys)
    yield _whole("values", values)


def _write(file: BinaryIO, tensors: list[_Tensor], about: dict[str, Any]) -> None:
    header: dict[str, Any] = {
        "__metadata__": {"format": FORMAT, "digest": _NO_DIGEST, "about": json.dumps(about)}
    }
    end = 0
    # the wide ones first: safetensors wants no gaps, and readers want aligned numbers
    tensors.sort(key=lambda tensor: -np.dtype(tensor.dtype).itemsize)
    for tensor in tensors:
        start, end = end, end + tensor.bytes
        kind = _TYPES[tensor.dtype]
        header[tensor.name] = {
            "dtype": kind,
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(head)
    file.write(head)
    for tensor in tensors:
        for part in tensor.parts:
            data = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
            for first in range(0, len(data), _CHUNK):
                piece = data[first : first + _CHUNK].tobytes()
                digest.update(piece)
                file.write(piece)
    at = head.index(_NO_DIGEST.encode())
    file.seek(at)
    file.write(digest.hexdigest().encode())
    file.seek(0, os.SEEK_END)


# ---- identity ----------------------------------------------------------------------------------


def model_identity(model: Model) -> dict[str, Any]:
    """Name, size and a digest of samples of a model's file: of 5 GB, reading all takes seconds."""
    digest = hashlib.sha256()
    with model.path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        for sample in range(_SAMPLES):
            file.seek(max(0, size - _SAMPLE) * sample // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE))
    return {"name": model.name, "bytes": size, "samples": digest.hexdigest()}


# ---- loading -----------------------------------------------------------------------------------


def load(
    engine: LaserKV,
    path: str | Path,
    *,
    max_tokens: int = 1024,
    sampling: Sampling | None = None,
) -> Conversation:
    """A conversation about a document that `save` has written, as it was read there.

    Its ratio, blocks and positions are the file's. Where rows were parked, recall is on as it was
    there, unless the engine says otherwise; the engine's policy chooses what is recalled.

    Raises:
        UserError: no such file, a damaged one, one of another model, build or row format, or one
            that does not fit the context; the message says which.
    """
    from laserkv_gguf.session import Conversation

    path = Path(path)
    about = _checked(path)
    _compare(path, about, engine.model)
    if about["parked"]:
        engine.turn_recall_on(about["settings"])
    elif engine.settings.recall != "off":
        log.warning("%s holds no parked rows: nothing can be recalled", path)
    budget, form = Budget(**about["budget"]), rows.Format(**about["rows"])
    conversation = Conversation(
        engine, system=about["system"], max_tokens=max_tokens, sampling=sampling
    )
    with engine._alone(), safe_open(path, framework="numpy") as file:
        if engine._owner:
            engine._owner.forget_parked()
            engine._owner = None
        reading = Reading(
            file.get_tensor("tokens"),
            budget,
            file.get_tensor("kept"),
            about["next_position"],
            Timings(**about["timings"]),
            about["kept_per_block"],
        )
        room = conversation._room(budget.tokens, budget)
        run = engine.prepare(
            budget.tokens, 0, room, asked=False, budget=budget, compact=about["compact"]
        )
        context = run.reader.context
        run.reader.forget()
        if (here := engine.row_format(context)) != form:
            raise UserError(
                f"{path} holds rows of {_said(form)}, this context makes {_said(here)}; "
                "load it with the -ctk, -ctv and -fa it was saved with"
            )
        recaller = engine.recaller(run) if about["parked"] else None
        try:
            if recaller:
                _park(path, recaller, file, about)
                recaller.tokens = reading.tokens
                recaller.restore(reading.kept)
                reading.next_position = recaller.next_position
            else:
                _put(context, form, file)
        except BaseException:
            if recaller:
                recaller.close()
            run.reader.forget()
            raise
        conversation._adopt(run, reading, recaller)
    return conversation


def settings(path: str | Path) -> dict[str, Any]:
    """The settings and context options a document was read with, by the names of their classes."""
    path = Path(path)
    try:  # its digest is looked at when it is loaded
        about = json.loads(_header(path)[1]["about"])
        found: dict[str, Any] = about["settings"] | about["context"]
    except (ValueError, KeyError, TypeError):
        raise _damaged(path) from None
    return found


def _damaged(path: Path) -> UserError:
    return UserError(
        f"{path} is damaged: it was cut off or changed since it was saved; read the document again"
    )


def _header(path: Path) -> tuple[bytes, dict[str, str]]:
    """A file's first bytes up to the data, and its metadata.

    Raises:
        UserError: not a saved document.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = os.fstat(file.fileno()).st_size
            file.seek(0)
            head = file.read(8 + length) if 8 + length <= size else b""
        metadata = json.loads(head[8:])["__metadata__"]
        if metadata["format"] != FORMAT or len(metadata["digest"]) != len(_NO_DIGEST):
            raise ValueError
    except FileNotFoundError:
        raise UserError(f"no saved document at {path}; --save FILE writes one") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, UnicodeDecodeError):
        raise UserError(
            f"{path} is not a document that --save wrote with this version, or its beginning is "
            "damaged; read the document again"
        ) from None
    return head, metadata


def _checked(path: Path) -> dict[str, Any]:
    """What the file says of itself, after its digest has been found right."""
    head, metadata = _header(path)
    digest = hashlib.sha256(head.replace(metadata["digest"].encode(), _NO_DIGEST.encode(), 1))
    with path.open("rb") as file:
        file.seek(len(head))
        while piece := file.read(_CHUNK):
            digest.update(piece)
    if digest.hexdigest() != metadata["digest"]:
        raise _damaged(path)
    about: dict[str, Any] = json.loads(metadata["about"])
    return about


def _compare(path: Path, about: dict[str, Any], model: Model) -> None:
    here = model_identity(model)
    if here["samples"] != about["model"]["samples"] or here["bytes"] != about["model"]["bytes"]:
        saved = about["model"]
        raise UserError(
            f"{path} was saved with another model: {saved['name']} of {saved['bytes']} bytes, not "
            f"{here['name']} of {here['bytes']}; give that one with --model"
        )
    if about["build"] != library.version():
        raise UserError(
            f"{path} was saved with {about['build']}, this is {library.version()}, whose rows may "
            "differ; read the document again"
        )


def _said(form: rows.Format) -> str:
    """A row format in words."""
    names = {number: name for name, number in CACHE_TYPES.items()}
    order = "transposed values" if form.element else "values in rows"
    return (
        f"{form.layers} layers, {names.get(form.key_type, form.key_type)} keys of "
        f"{form.key_bytes} bytes and {names.get(form.value_type, form.value_type)} values of "
        f"{form.value_bytes}, {order}"
    )


def _park(path: Path, recaller: Recaller, file: Any, about: dict[str, Any]) -> None:
    """Fills a store from the file, and what finds rows in it."""
    store, names = recaller.store, set(file.keys())
    keys, values, positions = (file.get_slice(name) for name in ("keys", "values", "positions"))
    step = max(1, _CHUNK // recaller.form.cell_bytes)
    for first in range(0, store.tokens, step):
        end = min(first + step, store.tokens)
        store.write(keys[:, first:end], values[:, first:end], positions[first:end])
    if recaller.mode == "replay":
        return
    same = about["settings"]["policy"] == recaller.policy.name
    if recaller.policy.unit and "units" in names and same:
        recaller.units = file.get_tensor("units")
        recaller.index = {
            name.removeprefix(_INDEX): file.get_tensor(name)
            for name in names
            if name.startswith(_INDEX)
        }
    elif recaller.signatures is not None and "signatures" in names:
        recaller.signatures.codes = file.get_tensor("signatures")
        recaller.signatures.centre = file.get_tensor("centre")
    elif recaller.policy.needs.recall:
        raise UserError(
            f"{path} was not read with --policy {recaller.policy.name}, which notes while it "
            "reads what it looks up; read the document again, or use another policy"
        )
    else:
        recaller.remember()


def _put(context: Context, form: rows.Format, file: Any) -> None:
    """Puts kept rows where they stood."""
    main, spare = Sequence(context, MAIN), Sequence(context, SPARE)
    positions = file.get_tensor("positions")
    keys, values = file.get_slice("keys"), file.get_slice("values")
    for first in range(0, len(positions), form.per_call):
        end = min(first + form.per_call, len(positions))
        built = rows.build(form, positions[first:end])
        built.keys[...] = keys[:, first:end]
        built.values[...] = values[:, first:end].reshape(built.values.shape)
        try:
            rows.put(context, built, SPARE)
            spare.share_with(main)
        finally:
            spare.remove()
