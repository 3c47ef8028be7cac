"""A run that judges itself: named rules over its metrics, each with its probable cause and what to try.

They are signs, not a diagnosis, and their thresholds are chosen to be silent on a sound run. A rule is said in the log
when it first holds; those that hold when the run ends stand in summary.json and on top of the report.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from statistics import fmean, median
from typing import Any

from gspo_mm.config import Config
from gspo_mm.config.run import RuleName
from gspo_mm.observe.metrics import finite

logger = logging.getLogger(__name__)

MAX_LR = 0.01  # Adam moves each weight by about lr a step; language models are trained with 1e-7 to 1e-3
WINDOW = 5  # steps that a mean or median is taken over

# every metric's finite values in the order of the steps
type Series = Mapping[str, Sequence[float]]
type Seen = Callable[[Series], str | None]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A sickness."""

    # when it holds, for people
    when: str
    cause: str
    advice: str
    # the numbers that show it, or None where it does not hold
    seen: Seen


def at_start(config: Config, *, steps: int) -> list[str]:
    """What the settings of a run of `steps` steps should make its user look twice at."""
    found = []
    sampling, optimizer = config.rollout.sampling, config.policy.optimizer
    if sampling.top_p < 1 or sampling.top_k:
        found.append(
            f"rollout.sampling.top_p={sampling.top_p:g}, top_k={sampling.top_k}: answers are sampled from a truncated "
            "distribution and trained with log-probs of the whole one, so training is off-policy; 1.0 and 0 are on-policy"
        )
    if optimizer.lr > MAX_LR:
        found.append(
            f"policy.optimizer.lr={optimizer.lr:g} moves every weight by about as much in each update; 1e-7 to 1e-3 are usual"
        )
    if optimizer.warmup_steps >= steps > 1:
        found.append(
            f"policy.optimizer.warmup_steps={optimizer.warmup_steps} is no less than the {steps} steps of the run, so "
            "that the rate only rises; lower it"
        )
    return found


class Health:
    """Looks at a run's lines of metrics as they come; `lines`: those of before, of which nothing is logged."""

    def __init__(self, lines: Iterable[Mapping[str, Any]] = ()) -> None:
        self._series: dict[str, list[float]] = {}
        # the step at which a rule first held, and what was seen
        self._began: dict[RuleName, tuple[int, str]] = {}
        for line in lines:
            self._take(line)

    def look(self, line: Mapping[str, Any]) -> dict[RuleName, str]:
        """Take in one line; returns, and logs, what it shows for the first time: sentences by rule."""
        new = self._take(line)
        for name, said in new.items():
            logger.warning("%s: %s", name, said)
        return new

    def _take(self, line: Mapping[str, Any]) -> dict[RuleName, str]:
        for name, value in line.items():
            if (number := finite(value)) is not None:
                self._series.setdefault(name, []).append(number)
        new: dict[RuleName, str] = {
            name: said for name, said in self.found().items() if name not in self._began
        }
        step = int(line.get("step", 0))
        self._began |= {name: (step, said) for name, said in new.items()}
        return new

    def found(self) -> dict[RuleName, str]:
        """The rules that hold now, each with what was seen, the probable cause and what to try."""
        return {
            name: f"{what}; probable cause: {rule.cause}; try: {rule.advice}"
            for name, rule in RULES.items()
            if (what := rule.seen(self._series))
        }

    def passed(self) -> dict[RuleName, str]:
        """The rules that held for a time and hold no more, each with the step and what was seen when it first did."""
        found = self.found()
        return {
            name: f"from step {step}: {said}"
            for name, (step, said) in self._began.items()
            if name not in found
        }

    def verdict(self) -> str:
        """One sentence on `found`, or on `passed`."""
        if found := self.found():
            return f"The run looks ill: {', '.join(found)}."
        if self._began:
            passed = ", ".join(f"{name} (from step {step})" for name, (step, _) in self._began.items())
            return f"No rule holds at the end, but for a time did {passed}."
        steps = len(self._series.get("grad_norm", ()))
        if steps < 2 * WINDOW:
            return f"No rule holds, but {steps} steps are few to judge by."
        return "The run looks healthy: no rule holds."


def rules_table() -> str:
    """The rules in Markdown, for configs/README.md."""
    rows = [f"| `{name}` | {rule.when} | {rule.cause} | {rule.advice} |" for name, rule in RULES.items()]
    return "\n".join(["| rule | holds when | probable cause | what to try |", "|---|---|---|---|", *rows])


# --- what the rules are made of


def _last(series: Series, name: str, least: int = WINDOW) -> Sequence[float]:
    """The last values, empty while there are fewer than `least`."""
    values = series.get(name, ())
    return values[-max(least, WINDOW) :] if len(values) >= least else ()


def _ends(series: Series, name: str, window: int = WINDOW) -> tuple[float, float] | None:
    """Medians of the first and the last values, from twice `window` on."""
    values = series.get(name, ())
    return (median(values[:window]), median(values[-window:])) if len(values) >= 2 * window else None


def _moved(name: str, what: str, *, holds: Callable[[float, float], bool]) -> Seen:
    """A rule on how a metric ended beside how it began."""

    def seen(series: Series) -> str | None:
        ends = _ends(series, name)
        return f"{what} went from {ends[0]:.3g} to {ends[1]:.3g}" if ends and holds(*ends) else None

    return seen


def _accuracy_fell(series: Series) -> str | None:
    accuracies, judged = series.get("eval/accuracy", ()), series.get("eval/judged", ())
    if len(accuracies) < 2 or not judged:
        return None
    first, best, last = accuracies[0], max(accuracies), accuracies[-1]
    # the best of many is above its own mean by chance, so that it takes more to be below it
    for name, before, errors in (("its start", first, 2), ("its best", best, 3)):
        mean = (before + last) / 2
        # standard error of the difference of two means of n answers
        if before - last > errors * math.sqrt(2 * mean * (1 - mean) / judged[-1]):
            return f"held-out accuracy fell from {name}, {before:.1%}, to {last:.1%}"
    return None


def _constant_reward(series: Series) -> str | None:
    spread = _last(series, "reward/std", least=3)
    if not spread or max(spread) > 0:
        return None
    return f"all answers of {len(spread)} steps got the reward {series['reward/mean'][-1]:g}"


def _dead_groups(series: Series) -> str | None:
    live, dead = sum(_last(series, "groups/live")), sum(_last(series, "groups/dead"))
    if dead <= 0.8 * (live + dead) or max(_last(series, "reward/std"), default=1.0) == 0:
        return None
    return f"{dead:.0f} of {live + dead:.0f} groups of the last {WINDOW} steps had equal rewards and trained nothing"


def _failures(series: Series) -> str | None:
    for what, name in (("rewards", "reward/failed"), ("the environment", "turns/failed")):
        failed = _last(series, name)
        if failed and fmean(failed) > 0.02:
            return f"{what} of {fmean(failed):.1%} of the answers failed in the last {WINDOW} steps"
    return None


def _policy_jumped(series: Series) -> str | None:
    largest = max(_last(series, "approx_kl", least=1), default=0.0)
    return f"within one step the policy moved by {largest:.2g} nats a token" if largest > 1 else None


def _clipped(series: Series, steps: int) -> list[float]:
    """Share of what is clipped, at either bound, in each of the last steps."""
    low, high = (_last(series, f"clip_{bound}_fraction", steps) for bound in ("low", "high"))
    return [a + b for a, b in zip(low, high, strict=False)]


def _clip_saturated(series: Series) -> str | None:
    shares = _clipped(series, WINDOW)
    if not shares or fmean(shares) <= 0.5:
        return None
    return f"{fmean(shares):.0%} was clipped in the last {WINDOW} steps"


def _clip_idle(series: Series) -> str | None:
    shares, ratios = _clipped(series, 20), _last(series, "ratio_max", 20)
    if not shares or any(shares) or max(ratios, default=1.0) <= 6:
        return None
    return f"ratios rose to {max(ratios):.3g} and nothing was clipped in {len(shares)} steps"


def _truncated(series: Series) -> str | None:
    shares = _last(series, "length/truncated_fraction")
    if not shares or fmean(shares) <= 0.3:
        return None
    return f"{fmean(shares):.0%} of the answers of the last {WINDOW} steps were cut off"


def _parts_at_odds(series: Series) -> str | None:
    prefix = "reward/part/"
    # a part may be of a few prompts a step only, so that it takes many steps to see it move
    ends = {name.removeprefix(prefix): _ends(series, name, 20) for name in series if name.startswith(prefix)}
    change = {name: both[1] - both[0] for name, both in ends.items() if both}
    for rose, fell in permutations(change, 2):
        if change[rose] > 0.15 and change[fell] < -0.15:
            return f"part {rose} rose by {change[rose]:.2g} while {fell} fell by {-change[fell]:.2g}"
    return None


def _no_effect(series: Series) -> str | None:
    moves, held_out = _last(series, "approx_kl", 30), series.get("eval/reward", ())[-4:]
    if not moves or max(moves) > 1e-7:
        return None
    if max(moves) > 0:
        return f"in {len(moves)} steps the policy moved by at most {max(moves):.1g} nats a token"
    # with one update per batch it never moves within a step: only held-out answers can show it
    if len(held_out) < 4 or len(set(held_out)) > 1:
        return None
    return f"the last {len(held_out)} evaluations have the same reward, {held_out[0]:.6g}"


RULES: dict[RuleName, Rule] = {
    "accuracy_fell": Rule(
        when="held-out accuracy is 2 standard errors below its start, or 3 below its best",
        cause="the rate is too high, or the reward pays for something else",
        advice="lower policy.optimizer.lr, look at answers and rewards in the report, set checkpoint.keep_best",
        seen=_accuracy_fell,
    ),
    "constant_reward": Rule(
        when="all answers of 3 to 5 steps got the same reward",
        cause="the reward does not tell answers apart, or none is right yet",
        advice="look at reward.file and the answers in the report, warm up with `gspo-mm sft`, or take easier prompts",
        seen=_constant_reward,
    ),
    "dead_groups": Rule(
        when="above 80 % of the groups of 5 steps have equal rewards",
        cause="prompts are too easy or too hard, or the answers of a group are alike",
        advice="other prompts, rollout.drop_dead_groups, a larger rollout.group_size or sampling.temperature",
        seen=_dead_groups,
    ),
    "failures": Rule(
        when="rewards, or the environment, fail for above 2 % of the answers of 5 steps",
        cause="a reward or an environment raises, or runs out of time",
        advice="read the reasons in RUN/log.txt; raise reward.timeout or rollout.environment.timeout",
        seen=_failures,
    ),
    "entropy_collapsed": Rule(
        when="entropy is below 0.03 nats a token and a fifth of what it was",
        cause="the policy has become sure of one answer and explores no more",
        advice="stop earlier, lower policy.optimizer.lr, or raise rollout.sampling.temperature",
        seen=_moved("entropy", "entropy", holds=lambda first, last: last < min(0.03, first / 5)),
    ),
    "gradient_growing": Rule(
        when="the gradient norm is 20 times what it was",
        cause="training becomes unstable",
        advice="lower policy.optimizer.lr or policy.optimizer.grad_clip",
        seen=_moved("grad_norm", "the gradient norm", holds=lambda first, last: last > 20 * first > 0),
    ),
    "policy_jumped": Rule(
        when="the policy moved by more than 1 nat a token within one of 5 steps",
        cause="the rate is too high, or too many updates are made of one batch",
        advice="lower policy.optimizer.lr or train.updates_per_batch",
        seen=_policy_jumped,
    ),
    "clip_saturated": Rule(
        when="above half of the sequences (tokens by loss.level) are clipped in 5 steps",
        cause="the policy moves further than the clip bounds allow",
        advice="lower policy.optimizer.lr or train.updates_per_batch, or widen loss.clip_low and loss.clip_high",
        seen=_clip_saturated,
    ),
    "clip_idle": Rule(
        when="a ratio rises above 6 and nothing is clipped in 20 steps",
        cause="the clip bounds are too wide to act",
        advice="lower loss.clip_low and loss.clip_high",
        seen=_clip_idle,
    ),
    "length_collapsed": Rule(
        when="answers are a quarter as long as they were",
        cause="the reward pays for short answers, or does not pay for the reasoning",
        advice="look at short answers with a high reward in the report; change the part that pays for them",
        seen=_moved("length/mean", "tokens per answer", holds=lambda first, last: last < first / 4),
    ),
    "length_exploded": Rule(
        when="answers are 4 times as long as they were",
        cause="the reward pays for long answers, or answers no longer end",
        advice="look at long answers in the report; add a `length` part to the reward",
        seen=_moved("length/mean", "tokens per answer", holds=lambda first, last: last > 4 * first),
    ),
    "truncated": Rule(
        when="above 30 % of the answers of 5 steps are cut off",
        cause="answers need more room than they have, or do not end",
        advice="raise rollout.sampling.max_new_tokens (environment.max_turns), or warm up with `gspo-mm sft`",
        seen=_truncated,
    ),
    "mismatch_growing": Rule(
        when="engine and policy differ by above 0.05 nats a token and 3 times what it was",
        cause="the engine computes something else, in other precision or with older weights",
        advice="run `gspo-mm preflight`, set loss.correction, or lower rollout.max_staleness",
        seen=_moved(
            "logprob_gap_mean",
            "the gap of engine and policy",
            holds=lambda first, last: last > max(0.05, 3 * first),
        ),
    ),
    "parts_at_odds": Rule(
        when="one part of the reward rose by 0.15 while another fell by 0.15, 20 steps each",
        cause="the policy trades one part of the reward, or one task, for another",
        advice="change the weights of the parts in reward.file, or the shares of the tasks in data.train",
        seen=_parts_at_odds,
    ),
    "no_effect": Rule(
        when="the policy moved by at most 1e-7 nats a token in each of 30 steps; if by 0, 4 evaluations are equal too",
        cause="the rate is too low for the policy's precision, or what should learn is frozen",
        advice="raise policy.optimizer.lr, look at policy.freeze and policy.dtype",
        seen=_no_effect,
    ),
    "loss_rose": Rule(
        when="`gspo-mm sft`: the loss is a tenth above where it began",
        cause="the rate is too high",
        advice="lower policy.optimizer.lr",
        seen=_moved("sft/loss", "the loss", holds=lambda first, last: last > 1.1 * first),
    ),
}
