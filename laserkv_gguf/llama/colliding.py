"""Collisions of queries and keys as a ggml graph, beside the attention of `scorer`.

What `kernels.simhash` counts on the host (arXiv 2602.02199, step 5; MagicPIG, arXiv 2410.16179):
keys are centred on their mean; a table's signature is the signs of `bits` random projections. As
+1 and -1 the signs of two signatures have a product of `bits` where all agree, and less elsewhere.
The analytic rule needs an arc cosine, which ggml has not: it is the polynomial of Abramowitz and
Stegun, Handbook of Mathematical Functions, 4.4.46, which is off by 2e-8 at most.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import pi
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ARC = (
    *(1.5707963050, -0.2145988016, 0.0889789874, -0.0501743046),
    *(0.0308918810, -0.0170881256, 0.0066700901, -0.0012624911),
)  # acos(x) = sqrt(1 - x) * sum(a_i * x^i) for x in 0 … 1


@dataclass(frozen=True)
class Collisions:
    """What counts as a collision; as `policies.laser.Laser` says it."""

    rule: str
    bits: int
    tables: int
    seed: int

    @property
    def signs(self) -> int:
        """Projections of a vector; none where the angle itself counts."""
        return 0 if self.rule == "analytic" else self.bits * self.tables

    @property
    def copies(self) -> int:
        """Numbers held at a time for a query and a key."""
        return 6 if self.rule == "analytic" else 4 * self.tables

    @property
    def nodes(self) -> int:
        """Tensors that the scores of some queries are described with, at most."""
        return 64

    def planes(self, dim: int) -> NDArray[np.float32] | None:
        """The kernels' hyperplanes, (tables * bits, head_dim); None where none are used."""
        if not self.signs:
            return None
        from laserkv_gguf import kernels

        return kernels.planes(dim, self.bits, self.tables, self.seed)


class Colliding:
    """Describes the scores of some kv heads' keys; shapes are ggml's, fastest axis first.

    Args:
        ggml: its functions.
        at: where tensors are described.
        how: what counts.
        planes: tensor (head_dim, tables * bits).

    Attributes:
        nodes: all that a device must be able to compute.
    """

    def __init__(self, ggml: Any, at: Any, how: Collisions, planes: int) -> None:
        self.ggml, self.at, self.how, self.planes = ggml, at, how, planes
        self.nodes: list[int] = []
        self._keys = self._count = self._heads = 0

    def use_keys(self, by_head: int, dim: int, count: int, heads: int) -> None:
        """Centres the keys, (head_dim, C, heads), on their mean over the candidates."""
        self._count, self._heads = count, heads
        keys = self._new("cont", by_head)
        across = self._new("cont", self.ggml.permute(self.at, keys, 1, 0, 2, 3))
        mean = self.ggml.reshape_3d(self.at, self._new("mean", across), dim, 1, heads)
        self._keys = self._ready(self._new("sub", keys, mean), count)

    def scores(self, queries: int, rows: int) -> int:
        """What queries (head_dim, rows, heads) give the keys, all together: (1, C)."""
        asked = self._ready(queries, rows)
        if self.how.rule == "analytic":
            worth, each = self._expected(asked), rows * self._heads
        else:
            worth, each = self._hits(asked, rows)
        flat = self.ggml.reshape_3d(self.at, worth, self._count, each, 1)
        return self._new("sum_rows", self._turned(flat, 1, 0, 2, 3))

    def _new(self, name: str, *given: Any) -> int:
        node = int(getattr(self.ggml, name)(self.at, *given))
        self.nodes.append(node)
        return node

    def _turned(self, tensor: int, *axes: int) -> int:
        return self._new("cont", self.ggml.permute(self.at, tensor, *axes))

    def _product(self, left: int, right: int) -> int:
        product = self._new("mul_mat", left, right)
        self.ggml.mul_mat_set_prec(product, 10)  # GGML_PREC_F32
        return product

    def _ready(self, vectors: int, count: int) -> int:
        """Of length 1, or the signs by tables: (bits, count, tables, heads) of +1 and -1."""
        if self.how.rule == "analytic":
            return self._new("l2_norm", vectors, 1e-20)
        below = self._new("scale_bias", self._product(self.planes, vectors), -1.0, 0.0)
        signs = self._new("scale_bias", self._new("step", below), -2.0, 1.0)  # of 0 it is +1
        bits, tables, total = self.how.bits, self.how.tables, self.how.signs
        by_table = self.ggml.view_4d(
            *(self.at, signs, bits, tables, count, self._heads),
            *(4 * bits, 4 * total, 4 * total * count, 0),
        )
        return self._turned(by_table, 0, 2, 1, 3)

    def _hits(self, asked: int, rows: int) -> tuple[int, int]:
        """1 for every collision, (C, rows, tables, heads); of "magicpig" (C, rows, heads)."""
        agree = self._product(self._keys, asked)
        less = self._new("scale_bias", agree, 1.0, 0.5 - self.how.bits)
        hits, each = self._new("step", less), rows * self.how.tables * self._heads
        if self.how.rule == "fraction":
            return hits, each
        counts = self._new("sum_rows", self._turned(hits, 1, 2, 0, 3))  # (1, C, rows, heads)
        return self._new("step", self._new("scale_bias", counts, 1.0, -1.5)), rows * self._heads

    def _expected(self, asked: int) -> int:
        """(1 - θ/π)^bits: (C, rows, heads)."""
        cosine = self._new("clamp", self._product(self._keys, asked), -1.0, 1.0)
        size = self._new("abs", cosine)
        arc = self._new("scale_bias", size, _ARC[-1], _ARC[-2])
        for factor in reversed(_ARC[:-2]):
            arc = self._new("scale_bias", self._new("mul", arc, size), 1.0, factor)
        root = self._new("sqrt", self._new("scale_bias", size, -1.0, 1.0))
        above = self._new("scale_bias", self._new("mul", arc, root), -1 / pi, 0.5)
        below = self._new("step", self._new("scale_bias", cosine, -1.0, 0.0))
        sign = self._new("scale_bias", below, -2.0, 1.0)
        share = self._new("scale_bias", self._new("mul", above, sign), 1.0, 0.5)
        power = share
        for bit in bin(self.how.bits)[3:]:
            power = self._new("mul", power, power)
            if bit == "1":
                power = self._new("mul", power, share)
        return power
