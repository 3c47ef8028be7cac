"""Weights of ranks that share a model, pushed to two servers without a model. Run on ranks.

torchrun --nproc-per-node 4 -m tests.parallel.push OUT FOLDER
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from gspo_mm.config import Config, parse_config
from gspo_mm.policy.engine import Policy
from gspo_mm.runtime.dist import Ranks
from gspo_mm.serving.admin import call_all
from gspo_mm.serving.server import Server
from gspo_mm.sync.checksums import Checksums
from gspo_mm.sync.distributed import DistributedSender
from gspo_mm.sync.quantize import on_the_way
from gspo_mm.types import GspoError
from tools.bench.weight_server import servers, sum_of

# four senders, two of which gather with another; and two, as many as there are servers
PARALLEL = {False: {"tp": 2, "pp": 2, "ep": 2, "etp": 1}, True: {"tp": 2, "ep": 2, "etp": 1}}


def config_of(folder: Path, *, fp8: bool) -> Config:
    return parse_config(
        {
            "run": {"name": "push"},
            "model": {"path": str(folder)},
            "data": {"train": ["unused.tar"]},
            "rollout": {"engine": "sglang", "sglang": {"fp8": fp8}},
            "sync": {"mode": "distributed", "bucket_mb": 1, "timeout": 30},
            "reward": {"file": "unused.yaml"},
            "policy": {"dtype": "bfloat16" if fp8 else "float32", "parallel": PARALLEL[fp8]},
        },
    )


class Pushes:
    """Pushes of one policy, and what came of them."""

    def __init__(self, folder: Path, *, fp8: bool) -> None:
        config = config_of(folder, fp8=fp8)
        self.policy = Policy.from_hf(str(folder), config.policy, seed=0, total_steps=1)
        self._config = config
        self._sender = DistributedSender(config, self.policy)

    def send(self, to: list[Server]) -> dict[str, Any]:
        """What each server got and from whom, beside what an export has."""
        checksums = Checksums(self.policy.family)
        fault = None
        try:
            self._sender.send(to, version=1, checksums=checksums)
        except GspoError as error:
            fault = str(error)
        of_ranks = self.policy.ranks.gather(checksums.names)
        weights = on_the_way(self._config)(self.policy.weights.export(experts_apart=True))
        expected = {name: sum_of(tensor) for name, tensor in weights}
        told: dict[str, Any] = {"fault": fault, "names": of_ranks, "expected": expected, "servers": []}
        if self.policy.ranks.main and not fault:
            replies = call_all(to, "/get", timeout=10)
            told["servers"] = [{key: reply[key] for key in ("sums", "buckets")} for reply in replies]
        return told

    def close(self) -> None:
        self._sender.close()


def main() -> None:
    out, folder = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    told = {}
    ranks = Ranks()
    with servers((), (), ("--last", "1")) if ranks.main else nullcontext([]) as of_main:
        first, second, dying = ranks.from_main(of_main)
        pushes = Pushes(folder, fp8=False)
        told["plain"] = pushes.send([first, second])
        told["dying"] = pushes.send([first, dying])
        told["after it"] = pushes.send([first, second])
        pushes.close()
        told["fp8"] = Pushes(folder, fp8=True).send([first, second])
    if ranks.main:
        (out / "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
