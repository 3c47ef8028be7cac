"""What near ties of experts explain, where sequences, layers and experts are split over ranks. Run on ranks.

torchrun --nproc-per-node 2 -m tests.parallel.ties OUT FOLDER MEMBERS NAME...
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import torch

from gspo_mm.batch import pack
from gspo_mm.policy.engine import Policy
from gspo_mm.policy.near_ties import NearTies
from tests.parallel.layouts import policy_config
from tests.unit.test_near_ties import TEXT

# the tie is in the second stage, of one layer
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {"dp": 2},
    "ep2": {"ep": 2},
    "tp2": {"tp": 2},
    "tp2 ep2": {"tp": 2, "ep": 2, "etp": 1},
    "cp2": {"cp": 2},
    "pp2": {"pp": 2, "first_stage_layers": 3},
}


def look(folder: str, members: list[Any], parallel: dict[str, Any]) -> dict[str, Any]:
    """Of four sequences in micro-batches of one; with data parallelism one rank has nothing odd."""
    policy = Policy.from_hf(folder, policy_config({"parallel": parallel}), seed=0, total_steps=1)
    mine = members[policy.groups.dp.rank() :: policy.plan.dp]
    batches = [pack([member], TEXT) for member in mine]
    ties = NearTies(policy, TEXT)
    metrics = ties.look([[member] for member in mine], batches, list(policy.logprobs(batches)))
    return {"metrics": policy.ranks.gather(metrics), "said": policy.ranks.gather(ties.said)}


def main() -> None:
    out, folder, members, *names = sys.argv[1:]
    torch.set_num_threads(1)
    for name in names:
        found = look(folder, pickle.loads(Path(members).read_bytes()), LAYOUTS[name])
        if torch.distributed.get_rank() == 0:
            (Path(out) / f"{name}.pkl").write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main()
