"""What people use instead of a compressed cache, by name; they stand beside the policies."""

from __future__ import annotations

from laserkv_gguf.evaluation.peers.base import Case, Peer
from laserkv_gguf.evaluation.peers.bm25 import Bm25
from laserkv_gguf.evaluation.peers.quantised import Quantised
from laserkv_gguf.evaluation.peers.shift import Shift

__all__ = ["PEERS", "Case", "Peer"]

PEERS: dict[str, type[Peer]] = {kind.name: kind for kind in (Bm25, Shift, Quantised)}
