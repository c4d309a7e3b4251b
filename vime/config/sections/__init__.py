"""The sections of a configuration, one frozen dataclass each. Every field names its flag.

A section checks what it alone can know in `problems`; rules across sections are in `rules.py`.
"""

from vime.config.sections.algorithm import AlgorithmConfig
from vime.config.sections.evaluation import EvalConfig
from vime.config.sections.machine import (
    ClusterConfig,
    DebugConfig,
    EngineConfig,
    LogConfig,
    ParallelConfig,
)
from vime.config.sections.model import CheckpointConfig, ModelConfig, OptimizerConfig
from vime.config.sections.prompts import BatchConfig, DataConfig
from vime.config.sections.rollout import RewardConfig, RolloutConfig

__all__ = [
    "AlgorithmConfig",
    "BatchConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "DataConfig",
    "DebugConfig",
    "EngineConfig",
    "EvalConfig",
    "LogConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RewardConfig",
    "RolloutConfig",
]
