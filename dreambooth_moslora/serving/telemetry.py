"""The metrics that Prometheus reads at `/metrics`."""

from dreambooth_moslora.serving.orders import Drawn

__all__ = ["CONTENT_TYPE", "Telemetry"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300)
BATCH = (1, 2, 4, 8, 16, 32)


class Telemetry:
    """Metrics of one front. They contain no prompt, adapter name or client."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = CollectorRegistry()
        own = {"registry": self.registry, "namespace": "dreambooth"}
        self.requests = Counter("requests", "Answers to /generate", ["status"], **own)
        self.pictures = Counter("pictures", "Pictures drawn", **own)
        self.seconds = Histogram("request_seconds", "From request to picture", buckets=SECONDS, **own)
        self.batch = Histogram("batch_size", "Orders of a picture's batch", buckets=BATCH, **own)
        self.inside = Gauge("requests_inside", "Requests that wait or are drawn", **own)
        self.loads = Gauge("adapter_loads", "Adapters loaded since the replica's start", ["replica"], **own)
        self.memory = Gauge("replica_memory_bytes", "Resident memory at its last picture", ["replica"], **own)

    def note_picture(self, drawn: Drawn, seconds: float) -> None:
        self.pictures.inc()
        self.seconds.observe(seconds)
        self.batch.observe(drawn.batch_size)
        self.loads.labels(drawn.replica).set(drawn.adapter_loads)
        self.memory.labels(drawn.replica).set(drawn.memory_bytes)

    def text(self) -> bytes:
        from prometheus_client import generate_latest

        return generate_latest(self.registry)
