"""Start the ranks that a parallel layout needs, on this machine, for tools that a user calls as one command."""

from __future__ import annotations

import math
import os
import subprocess
import sys

from pydantic import ValidationError

from gspo_mm.config import ConfigError, ParallelConfig
from gspo_mm.runtime.threads import share_of_cores


def parse_plan(text: str) -> ParallelConfig:
    """`tp=2,ep=2,etp=1` -> the same as policy.parallel of a config. Raises ConfigError for what it is not."""
    sizes: dict[str, int] = {}
    for item in filter(None, text.split(",")):
        key, _, value = item.partition("=")
        if key not in ParallelConfig.model_fields or not value.isdecimal():
            raise ConfigError(
                f"--plan {text}: {item!r} is not KEY=NUMBER with a key of {', '.join(ParallelConfig.model_fields)}"
            )
        sizes[key] = int(value)
    try:
        return ParallelConfig(**sizes)
    except ValidationError as error:
        raise ConfigError(f"--plan {text}: {error.errors()[0]['msg']}") from None


def ranks_needed(plan: ParallelConfig) -> int:
    """The fewest ranks that the plan fits: data parallelism as its experts demand where it does not say."""
    inner = plan.tp * plan.pp * plan.cp
    if plan.dp is not None:
        return inner * plan.dp
    return math.lcm(inner, plan.ep * (plan.etp or plan.tp) * plan.pp)


def start_ranks(count: int) -> None:
    """Unless ranks were started already, run this very command on `count` of them and exit with their status."""
    if count == 1 or "RANK" in os.environ:
        return
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(share_of_cores(count)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    done = subprocess.run([*command, *sys.argv], env=environment)
    raise SystemExit(done.returncode)
