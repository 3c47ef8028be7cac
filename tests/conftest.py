"""The tiny model and a few digit shards, made once per test session by the tools a user would call."""

import atexit
import gc
import json
import logging
import os
import subprocess
import sys
import tempfile
from importlib.metadata import packages_distributions
from pathlib import Path

import hypothesis
import pytest

from gspo_mm.runtime.threads import share_of_cores
from tests.forked import COMMANDS

# read when torch is imported, by this process and by all that tests start
os.environ.setdefault(
    "OMP_NUM_THREADS", str(share_of_cores(int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))
)

# what tests/quick does for all that tests start; workers of xdist have it from the process that started them
if "GSPO_MM_TESTS_PACKAGES" not in os.environ:
    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as packages:
        json.dump(packages_distributions(), packages)
    atexit.register(Path(packages.name).unlink)
    os.environ["GSPO_MM_TESTS_PACKAGES"] = packages.name
    quick = [str(Path(__file__).with_name("quick")), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, quick))
    import tests.quick.sitecustomize  # noqa: F401  (this process, too, has the list)

# folders whose tests share what takes long to start, a server or a cluster; the others share within a file
TOGETHER = ("sglang", "slurm")
TOOLS = Path(__file__).parents[1] / "tools"


def run_tool(name: str, *arguments: str | Path | int, forked: bool = True) -> None:
    command = [str(TOOLS / name), *map(str, arguments)]
    done = (
        COMMANDS.run(*command) if forked else subprocess.run([sys.executable, *command], capture_output=True)
    )
    done.check_returncode()


def pytest_configure() -> None:
    """Python's collector would look through all modules again and again while they are loaded, and at every save of a policy."""
    gc.disable()
    # no test asserts how fast a machine is
    hypothesis.settings.register_profile("any machine", deadline=None)
    hypothesis.settings.load_profile("any machine")


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def a_log_of_its_own() -> None:
    """A command that ran in this process before had Python's warnings logged, and more than warnings, to its own places."""
    logging.captureWarnings(False)
    root = logging.getLogger()
    root.setLevel(logging.WARNING)
    for handler in [h for h in root.handlers if not type(h).__module__.startswith("_pytest")]:
        root.removeHandler(handler)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-VL-MoE folder with tokenizer and processor."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    run_tool("make_tiny_model.py", path)
    return path


@pytest.fixture(scope="session")
def tiny_hybrid_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3.5-MoE folder: three of its four layers attend linearly."""
    path = tmp_path_factory.mktemp("model") / "hybrid"
    run_tool("make_tiny_model.py", path, "--family", "qwen3_5_moe")
    return path


@pytest.fixture(scope="session")
def tiny_windows_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2.5-VL folder: its tower attends within windows."""
    path = tmp_path_factory.mktemp("model") / "windows"
    run_tool("make_tiny_model.py", path, "--family", "qwen2_5_vl")
    return path


@pytest.fixture(scope="session")
def tiny_sigmoid_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GLM-4.5V folder: experts are chosen by sigmoid scores and a bias."""
    path = tmp_path_factory.mktemp("model") / "sigmoid"
    run_tool("make_tiny_model.py", path, "--family", "glm4v_moe")
    return path


@pytest.fixture(scope="session")
def digit_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four training shards (200 samples) and one validation shard (40)."""
    path = tmp_path_factory.mktemp("digits")
    run_tool("make_shards.py", "digits", path, "--train", 200, "--validation", 40, "--samples-per-shard", 50)
    return path


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For `pytest -n`: what shares a fixture runs in one process, and what takes longest begins first."""
    groups = {item: _group(item) for item in items}
    for item, group in groups.items():
        item.add_marker(pytest.mark.xdist_group(group))
    first = ["sglang/test_faults", *TOGETHER, "e2e", "parallel", "te"]
    items.sort(
        key=lambda item: next(
            (i for i, name in enumerate(first) if groups[item].startswith(name)), len(first)
        )
    )


def _group(item: pytest.Item) -> str:
    folder, file = item.path.parent.name, item.path.stem
    alone = folder not in TOGETHER or file == "test_faults"
    return f"{folder}/{file}" if alone else folder
