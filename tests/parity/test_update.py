"""A step's update does not depend on how it is split, and skips the passes it does not need."""

import math
import random
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from gspo_mm.advantage import group_advantages
from gspo_mm.batch import sequences_of
from gspo_mm.checkpoint.distributed import load_policy, save_policy
from gspo_mm.config import Config, parse_config
from gspo_mm.data.processor import Processor
from gspo_mm.data.source import PromptSource
from gspo_mm.policy.engine import Policy
from gspo_mm.policy.reference import Reference
from gspo_mm.policy.shares import share_out, split_evenly
from gspo_mm.policy.update import update_policy
from gspo_mm.runtime.phases import Phases
from gspo_mm.types import Completion, Finish, GspoError, RolloutGroup, Score


def config(model: Path, shards: Path, **sections: Any) -> Config:
    values = {
        "run": {"name": "a"},
        "model": {"path": str(model)},
        "data": {"train": [f"{shards}/train-*.tar"]},
        "reward": {"file": "unused"},
        "policy": {"dtype": "float32", "optimizer": {"lr": 1e-3}},
    }
    return parse_config(values | sections)


@pytest.fixture(scope="module")
def processor(tiny_model: Path, digit_shards: Path) -> Processor:
    return Processor(str(tiny_model), config(tiny_model, digit_shards).data)


@pytest.fixture(scope="module")
def groups(tiny_model: Path, digit_shards: Path, processor: Processor) -> tuple[RolloutGroup, ...]:
    """Six groups of four made-up answers of different lengths and rewards."""
    rng = random.Random(0)
    source = PromptSource(config(tiny_model, digit_shards).data, processor, seed=0, split="train")
    made = [
        RolloutGroup(
            id=i,
            prompt=encoded.prompt,
            prompt_ids=encoded.token_ids,
            completions=tuple(completion(rng) for _ in range(4)),
            scores=tuple(Score(value=rng.random(), parts={}) for _ in range(4)),
        )
        for i, encoded in enumerate(source.take(6))
    ]
    return group_advantages(made, config(tiny_model, digit_shards).advantage).live


def completion(rng: random.Random) -> Completion:
    tokens = tuple(rng.randrange(400) for _ in range(rng.randint(1, 9)))
    return Completion.of_one_turn(
        token_ids=tokens,
        logprobs=(-6.0,) * len(tokens),
        versions=(0,) * len(tokens),
        finish=Finish.STOP,
        text="",
    )


def run(
    config: Config, groups: Any, processor: Processor, *, steps: int = 1
) -> tuple[Policy, list[dict[str, float]]]:
    policy = Policy.from_hf(config.model.path, config.policy, seed=0, total_steps=100)
    reference = Reference(policy) if config.loss.kl_coef else None
    metrics = [update(policy, config, groups, processor, reference) for _ in range(steps)]
    return policy, metrics


def update(
    policy: Policy,
    config: Config,
    groups: Any,
    processor: Processor,
    reference: Reference | None = None,
    *,
    step: int = 0,
) -> dict[str, float]:
    updates = [sequences_of(part) for part in split_evenly(groups, config.train.updates_per_batch)]
    shares, *_ = share_out(policy, updates, processor=processor, config=config.policy)
    return update_policy(
        policy, shares, processor=processor, reference=reference, config=config, phases=Phases(), step=step
    )


def weights(policy: Policy) -> torch.Tensor:
    return torch.cat([tensor.flatten() for _, tensor in policy.export()])


@pytest.mark.parametrize(
    ("loss", "shares"),
    [
        ({}, False),
        ({}, True),
        ({"aggregation": "token_mean"}, True),
        ({"aggregation": "dr_grpo"}, True),
        ({"level": "token"}, True),
        ({"type": "gmpo"}, True),
        ({"correction": {"kind": "mask", "low": 0.5, "high": 1.1}}, True),
    ],
)
def test_the_split_into_micro_batches_changes_nothing(
    tiny_model: Path,
    digit_shards: Path,
    groups: Any,
    processor: Processor,
    loss: dict[str, Any],
    shares: bool,
) -> None:
    """But for the load of experts where prompts are shared: they see a prompt once for each micro-batch that has it."""

    def compared(found: dict[str, float]) -> dict[str, float]:
        return {n: value for n, value in found.items() if not (shares and n.startswith("moe/load_max"))}

    results = []
    for tokens in (1, 100, 100_000):
        # with Adam's usual eps a gradient of rounding noise moves its weight by a full lr, in either direction
        optimizer = {"lr": 1e-3, "eps": 1e-3}
        policy = {"dtype": "float32", "optimizer": optimizer, "micro_batch_tokens": tokens}
        policy["share_prompts"] = shares
        results.append(run(config(tiny_model, digit_shards, policy=policy, loss=loss), groups, processor))
    (policy, (metrics,)), *others = results
    for other, (other_metrics,) in others:
        assert compared(other_metrics) == pytest.approx(compared(metrics), rel=1e-4, abs=1e-5)
        torch.testing.assert_close(weights(other), weights(policy), atol=1e-6, rtol=1e-5)


def test_the_first_ratio_is_one_and_later_ones_are_not(
    tiny_model: Path, digit_shards: Path, groups: Any, processor: Processor
) -> None:
    two = config(tiny_model, digit_shards, train={"updates_per_batch": 2})
    _, (metrics,) = run(two, groups, processor)
    assert metrics["first_update_ratio_error"] < 1e-6
    assert metrics["ratio_max"] > 1.001


def test_one_update_skips_the_old_pass_and_gives_what_the_pass_would(
    tiny_model: Path, digit_shards: Path, groups: Any, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    whole = Policy.logprobs
    monkeypatch.setattr(Policy, "logprobs", lambda self, b, **k: passes.append(len(b)) or whole(self, b, **k))
    single = config(tiny_model, digit_shards, train={"updates_per_batch": 1})
    _, (metrics,) = run(single, groups, processor)
    assert not passes
    assert metrics["ratio_mean"] == pytest.approx(1.0, abs=1e-12)
    # the same groups with old log-probs of their own pass: shown by asking for the pass without a second update
    double = config(tiny_model, digit_shards, train={"updates_per_batch": 2})
    first_half = run(double, groups, processor)[1][0]
    assert passes == [len(groups[:1]) * 2]  # one pass over both shares' micro-batches
    assert first_half["first_update_ratio_error"] < 1e-6


@pytest.mark.parametrize("kind", ["truncate", "mask"])
def test_a_correction_sees_the_same_ratios_with_and_without_an_old_pass(
    tiny_model: Path, digit_shards: Path, groups: Any, processor: Processor, kind: str
) -> None:
    """One update takes the current log-probs for the old ones; of two updates, quantiles are over both together."""
    found: list[dict[str, float]] = []
    for updates in (1, 2):
        correction = {"kind": kind, "low": 0.5, "high": 1.1}
        settings = config(
            tiny_model,
            digit_shards,
            loss={"correction": correction},
            train={"updates_per_batch": updates},
        )
        found.append(run(settings, groups, processor)[1][0])
    names = {name for name in found[0] if name.startswith("mismatch/")}
    assert len(names) == 9
    assert 0 < found[0]["mismatch/corrected_fraction"] < 1
    assert found[0]["mismatch/ratio_p01"] < found[0]["mismatch/ratio_p50"] < found[0]["mismatch/ratio_p99"]
    for name in names:
        assert found[1][name] == pytest.approx(found[0][name], abs=1e-5), name
    plain = config(tiny_model, digit_shards, train={"updates_per_batch": 1})
    assert run(plain, groups, processor)[1][0]["grad_norm"] != found[0]["grad_norm"]


def test_rollouts_without_log_probs_are_trained_on_unless_they_are_to_be_corrected(
    tiny_model: Path, digit_shards: Path, groups: Any, processor: Processor
) -> None:
    plain = config(tiny_model, digit_shards, train={"updates_per_batch": 1})
    masked = config(
        tiny_model, digit_shards, train={"updates_per_batch": 1}, loss={"correction": {"kind": "mask"}}
    )
    policy = Policy.from_hf(plain.model.path, plain.policy, seed=0, total_steps=100)
    bare = [[replace(s, rollout_logprobs=None) for s in sequences_of(groups)]]
    shares, *_ = share_out(policy, bare, processor=processor, config=plain.policy)
    given = {"processor": processor, "reference": None, "phases": Phases()}
    before = weights(policy).clone()
    with pytest.raises(GspoError, match=r"loss\.correction\.kind=mask needs the log-probs"):
        update_policy(policy, shares, config=masked, **given)
    assert torch.equal(weights(policy), before)
    metrics = update_policy(policy, shares, config=plain, **given)
    assert not any(name.startswith("mismatch/") for name in metrics)


def closed_form(done: float, *, steps: int) -> float:
    """Of lr 1e-3, min_lr_ratio 0, two warm-up steps."""
    if done <= 3:
        return 1e-3 * min(1.0, done / 2)
    if done > steps - 1:
        return 0.0
    return 1e-3 * math.cos(math.pi / 2 * (done - 3) / (steps - 3)) ** 2


def test_the_learning_rate_counts_training_steps_however_many_updates_they_make(
    tiny_model: Path, digit_shards: Path, groups: Any, processor: Processor, tmp_path: Path
) -> None:
    """Live groups per step: 6, 1 (one update), 0 (none), 6 ...; resumed after step 4, and then of 8 steps, not 6."""
    optimizer = {"lr": 1e-3, "min_lr_ratio": 0.0, "warmup_steps": 2}
    settings = config(
        tiny_model,
        digit_shards,
        policy={"dtype": "float32", "optimizer": optimizer},
        rollout={"prompts_per_step": 6},
        train={"updates_per_batch": 3},
    )
    live = [6, 1, 0, 6, 2, 6, 3, 1]

    def train(policy: Policy, steps: range) -> list[tuple[float, float]]:
        total = policy.optimizer._total_steps
        found = []
        for step in steps:
            if live[step]:
                lr = update(policy, settings, groups[: live[step]], processor, step=step)["lr"]
                updates = min(3, live[step])
                ends = [step + (k + 1) / updates for k in range(updates)]
                found.append((lr, fmean(closed_form(done, steps=total) for done in ends)))
        return found

    first = Policy.from_hf(settings.model.path, settings.policy, seed=0, total_steps=6)
    rates = train(first, range(6))
    assert [found for found, _ in rates] == pytest.approx([wanted for _, wanted in rates], rel=1e-12, abs=0)
    assert rates[-1][0] == 0.0
    save_policy(first, tmp_path / "checkpoint").finish()
    longer = Policy.from_hf(settings.model.path, settings.policy, seed=0, total_steps=8)
    load_policy(longer, tmp_path / "checkpoint")
    rates = train(longer, range(4, 8))
    assert [found for found, _ in rates] == pytest.approx([wanted for _, wanted in rates], rel=1e-12, abs=0)
    assert rates[0][0] > rates[1][0] > rates[2][0] > rates[3][0] == 0.0


def test_kl_to_the_reference_starts_at_zero_and_grows(
    tiny_model: Path, digit_shards: Path, groups: Any, processor: Processor
) -> None:
    with_kl = config(tiny_model, digit_shards, loss={"kl_coef": 0.1}, train={"updates_per_batch": 1})
    _, (first, second) = run(with_kl, groups, processor, steps=2)
    assert first["kl_ref"] == pytest.approx(0.0, abs=1e-9)
    assert second["kl_ref"] > 1e-6


def test_looking_at_the_reference_leaves_the_policy_as_it_was(
    tiny_model: Path, digit_shards: Path, groups: Any, processor: Processor
) -> None:
    settings = config(tiny_model, digit_shards)
    policy, _ = run(settings, groups, processor)
    reference = Reference(policy)
    trained = weights(policy).clone()
    update(policy, settings, groups, processor)
    moved = weights(policy).clone()
    reference.logprobs([], 1.0)
    assert torch.equal(weights(policy), moved)
    assert not torch.equal(trained, moved)


def test_without_a_kl_coefficient_nothing_of_a_reference_is_computed(
    tiny_model: Path, digit_shards: Path, groups: Any, processor: Processor
) -> None:
    _, (metrics,) = run(config(tiny_model, digit_shards), groups, processor)
    assert "kl_ref" not in metrics


def test_shares_are_even_ordered_and_never_empty() -> None:
    assert split_evenly(list(range(7)), 3) == [[0, 1], [2, 3], [4, 5, 6]]
    assert split_evenly([1, 2], 4) == [[1], [2]]
