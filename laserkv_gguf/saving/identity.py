"""What a saved file must agree with to be loaded, and the settings it was made with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from laserkv_gguf.engine.engine import Engine
from laserkv_gguf.llama import library
from laserkv_gguf.models.identity import identity
from laserkv_gguf.saving.fields import SETTINGS
from laserkv_gguf.version import VERSION

_SHORT = 100  # characters


def made_with(engine: Engine) -> dict[str, Any]:
    """What a file must agree with to be loaded, and the settings it was made with."""
    options = engine.options
    file = identity(engine.model.path)
    return {
        "version": VERSION,
        "model": {"name": engine.model.name, "bytes": file.bytes, "samples": file.samples},
        "build": library.version(),
        "cache": options.said(engine.model.gpu_layers != 0) + _changed(engine),
        "settings": {name: _plain(getattr(engine.settings, name)) for name in SETTINGS},
        "context": {name: getattr(options, name) for name in ("type_k", "type_v", "flash_attn")},
    }


def _changed(engine: Engine) -> str:
    """What beside the model file the rows depend on: scaled positions and adapters, by contents."""
    said = "".join(
        f" --{name.replace('_', '-')} {value}"
        for name, value in engine.model.placement.changes().items()
    )
    if len(said) <= _SHORT:
        return said
    return f" and --rope-…, --lora #{hashlib.sha256(said.encode()).hexdigest()[:16]}"


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value
