"""Typed configuration: the schema, how a YAML file and overrides become one object, and the YAML files themselves."""

from configs.load import ConfigError, load_config, to_yaml
from configs.schema import (
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    PruningConfig,
    RecalibrateConfig,
    TrackingConfig,
    TrainConfig,
)

__all__ = [
    "ConfigError",
    "DataConfig",
    "EvaluateConfig",
    "ModelConfig",
    "PruningConfig",
    "RecalibrateConfig",
    "TrackingConfig",
    "TrainConfig",
    "load_config",
    "to_yaml",
]
