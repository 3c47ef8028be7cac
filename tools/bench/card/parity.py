"""Stage b: the policy on Transformer Engine's layers against transformers in float32 on the host, and that FP8 trains."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.bench.card.results import Report

if TYPE_CHECKING:
    import torch

    from gspo_mm.policy.engine import Policy
    from gspo_mm.types import MicroBatch

# by number format: largest mean difference of log-probs in nats, least cosine of all gradients as one vector. On a card
# Transformer Engine multiplies float32 as TF32 (common/gemm/cublaslt_gemm.cu).
LIMITS = {
    "float32": (1e-4, 0.9999),
    "bf16": (0.01, 0.98),
    "tensorwise": (0.05, 0.95),
    "blockwise": (0.05, 0.95),
}
_SMALL = 1e-3  # norm below which a gradient is not compared by itself


@dataclass(frozen=True, kw_only=True)
class Distance:
    """Between the policy and transformers, of the same micro-batch."""

    logprob_max: float  # nats
    logprob_mean: float  # nats
    gradient_cosine: float  # of all gradients as one vector
    worst_cosine: float  # of a single tensor's
    worst_gradient: str  # that tensor's name


def measure(report: Report, number_format: str, updates: int) -> None:
    """A mixture and a dense model in one number format; in FP8 also updates, with FP8 primary weights and without."""
    from tests.tiny_vl import save, wide_vl
    from tools.check_parity import random_batch

    gap, cosine = LIMITS[number_format]
    for kind in ("mixture", "dense"):
        model = wide_vl(moe=kind == "mixture")
        batch = random_batch(model, images=3)
        with tempfile.TemporaryDirectory() as made:
            folder = save(model, Path(made))
            found = distance(policy(folder, number_format), model, batch)
            report(**{kind: asdict(found)})
            report.check(
                found.logprob_mean <= gap, f"{kind}: log-probs differ by {found.logprob_mean:.3g} nats"
            )
            report.check(
                found.gradient_cosine >= cosine, f"{kind}: gradients' cosine {found.gradient_cosine:.4f}"
            )
            for primary in (False, True) if number_format in ("tensorwise", "blockwise") else ():
                trained = policy(folder, number_format, fp8={"primary_weights": primary})
                where = f"{kind} {'primary' if primary else 'beside'}"
                held = sum("Float8" in type(parameter).__name__ for parameter in trained.parameters())
                still = unmoved(trained, batch, updates)
                report(**{where: {"held_in_fp8": held, "unmoved": len(still)}})
                report.check((held > 0) == primary, f"{where}: {held} tensors are held in FP8")
                report.check(
                    not still, f"{where}: {updates} updates left {len(still)} as they were: {still[:2]}"
                )


def policy(folder: Path, number_format: str, **settings: Any) -> Policy:
    from gspo_mm.config import PolicyConfig
    from gspo_mm.policy.engine import Policy

    fp8 = {"recipe": None if number_format in ("float32", "bf16") else number_format}
    config = {
        "dtype": "float32" if number_format == "float32" else "bfloat16",
        "optimizer": {"lr": 1e-3},
        **settings,
        "fp8": fp8 | settings.get("fp8", {}),
    }
    return Policy.from_hf(str(folder), PolicyConfig.model_validate(config), seed=0, total_steps=60)


def distance(trained: Policy, model: Any, batch: MicroBatch) -> Distance:
    """`model` is transformers', in float32, with the weights that the policy was loaded from."""
    import torch

    from tools.check_parity import reference_logprobs

    (logprobs,) = trained.logprobs([batch])
    trained.backward([batch], lambda _, logprobs_R, __: (logprobs_R.sum(), {}))
    found = {name: gradient.float().cpu().flatten() for name, gradient in trained.export_gradients()}
    model.zero_grad()
    expected = reference_logprobs(model.cpu(), batch)
    expected.sum().backward()
    gradients = {name: p.grad.flatten() for name, p in model.named_parameters() if p.grad is not None}
    cosines = {
        name: _cosine(found[name], gradient)
        for name, gradient in gradients.items()
        if gradient.norm() > _SMALL
    }
    worst = min(cosines, key=lambda name: cosines[name])
    gaps = (logprobs.cpu() - expected.detach()).abs()
    return Distance(
        logprob_max=float(gaps.max()),
        logprob_mean=float(gaps.mean()),
        gradient_cosine=_cosine(
            torch.cat([found[name] for name in gradients]), torch.cat(list(gradients.values()))
        ),
        worst_cosine=cosines[worst],
        worst_gradient=worst,
    )


def unmoved(trained: Policy, batch: MicroBatch, updates: int) -> list[str]:
    """Names of exported tensors that some updates leave as they were: what servers and checkpoints get, not main copies."""
    before = {name: tensor.float().clone() for name, tensor in trained.export()}
    for _ in range(updates):
        trained.update([batch], lambda _, logprobs_R, __: (-1e-2 * logprobs_R.sum(), {}))
    after = {name: tensor.float() for name, tensor in trained.export()}
    return [name for name, tensor in before.items() if bool((tensor == after[name]).all())]


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    import torch

    return float(torch.cosine_similarity(a.double(), b.double(), dim=0))
