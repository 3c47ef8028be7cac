"""One real SGLang server on the CPU for all tests of this folder: starting it is most of their time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gspo_mm.config import Config, parse_config
from gspo_mm.data.processor import Processor
from gspo_mm.data.source import PromptSource
from gspo_mm.rollout.sglang import SGLangEngine
from gspo_mm.serving.fleet import Fleet
from gspo_mm.types import EncodedPrompt, Prompt
from tests.conftest import run_tool

type MakeConfig = Callable[..., Config]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Deep enough for two pipeline stages, the first of which has all layers that DeepStack reaches."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    run_tool("make_tiny_model.py", path, "--set", "text.num_hidden_layers=4")
    return path


@pytest.fixture(scope="session")
def turning_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_model`, and about every sixth token that it samples ends a turn."""
    path = tmp_path_factory.mktemp("model") / "turning"
    run_tool("make_tiny_model.py", path, "--set", "text.num_hidden_layers=4", "--ends", 0.2)
    return path


@pytest.fixture(scope="session")
def make_config(tiny_model: Path, digit_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeConfig:
    """A config of the digits task on SGLang servers; keyword arguments replace whole sections' keys."""
    runs = tmp_path_factory.mktemp("runs")

    def make(name: str = "shared", **sections: dict[str, Any]) -> Config:
        rollout = {
            "engine": "sglang",
            "prompts_per_step": 8,
            "group_size": 4,
            "sampling": {"max_new_tokens": 8},
            "sglang": {"mem_fraction": 0.2, "max_tokens": 16384, "context_length": 512, "start_timeout": 300},
        }
        values: dict[str, dict[str, Any]] = {
            "run": {"name": name, "dir": str(runs), "seed": 1},
            "model": {"path": str(tiny_model)},
            "data": {"train": [str(digit_shards / "train-*.tar")], "shuffle_buffer": 0},
            "rollout": rollout,
            "sync": {"mode": "disk", "bucket_mb": 1},
            "reward": {"file": "configs/rewards/digits.yaml"},
            "policy": {"dtype": "float32", "optimizer": {"lr": 1e-3}},
        }
        for section, changes in sections.items():
            values[section] = values.get(section, {}) | changes
        values["rollout"] = rollout | sections.get("rollout", {})
        values["rollout"]["sglang"] = rollout["sglang"] | sections.get("rollout", {}).get("sglang", {})
        return parse_config(values)

    return make


@pytest.fixture(scope="session")
def config(make_config: MakeConfig) -> Config:
    return make_config()


@pytest.fixture(scope="session")
def processor(config: Config) -> Processor:
    return Processor(config.model.path, config.data)


@pytest.fixture(scope="session")
def prompts(config: Config, processor: Processor) -> list[EncodedPrompt]:
    """Thirty prompts with 0, 1, 2 and 3 images in turn, no two alike."""
    seen = PromptSource(config.data, processor, seed=1, split="train").take(40)
    images = [p.prompt.images[0] for p in seen]

    def prompt(number: int) -> Prompt:
        count = number % 4
        question = {"type": "text", "text": f"Which digit is this? {number}"}
        return Prompt(
            key=f"prompt {number}",
            messages=({"role": "user", "content": [{"type": "image"}] * count + [question]},),
            images=tuple(images[number : number + count]),
            answer="7",
            task="digit",
        )

    return [processor.encode(prompt(number)) for number in range(30)]


@pytest.fixture(scope="session")
def engine(config: Config, processor: Processor) -> Iterator[SGLangEngine]:
    """Serves random weights; whoever needs known ones pushes them first."""
    engine = SGLangEngine(config, processor, Fleet(config))
    yield engine
    engine.close()
