"""Start gloo ranks the way torchrun does, for tests."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def torchrun(
    ranks: int, *command: str, path: tuple[str, ...] = (), timeout: float = 400
) -> subprocess.CompletedProcess[str]:
    """`command` (a script or `-m module` with arguments) on `ranks` ranks of one thread each; `path`: further places of modules."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *path])},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
