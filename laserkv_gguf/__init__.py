"""Long documents for GGUF models on small memory: LASER-KV on llama.cpp."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from laserkv_gguf.version import VERSION

if TYPE_CHECKING:
    from laserkv_gguf.api import LaserKV
    from laserkv_gguf.conversation.account import Account
    from laserkv_gguf.conversation.conversation import Conversation
    from laserkv_gguf.conversation.generation import Reply
    from laserkv_gguf.conversation.many import Outcome, Request
    from laserkv_gguf.errors import Cancelled, Closed, LaserKVError, UserError
    from laserkv_gguf.llama.context import ContextOptions
    from laserkv_gguf.llama.sampler import Sampling

__version__ = VERSION

__all__ = [
    "Account",
    "Cancelled",
    "Closed",
    "ContextOptions",
    "Conversation",
    "LaserKV",
    "LaserKVError",
    "Outcome",
    "Reply",
    "Request",
    "Sampling",
    "UserError",
]

_HOMES = {
    "Account": "conversation.account",
    "Cancelled": "errors",
    "Closed": "errors",
    "ContextOptions": "llama.context",
    "Conversation": "conversation.conversation",
    "LaserKV": "api",
    "LaserKVError": "errors",
    "Outcome": "conversation.many",
    "Reply": "conversation.generation",
    "Request": "conversation.many",
    "Sampling": "llama.sampler",
    "UserError": "errors",
}


def __getattr__(name: str) -> Any:
    """Imports on first use: `--help` and the policies need neither llama.cpp nor Numba."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
