"""llama.cpp's own sampler chain."""

from __future__ import annotations

from dataclasses import dataclass

import llama_cpp as L
import numpy as np

from laserkv_gguf.errors import LaserKVError


@dataclass(frozen=True)
class Sampling:
    """llama.cpp's sampling parameters, in its order: top-k, top-p, min-p, temperature.

    A temperature of 0 or less is greedy: the most likely token, whatever the seed.
    """

    temperature: float = 0.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    seed: int = 0


class Sampler:
    """A sampler chain; close it."""

    def __init__(self, sampling: Sampling) -> None:
        self.chain = L.llama_sampler_chain_init(L.llama_sampler_chain_default_params())
        if sampling.temperature <= 0:
            L.llama_sampler_chain_add(self.chain, L.llama_sampler_init_greedy())
            return
        for sampler in (
            L.llama_sampler_init_top_k(sampling.top_k),
            L.llama_sampler_init_top_p(sampling.top_p, 1),
            L.llama_sampler_init_min_p(sampling.min_p, 1),
            L.llama_sampler_init_temp(sampling.temperature),
            L.llama_sampler_init_dist(sampling.seed & 0xFFFFFFFF),
        ):
            L.llama_sampler_chain_add(self.chain, sampler)

    def sample(self, context: int, index: int = -1) -> int:
        """Chooses and accepts a token from the logits of output `index` (-1: the last).

        Raises:
            LaserKVError: they are no numbers (a saved file or a model may be damaged), by which
                llama.cpp would sort tokens out of bounds.
        """
        vocab = L.llama_model_get_vocab(L.llama_get_model(context))
        logits = L.llama_get_logits_ith(context, index)
        if np.isnan(np.ctypeslib.as_array(logits, (L.llama_vocab_n_tokens(vocab),))).any():
            raise LaserKVError(
                "the model computed no numbers here: what it read, or its file, is damaged"
            )
        return int(L.llama_sampler_sample(self.chain, context, index))

    def close(self) -> None:
        if self.chain:
            L.llama_sampler_free(self.chain)
            self.chain = None

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
