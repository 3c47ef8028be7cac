"""What `gspo-mm import` takes for TRL's defaults, and makes of its batch sizes, is what TRL itself says."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from trl import GRPOConfig, ModelConfig

from gspo_mm.importing import trl
from gspo_mm.importing.source import Source
from gspo_mm.importing.translation import Translation


def test_defaults_are_those_of_trl() -> None:
    theirs = {field.name: field.default for kind in (ModelConfig, GRPOConfig) for field in fields(kind)}
    theirs["bf16"] = True  # None, which becomes true unless fp16 is set
    assert {name: theirs[name] for name in trl.FORMAT.defaults} == dict(trl.FORMAT.defaults)


@pytest.mark.parametrize(
    "given",
    [
        {"per_device_train_batch_size": 8, "num_generations": 4},
        {"per_device_train_batch_size": 8, "num_generations": 4, "gradient_accumulation_steps": 3},
        {"per_device_train_batch_size": 8, "num_generations": 4, "steps_per_generation": 4},
        {
            "per_device_train_batch_size": 4,
            "num_generations": 4,
            "gradient_accumulation_steps": 2,
            "generation_batch_size": 32,
        },
    ],
)
def test_a_rollout_batch_is_that_of_trl(given: dict[str, Any], tmp_path: Path) -> None:
    theirs = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **given)
    made = Translation(Source(format="trl", keys=dict(given)), trl.FORMAT)
    trl.translate(made)
    prompts = theirs.generation_batch_size / theirs.num_generations
    updates = theirs.steps_per_generation / theirs.gradient_accumulation_steps
    assert made.settings["rollout.prompts_per_step"][0] == prompts
    assert made.settings["train.updates_per_batch"][0] == updates
