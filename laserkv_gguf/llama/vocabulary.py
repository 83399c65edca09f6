"""Counts tokens with a model's vocabulary alone."""

from __future__ import annotations

import os
from pathlib import Path

import llama_cpp as L
import numpy as np

from laserkv_gguf.errors import UserError
from laserkv_gguf.llama import library, loadable
from laserkv_gguf.llama.model import check_file


def count_tokens(path: Path, text: str) -> int:
    """How many tokens a text has; the file's weights are not read.

    Raises:
        UserError: llama.cpp cannot read the vocabulary, as of an incomplete file.
    """
    check_file(path)
    loadable.check(path)
    library.start()
    params = L.llama_model_default_params()
    params.vocab_only = True
    model = L.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise UserError(
            f"llama.cpp cannot read the vocabulary of {path.name} (is the file complete?); "
            "give --tokens instead of --document"
        )
    try:
        data = text.encode("utf-8")
        none = np.empty(0, np.int32).ctypes.data_as(L.llama_token_p)
        vocab = L.llama_model_get_vocab(model)
        # with no room for them it answers minus their number
        return -int(L.llama_tokenize(vocab, data, len(data), none, 0, False, False))
    finally:
        L.llama_model_free(model)
