"""`gspo-mm doctor`: versions, devices, which fused parts are active, and what would stop a run."""

from __future__ import annotations

import os
import shutil
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gspo_mm.config import Config

_COLORS = {"ok": "green", "info": "blue", "warning": "yellow", "error": "red"}


@dataclass(frozen=True, kw_only=True)
class Check:
    """One finding; only an `error` makes the command fail."""

    name: str
    status: Literal["ok", "info", "warning", "error"]
    found: str
    hint: str = ""


def doctor(sglang_url: str | None = None, *, config: Config | None = None, ranks: int | None = None) -> int:
    """Print the findings; returns the exit status. Raises ConfigError or PlanError where the run does not fit `ranks`."""
    checks = diagnose(sglang_url, config=config, ranks=ranks)
    table = Table(box=None, pad_edge=False)
    for column in ("", "what", "found", "hint"):
        table.add_column(column, overflow="fold")
    for check in checks:
        color = _COLORS[check.status]
        hint = f"[dim]{escape(check.hint)}[/]"
        table.add_row(f"[{color}]{check.status}[/]", check.name, escape(check.found), hint)
    Console().print(table)
    return int(any(check.status == "error" for check in checks))


def diagnose(
    sglang_url: str | None = None, *, config: Config | None = None, ranks: int | None = None
) -> list[Check]:
    """All findings, in the order they are shown."""
    return [
        _python(),
        *(
            _required(name)
            for name in ("torch", "megatron-core", "transformers", "torchvision", "webdataset")
        ),
        *_devices(),
        _transformer_engine(),
        _apex(),
        _flash_attention(),
        *_sglang(sglang_url),
        *_machine(),
        *_speed(config, ranks),
    ]


def _python() -> Check:
    return Check(name="python", status="ok", found=".".join(map(str, sys.version_info[:3])))


def _required(name: str) -> Check:
    found = _version(name)
    if found is None:
        return Check(name=name, status="error", found="missing", hint="pip install -e . brings it")
    return Check(name=name, status="ok", found=found)


def _devices() -> list[Check]:
    if find_spec("torch") is None:
        return []
    import torch

    checks = []
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            memory = f"{properties.total_memory / 2**30:.0f} GiB, compute capability {properties.major}.{properties.minor}"
            fp8 = "" if (properties.major, properties.minor) >= (8, 9) else "no FP8 before capability 8.9"
            checks.append(
                Check(name=f"cuda:{i}", status="ok", found=f"{properties.name}, {memory}", hint=fp8)
            )
    else:
        hint = (
            "everything runs on the CPU"
            if torch.version.cuda is None
            else "torch has CUDA but sees no device"
        )
        checks.append(Check(name="cuda", status="info", found="no device", hint=hint))
    backends = [b for b in ("gloo", "nccl") if getattr(torch.distributed, f"is_{b}_available")()]
    checks.append(Check(name="collectives", status="ok", found=", ".join(backends) or "none"))
    return checks


def _transformer_engine() -> Check:
    found = _version("transformer-engine") or _version("transformer_engine_torch")
    if found is None:
        return Check(
            name="transformer-engine",
            status="info",
            found="missing",
            hint="needed on GPUs: pip install -e '.[te]'",
        )
    return Check(name="transformer-engine", status="ok", found=found)


def _apex() -> Check:
    """NVIDIA's apex has no PyPI release; the package of that name there is a web framework's helper."""
    if find_spec("apex") is None:
        hint = "not needed: Transformer Engine has its optimizer, and adds up weight gradients itself"
        return Check(name="apex", status="info", found="missing", hint=hint)
    if find_spec("amp_C") is None and find_spec("apex.optimizers") is None:
        return Check(
            name="apex",
            status="warning",
            found=f"{_version('apex') or 'unknown'}, not NVIDIA's",
            hint="pip uninstall apex: PyPI's package of that name is unrelated and hides the real one",
        )
    return Check(name="apex", status="ok", found=_version("apex") or "from source")


def _flash_attention() -> Check:
    found = _version("flash-attn") or _version("flash-attn-3")
    if found is None:
        return Check(
            name="flash-attn", status="info", found="missing", hint="optional; TE has cuDNN's attention too"
        )
    return Check(name="flash-attn", status="ok", found=found)


def _speed(config: Config | None, ranks: int | None) -> list[Check]:
    """What the policy of a run has on this machine for its speed; without a config, of a mixture on one rank."""
    if find_spec("torch") is None or find_spec("megatron") is None:
        return []
    from gspo_mm.policy.speed import choices_of_run

    return [
        Check(
            name=choice.name,
            status="ok" if choice.on else "warning" if choice.missed else "info",
            found="on" if choice.on else "off",
            hint=choice.why,
        )
        for choice in choices_of_run(config, ranks)
    ]


def _sglang(url: str | None) -> list[Check]:
    version = _version("sglang")
    hint = "" if version else "may live in an environment of its own; the embedded engine needs none"
    checks = [Check(name="sglang", status="info", found=version or "not in this environment", hint=hint)]
    if url is None:
        return checks
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=5) as reply:
            checks.append(Check(name=url, status="ok", found=f"answers with HTTP {reply.status}"))
    except urllib.error.HTTPError as error:
        checks.append(
            Check(name=url, status="error", found=f"HTTP {error.code}", hint="is this an SGLang server?")
        )
    except (OSError, ValueError) as error:
        hint = "start the server, or check host, port and firewall"
        checks.append(Check(name=url, status="error", found=str(getattr(error, "reason", error)), hint=hint))
    return checks


def _machine() -> list[Check]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    free = shutil.disk_usage(".").free / 2**30
    return [
        Check(name="cores", status="ok", found=str(len(os.sched_getaffinity(0)))),
        Check(name="memory", status="ok", found=f"{memory:.0f} GiB"),
        Check(
            name="free disk here",
            status="ok" if free > 5 else "warning",
            found=f"{free:.0f} GiB",
            hint="" if free > 5 else "checkpoints may not fit; move run.dir",
        ),
    ]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
