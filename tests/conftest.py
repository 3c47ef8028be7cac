"""The tiny model and a few digit shards, made once per test session by the tools a user would call."""

import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / "tools"


def run_tool(name: str, *arguments: str | Path | int) -> None:
    subprocess.run([sys.executable, str(TOOLS / name), *map(str, arguments)], check=True, capture_output=True)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-VL-MoE folder with tokenizer and processor."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    run_tool("make_tiny_model.py", path)
    return path


@pytest.fixture(scope="session")
def digit_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four training shards (200 samples) and one validation shard (40)."""
    path = tmp_path_factory.mktemp("digits")
    run_tool("make_shards.py", "digits", path, "--train", 200, "--validation", 40, "--samples-per-shard", 50)
    return path
