"""What happens in the server, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from laserkv_gguf.server.store import Store
from laserkv_gguf.server.work import Done, Works

_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)


class Metrics:
    """Counters of this server; each server has its own."""

    def __init__(self, works: Works, store: Store) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Now(works, store))
        self.requests = Counter(
            "laserkv_requests", "Requests by path and status.", ["path", "status"],
            registry=self.registry,
        )  # fmt: skip
        self.tokens = Counter(
            "laserkv_tokens", "Tokens: prompt, cached (of these), generated.", ["kind"],
            registry=self.registry,
        )  # fmt: skip
        self.found = Counter(
            "laserkv_found", "Where what a request began with was found.", ["where"],
            registry=self.registry,
        )  # fmt: skip
        self.first = Histogram(
            "laserkv_first_token_seconds", "From a thread's start to the first token.",
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.waited = Histogram(
            "laserkv_waited_seconds", "Before a thread was free.",
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip

    def done(self, done: Done, prompt: int) -> None:
        self.tokens.labels("prompt").inc(prompt)
        self.tokens.labels("cached").inc(done.there)
        self.tokens.labels("generated").inc(len(done.reply.tokens))
        self.found.labels(done.found).inc()
        self.first.observe(done.first)
        self.waited.observe(done.waited)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Now(Collector):
    """What is so at the moment it is asked for."""

    def __init__(self, works: Works, store: Store) -> None:
        self.works, self.store = works, store

    def collect(self) -> Iterator[Metric]:
        places = GaugeMetricFamily(
            "laserkv_conversations", "Conversations by where they are.", labels=["where"]
        )
        found: dict[str, int] = {}
        for entry in self.store.entries():
            where = self.store.where(entry)
            found[where] = found.get(where, 0) + 1
        for where, count in found.items():
            places.add_metric([where], count)
        yield places
        disk = self.store.disk
        for name, text, value in (
            ("laserkv_running", "Requests that are worked on.", self.works.running),
            ("laserkv_waiting", "Requests that wait for a thread.", self.works.waiting),
            ("laserkv_parked_bytes", "Rows of evicted tokens.", self.store.parked_bytes),
            ("laserkv_disk_bytes", "Documents on disk.", disk.bytes if disk else 0),
        ):
            yield GaugeMetricFamily(name, text, value=value)
