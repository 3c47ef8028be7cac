"""Every variant of the loss: its equation written out again, what all share, its config, and losses of the user's own."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from gspo_mm.config import Config, ConfigError, LossConfig, load_config, save_config
from gspo_mm.config.loss import LossType
from gspo_mm.loss import LossInputs, LossTerms, check_clip_can_act, reduce_metrics, summarize
from gspo_mm.loss.table import SURROGATES
from gspo_mm.observe.metrics import is_documented
from tests.unit.test_gspo import AGGREGATIONS, Batch, C

TYPES = get_args(LossType.__value__)
HERE = "tests.unit.test_losses"
CONFIGS = Path(__file__).parents[2] / "configs"
README = CONFIGS.parent / "gspo_mm" / "loss" / "README.md"


def of_type(name: str | None, **changes: Any) -> LossConfig:
    return LossConfig.model_validate({"type": name, "dr_grpo_length": C, **changes})


def by_hand(batch: Batch, config: LossConfig) -> tuple[float, np.ndarray]:
    """(loss, gradient [R]) by scalar arithmetic; the gradient from the derivative worked out on paper."""
    loss, gradient, start = 0.0, np.zeros(batch.R), 0
    low, high = 1 - (config.clip_low or 1.0), math.inf if config.clip_high is None else 1 + config.clip_high
    for i, L in enumerate(batch.lengths):
        A = float(batch.advantages[i])
        a = {"sequence_mean": 1 / (batch.S * L), "token_mean": 1 / batch.R, "dr_grpo": 1 / (batch.S * C)}[
            config.aggregation
        ]
        ratios = [
            math.exp(float(batch.new[t])) / math.exp(float(batch.old[t])) for t in range(start, start + L)
        ]
        if config.type == "gmpo":  # product of |min(w A, clip(w) A)|, to the power 1/L, with the sign of A
            bounded = [min(w * A, min(max(w, low), high) * A) / A for w in ratios]
            objective = A * math.prod(bounded) ** (1 / L)
            loss -= a * L * objective
            for t, (w, kept) in enumerate(zip(ratios, bounded, strict=True)):
                gradient[start + t] -= a * objective * (w == pytest.approx(kept, rel=1e-12))
        for t, w in enumerate(ratios):
            if config.type == "cispo":
                weight = min(max(w, low), high)
                loss -= a * weight * A * float(batch.new[start + t])
                gradient[start + t] -= a * weight * A
            if config.type == "sapo":
                tau = config.tau_positive if A > 0 else config.tau_negative
                assert tau
                p = 1 / (1 + math.exp(-tau * (w - 1)))
                loss -= a * 4 / tau * p * A
                gradient[start + t] -= a * 4 * p * (1 - p) * w * A
        start += L
    return loss, gradient


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gmpo", {}),
        ("gmpo", {"clip_low": None}),
        ("cispo", {"clip_high": 0.5}),
        ("cispo", {"clip_low": 0.3, "clip_high": None}),
        ("sapo", {}),
        ("sapo", {"tau_positive": 0.7, "tau_negative": 3.0}),
    ],
)
def test_value_and_gradient_equal_the_equations_written_out(
    name: str, changes: dict[str, Any], aggregation: str
) -> None:
    config = of_type(name, aggregation=aggregation, **changes)
    clipped = 0.0
    for seed in range(4):
        batch = Batch(seed=seed, spread=0.6)
        output, gradient = batch.gradient(config)
        loss, expected = by_hand(batch, config)
        assert output.loss.item() == pytest.approx(loss, abs=1e-12)
        np.testing.assert_allclose(gradient.numpy(), expected, atol=1e-12, rtol=0)
        assert all(map(is_documented, summarize(output.metrics)))
        clipped += float(output.metrics.get("clip_token_fraction", 0.5))
    assert 0 < clipped < 4


@pytest.mark.parametrize("name", TYPES)
def test_equal_policies_give_the_policy_gradient(name: str) -> None:
    """Every variant begins as REINFORCE: with ratio 1 nothing is clipped and every gate is open."""
    batch, config = Batch(seed=4), of_type(name)
    batch.old = batch.new.clone()
    output, gradient = batch.gradient(config)
    L = torch.tensor(batch.lengths).double()
    weights = {
        "sequence_mean": 1 / (batch.S * L),
        "token_mean": 1 / L.sum() + 0 * L,
        "dr_grpo": 1 / (batch.S * C) + 0 * L,
    }
    expected = -(weights[config.aggregation] * batch.advantages).repeat_interleave(L.long())
    torch.testing.assert_close(gradient, expected, atol=1e-15, rtol=0)
    assert output.metrics.get("clip_token_fraction", 0.0) == 0.0
    assert output.metrics.get("loss/gate", 1.0) == pytest.approx(1.0, abs=1e-15)


def half(inputs: LossInputs, *, factor: float = 0.5) -> LossTerms:
    """A loss per sequence of the user's, with a metric per token."""
    log_s = torch.segment_reduce(inputs.log_ratio, "mean", lengths=inputs.lengths, axis=0)
    first = inputs.lengths.cumsum(0) - inputs.lengths
    return LossTerms(
        loss=-factor * log_s.exp() * inputs.advantages[first],
        clipped={"high": inputs.log_ratio > 0.3},
        metrics={"square": inputs.log_ratio.square()},
    )


@pytest.mark.parametrize("kind", ["none", "mask"])
@pytest.mark.parametrize("name", [*TYPES, None])
def test_the_split_into_micro_batches_changes_nothing(name: str | None, kind: str) -> None:
    spread = 4e-3 if name in ("gspo", "gspo_token") else 0.4
    batch = Batch(seed=1, spread=spread)
    config = of_type(
        name,
        kl_coef=0.1,
        correction={"kind": kind, "low": 0.995, "high": 1.005},
        **({} if name else {"python": f"{HERE}:half"}),
    )
    whole, gradient = batch.gradient(config, rollout_logprobs=batch.rollout)
    if kind == "mask":
        assert 0 < whole.metrics["mismatch/corrected_fraction"] < 1
    for split in ([[0, 2, 4], [1, 3, 5]], [[5], [4, 0], [2], [3, 1]]):
        summed, collected, parts = 0.0, torch.full_like(gradient, math.nan), []
        for indices in split:
            part, tokens = batch.select(indices)
            output, own = part.gradient(
                config, rollout_logprobs=part.rollout, num_sequences=batch.S, num_tokens=batch.R
            )
            summed += output.loss.item()
            collected[tokens] = own
            parts.append(output.metrics)
        assert summed == pytest.approx(whole.loss.item(), abs=1e-13)
        torch.testing.assert_close(collected, gradient, atol=1e-14, rtol=0)
        expected = summarize(reduce_metrics([whole.metrics]))
        assert summarize(reduce_metrics(parts)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", ["gmpo", "cispo", "sapo"])
def test_a_masked_answer_gives_no_gradient_and_leaves_the_others_theirs(name: str) -> None:
    batch = Batch(seed=1, spread=0.4)
    batch.rollout = batch.old.clone()
    batch.rollout[4:11] -= 0.5  # sequence 2
    mask = {"kind": "mask", "low": 0.9, "high": 1.1}
    _, plain = batch.gradient(of_type(name))
    _, masked = batch.gradient(of_type(name, correction=mask), rollout_logprobs=batch.rollout)
    assert plain[4:11].abs().sum() > 0
    plain[4:11] = 0.0
    assert torch.equal(masked, plain)


@pytest.mark.parametrize("name", ["gmpo", "cispo", "sapo"])
def test_a_ratio_that_overflows_is_bounded_without_nan(name: str) -> None:
    batch = Batch(lengths=(1, 1))
    batch.new, batch.old = torch.tensor([-1.0, -1.0]).double(), torch.tensor([-2001.0, -1.0]).double()
    batch.advantages = torch.tensor([1.0, 1.0]).double()
    output, gradient = batch.gradient(of_type(name), ref=None)
    assert output.loss.isfinite()
    assert gradient.tolist() == pytest.approx([-2.5 if name == "cispo" else 0.0, -0.5], abs=0, rel=1e-15)


def test_gspo_is_the_default_and_token_means_are_of_the_batch() -> None:
    assert LossConfig() == of_type("gspo", dr_grpo_length=None)
    assert SURROGATES.keys() == set(TYPES)
    batch = Batch(seed=3, spread=0.3)
    expected, gradient = batch.gradient(of_type("grpo", clip_high=0.28, aggregation="token_mean"))
    found, same = batch.gradient(of_type("dapo"))
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(same, gradient)


def test_gmpo_takes_one_advantage_per_answer() -> None:
    batch = Batch()
    with pytest.raises(ValueError, match=r"advantages has shape \[22\]; loss.type=gmpo .* takes \[6\]"):
        batch.loss(of_type("gmpo"), advantages=batch.token_advantages)


def test_a_bound_that_is_left_out_clips_nothing() -> None:
    batch = Batch(seed=2, spread=0.5)
    output, gradient = batch.gradient(of_type("grpo", clip_low=None, clip_high=None))
    owner = torch.repeat_interleave(torch.tensor(batch.lengths))
    ratio, L = (batch.new - batch.old).exp(), torch.tensor(batch.lengths)[owner]
    torch.testing.assert_close(gradient, -ratio * batch.advantages[owner] / (batch.S * L), atol=1e-15, rtol=0)
    assert output.metrics["clip_token_fraction"] == 0.0


# --- the user's own


def raises(inputs: LossInputs) -> LossTerms:
    raise RuntimeError("not today")


def shapeless(inputs: LossInputs) -> LossTerms:
    return LossTerms(loss=-inputs.logprobs.sum())


def constant(inputs: LossInputs) -> LossTerms:
    return LossTerms(loss=inputs.old_logprobs)


def extreme(inputs: LossInputs) -> LossTerms:
    return LossTerms(loss=-inputs.logprobs, metrics={"ratio_max": inputs.log_ratio})


def bare(inputs: LossInputs) -> Any:
    return -inputs.logprobs


def test_a_loss_of_the_users_own_gets_arguments_and_gives_metrics() -> None:
    batch = Batch(seed=2, spread=0.3)
    config = of_type(None, python=f"{HERE}:half", args={"factor": 2.0})
    output, gradient = batch.gradient(config)
    pieces = np.split((batch.new - batch.old).numpy(), np.cumsum(batch.lengths)[:-1])
    s = np.array([math.exp(piece.mean()) for piece in pieces])
    assert output.loss.item() == pytest.approx(-2 * (s * batch.advantages.numpy()).mean(), abs=1e-13)
    L = np.array(batch.lengths)
    expected = np.repeat(-2 * s * batch.advantages.numpy() / (batch.S * L), L)
    np.testing.assert_allclose(gradient.numpy(), expected, atol=1e-14)
    assert output.metrics["loss/square"] == pytest.approx(np.mean([(p**2).mean() for p in pieces]))
    assert output.metrics["clip_high_fraction"] == pytest.approx(np.mean([(p > 0.3).mean() for p in pieces]))


@pytest.mark.parametrize(
    ("name", "args", "said"),
    [
        ("nowhere", {}, "write it as package.module:function"),
        ("no.such.module:loss", {}, "No module named 'no'"),
        (f"{HERE}:nothing", {}, "has no nothing; correct the name"),
        (
            f"{HERE}:half",
            {"facter": 1.0},
            r"cannot be called as function\(inputs, \*\*loss.args\): .*'facter'",
        ),
        (f"{HERE}:raises", {}, r"failed at .*test_losses.py:\d+: RuntimeError: not today"),
        (f"{HERE}:shapeless", {}, r"loss has shape \[\]; a tensor of \[22\]"),
        (f"{HERE}:constant", {}, "returned a loss without a gradient"),
        (f"{HERE}:extreme", {}, "metric ratio_max is averaged"),
        (f"{HERE}:bare", {}, "returned Tensor; return gspo_mm.loss.LossTerms"),
    ],
)
def test_what_is_wrong_with_a_loss_is_one_sentence(name: str, args: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        Batch().gradient(of_type(None, python=name, args=args))
    assert str(caught.value).startswith(f"loss.python={name}")
    assert "\n" not in str(caught.value)


# --- config

MINIMAL = "run: {name: a}\nmodel: {path: m}\ndata: {train: [a.tar]}\nreward: {file: r.yaml}\n"


def load(folder: Path, *overrides: str, text: str = "") -> Config:
    (folder / "c.yaml").write_text(MINIMAL + text)
    return load_config(folder / "c.yaml", list(overrides))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["type=sappo"], ["loss.type='sappo'", "'sapo'"]),
        (["type=null"], ["loss.type=None and loss.python=None", "one of them"]),
        (["type=sapo", "python=a:b"], ["loss.type=sapo and loss.python=a:b", "one of them"]),
        (["args={x: 1}"], ["loss.args={'x': 1} with loss.type=gspo", "leave them out"]),
        (["type=sapo", "clip_low=0.2"], ["loss.clip_low=0.2 is not used by loss.type=sapo"]),
        (["type=sapo", "dual_clip=3.0"], ["loss.dual_clip=3 is not used by loss.type=sapo"]),
        (["type=sapo", "tau_negative=null"], ["loss.type=sapo needs", "leave them out"]),
        (["type=sapo", "tau_negative=0"], ["loss.tau_negative=0", "greater than 0"]),
        (["type=grpo", "tau_positive=1.0"], ["loss.tau_positive=1 is not used by loss.type=grpo"]),
        (["type=cispo", "dual_clip=3.0"], ["loss.dual_clip=3 is not used by loss.type=cispo"]),
        (
            ["type=cispo", "level=sequence"],
            ["loss.level=sequence with loss.type=cispo", "token or sequence_token"],
        ),
        (["type=gmpo", "level=sequence"], ["loss.level=sequence with loss.type=gmpo", "takes token"]),
        (["type=gspo", "clip_high=0.28"], ["loss.clip_high=0.28", "loss.allow_wide_clip=true"]),
    ],
)
def test_what_does_not_belong_together_is_refused(
    tmp_path: Path, overrides: list[str], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, *(f"loss.{change}" for change in overrides))
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", TYPES)
def test_a_named_loss_reads_back_as_it_was_saved(tmp_path: Path, name: str) -> None:
    config = load(tmp_path, f"loss.type={name}")
    assert config.advantage.std == ("none" if name == "dr_grpo" else "unbiased")
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


def test_keys_override_what_a_loss_sets(tmp_path: Path) -> None:
    text = "loss: {type: dapo, clip_low: 0.1}\n"
    loss = load(tmp_path, "loss.aggregation=sequence_mean", text=text).loss
    assert (loss.level, loss.aggregation, loss.clip_low, loss.clip_high) == (
        "token",
        "sequence_mean",
        0.1,
        0.28,
    )
    assert load(tmp_path, "loss.type=dr_grpo", "advantage.std=biased").advantage.std == "biased"


def test_another_loss_takes_nothing_from_the_one_before(tmp_path: Path) -> None:
    text = (
        "loss: {level: sequence, clip_low: 0.008, clip_high: 0.01, kl_coef: 0.1}\nadvantage: {std: biased}\n"
    )
    plain = load(tmp_path, text=text)
    for name in TYPES:
        alone = of_type(name, dr_grpo_length=None, kl_coef=0.1)
        config = load(tmp_path, f"loss.type={name}", text=text)
        assert config.loss == alone
        assert config.advantage.std == ("none" if name == "dr_grpo" else "unbiased")
    assert load(tmp_path, "loss.type=grpo", "loss.clip_low=0.3", text=text).loss.clip_low == 0.3
    assert load(tmp_path, f"loss.python={HERE}:half", text=text).loss.type is None
    assert plain.loss.clip_low == load(tmp_path, "loss.kl_coef=0.2", text=text).loss.clip_low == 0.008


def test_a_config_extends_another_beside_it(tmp_path: Path) -> None:
    base = load(tmp_path, text="loss: {clip_low: 0.005, kl_coef: 0.1}\ntrain: {steps: 7}\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "d.yaml").write_text(
        "extends: ../c.yaml\nloss: {type: sapo}\nrun: {name: 'b-${run.seed}'}\n"
    )
    (tmp_path / "e.yaml").write_text("extends: sub/d.yaml\ntrain: {steps: 9}\n")
    config = load_config(tmp_path / "e.yaml", ["run.seed=3"])
    assert (config.run.name, config.train.steps, config.model) == ("b-3", 9, base.model)
    assert config.loss == of_type("sapo", kl_coef=0.1, dr_grpo_length=None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("extends: f.yaml\n", r"e.yaml: extends=.*f.yaml, which does not exist"),
        ("extends: e.yaml\n", r"e.yaml: extends=.*e.yaml, which extends itself"),
        ("extends: g.yaml\n", r"g.yaml is not valid YAML"),
        ("extends: c.yaml\nrun: {name: no}\n", r"run.name=no without quotes"),
        ("extends: h.yaml\n", r"run.name=no without quotes"),
        ("extends: c.yaml\nrun: {nam: b}\n", r"e.yaml: unknown key run.nam"),
    ],
)
def test_a_config_that_extends_nothing_useful_is_told(tmp_path: Path, text: str, said: str) -> None:
    load(tmp_path)
    (tmp_path / "g.yaml").write_text("run: {name: [}\n")
    (tmp_path / "h.yaml").write_text(MINIMAL.replace("name: a", "name: no"))
    (tmp_path / "e.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_config(tmp_path / "e.yaml")


def test_what_cannot_act_in_a_single_update_is_told() -> None:
    assert "the gate of loss.type=sapo" in (check_clip_can_act(of_type("sapo"), 1) or "")
    assert "loss.clip_high=4;" in (check_clip_can_act(of_type("cispo"), 1) or "")
    assert all(check_clip_can_act(of_type(name), 2) is None for name in TYPES)
    assert check_clip_can_act(of_type(None, python="a:b"), 1) is None


@pytest.mark.parametrize("path", sorted((CONFIGS / "losses").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_loss_is_the_quick_start_with_that_loss(path: Path) -> None:
    config, base = load_config(path), load_config(CONFIGS / "quickstart.yaml")
    assert config.loss.type == path.stem
    same = {"loss": base.loss, "run": base.run, "advantage": config.advantage}
    assert config.model_copy(update=same) == base.model_copy(update={"advantage": config.advantage})
    for line in path.read_text().splitlines():
        assert line.startswith(("#", "extends: ")) or not line or line.endswith(":") or " # " in line, line


def test_every_loss_has_a_config_and_a_row_in_the_readme() -> None:
    assert {path.stem for path in (CONFIGS / "losses").glob("*.yaml")} == {*TYPES} - {"gspo"}
    assert all(f"| `{name}` |" in README.read_text() for name in TYPES)


def test_the_loss_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, settings = re.findall(r"```(?:python|yaml)\n(.*?)```", README.read_text(), flags=re.DOTALL)
    (tmp_path / "my_losses.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    config = load(tmp_path, text=settings).loss
    batch = Batch(seed=1, spread=0.1)
    output, gradient = batch.gradient(config)
    assert gradient.abs().min() > 0
    assert 0 < output.metrics["loss/window"] < 1
