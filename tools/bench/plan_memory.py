"""How far `gspo-mm plan` is off in memory: peaks of updates on this machine's CPU against what is planned for them.

    python tools/bench/plan_memory.py          half a minute each, 5 GB of memory

Of a process of its own: what it holds at its most beyond what it held before the policy was built, without files that it maps
(RssAnon). A CPU has neither CUDA's context nor Transformer Engine's layers; ours for it keep more between forward and backward,
as they have no fused kernels. So weights, gradients, optimizer state and log-probs can be compared, and activations where
layers are recomputed; the case of adapters shows by how much the others differ.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

CASES: dict[str, dict[str, Any]] = {
    "nothing frozen": {},
    "recompute=full": {"recompute": "full"},
    "vision frozen": {"freeze": ["vision", "projector"]},
    "adapters": {"lora": {"rank": 8, "targets": ["attention", "experts"]}},
    "long, recompute=full": {"recompute": "full", "micro_batch_tokens": 4096},
}
_USES = ("weights", "gradients", "optimizer", "activations", "log-probs", "vision")


def main(case: Annotated[str | None, typer.Option(help="measure one, in this process")] = None) -> None:
    """Print planned and measured peaks of all cases."""
    if case is not None:
        with tempfile.TemporaryDirectory() as folder:
            print(*measure(case, Path(folder)))
        return
    table = Table("update", "planned, GB", "measured, GB", "error", box=None, pad_edge=False)
    for name in CASES:
        command = [sys.executable, "-m", "tools.bench.plan_memory", "--case", name]
        planned, measured = map(
            float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-2:]
        )
        table.add_row(name, f"{planned / 1e9:.2f}", f"{measured / 1e9:.2f}", f"{planned / measured - 1:+.0%}")
    Console().print(table)


def measure(name: str, folder: Path) -> tuple[float, float]:
    """Bytes planned, and measured."""
    from transformers import AutoModelForImageTextToText

    from gspo_mm.config import PolicyConfig
    from gspo_mm.policy.engine import Policy
    from tools.bench.update import make_batch, make_model

    config = PolicyConfig.model_validate({"dtype": "float32", "micro_batch_tokens": 2048, **CASES[name]})
    make_model(768, 6, 32768, folder)
    batch = make_batch(
        AutoModelForImageTextToText.from_pretrained(folder), [256] * (config.micro_batch_tokens // 256)
    )
    rows = batch.num_response_tokens
    with Peak() as peak:
        policy = Policy.from_hf(str(folder), config, seed=0, total_steps=10)
        for _ in range(2):
            policy.update([batch], lambda _, lp, __: (-lp.sum() / rows, {}))
    return planned_bytes(folder, config), peak.bytes


def planned_bytes(folder: Path, config: Any) -> float:
    from gspo_mm.config.layout import Sizes
    from gspo_mm.plan.hardware import gpu_of
    from gspo_mm.plan.memory import training_memory
    from gspo_mm.plan.model import read_model
    from gspo_mm.plan.setup import Job, Lengths, Policy, Work

    lengths = Lengths(prompt=96, image=16, answer=160, longest=160)
    work = Work(
        prompts=config.micro_batch_tokens // 256, group=1, updates=1, lengths=lengths, old=False, reference=False,
        staleness=0, in_flight=1,
    )  # fmt: skip
    policy = Policy(
        sizes=Sizes(), width=4, frozen=frozenset(config.frozen), lora=config.lora, recompute=config.recompute,
        micro_tokens=config.micro_batch_tokens,
    )  # fmt: skip
    model, gpu = read_model(str(folder)), gpu_of("h100")
    # one rank has all experts: none is busier than another
    job = Job(model=model, gpu=gpu, per_node=1, policy=policy, work=work, servers=None, imbalance=1.0)
    (memory,) = training_memory(job)
    return sum(memory.uses[use] for use in _USES)


class Peak:
    """Most bytes that this process has held since the block began, beyond what it held then."""

    bytes = 0

    def __enter__(self) -> Peak:
        self._before, self._done = _held(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.bytes = max(self.bytes, _held() - self._before)


def _held() -> int:
    """Bytes of memory that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this kernel does not say RssAnon in /proc/self/status")


if __name__ == "__main__":
    typer.run(main)
