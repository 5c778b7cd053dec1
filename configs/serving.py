"""Options of ``prunetune serve``: one arm behind an OpenAI-compatible endpoint."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from prunetune.configs.schema import ModelConfig, PluggedConfig, Section
from prunetune.pruning.spec import PruningSpec


class BatchingConfig(Section):
    """How requests wait, and which of them are answered together."""

    max_batch: int = Field(16, ge=1, description="most requests of one micro-batch")
    wait_ms: float = Field(5.0, ge=0, description="milliseconds that a batch waits to fill after its first request")
    max_waiting: int = Field(1024, ge=1, description="requests that may wait; one more is refused with 429")


class LimitsConfig(Section):
    """What a request may hold; whatever is above is refused before the model sees it."""

    max_body: int = Field(32_000_000, ge=1, description="bytes of a request")
    max_images: int = Field(8, ge=0, description="images of a request")
    max_pixels: int = Field(
        20_000_000, ge=1, description="images with more pixels are refused before they are decoded, 3 bytes each"
    )
    max_waiting_pixels: int = Field(
        1_000_000_000, ge=1, description="pixels of the images of all requests that wait or run, 3 bytes each; a "
        "request above is refused with 429"
    )  # fmt: skip
    max_tokens: int = Field(
        512, ge=1, description="longest answer of a request that does not ask for one, in tokens; shorter where the "
        "context ends"
    )  # fmt: skip
    body_seconds: float = Field(30.0, gt=0, description="a client that takes longer to send its request is refused")
    answer_seconds: float = Field(300.0, gt=0, description="a request that takes longer is given up with 504")
    image_hosts: list[str] = Field(
        default_factory=list,
        description="hosts whose http and https image URLs are fetched; none: data: URLs alone. Private addresses are "
        "refused, whatever a host's name resolves to",
    )
    image_root: str | None = Field(None, description="folder below which file: image URLs are read; None: none is read")


class EngineClientConfig(Section):
    """The stock engine that answers, where it is not this process."""

    url: str = Field("http://127.0.0.1:8001", description="where the engine listens; on one host: features are large")
    model: str | None = Field(None, description="the engine's name of the model; None is the only one that it has")
    in_flight: int = Field(64, ge=1, description="requests that the engine is given at once")
    questions: int = Field(
        4, ge=0, description="reference questions that both paths answer before the port opens; 0 asks none"
    )
    references: str | None = Field(
        None, description="reference.json of `prunetune export --for vllm`; None draws pictures and asks about them"
    )
    keep_llm: bool = Field(
        False, description="keep the LLM's layers here after the questions; they are of no use beside an engine"
    )


class ServeConfig(PluggedConfig):
    """Serve one arm."""

    model: ModelConfig
    pruning: PruningSpec = PruningSpec()
    adapter: str | None = Field(None, description="folder of a recalibrated projector; None is training-free")
    engine: Literal["embedded", "vllm"] = Field(
        "embedded",
        description="who runs the LLM: this process, for every family, or a vLLM server that is given the kept, "
        "projected features",
    )
    name: str | None = Field(None, description="what clients call the model; None is the last part of its path")
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 is every one, and nothing here asks who")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one and prints it")
    temperature: float = Field(
        0.0, ge=0, le=2, description="of requests that name none; 0 is greedy, as `prunetune evaluate`"
    )
    device: str | None = Field(None, description="cuda, cuda:1 or cpu; None is the GPU if there is one")
    grace: float = Field(60.0, gt=0, description="seconds between SIGTERM or Ctrl-C and the end of unfinished answers")
    batching: BatchingConfig = BatchingConfig()
    limits: LimitsConfig = LimitsConfig()
    vllm: EngineClientConfig = EngineClientConfig()

    @property
    def served_name(self) -> str:
        """What clients call the model."""
        return self.name or self.model.path.rstrip("/").rpartition("/")[2]

    @model_validator(mode="before")
    @classmethod
    def _model_by_path(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("model"), str):
            return {**values, "model": {"path": values["model"]}}
        return values

    @model_validator(mode="after")
    def _names_an_engine(self) -> ServeConfig:
        if not self.vllm.url.startswith(("http://", "https://")):
            raise ValueError(f"vllm.url is http://HOST:PORT, got {self.vllm.url!r}")
        return self
