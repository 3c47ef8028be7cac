"""Two optimizer steps under one layout, a checkpoint, and two more: saved, or resumed under another layout.

torchrun --nproc-per-node 2 -m tests.parallel.resume save FOLDER CHECKPOINT "tp2 ep2 etp1" OUT
torchrun --nproc-per-node 2 -m tests.parallel.resume load FOLDER CHECKPOINT "pp2" OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from gspo_mm.checkpoint.distributed import load_policy, save_policy
from gspo_mm.policy.engine import Policy
from tests.parallel.layouts import LAYOUTS, batches_of, loss_of, policy_config, set_pairs


def steps(
    action: str, folder: Path, checkpoint: Path, changes: dict[str, Any]
) -> list[tuple[float, float, float]]:
    """Loss, gradient norm and learning rate of the two steps after the checkpoint."""
    optimizer = {"warmup_steps": 2, "min_lr_ratio": 0.1}
    policy = Policy.from_hf(
        str(folder), policy_config({**changes, "optimizer": optimizer}), seed=0, total_steps=6
    )
    set_pairs(policy)
    everything = batches_of(policy)
    mine = list(range(len(everything)))[policy.groups.dp.rank() :: policy.plan.dp]
    batches, loss_fn = [everything[i] for i in mine], loss_of(mine, everything)
    if action == "save":
        for _ in range(2):
            policy.update(batches, loss_fn)
        save_policy(policy, checkpoint).finish()
    else:
        load_policy(policy, checkpoint)
    stats = [policy.update(batches, loss_fn) for _ in range(2)]
    return [(s.loss, s.grad_norm, s.lr) for s in stats]


def main() -> None:
    action, folder, checkpoint, name, out = sys.argv[1:]
    torch.set_num_threads(1)
    result = steps(action, Path(folder), Path(checkpoint), LAYOUTS[name][2])
    if torch.distributed.get_rank() == 0:
        Path(out).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
