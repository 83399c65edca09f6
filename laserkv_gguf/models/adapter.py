"""Whether a LoRA adapter fits a model, from both headers alone."""

from __future__ import annotations

from pathlib import Path

from laserkv_gguf.errors import UserError
from laserkv_gguf.models.header import Contents, Tensor, opened, parts
from laserkv_gguf.shown import short

_A, _B = ".lora_a", ".lora_b"
_EMBEDDING = "token_embd.weight"


def check(adapter: Path, model: Path) -> None:
    """Refuses an adapter that was not made for a model.

    Raises:
        UserError: no adapter, one of another model, or a file that is missing or damaged.
    """
    if not adapter.exists():
        raise UserError(f"no adapter at {adapter}; give --lora the path of a LoRA in GGUF")
    with opened(adapter) as data:
        found = data.header()
    name = adapter.name
    if found.metadata.get("general.type") != "adapter":
        raise UserError(f"--lora {name} is a model, not an adapter; give it with --model")
    kind = found.metadata.get("adapter.type")
    if kind != "lora" or "adapter.alora.invocation_tokens" in found.metadata:
        said = short(kind) if kind != "lora" else "aLoRA"
        raise UserError(f"--lora {name} is an adapter of type {said}; only plain LoRA can be used")
    base, tensors = _of_model(model)
    architecture = base.metadata.get("general.architecture")
    wanted = found.metadata.get("general.architecture")
    if wanted != architecture:
        raise _foreign(name, model, f"it adapts a {short(wanted)} model")
    by_name = {tensor.name: tensor for tensor in found.tensors}
    ends = {tensor.name.removesuffix(_A).removesuffix(_B) for tensor in found.tensors}
    for target in sorted(ends):
        if target.endswith("_norm.weight") and target in by_name:
            continue  # llama.cpp leaves these out
        a, b = by_name.get(target + _A), by_name.get(target + _B)
        if a is None or b is None or len(a.dims) < 2 or len(b.dims) < 2:
            raise UserError(f"--lora {name} is damaged at {short(target)}; convert it again")
        if target not in tensors:
            raise _foreign(name, model, f"the model has no {short(target)}")
        if not _fits(tensors[target], a, b):
            raise _foreign(name, model, f"{short(target)} has another shape there")


def _of_model(model: Path) -> tuple[Contents, dict[str, Tensor]]:
    with opened(model) as data:
        contents = data.header()
    tensors = list(contents.tensors)
    for part in parts(model, contents.metadata):
        with opened(part) as data:
            tensors += data.header().tensors
    return contents, {tensor.name: tensor for tensor in tensors}


def _fits(tensor: Tensor, a: Tensor, b: Tensor) -> bool:
    if len(tensor.dims) < 2 or len(tensor.dims) != len(a.dims) or len(a.dims) != len(b.dims):
        return False
    if tensor.name.endswith(_EMBEDDING):  # turned the other way round
        return tensor.dims[:2] == (b.dims[1], a.dims[1]) and a.dims[0] == b.dims[0]
    return tensor.dims[:2] == (a.dims[0], b.dims[1]) and a.dims[1] == b.dims[0]


def _foreign(name: str, model: Path, why: str) -> UserError:
    return UserError(
        f"--lora {name} was made for another model than {model.name}: {why}; "
        "give the model that it was trained on"
    )
