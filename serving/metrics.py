"""What the server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from prunetune.serving.job import Usage

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        own = CollectorRegistry()
        self.registry = own
        self.requests = Counter("prunetune_requests", "Requests by HTTP status", ["status"], registry=own)
        self.in_flight = Gauge("prunetune_requests_in_flight", "Requests that are not answered yet", registry=own)
        self.waiting = Gauge("prunetune_requests_waiting", "Requests in the queue", registry=own)
        self.batches = Histogram("prunetune_batch_size", "Requests of a batch", buckets=_SIZES, registry=own)
        self.queued = Histogram("prunetune_queue_seconds", "Waiting for a batch", buckets=_SECONDS, registry=own)
        self.first = Histogram("prunetune_first_text_seconds", "Until the first text", buckets=_SECONDS, registry=own)
        self.seconds = Histogram("prunetune_request_seconds", "Until the whole answer", buckets=_SECONDS, registry=own)
        self.prompt = Counter("prunetune_prompt_tokens", "Tokens that the LLM read", registry=own)
        self.completion = Counter("prunetune_completion_tokens", "Tokens that the LLM wrote", registry=own)
        self.kept = Counter("prunetune_visual_tokens_kept", "Visual tokens that reached the LLM", registry=own)
        self.pruned = Counter("prunetune_visual_tokens_pruned", "Visual tokens that were pruned", registry=own)

    def count(self, usage: Usage) -> None:
        """Add an answer's tokens."""
        self.prompt.inc(usage.prompt)
        self.completion.inc(usage.completion)
        self.kept.inc(usage.kept)
        self.pruned.inc(usage.visual - usage.kept)

    def text(self) -> bytes:
        """Return all of it in Prometheus's text format."""
        return generate_latest(self.registry)
