"""What Prometheus reads at /metrics."""

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from modalloy.serve.queue import Running

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The server's counters, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = kept = CollectorRegistry()
        self.requests = Counter(
            "modalloy_requests", "Requests, by route and HTTP status.", ["route", "status"], registry=kept
        )
        self.queue = Gauge(
            "modalloy_requests_under_way", "Requests read, waiting or being answered.", ["model"], registry=kept
        )
        self.running = Gauge("modalloy_rows", "Requests whose tokens are being made.", ["model"], registry=kept)
        self.kept = Gauge(
            "modalloy_kept_bytes", "Keys and values of earlier turns that are kept.", ["model"], registry=kept
        )
        self.known = Gauge("modalloy_known_bytes", "Media that are known, encoded.", ["model"], registry=kept)
        self.tokens = Counter(
            "modalloy_tokens",
            "Tokens of prompts by modality, and of answers.",
            ["model", "kind", "modality"],
            registry=kept,
        )
        self.reused = Counter(
            "modalloy_reused_tokens",
            "Tokens of prompts that earlier requests had left known.",
            ["model"],
            registry=kept,
        )
        self.gone = Counter("modalloy_abandoned", "Requests whose client went away.", ["model"], registry=kept)
        self.first_token = Histogram(
            "modalloy_time_to_first_token_seconds",
            "From a request to its first token.",
            ["model"],
            buckets=SECONDS,
            registry=kept,
        )
        self.latency = Histogram(
            "modalloy_request_seconds",
            "From a request to the end of its answer.",
            ["model"],
            buckets=SECONDS,
            registry=kept,
        )

    def answered(self, model: str, owners: tuple[str, ...], running: "Running") -> None:
        """Count a request that was answered, or whose client went away."""
        if running.answer.finished is None:
            self.gone.labels(model).inc()
        for index, name in enumerate(owners):
            if count := running.prompt.owners.count(index):
                self.tokens.labels(model, "prompt", name).inc(count)
        self.tokens.labels(model, "completion", "text").inc(running.answer.new_tokens)
        self.reused.labels(model).inc(running.reused)
        if running.first_s is not None:
            self.first_token.labels(model).observe(running.first_s)
        self.latency.labels(model).observe((running.ended or running.arrived) - running.arrived)

    def page(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self.registry)
