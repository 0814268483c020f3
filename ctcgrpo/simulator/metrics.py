"""What a simulator server tells Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from ctcgrpo.llm_client.endpoints import CallRecord

_NAMESPACE = "ctcgrpo_simulator"
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.05, 0.2, 0.5, 1, 2, 5, 10, 20, 40, 80, 160)


class ServerMetrics:
    """A registry of its own for each server, so that several live in one process."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(name, what, labels, namespace=_NAMESPACE, registry=registry)

        def seconds(name: str, what: str, *labels: str) -> Histogram:
            return Histogram(name, what, labels, namespace=_NAMESPACE, registry=registry, buckets=_SECONDS)

        self.turns = counter("turns", "Turns by scene and result (ok, or the kind of error)", "scene", "result")
        self.refused = counter("refused", "Requests refused before the token was checked, by status", "status")
        self.source = counter("answers", "Answers by where they came from", "source")
        self.seconds = seconds("turn_seconds", "From a request to its answer")
        self.under_way = Gauge("turns_under_way", "Turns being answered", namespace=_NAMESPACE, registry=registry)
        self.calls = counter("calls", "Calls to endpoints by result", "endpoint", "result")
        self.call_seconds = seconds("call_seconds", "A call to an endpoint", "endpoint")
        self.tokens = counter("tokens", "Tokens booked", "endpoint", "kind")
        self.money = counter("money", "Money booked, in the budget's currency", "endpoint")

    def on_call(self, record: CallRecord) -> None:
        self.calls.labels(record.endpoint, record.result).inc()
        self.call_seconds.labels(record.endpoint).observe(record.seconds)
        self.tokens.labels(record.endpoint, "prompt").inc(record.spent.prompt_tokens)
        self.tokens.labels(record.endpoint, "completion").inc(record.spent.completion_tokens)
        self.money.labels(record.endpoint).inc(record.spent.money / 1e6)
