"""What a server is started with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from laserkv_gguf.errors import UserError
from laserkv_gguf.llama.sampler import Sampling

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class ServerSettings:
    """What a server is started with; sizes in bytes, times in seconds.

    Attributes:
        host, port: where it listens; port 0 for any free one, which is printed.
        api_keys: one of them has to come with every request; none for no key.
        cors_origins: pages of these origins may call, beside those the server brings itself.
        allowed_hosts: names by which the server may be called, where it is bound to this machine
            alone: beside its own ones. A page of somewhere else that had its name point here would
            come by another.
        model_name: what `/v1/models` calls the model.
        workers: requests that are worked on at a time.
        queue: requests that may wait; one more gets 503.
        sampling, max_tokens: where a request does not say.
        body: largest request.
        body_seconds: in which a request has to arrive.
        request_seconds: in which it has to be answered, waiting and reading included.
        keep_alive: a stream says something at least so often while nothing is generated.
        grace: at the end running answers may go on for so long.
        cache_dir: where read documents and uploaded files are; None for memory alone.
        cache_bytes: of read documents there.
        memory: bytes of evicted tokens' rows in memory, of all documents together.
        conversations: how many are known at a time.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    model_name: str = ""
    workers: int = 4
    queue: int = 64
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = 1024
    body: int = 64 << 20
    body_seconds: float = 60.0
    request_seconds: float = 3600.0
    keep_alive: float = 10.0
    grace: float = 10.0
    cache_dir: Path | None = None
    cache_bytes: int = 16 << 30
    memory: int = 4 << 30
    conversations: int = 64

    @property
    def local(self) -> bool:
        """Whether only this machine can reach it."""
        return self.host in LOOPBACK

    def check(self) -> None:
        """Refuses unusable values.

        Raises:
            UserError: with the remedy in one line.
        """
        if not 0 <= self.port <= 65535:
            raise UserError(f"--port {self.port}: give 1 to 65535, or 0 for any free one")
        if any(not key.strip() for key in self.api_keys):
            raise UserError("--api-key is empty; leave it out for none")
        for flag, value in (
            ("--parallel", self.workers),
            ("--queue", self.queue),
            ("--max-body", self.body),
            ("--predict", self.max_tokens),
            ("--conversations", self.conversations),
        ):
            if value < 1:
                raise UserError(f"{flag} {value}: give at least 1")
        for flag, seconds in (
            ("--body-timeout", self.body_seconds),
            ("--timeout", self.request_seconds),
            ("--keep-alive", self.keep_alive),
        ):
            if not seconds > 0:
                raise UserError(f"{flag} {seconds:g}: give seconds above 0")
        for flag, value in (("--cache-limit", self.cache_bytes), ("--memory-limit", self.memory)):
            if value < 0:
                raise UserError(f"{flag} {value}: give bytes, or 0 for none")
