"""Typed configuration: the schema, how a YAML file and overrides become one object, and the YAML files themselves."""

if __name__ != "prunetune.configs":
    raise ImportError("import prunetune.configs, not configs: a second name would load everything twice")

from prunetune.configs.analyze import AnalyzeConfig, AnalyzedMethod, CorruptionConfig
from prunetune.configs.load import ConfigError, load_config, to_yaml
from prunetune.configs.schema import (
    Backend,
    BackendOptions,
    DataConfig,
    EngineConfig,
    EvaluateConfig,
    ModelConfig,
    RecalibrateConfig,
    TrackingConfig,
    TrainConfig,
)
from prunetune.configs.serving import ServeConfig
from prunetune.configs.table import TableConfig, TableMethod, TableModel
from prunetune.configs.visualize import ShownMethod, VisualizeConfig

__all__ = [
    "AnalyzeConfig",
    "AnalyzedMethod",
    "Backend",
    "BackendOptions",
    "ConfigError",
    "CorruptionConfig",
    "DataConfig",
    "EngineConfig",
    "EvaluateConfig",
    "ModelConfig",
    "RecalibrateConfig",
    "ServeConfig",
    "ShownMethod",
    "TableConfig",
    "TableMethod",
    "TableModel",
    "TrackingConfig",
    "TrainConfig",
    "VisualizeConfig",
    "load_config",
    "to_yaml",
]
