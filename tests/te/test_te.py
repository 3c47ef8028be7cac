"""The policy on Transformer Engine's layers, without a GPU.

Each file of inside/ runs in a process of its own, since the stand-in changes torch.cuda for good.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# transformer_engine's Python code, which must not be seen by other tests: without its library it cannot be imported
SITE = Path(sys.prefix) / "te"


@pytest.mark.parametrize("file", sorted(path.name for path in (HERE / "inside").glob("inside_*.py")))
def test_inside(file: str) -> None:
    assert (SITE / "transformer_engine").is_dir(), "make .venv/dev installs transformer_engine there"
    done = subprocess.run(
        [sys.executable, "-m", "tests.te.inside", str(HERE / "inside" / file)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{SITE}", "PYTEST_ADDOPTS": "", "TORCHDYNAMO_DISABLE": "1"},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
