"""What an answer could see of its document: the retention report, for the page and for others."""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict

from laserkv_gguf.errors import UserError
from laserkv_gguf.retention import page, spans
from laserkv_gguf.server.errors import ApiError
from laserkv_gguf.server.store import Store

_MOST = 16  # reports that can be looked at, the newest
_PATIENCE = 120.0  # seconds to wait for a question about the same document

HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; img-src data:; frame-ancestors 'self'; sandbox allow-scripts "
    "allow-popups",
    "x-frame-options": "SAMEORIGIN",
    "cache-control": "no-store",
}
"""A report has its script in it; it may do nothing else, and knows nothing of the server."""


class Reports:
    """Reports that were made, by addresses that nobody can guess: a frame sends no key."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._made: OrderedDict[str, str] = OrderedDict()
        self._lock = threading.Lock()

    def make(self, owner: str, document: str) -> str:
        """Makes the report of a document's last question; returns what to find it by.

        Raises:
            ApiError: there is no such document any more, or it is another client's.
        """
        found = [one for one in self.store.entries() if one.id == document and one.owner == owner]
        if not found:
            raise _gone()
        entry = found[0]
        if not entry.lock.acquire(timeout=_PATIENCE):
            raise ApiError(
                503, "the document is being asked; try again", headers={"Retry-After": "5"}
            )
        try:
            if entry.dead or entry.conversation is None:
                raise _gone()
            text = page.render([spans.of(entry.conversation)])
        except UserError as error:
            raise ApiError(404, str(error)) from None
        finally:
            entry.lock.release()
        name = secrets.token_urlsafe(24)
        with self._lock:
            self._made[name] = text
            while len(self._made) > _MOST:
                self._made.popitem(last=False)
        return name

    def text(self, name: str) -> str:
        with self._lock:
            text = self._made.get(name)
        if text is None:
            raise _gone()
        return text


def _gone() -> ApiError:
    return ApiError(404, "there is no such document any more; ask about it again")
