"""A GGUF model: loading, what its header says, its tokenizer."""

from __future__ import annotations

import codecs
import contextlib
import ctypes
import logging
import os
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import llama_cpp as L
import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.errors import LaserKVError, UserError
from laserkv_gguf.llama import devices, library, loadable, placing
from laserkv_gguf.llama.handle import Handle, closed_at_exit
from laserkv_gguf.llama.placement import Placement
from laserkv_gguf.models.header import check_plain
from laserkv_gguf.shown import short

log = logging.getLogger(__name__)

CACHE_TYPES = {
    "f32": 0,
    "f16": 1,
    "bf16": 30,
    "q8_0": 8,
    "q4_0": 2,
    "q4_1": 3,
    "iq4_nl": 20,
    "q5_0": 6,
    "q5_1": 7,
}
"""llama.cpp's names for the types of the KV cache, and ggml's numbers for them."""

Tokens = NDArray[np.int32]

_open = closed_at_exit(lambda model: model.close())


@cache
def row_bytes(cache_type: str, values: int) -> int:
    """Bytes of one row of `values` numbers in a cache of that type."""
    size = library.ggml_base().ggml_row_size
    size.restype, size.argtypes = ctypes.c_size_t, [ctypes.c_int, ctypes.c_int64]
    return int(size(CACHE_TYPES[cache_type], values))


class Model:
    """A loaded model. Close it, or use it as a context manager.

    Once closed it raises `Closed` wherever llama.cpp would be asked. Its memory is given back when
    the last context over it has been closed, too.

    Args:
        path: a GGUF file.
        gpu_layers: layers to put on the GPU; None or a negative number for all where the build and
            the machine can, else none.
        extra_buffers: llama.cpp's `use_extra_bufts` (repacked weights, AMX); see `trial`.
        placement: which devices, and what goes where; None for what llama.cpp does by itself.

    Attributes:
        devices: names of the devices that it may use, also where no layer is on them.
        remote: whether one of them belongs to an RPC server.
        adapters: llama.cpp's pointers to the LoRA adapters that every context adds.

    Raises:
        UserError: not a usable GGUF (see `loadable`), or an architecture whose cache is not one key
            and value a token, GPU layers asked of a build without, a placement that cannot be, or
            an adapter of another model.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        gpu_layers: int | None = None,
        extra_buffers: bool = True,
        placement: Placement | None = None,
    ) -> None:
        self.path = Path(path)
        self.placement = placement = placement or Placement()
        placement.check()
        check_file(self.path)
        names = loadable.check(self.path)
        placing.check_adapters(placement, self.path)
        loading = placing.loading(placement, gpu_layers, names)
        self.devices = tuple(one.name for one in loading.devices)
        self.remote = any(one.backend == devices.RPC for one in loading.devices)
        self.gpu_layers = int(loading.params.n_gpu_layers)
        loading.params.use_extra_bufts = extra_buffers
        with library.recorded() as lines:
            address = L.llama_model_load_from_file(os.fsencode(self.path), loading.params)
        if not address:
            raise UserError(_why_not_loaded(self.path, lines))
        if placement.mlock and any("failed to mlock" in line for line in lines):
            log.warning(
                "--mlock: the system refuses to keep so much memory; raise ulimit -l, or leave "
                "--mlock out"
            )
        self.memory = Handle(address, L.llama_model_free, f"the model {self.path.name}")
        _open.add(self)
        self.buffers, self.offloaded_layers = library.buffers(), library.offloaded()
        try:
            self.vocab = L.llama_model_get_vocab(address)
            self._check_architecture()
            self.adapters = placing.adapters(placement, address)
        except BaseException:
            self.close()
            raise

    @property
    def handle(self) -> Any:
        """llama.cpp's pointer.

        Raises:
            Closed: there is none any more.
        """
        return self.memory.address

    def _ask(self, function: Any, *arguments: Any) -> Any:
        """What a function of llama.cpp says of the model, which is not freed meanwhile."""
        with self.memory as address:
            return function(address, *arguments)

    def _look_up(self, function: Any, *arguments: Any) -> Any:
        """What a function of llama.cpp says of its vocabulary; likewise."""
        with self.memory:
            return function(self.vocab, *arguments)

    def close(self) -> None:
        if hasattr(self, "memory"):
            self.memory.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    # what the header says

    def metadata(self, key: str) -> str | None:
        """A metadata value as text; None where the file does not have it."""
        size = 256
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = self._ask(L.llama_model_meta_val_str, key.encode(), buffer, size)
            if length < 0:
                return None
            if length < size:
                return buffer.value.decode("utf-8", "replace")
            size = length + 1

    @cached_property
    def architecture(self) -> str:
        return self.metadata("general.architecture") or "unknown"

    @cached_property
    def name(self) -> str:
        return self.metadata("general.name") or self.path.stem

    def _number(self, key: str, default: int) -> int:
        value = self.metadata(f"{self.architecture}.{key}")
        return int(value) if value and value.isdigit() else default

    @cached_property
    def layers(self) -> int:
        return int(self._ask(L.llama_model_n_layer))

    @cached_property
    def heads(self) -> int:
        return int(self._ask(L.llama_model_n_head))

    @cached_property
    def kv_heads(self) -> int:
        return int(self._ask(L.llama_model_n_head_kv))

    @cached_property
    def head_dim(self) -> int:
        default = int(self._ask(L.llama_model_n_embd)) // max(self.heads, 1)
        return self._number("attention.key_length", default)

    @cached_property
    def value_dim(self) -> int:
        return self._number("attention.value_length", self.head_dim)

    @cached_property
    def rotated_dims(self) -> int:
        """Dimensions of a head that RoPE rotates."""
        return self._number("rope.dimension_count", self.head_dim)

    @cached_property
    def rope_type(self) -> int:
        """llama.cpp's rope type: 0 rotates pairs (2i, 2i+1), 2 pairs (i, i + dims/2)."""
        return int(self._ask(L.llama_model_rope_type))

    @cached_property
    def trained_context(self) -> int:
        """Positions the model takes: those it was trained for, more where they are scaled."""
        trained = int(self._ask(L.llama_model_n_ctx_train))
        return self.placement.rope.positions(trained, self.rope_scale)

    @cached_property
    def rope_scale(self) -> float:
        """What the header says frequencies are scaled by; 1 for not at all."""
        for key in ("rope.scaling.factor", "rope.scale_linear"):
            value = self.metadata(f"{self.architecture}.{key}")
            if value is not None:
                with contextlib.suppress(ValueError, ZeroDivisionError):
                    return 1 / float(value)
        return 1.0

    @cached_property
    def vocab_size(self) -> int:
        return int(self._look_up(L.llama_vocab_n_tokens))

    @cached_property
    def weights_bytes(self) -> int:
        return int(self._ask(L.llama_model_size))

    @cached_property
    def description(self) -> str:
        buffer = ctypes.create_string_buffer(256)
        self._ask(L.llama_model_desc, buffer, 256)
        return buffer.value.decode("utf-8", "replace")

    def cell_bytes(self, type_k: str, type_v: str) -> int:
        """Bytes of one cell of the KV cache over all layers."""
        key = row_bytes(type_k, self.kv_heads * self.head_dim)
        value = row_bytes(type_v, self.kv_heads * self.value_dim)
        return self.layers * (key + value)

    def _check_architecture(self) -> None:
        """Refuses models whose cache is not one key and value a token, layer and head."""
        name = self.architecture

        def refuse(what: str, why: str) -> None:
            raise UserError(
                f"{self.path.name} is a {short(name)} model, {what}: {why}; "
                "use a model with plain attention such as Llama 3, Qwen 2.5 or SmolLM2"
            )

        if self._ask(L.llama_model_is_recurrent):
            refuse("which is recurrent", "it keeps a state, not keys and values to choose from")
        if self._ask(L.llama_model_is_hybrid):
            refuse("a hybrid", "its recurrent layers cannot forget single tokens")
        if self._ask(L.llama_model_is_diffusion):
            refuse("a diffusion model", "it does not generate token by token from a cache")
        if self._ask(L.llama_model_has_encoder):
            refuse("which has an encoder", "only decoders have a KV cache to compress")
        pooling = self.metadata(f"{name}.pooling_type")
        causal = self.metadata(f"{name}.attention.causal")
        if causal == "false" or (pooling or "0") not in ("0", "-1"):
            refuse("made for embeddings", "it does not generate text")
        if self._ask(L.llama_model_n_swa) > 0:
            refuse(
                "with sliding-window attention",
                "llama.cpp frees its old cells by itself, so nothing could be kept",
            )
        if self.metadata(f"{name}.attention.kv_lora_rank"):
            refuse("with latent attention", "its cache holds no keys per head to score")
        if not self._ask(L.llama_model_has_decoder) or self.heads == 0:
            refuse("without attention", "there is no KV cache to compress")

    # tokens

    def tokenize(self, text: str, *, special: bool = False, bos: bool = False) -> Tokens:
        """Tokens of a text, int32.

        Args:
            special: read control tokens such as <|im_end|> written in the text as such; never for
                text that a user or a document supplies.
            bos: put what the model wants in front (BOS).
        """
        data = text.encode("utf-8", "replace")  # a lone surrogate is no character
        size = len(data) + 8
        buffer = np.empty(size, np.int32)
        pointer = buffer.ctypes.data_as(L.llama_token_p)
        count = self._look_up(L.llama_tokenize, data, len(data), pointer, size, bos, special)
        if count < 0:
            size = -count
            buffer = np.empty(size, np.int32)
            pointer = buffer.ctypes.data_as(L.llama_token_p)
            count = self._look_up(L.llama_tokenize, data, len(data), pointer, size, bos, special)
        return buffer[:count].copy()

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes of one token; control tokens are empty unless `special`.

        Raises:
            LaserKVError: the vocabulary has no such token, for which llama.cpp ends the process.
        """
        if not 0 <= token < self.vocab_size:
            raise LaserKVError(f"{token} is no token of this model, which has {self.vocab_size}")
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = self._look_up(L.llama_token_to_piece, token, buffer, size, 0, special)
            if length >= 0:
                return buffer.raw[:length]
            size = -length

    def text(self, tokens: Tokens, *, special: bool = False) -> str:
        data = b"".join(self.piece(int(token), special=special) for token in tokens)
        return data.decode("utf-8", "replace")

    def ends_generation(self, token: int) -> bool:
        return bool(self._look_up(L.llama_vocab_is_eog, token))

    @property
    def adds_bos(self) -> bool:
        return bool(self._look_up(L.llama_vocab_get_add_bos))

    def special_text(self, token: int) -> str:
        """A control token as the template writes it; empty for none."""
        return "" if token < 0 else self.piece(token, special=True).decode("utf-8", "replace")

    @property
    def bos(self) -> int:
        """The token that begins a text, -1 for none."""
        return int(self._look_up(L.llama_vocab_bos))

    @cached_property
    def bos_text(self) -> str:
        return self.special_text(self.bos)

    @cached_property
    def eos_text(self) -> str:
        return self.special_text(int(self._look_up(L.llama_vocab_eos)))


class PieceDecoder:
    """Turns tokens into text as they come; a character split over tokens waits for its rest."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        return self._decoder.decode(self._model.piece(token))

    def finish(self) -> str:
        return self._decoder.decode(b"", True)


def check_file(path: Path) -> None:
    """Refuses what is not a GGUF file before llama.cpp sees it.

    Raises:
        UserError: missing, a folder, unreadable, or without GGUF's magic number.
    """
    try:
        check_plain(path)
        with path.open("rb") as file:
            magic = file.read(4)
    except FileNotFoundError:
        raise UserError(
            f"no model at {path}; give the path of a GGUF file, "
            "or leave --model out for the embedded SmolLM2"
        ) from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; give the GGUF file in it") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if magic != b"GGUF":
        raise UserError(
            f"{path.name} is not a GGUF file (it begins with {magic!r}); "
            "convert it with llama.cpp's convert_hf_to_gguf.py, or download a GGUF"
        )


def _why_not_loaded(path: Path, lines: list[str]) -> str:
    said = " ".join(lines)
    if "corrupted or incomplete" in said or "failed to read" in said or "tensor data" in said:
        return f"{path.name} is truncated or damaged; download it again"
    if "unknown model architecture" in said:
        name = said.split("unknown model architecture:")[-1].split("'")[1:2]
        kind = short(name[0]) if name else "new"
        return (
            f"{path.name} is a {kind} model, which this llama.cpp does not know; "
            "upgrade llama-cpp-python"
        )
    detail = next((line for line in lines if "error loading model" in line), "")
    detail = detail.split("error loading model:")[-1].strip() or "see --debug"
    return f"llama.cpp cannot load {path.name}: {short(detail, 200)}"
