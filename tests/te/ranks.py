"""What a policy on Transformer Engine's layers computes under a parallel layout and in a number format. Run on ranks.

torchrun --nproc-per-node 2 -m tests.te.ranks OUT FOLDER NAME...
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

FORMATS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {},
    "overlapping": {
        "optimizer": {"overlap": True},
        "megatron": {"overlap_dispatch_backward_with_experts_wgrad": True},
    },
    "tensorwise": {"fp8": {"recipe": "tensorwise"}},
    "blockwise": {"fp8": {"recipe": "blockwise"}},
    "tensorwise primary": {"fp8": {"recipe": "tensorwise", "primary_weights": True}},
    "blockwise primary": {"fp8": {"recipe": "blockwise", "primary_weights": True}},
}
FP8 = ["tensorwise", "blockwise"]
PRIMARY = ["tensorwise primary", "blockwise primary"]
# name -> (ranks, policy.parallel, formats)
LAYOUTS: dict[str, tuple[int, dict[str, int], list[str]]] = {
    "alone": (1, {}, list(FORMATS)),
    "tp2": (2, {"tp": 2}, ["float32", "blockwise", *PRIMARY]),
    "ep2": (2, {"ep": 2}, ["float32", "tensorwise", "blockwise primary"]),
    "tp2 ep2 etp1": (2, {"tp": 2, "ep": 2, "etp": 1}, ["float32", "blockwise", "tensorwise primary"]),
    "pp2": (2, {"pp": 2}, ["float32", "bfloat16", "tensorwise"]),
    "pp2 vpp2": (2, {"pp": 2, "vpp": 2}, ["float32", "blockwise primary"]),
    "dp2": (2, {"dp": 2}, ["float32", "bfloat16", "overlapping", *PRIMARY]),
    "cp2": (2, {"cp": 2}, ["bfloat16", "tensorwise"]),
    "tp4": (4, {"tp": 4}, ["float32", *FP8]),
    "tp2 ep2 etp2": (4, {"tp": 2, "ep": 2, "etp": 2}, ["blockwise primary"]),
}


def measure(folder: Path, parallel: dict[str, int], form: str) -> dict[str, Any]:
    """Log-probs, and losses and weights of two updates, all by two micro-batches of which one has no image."""
    from tests.parallel.layouts import in_pieces, loss_of, policy_config
    from tools.check_parity import positions_model, random_batches

    # large enough steps that BF16 does not round them away; not scaled by the norm, whose last digit depends on the layout
    optimizer = {} if form == "float32" else {"lr": 4e-3, "eps": 1e-8, "grad_clip": 1e6}
    settings = FORMATS[form] | {"optimizer": optimizer | FORMATS[form].get("optimizer", {})}
    config = policy_config({"dtype": "bfloat16", **settings, "parallel": parallel})
    policy = in_pieces(20_000 if form == "overlapping" else None, folder, config)
    everything = random_batches(positions_model(policy.hf), images=2)
    mine = list(range(len(everything)))[policy.groups.dp.rank() :: policy.plan.dp]
    batches, loss_fn = [everything[i] for i in mine], loss_of(mine, everything)

    def weights() -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in policy.export()}

    loaded = weights()
    numbered = policy.ranks.gather(list(zip(mine, policy.logprobs(batches), strict=True)))
    logprobs = dict(pair for of_rank in numbered for pair in of_rank)
    loss, _ = policy.backward(batches, loss_fn)
    gradients = {name: tensor.clone() for name, tensor in policy.export_gradients()}
    norm, _ = policy.optimizer.step()
    second = policy.update(batches, loss_fn)
    return {
        "loaded": loaded,
        "logprobs": torch.cat([logprobs[i] for i in range(len(everything))]),
        "losses": [loss, second.loss],
        "norms": [norm, second.grad_norm],
        "gradients": gradients,
        "weights": weights(),
    }


def main() -> None:
    import tests.te.loaded  # noqa: F401  # installs the stand-in, before anything of ours is imported
    from gspo_mm.policy import spec

    spec.FUSED = True
    out, folder, *names = sys.argv[1:]
    torch.set_num_threads(1)
    for name in names:
        for form in LAYOUTS[name][2]:
            result = measure(Path(folder), LAYOUTS[name][1], form)
            if torch.distributed.get_rank() == 0:
                torch.save(result, Path(out) / f"{name} {form}.pt")


if __name__ == "__main__":
    main()
