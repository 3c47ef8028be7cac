"""Runs a real SGLang server on a machine without a GPU, for laptops and tests.

SGLang takes other devices as plug-ins: it asks every entry point of the group `sglang.srt.platforms` for the path of
a platform class. Ours (see pyproject.toml) answers only where `GSPO_MM_SGLANG_CPU=1`, which `environment` sets for
the servers that it is meant for. Server, scheduler and model code stay SGLang's own; kernels are torch's, and where SGLang
knows Triton's alone, as in linear attention, Triton's interpreter runs them.
"""

from __future__ import annotations

import ctypes
import gc
import os
import shutil
import subprocess
from pathlib import Path

from gspo_mm.runtime.disk import written_whole
from gspo_mm.types import GspoError

SWITCH = "GSPO_MM_SGLANG_CPU"
# options of a server on this platform, and what would not work there anyway
ARGUMENTS = {
    "device": "cpu",
    "attention-backend": "torch_native",
    "sampling-backend": "pytorch",
    "disable-overlap-schedule": True,
    "sleep-on-idle": True,  # else its scheduler keeps a core busy, which the trainer needs
    # images of a prefill attend through one dense mask: time grows with the square of their number
    "chunked-prefill-size": -1,
    "max-prefill-tokens": 256,
}

_STUB = "libcuda.so.1"
_STUB_SOURCE = (
    "int cuPointerGetAttribute(void *data, int attribute, unsigned long long pointer) { return 100; }\n"
)


def activate() -> str | None:
    """SGLang's question, asked in each of its processes: the platform class to use, or None to stand aside."""
    if os.environ.get(SWITCH) != "1":
        return None
    # asked when little is imported yet: looking for garbage after every 700 new objects takes a sixth of a start
    gc.set_threshold(50_000, 20, 100)
    return "gspo_mm.serving.cpu_platform.CpuPlatform"


def environment(folder: Path) -> dict[str, str]:
    """Variables for a server process on this machine. Raises GspoError when the driver stub cannot be built.

    sglang's kernel wheel links the CUDA driver for one function, which is never called on a CPU. Where there is no
    driver, a library of that name with that one function (it answers "no device") is compiled into `folder`.
    """
    variables = {SWITCH: "1", "TRITON_INTERPRET": "1"}
    if not _has_driver():
        build_driver_stub(folder)
        paths = [str(folder), os.environ.get("LD_LIBRARY_PATH", "")]
        variables["LD_LIBRARY_PATH"] = ":".join(filter(None, paths))
    return variables


def build_driver_stub(folder: Path) -> Path:
    """Compile the stub into `folder` unless it is there. Safe with several at once."""
    target = folder / _STUB
    if target.exists():
        return target
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise GspoError(
            f"{_STUB} is missing and there is no C compiler to build a stand-in for it; install gcc (apt-get install "
            "gcc), or use rollout.engine=embedded"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with written_whole(target) as file:
        command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", str(file), f"-Wl,-soname,{_STUB}"]
        done = subprocess.run(command, input=_STUB_SOURCE, capture_output=True, text=True)
        if done.returncode:
            raise GspoError(f"{compiler} could not build {target}: {done.stderr.strip()}")
    return target


def _has_driver() -> bool:
    try:
        ctypes.CDLL(_STUB)
    except OSError:
        return False
    return True
