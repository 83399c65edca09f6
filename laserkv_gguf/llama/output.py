"""What a value adds to the stream: norms by the attention's output matrix, read out of the GGUF.

CriticalKV (arXiv 2502.03805) weighs attention by ‖W_o v‖ in place of ‖v‖. W_o maps the values of
all heads to the stream; the columns of one query head h are W_h. A kv head's value is read by the
`heads / kv_heads` query heads of its group, so its norm here is the root mean square of theirs,

    sqrt(mean over h of ‖W_h v‖²) = ‖F v‖,   F = (mean over h of W_hᵀ W_h)^(1/2),

which needs one symmetric matrix (head_dim, head_dim) a kv head and no row of W_o any more.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from laserkv_gguf.errors import UserError
from laserkv_gguf.llama.model import Model

_REMEDY = "use --policy-option values=norm"


def factors(model: Model) -> NDArray[np.float32]:
    """F of every layer and kv head: (layers, kv_heads, value_dim, value_dim) float32, symmetric.

    Read once a model: seconds for one of billions of weights.

    Raises:
        UserError: the file has no such matrices, or their type cannot be read.
    """
    shape = model.layers, model.heads, model.kv_heads, model.value_dim
    return _factors(model.path, model.path.stat().st_mtime_ns, *shape)


@lru_cache(maxsize=2)
def _factors(
    path: Path, _changed: int, layers: int, heads: int, kv_heads: int, dim: int
) -> NDArray[np.float32]:
    try:
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    except Exception as error:  # what the gguf package raises is not documented
        raise UserError(f"{path.name}: its tensors cannot be listed ({error}); {_REMEDY}") from None
    result = np.empty((layers, kv_heads, dim, dim), np.float32)
    for layer in range(layers):
        name = f"blk.{layer}.attn_output.weight"
        if name not in tensors:
            raise UserError(f"{path.name} has no {name}, which values=output needs; {_REMEDY}")
        tensor = tensors[name]
        try:
            matrix = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise UserError(f"{name} is of type {kind}, which cannot be read; {_REMEDY}") from None
        if matrix.shape[-1] != heads * dim:
            raise UserError(f"{name} does not map {heads} heads of {dim} values; {_REMEDY}")
        grouped = np.asarray(matrix, np.float32).reshape(-1, kv_heads, heads // kv_heads * dim)
        for head in range(kv_heads):
            columns = grouped[:, head].reshape(-1, dim)  # the outputs of all heads of the group
            result[layer, head] = _root(columns.T @ columns * (kv_heads / heads))
    result.flags.writeable = False
    return result


def _root(matrix: NDArray[np.float32]) -> NDArray[np.float64]:
    """The symmetric square root of a matrix that has no negative eigenvalues."""
    values, vectors = np.linalg.eigh(matrix.astype(np.float64))
    root: NDArray[np.float64] = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    return root
