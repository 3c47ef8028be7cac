"""What a policy computes under one parallel layout. Run by torchrun for many layouts at once, and by the tests alone.

torchrun --nproc-per-node 2 -m tests.parallel.layouts OUT FOLDER... -- NAME...
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig

from gspo_mm.batch import pack
from gspo_mm.config import LossConfig, PolicyConfig
from gspo_mm.families.folder import read_hf
from gspo_mm.loss import policy_loss
from gspo_mm.loss.table import SURROGATES
from gspo_mm.policy import engine
from gspo_mm.policy.engine import Policy
from gspo_mm.policy.routing_audit import RoutingAudit
from gspo_mm.policy.weights import gradient_of
from gspo_mm.types import MicroBatch
from tests.groups import Pictures, groups
from tools.check_parity import positions_model, random_batches

LORA = {"rank": 3, "alpha": 6, "targets": ["attention", "mlp", "experts", "projector"]}

# name -> (ranks, model, what differs from the plain policy config)
LAYOUTS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "tp2": (2, "moe", {"parallel": {"tp": 2}}),
    "tp2 dense": (2, "dense", {"parallel": {"tp": 2}}),
    "tp2 recompute full": (2, "moe", {"parallel": {"tp": 2}, "recompute": "full"}),
    "tp2 recompute selective": (2, "moe", {"parallel": {"tp": 2}, "recompute": "selective"}),
    "ep2": (2, "moe", {"parallel": {"ep": 2}}),
    "tp2 ep2 etp1": (2, "moe", {"parallel": {"tp": 2, "ep": 2, "etp": 1}}),
    "pp2": (2, "moe", {"parallel": {"pp": 2}}),
    "pp2 tied": (2, "dense", {"parallel": {"pp": 2}}),
    "cp2 dense": (2, "dense", {"parallel": {"cp": 2}}),
    "dp2 dense": (2, "dense", {"parallel": {"dp": 2}}),
    "pp2 uneven": (2, "moe", {"parallel": {"pp": 2, "first_stage_layers": 4}}),
    "pp2 interleaved": (2, "moe", {"parallel": {"pp": 2, "vpp": 2}}),
    "cp2": (2, "moe", {"parallel": {"cp": 2}}),
    "cp2 ep2": (2, "moe", {"parallel": {"cp": 2, "ep": 2}}),
    "dp2": (2, "moe", {"parallel": {"dp": 2}}),
    "dp2 overlapping": (2, "moe", {"parallel": {"dp": 2}, "optimizer": {"overlap": True}, "bucket": 20_000}),
    "dp2 frozen vision": (2, "moe", {"parallel": {"dp": 2}, "freeze": ["vision", "projector"]}),
    "tp2 frozen vision": (2, "moe", {"parallel": {"tp": 2}, "freeze": ["vision", "projector"]}),
    "hybrid tp2": (2, "hybrid", {"parallel": {"tp": 2}}),
    "hybrid tp2 ep2": (2, "hybrid", {"parallel": {"tp": 2, "ep": 2, "etp": 1}}),
    "hybrid pp2": (2, "hybrid", {"parallel": {"pp": 2}}),
    "hybrid cp2": (2, "hybrid", {"parallel": {"cp": 2}}),
    "hybrid dp2 recompute full": (2, "hybrid", {"parallel": {"dp": 2}, "recompute": "full"}),
    "hybrid ep2 recompute selective": (2, "hybrid", {"parallel": {"ep": 2}, "recompute": "selective"}),
    "hybrid tp2 cp2": (4, "hybrid", {"parallel": {"tp": 2, "cp": 2}}),
    "hybrid dense tp2": (2, "hybrid dense", {"parallel": {"tp": 2}}),
    "hybrid dense pp2": (2, "hybrid dense", {"parallel": {"pp": 2}}),
    "hybrid dense cp2": (2, "hybrid dense", {"parallel": {"cp": 2}}),
    "hybrid dense dp2": (2, "hybrid dense", {"parallel": {"dp": 2}}),
    "windows tp2": (2, "windows", {"parallel": {"tp": 2}}),
    "windows pp2": (2, "windows", {"parallel": {"pp": 2}}),
    "windows cp2": (2, "windows", {"parallel": {"cp": 2}}),
    "windows dp2 recompute full": (2, "windows", {"parallel": {"dp": 2}, "recompute": "full"}),
    "sigmoid tp2": (2, "sigmoid", {"parallel": {"tp": 2}}),
    "sigmoid ep2": (2, "sigmoid", {"parallel": {"ep": 2}}),
    "sigmoid tp2 ep2": (2, "sigmoid", {"parallel": {"tp": 2, "ep": 2, "etp": 1}}),
    "sigmoid pp2": (2, "sigmoid", {"parallel": {"pp": 2}}),
    "sigmoid cp2": (2, "sigmoid", {"parallel": {"cp": 2}}),
    "sigmoid dp2 recompute full": (2, "sigmoid", {"parallel": {"dp": 2}, "recompute": "full"}),
    "sinks tp2": (2, "sinks", {"parallel": {"tp": 2, "etp": 1}}),
    "sinks ep2": (2, "sinks", {"parallel": {"ep": 2}}),
    "sinks tp2 ep2": (2, "sinks", {"parallel": {"tp": 2, "ep": 2, "etp": 1}}),
    "sinks pp2": (2, "sinks", {"parallel": {"pp": 2}}),
    "sinks cp2 recompute selective": (2, "sinks", {"parallel": {"cp": 2}, "recompute": "selective"}),
    "sinks dp2 recompute full": (2, "sinks", {"parallel": {"dp": 2}, "recompute": "full"}),
    "tp2 ep2 etp2": (4, "moe", {"parallel": {"tp": 2, "ep": 2, "etp": 2}}),
    "pp2 ep2": (4, "moe", {"parallel": {"pp": 2, "ep": 2}}),
    "tp2 pp2": (4, "moe", {"parallel": {"tp": 2, "pp": 2}}),
    "tp2 pp2 ep2": (4, "moe", {"parallel": {"tp": 2, "pp": 2, "ep": 2, "etp": 1}}),
    "tp2 cp2": (4, "moe", {"parallel": {"tp": 2, "cp": 2}}),
    "tp2 cp2 aux loss": (4, "moe", {"parallel": {"tp": 2, "cp": 2}, "moe": {"aux_loss": 0.05}}),
    "pp2 ep2 aux loss": (4, "moe", {"parallel": {"pp": 2, "ep": 2}, "moe": {"aux_loss": 0.05}}),
    "pp2 interleaved dp2 overlapping": (
        4,
        "moe",
        {"parallel": {"pp": 2, "vpp": 2, "dp": 2}, "optimizer": {"overlap": True}, "bucket": 20_000},
    ),
    "ep4": (4, "moe", {"parallel": {"ep": 4}}),
    **{
        f"lora {name}": (ranks, "moe", {"parallel": parallel, "lora": LORA})
        for name, ranks, parallel in (
            ("tp2 ep2", 2, {"tp": 2, "ep": 2, "etp": 1}),
            ("pp2", 2, {"pp": 2}),
            ("cp2", 2, {"cp": 2}),
            ("dp2", 2, {"dp": 2}),
            ("tp2 ep2 etp2", 4, {"tp": 2, "ep": 2, "etp": 2}),
        )
    },
    # text alone: no stage has a tower
    "tp2 text": (2, "text", {"parallel": {"tp": 2}}),
    "ep2 text": (2, "text", {"parallel": {"ep": 2}}),
    "tp2 ep2 etp1 text": (2, "text", {"parallel": {"tp": 2, "ep": 2, "etp": 1}}),
    "pp2 text": (2, "text", {"parallel": {"pp": 2}}),
    "cp2 text": (2, "text", {"parallel": {"cp": 2}}),
    "dp2 text": (2, "text", {"parallel": {"dp": 2}}),
    "tp2 text dense": (2, "text dense", {"parallel": {"tp": 2}}),
    "pp2 text dense": (2, "text dense", {"parallel": {"pp": 2}}),
    "cp2 text dense": (2, "text dense", {"parallel": {"cp": 2}}),
    "dp2 text dense": (2, "text dense", {"parallel": {"dp": 2}}),
}


def policy_config(changes: dict[str, Any]) -> PolicyConfig:
    # eps: far above rounding, so that a gradient of rounding noise does not become a full step of Adam
    optimizer = {
        "lr": 1e-3,
        "eps": 1e-5,
        "grad_clip": 0.5,
        "weight_decay": 0.1,
        **changes.get("optimizer", {}),
    }
    return PolicyConfig.model_validate({"dtype": "float32", **changes, "optimizer": optimizer})


def batches_of(policy: Policy) -> list[MicroBatch]:
    """Four micro-batches, every other one without an image: with two data-parallel ranks one has text only.

    The third has answers to common prompts, which share them under the layouts that can.
    """
    model = positions_model(policy.hf)
    batches = random_batches(model, count=4, images=3)
    batches[2] = pack(groups(model), Pictures(model), shares_prompts=policy.shares_prompts)
    return batches


def loss_of(
    mine: list[int], batches: list[MicroBatch]
) -> Callable[..., tuple[torch.Tensor, dict[str, float]]]:
    """A loss that weighs every token differently, plus losses that loss.type names, two to a micro-batch; and a metric."""
    S, N = sum(b.num_sequences for b in batches), sum(b.num_response_tokens for b in batches)

    def loss_fn(index: int, logprobs_R: torch.Tensor, entropy_R: torch.Tensor) -> Any:
        batch = batches[mine[index]]
        generator = torch.Generator().manual_seed(mine[index])
        weights_R = torch.randn(batch.num_response_tokens, generator=generator)
        total = (logprobs_R * weights_R).sum() / 10
        old_R = logprobs_R.detach() + 0.3 * torch.randn(len(weights_R), generator=generator)
        advantages = torch.randn(batch.num_sequences, generator=generator)
        for name in list(SURROGATES)[mine[index] % 4 :: 4]:
            config = LossConfig.model_validate({"type": name, "dr_grpo_length": 9})
            offsets = batch.response_cu_seqlens
            made = policy_loss(
                logprobs_R, old_R, advantages, offsets, config=config, num_sequences=S, num_tokens=N
            )
            total = total + made.loss
        return total, {"entropy": float(entropy_R.sum())}

    return loss_fn


@torch.no_grad()
def set_pairs(policy: Policy) -> None:
    """Adapters that change something: they begin with B = 0, through which nothing reaches A."""
    for adapters in policy.adapters:
        for key in adapters.names():
            generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
            for pair in adapters.pair(key):
                pair.copy_(0.1 * torch.randn(pair.shape, generator=generator))
    policy.optimizer.take_over_parameters()


def sent_once(policy: Policy) -> bool:
    """Whether the ranks that send weights to servers send all of them, once, with the values that an export has."""
    own: list[tuple[str, torch.Tensor]] = []
    for sender in policy.weights.senders(policy.ranks):
        part = [(name, tensor.clone()) for name, tensor in policy.weights.export_own(sender)]
        own += part if policy.ranks.rank == sender else []
    sent = [pair for of_rank in policy.ranks.gather(own) for pair in of_rank]
    expected = {name: tensor.clone() for name, tensor in policy.weights.export(experts_apart=True)}
    return sorted(name for name, _ in sent) == sorted(expected) and all(
        torch.equal(tensor, expected[name]) for name, tensor in sent
    )


def in_pieces(bucket: int | None, folder: Path, config: PolicyConfig) -> Policy:
    """A policy whose ranks exchange so many numbers at once: a tiny model in many pieces, as a large one is."""
    with pytest.MonkeyPatch.context() as patched:
        ddp = partial(DistributedDataParallelConfig, bucket_size=bucket)
        patched.setattr(engine, "DistributedDataParallelConfig", ddp)
        return Policy.from_hf(str(folder), config, seed=0, total_steps=4)


def measure(folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Log-probs, loss and gradients of four micro-batches, and the weights after two optimizer steps on them."""
    changes = dict(changes)
    policy = in_pieces(changes.pop("bucket", None), folder, policy_config(changes))
    source = read_hf(folder)
    there_and_back = {name: torch.equal(tensor, source.tensor(name)) for name, tensor in policy.export()}
    are_sent = sent_once(policy)
    set_pairs(policy)
    everything = batches_of(policy)
    mine = list(range(len(everything)))[policy.groups.dp.rank() :: policy.plan.dp]
    batches = [everything[i] for i in mine]
    loss_fn = loss_of(mine, everything)
    logprobs = policy.logprobs(batches, temperature=0.7)
    numbered = policy.ranks.gather(list(zip(mine, logprobs, strict=True)))
    loss, metrics = policy.backward(batches, loss_fn, temperature=0.7)
    gradients = {name: tensor.clone() for name, tensor in policy.export_gradients()}
    own = {
        f"{key} {letter}": gradient_of(pair).clone()
        for adapters in policy.adapters
        for key in adapters.names()
        for letter, pair in zip("AB", adapters.pair(key), strict=True)
    }
    gradients |= {name: tensor for of_rank in policy.ranks.gather(own) for name, tensor in of_rank.items()}
    # where prompts are shared, their decisions count once
    alone = random_batches(positions_model(policy.hf), count=len(everything), images=3)
    audit = RoutingAudit(policy, [alone[i] for i in mine])
    steps = [policy.update(batches, loss_fn, temperature=0.7, last=number == 1) for number in range(2)]
    return {
        "held": policy.ranks.gather(held(policy)),
        "exact": there_and_back,
        "sent": are_sent,
        "logprobs": [
            dict(pair for of_rank in numbered for pair in of_rank)[i] for i in range(len(everything))
        ],
        "loss": loss,
        "entropy": sum(m["entropy"] for m in metrics),
        "gradients": gradients,
        "norms": [step.grad_norm for step in steps],
        "losses": [step.loss for step in steps],
        "routing": audit.compare(),
        "weights": {name: tensor.clone() for name, tensor in policy.export()},
    }


def held(policy: Policy) -> dict[str, int]:
    """Numbers of this rank: its weights, those that are trained, and the optimizer's float32 moments of them."""
    state = 0
    for part in policy.optimizer.inner.chained_optimizers:
        for group in part.optimizer.param_groups:
            kept = (part.optimizer.state[parameter] for parameter in group["params"])
            state += sum(of[moment].numel() for of in kept if of for moment in ("exp_avg", "exp_avg_sq"))
    numbers = [(p.numel(), p.requires_grad) for p in policy.parameters()]
    return {
        "stage": policy.groups.pp.rank(),
        "weights": sum(number for number, _ in numbers),
        "trained": sum(number for number, trained in numbers if trained),
        "state": state,
    }


def main() -> None:
    out, *folders = sys.argv[1 : sys.argv.index("--")]
    names = sys.argv[sys.argv.index("--") + 1 :]
    torch.set_num_threads(1)
    for name in names:
        _, model, changes = LAYOUTS[name]
        result = measure(next(Path(f) for f in folders if Path(f).name == model), changes)
        if torch.distributed.get_rank() == 0:
            torch.save(result, Path(out) / f"{name}.pt")
            print("done", name, flush=True)


if __name__ == "__main__":
    main()
