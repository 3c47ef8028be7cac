"""The one schema of a run: strict pydantic models, one file per part of the pipeline.

    run.py      run, model, data, train, sft, checkpoint, observe
    rollout.py  rollout (with rollout.sampling, rollout.sglang), sync
    loss.py     reward, advantage, loss (with loss.correction)
    policy.py   policy (with .parallel, .optimizer, .fp8, .moe)
    schema.py   Config: all of them, and what they must agree on
    load.py     files and `key=value` overrides -> Config, faults -> sentences
    base.py     what all sections share

A key's description stands beside it. Loading never imports torch, so a mistake is reported in well under a second, in one
sentence that names the key, the value and the fix. `train.py` passes each stage its own section.
"""

from gspo_mm.config.base import ConfigError, Section
from gspo_mm.config.load import load_config, parse_config, save_config
from gspo_mm.config.loss import AdvantageConfig, CorrectionConfig, LossConfig, RewardConfig
from gspo_mm.config.policy import (
    Fp8Config,
    MoeConfig,
    OptimizerConfig,
    ParallelConfig,
    PolicyConfig,
    SkipConfig,
    check_world,
    data_parallel_size,
)
from gspo_mm.config.rollout import RolloutConfig, SamplingConfig, SGLangConfig, SyncConfig
from gspo_mm.config.run import (
    CheckpointConfig,
    CurriculumConfig,
    DataConfig,
    ModelConfig,
    ObserveConfig,
    RunConfig,
    SftConfig,
    SourceConfig,
    TrainConfig,
)
from gspo_mm.config.schema import Config

__all__ = [
    "AdvantageConfig",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "CorrectionConfig",
    "CurriculumConfig",
    "DataConfig",
    "Fp8Config",
    "LossConfig",
    "ModelConfig",
    "MoeConfig",
    "ObserveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PolicyConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "SGLangConfig",
    "SamplingConfig",
    "Section",
    "SftConfig",
    "SkipConfig",
    "SourceConfig",
    "SyncConfig",
    "TrainConfig",
    "check_world",
    "data_parallel_size",
    "load_config",
    "parse_config",
    "save_config",
]
