"""Optimizer steps of the policy: equal to torch's AdamW on transformers' model, exact on resume, and safe."""

import copy
import math
import threading
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from gspo_mm.checkpoint.distributed import CheckpointError, Saving, load_policy, save_policy
from gspo_mm.config import OptimizerConfig, PolicyConfig
from gspo_mm.policy.engine import Policy
from gspo_mm.policy.optimizer import learning_rate
from gspo_mm.policy.skips import SpikeError
from gspo_mm.types import NonFiniteError
from tests.tiny_vl import save, tiny_vl
from tools.check_parity import random_batch, reference_logprobs


def policy(folder: Path, *, freeze: Any = (), dtype: str = "float32", **optimizer: Any) -> Policy:
    config = PolicyConfig.model_validate(
        {"dtype": dtype, "freeze": list(freeze), "optimizer": {"lr": 1e-3, **optimizer}}
    )
    return Policy.from_hf(str(folder), config, seed=0, total_steps=6)


def mean_logprob(
    _: int, logprobs_R: torch.Tensor, entropy_R: torch.Tensor
) -> tuple[torch.Tensor, dict[str, Any]]:
    return -logprobs_R.mean(), {"entropy": entropy_R.mean()}


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in policy.export()}


def test_steps_equal_those_of_torchs_adamw_on_transformers_model(model: Any, folder: Path) -> None:
    settings = {"eps": 1e-4, "weight_decay": 0.1, "beta1": 0.8, "beta2": 0.9, "grad_clip": 0.5}
    ours = policy(folder, **settings, warmup_steps=2, min_lr_ratio=0.1)
    theirs = copy.deepcopy(model)
    decayed = [p for p in theirs.parameters() if p.dim() > 1]
    others = [p for p in theirs.parameters() if p.dim() == 1]
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(0.8, 0.9),
        eps=1e-4,
    )
    for step in range(4):
        batches = [
            random_batch(model, seed=2 * step),
            random_batch(model, seed=2 * step + 1, images=step % 2),
        ]
        stats = ours.update(batches, mean_logprob)
        adamw.zero_grad()
        losses = [-reference_logprobs(theirs, batch).mean() for batch in batches]
        sum(losses).backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        for group in adamw.param_groups:
            group["lr"] = learning_rate(step + 1, ours.config.optimizer, 6)
        adamw.step()
        assert stats.loss == pytest.approx(sum(losses).item(), rel=1e-5)
        assert stats.grad_norm == pytest.approx(norm.item(), rel=1e-4)
        assert stats.lr == adamw.param_groups[0]["lr"]
    trained = dict(theirs.named_parameters())
    start = dict(model.named_parameters())
    for name, tensor in ours.export():
        moved = (trained[name] - start[name]).abs().max()
        assert moved > 0
        assert (tensor - trained[name]).abs().max() < 1e-3 * moved + 1e-7, name


@pytest.mark.parametrize(("dtype", "background"), [("float32", False), ("float32", True), ("bfloat16", True)])
def test_a_resumed_policy_continues_bit_for_bit(
    model: Any, folder: Path, dtype: str, background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained_on, write = threading.Event(), Saving._write
    monkeypatch.setattr(Saving, "_write", lambda self: (trained_on.wait(60), write(self)))
    batches = [random_batch(model, seed=s) for s in range(5)]
    settings: dict[str, Any] = {"dtype": dtype, "warmup_steps": 2, "min_lr_ratio": 0.1}
    straight = policy(folder, **settings)
    whole = [straight.update([b], mean_logprob) for b in batches]
    first = policy(folder, **settings)
    for batch in batches[:2]:
        first.update([batch], mean_logprob)
    saving = save_policy(first, tmp_path / "checkpoint", background=background)
    if background:  # what is written in the meantime must be what was there when saving began
        first.update([batches[4]], mean_logprob)
    trained_on.set()
    saving.finish()
    del first
    resumed = policy(folder, **settings)
    resumed.update([batches[4]], mean_logprob)  # whatever it held before must be gone
    load_policy(resumed, tmp_path / "checkpoint")
    rest = [resumed.update([b], mean_logprob) for b in batches[2:]]
    assert rest == whole[2:]
    expected = weights(straight)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.export())


CHANGED: dict[str, Any] = {
    "lr": 3e-3,
    "min_lr_ratio": 0.2,
    "warmup_steps": 4,
    "beta1": 0.5,
    "beta2": 0.7,
    "eps": 1e-2,
    "weight_decay": 0.3,
    "grad_clip": 0.01,
}


@pytest.fixture(scope="module")
def two_steps(model: Any, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Policy]:
    """A checkpoint after two updates, and a policy that may be loaded from it."""
    checkpoint = tmp_path_factory.mktemp("two") / "checkpoint"
    first = policy(folder)
    for seed in range(2):
        first.update([random_batch(model, seed=seed)], mean_logprob)
    save_policy(first, checkpoint).finish()
    return checkpoint, first


@pytest.mark.parametrize("changed", [*([key] for key in CHANGED), list(CHANGED)], ids=" ".join)
def test_a_resumed_policy_steps_with_the_settings_that_the_config_has_now(
    model: Any, folder: Path, two_steps: tuple[Path, Policy], changed: list[str]
) -> None:
    """Against AdamW written down in float64, from the checkpoint's own moments."""
    settings = {key: CHANGED[key] for key in changed}
    config = OptimizerConfig.model_validate({"lr": 1e-3, **settings})
    resumed = policy(folder, **settings)
    load_policy(resumed, two_steps[0])
    inner = resumed.optimizer.inner
    (before,) = [part.optimizer for part in inner.chained_optimizers]
    old = {
        p: (p.double(), *(before.state[p][k].double() for k in ("exp_avg", "exp_avg_sq")))
        for group in before.param_groups
        for p in group["params"]
    }
    stats = resumed.update([random_batch(model, seed=2)], mean_logprob)
    count = 3
    low = config.lr * config.min_lr_ratio  # the third of 6 steps: of a warm-up of 4, or along the cosine
    falling = low + (config.lr - low) * (1 + math.cos(math.pi * 2 / 5)) / 2
    rate = config.lr * 3 / 4 if config.warmup_steps else falling
    assert stats.lr == pytest.approx(rate, rel=1e-12)
    clipped = math.sqrt(sum(float(p.grad.double().square().sum()) for p in old))
    assert clipped == pytest.approx(min(stats.grad_norm, config.grad_clip), rel=1e-3)
    for group in before.param_groups:
        decay = config.weight_decay * group["wd_mult"]
        for p in group["params"]:
            value, mean, square = old[p]
            g = p.grad.double()
            mean = config.beta1 * mean + (1 - config.beta1) * g
            square = config.beta2 * square + (1 - config.beta2) * g * g
            step = mean / (1 - config.beta1**count)
            step = step / ((square / (1 - config.beta2**count)).sqrt() + config.eps)
            expected = value - rate * decay * value - rate * step
            moved = (expected - value).abs().max()
            assert (p.double() - expected).abs().max() < 1e-4 * moved + 1e-7


def test_no_setting_of_a_parameter_group_comes_from_the_checkpoint(
    folder: Path, two_steps: tuple[Path, Policy]
) -> None:
    fresh, loaded = policy(folder, **CHANGED), policy(folder, **CHANGED)
    load_policy(loaded, two_steps[0])
    groups = zip(fresh.optimizer.inner.param_groups, loaded.optimizer.inner.param_groups, strict=True)
    for wanted, found in groups:
        assert {k: v for k, v in found.items() if k not in ("params", "step")} == {
            k: v for k, v in wanted.items() if k not in ("params", "step")
        }


def test_the_state_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    other = policy(
        save(tiny_vl(num_hidden_layers=2, vision={"deepstack_visual_indexes": [0]}), tmp_path / "hf")
    )
    save_policy(other, tmp_path / "checkpoint").finish()
    with pytest.raises(CheckpointError, match="another model"):
        load_policy(policy(folder), tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match="is no distributed checkpoint"):
        load_policy(policy(folder), tmp_path)


def test_equal_inputs_give_equal_bits(model: Any, folder: Path) -> None:
    once, again = policy(folder), policy(folder)
    for seed in range(3):
        batches = [random_batch(model, seed=seed)]
        assert once.update(batches, mean_logprob) == again.update(batches, mean_logprob)
    expected = weights(once)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.export())


def test_losses_of_micro_batches_add_up(model: Any, folder: Path) -> None:
    one, two = policy(folder), policy(folder)
    batches = [random_batch(model, seed=1), random_batch(model, seed=2)]
    one.backward([batches[0]], mean_logprob)
    single = {name: g.clone() for name, g in one.export_gradients()}
    one.backward([batches[1]], mean_logprob)
    second = dict(one.export_gradients())
    two.backward(batches, mean_logprob)
    for name, gradient in two.export_gradients():
        scale = gradient.abs().max() + 1e-12
        assert (gradient - single[name] - second[name]).abs().max() / scale < 1e-4, name


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change(model: Any, folder: Path) -> None:
    trained = policy(folder)
    before = weights(trained)
    with pytest.raises(NonFiniteError, match="gradient norm of update 1 is nan"):
        trained.update([random_batch(model)], lambda i, lp, e: (lp.sum() * float("nan"), {}))
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.export())
    assert trained.update([random_batch(model)], mean_logprob).grad_norm > 0


def test_updates_are_left_out_while_there_are_not_too_many_in_a_row(model: Any, folder: Path) -> None:
    trained, batch = policy(folder, skip={"in_a_row": 2}), [random_batch(model)]
    skips = trained.optimizer.skips
    broken = partial(trained.update, batch, lambda i, lp, e: (lp.sum() * float("nan"), {}))
    sound = partial(trained.update, batch, mean_logprob)
    before = weights(trained)
    assert [skips.attempt(broken), skips.attempt(broken)] == [None, None]
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.export())
    assert trained.optimizer.step_count == 0
    assert skips.attempt(sound) is not None
    assert [skips.attempt(broken), skips.attempt(broken)] == [None, None], "counted anew"
    with pytest.raises(NonFiniteError, match="gradient norm of update 2 is nan"):
        skips.attempt(broken)


def test_a_spike_is_left_out_also_after_a_resume(model: Any, folder: Path) -> None:
    trained, batch = policy(folder, skip={"in_a_row": 1, "spike_factor": 3}), [random_batch(model)]
    loss = lambda scale: lambda i, lp, e: (-lp.mean() * scale, {})
    for _ in range(16):  # so many are needed to know what is usual
        assert trained.update(batch, loss(1.0))
    resumed = policy(folder, skip={"in_a_row": 1, "spike_factor": 3})
    resumed.optimizer.skips.load(trained.optimizer.skips.state())
    for one in (trained, resumed):
        before = weights(one)
        with pytest.raises(
            SpikeError, match=r"more than policy.optimizer.skip.spike_factor=3 times the usual"
        ):
            one.update(batch, loss(100.0))
        assert one.optimizer.skips.attempt(partial(one.update, batch, loss(100.0))) is None
        assert all(torch.equal(tensor, before[name]) for name, tensor in one.export())
        assert one.update(batch, loss(0.1))


PARTS = {
    "vision": "model.visual.blocks.0.mlp.linear_fc1.weight",
    "projector": "model.visual.merger.linear_fc1.weight",
    "router": "model.language_model.layers.0.mlp.gate.weight",
    "language": "model.language_model.layers.0.self_attn.q_proj.weight",
}


@pytest.mark.parametrize(
    ("freeze", "still"),
    [
        (["vision"], {"vision"}),
        (["projector"], {"projector"}),
        (["router"], {"router"}),
        (["language"], {"language", "router"}),
        (["vision", "projector", "router"], {"vision", "projector", "router"}),
        ([], set()),
    ],
)
def test_frozen_parts_stay_and_the_rest_is_trained(
    model: Any, folder: Path, freeze: list[str], still: set[str]
) -> None:
    trained = policy(folder, freeze=freeze)
    before = weights(trained)
    text_and_image = [random_batch(model, images=0), random_batch(model)]
    trained.update(text_and_image, mean_logprob)
    after = weights(trained)
    assert {part for part, name in PARTS.items() if torch.equal(before[name], after[name])} == still


def test_freezing_everything_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="leaves nothing to train"):
        policy(folder, freeze=["vision", "projector", "language"])


def test_bfloat16_keeps_float32_copies_of_the_weights(model: Any, folder: Path) -> None:
    """A step far below bfloat16's resolution adds up over updates instead of being rounded away each time."""
    trained = policy(folder, dtype="bfloat16", lr=2e-5)
    before = weights(trained)
    for _ in range(6):
        trained.update([random_batch(model)], mean_logprob)
    name = "model.language_model.norm.weight"  # about 1, where bfloat16 steps are 2^-8
    (main,) = [
        p.main_param for n, p in trained.chunks[0].named_parameters() if n.endswith("final_layernorm.weight")
    ]
    assert main.dtype is torch.float32
    moved = (main - before[name].float()).abs().max()
    assert 1e-5 < moved < 2**-8
    assert trained.logprobs([random_batch(model)])[0].dtype is torch.float32


def test_the_learning_rate_warms_up_then_falls_along_a_cosine_to_its_floor() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=4, min_lr_ratio=0.2)
    rates = [learning_rate(step + 1, config, 20) for step in range(25)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert all(a > b for a, b in pairwise(rates[4:20]))
    assert rates[19:] == pytest.approx([0.2] * 6)
    assert learning_rate(8, OptimizerConfig(lr=3e-6), 20) == 3e-6


@pytest.mark.parametrize("updates", [1, 2, 3, 7])
@pytest.mark.parametrize(
    ("steps", "warmup"), [(450, 8), (10, 0), (10, 9), (10, 10), (10, 40), (2, 0), (2, 1)]
)
def test_the_last_step_is_at_the_promised_rate_and_the_warm_up_reaches_lr(
    updates: int, steps: int, warmup: int
) -> None:
    config = OptimizerConfig(lr=0.7, warmup_steps=warmup, min_lr_ratio=0.0)
    rates = [
        [learning_rate(step + (k + 1) / updates, config, steps) for k in range(updates)]
        for step in range(steps)
    ]
    if warmup < steps:
        assert rates[-1] == [0.0] * updates
    if 0 < warmup <= steps:
        assert rates[warmup - 1][-1] == pytest.approx(0.7, rel=1e-12)
    if warmup < steps - 1:
        assert rates[warmup] == [0.7] * updates
    rising = [rate for step in rates[:warmup] for rate in step]
    line = [0.7 * (number + 1) / (warmup * updates) for number in range(len(rising))]
    assert rising == pytest.approx(line, rel=1e-12), "as many equal rises as there are updates"


def test_a_run_of_one_step_is_trained_with_the_whole_rate() -> None:
    config = OptimizerConfig(lr=0.7, min_lr_ratio=0.0)
    assert [learning_rate(done, config, 1) for done in (0.5, 1)] == [0.7, 0.7]


@pytest.mark.parametrize(("recompute", "runs"), [("none", 1), ("full", 2)])
def test_full_recomputation_runs_the_towers_blocks_again(
    folder: Path, model: Any, recompute: str, runs: int
) -> None:
    config = PolicyConfig.model_validate({"dtype": "float32", "recompute": recompute})
    ours = Policy.from_hf(str(folder), config, seed=0, total_steps=1)
    tower: Any = ours.chunks[0].visual
    calls: list[int] = []
    for number, block in enumerate(tower.blocks):
        block.mlp.register_forward_pre_hook(lambda *_, n=number: calls.append(n))
    ours.backward([random_batch(model, seed=1)], mean_logprob)
    assert sorted(calls) == sorted(list(range(len(tower.blocks))) * runs)
