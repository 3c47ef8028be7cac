"""The charts of RUN/report.html, in their order. What each metric is stands in metrics.py."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Curves that share an axis; drawn where a run has any of them."""

    title: str
    unit: str  # of the vertical axis
    about: str  # one sentence for who sees it for the first time
    series: dict[str, str]  # {legend: metric}
    on_click: tuple[str, ...] = ()  # legends whose curves show on a click, since they would set the scale


CHARTS = [
    Chart(
        title="Accuracy",
        unit="fraction",
        about="Answers that the reward file calls correct.",
        series={"sampled": "accuracy", "held-out, greedy": "eval/accuracy"},
    ),
    Chart(
        title="Reward",
        unit="reward",
        about="What the step's answers earned, and those to held-out prompts.",
        series={"mean": "reward/mean", "standard deviation": "reward/std", "held-out": "eval/reward"},
    ),
    Chart(
        title="Importance ratio",
        unit="ratio",
        about="Policy after some updates against the policy that the step began with; 1 in the first update.",
        series={"mean": "ratio_mean", "min": "ratio_min", "max": "ratio_max"},
    ),
    Chart(
        title="Clipped",
        unit="fraction",
        about="Answers, and tokens in them, that got no gradient, with CISPO less, because their ratio left the clip range.",
        series={"low": "clip_low_fraction", "high": "clip_high_fraction", "tokens": "clip_token_fraction"},
    ),
    Chart(
        title="Gate",
        unit="fraction",
        about="How much of the gradient SAPO's gate lets through: 1 where the policy is still the one that sampled.",
        series={"mean": "loss/gate"},
    ),
    Chart(
        title="Response length",
        unit="tokens",
        about="A maximum that stays at rollout.sampling.max_new_tokens means that answers are cut off.",
        series={"mean": "length/mean", "max": "length/max"},
    ),
    Chart(
        title="Entropy and KL",
        unit="nats per token",
        about="Entropy near 0 means that the policy has stopped exploring.",
        series={"entropy": "entropy", "KL to old": "approx_kl", "KL to reference": "kl_ref"},
    ),
    Chart(
        title="Groups",
        unit="groups",
        about="Only live groups teach something; the answers of a dead one all earned the same.",
        series={"live": "groups/live", "dead": "groups/dead", "failed": "groups/failed"},
    ),
    Chart(
        title="Turns",
        unit="turns",
        about="Turns of an answer: after each but the last the environment gave something back.",
        series={"mean": "turns/mean", "largest": "turns/max"},
    ),
    Chart(
        title="Answers that call",
        unit="fraction",
        about="Answers to which the environment gave something back, as they called for it.",
        series={"sampled": "turns/called", "held-out, greedy": "eval/turns/called"},
    ),
    Chart(
        title="Accuracy with and without a call",
        unit="fraction",
        about="Correct ones of the answers that called, and of those that did not.",
        series={
            "with": "turns/accuracy_called",
            "without": "turns/accuracy_uncalled",
            "held-out, with": "eval/turns/accuracy_called",
            "held-out, without": "eval/turns/accuracy_uncalled",
        },
    ),
    Chart(
        title="Reward with and without a call",
        unit="reward",
        about="Mean reward of the answers that called, and of those that did not.",
        series={
            "with": "turns/reward_called",
            "without": "turns/reward_uncalled",
            "held-out, with": "eval/turns/reward_called",
            "held-out, without": "eval/turns/reward_uncalled",
        },
    ),
    Chart(
        title="Supervised loss",
        unit="nats per token",
        about="Cross-entropy of the reference responses.",
        series={"loss": "sft/loss"},
    ),
    Chart(
        title="Gradient norm",
        unit="norm",
        about="Before clipping to policy.optimizer.grad_clip.",
        series={"before clipping": "grad_norm"},
    ),
    Chart(
        title="Routing",
        unit="fraction",
        about="Choices of experts that the step's updates left as they were, on a few of its sequences; each of the others "
        "changes what the policy computes for a token, and so its ratio.",
        series={"agree": "routing/agree"},
    ),
    Chart(
        title="Engine against policy",
        unit="nats",
        about="|log-prob of the rollout engine - of the policy| of the sampled tokens.",
        series={"mean": "logprob_gap_mean", "max": "logprob_gap_max"},
    ),
    Chart(
        title="Mismatch",
        unit="nats per token",
        about="KL(rollout engine, policy), estimated twice; staleness adds to it, and a rise often precedes a collapse.",
        series={"k1": "mismatch/k1", "k3 (never negative)": "mismatch/k3"},
    ),
    Chart(
        title="Mismatch ratio of answers",
        unit="ratio",
        about="Policy / rollout engine, geometric mean over an answer's tokens; loss.correction.low and high bound it.",
        series={
            "median": "mismatch/ratio_p50",
            "1 % are below": "mismatch/ratio_p01",
            "1 % are above": "mismatch/ratio_p99",
            "mean": "mismatch/ratio_mean",
            "min": "mismatch/ratio_min",
            "max": "mismatch/ratio_max",
        },
        on_click=("mean", "min", "max"),
    ),
    Chart(
        title="Corrected answers",
        unit="fraction",
        about="Answers that loss.correction truncated or masked; more than a few percent is a mismatch to look into.",
        series={"corrected": "mismatch/corrected_fraction"},
    ),
    Chart(
        title="Staleness",
        unit="weight versions",
        about="Weight versions between sampling a token and training on it; rollout.max_staleness is the bound.",
        series={"mean": "rollout/staleness_mean", "max": "rollout/staleness_max"},
    ),
    Chart(
        title="Groups under way",
        unit="groups",
        about="On the servers, or waiting, while the step trained; those replaced because they were dead, or given "
        "up because they were slow; and requests sent again, because a server failed or its reply could not be used.",
        series={
            "in flight": "rollout/in_flight",
            "dropped": "rollout/dropped",
            "given up": "rollout/given_up",
            "asked again": "rollout/asked_again",
        },
    ),
    Chart(
        title="Busy",
        unit="fraction of the step",
        about="The trainer while it did not wait for answers, servers while they had any to give; with max_staleness above 0 "
        "the slower of the two comes near 1.",
        series={"trainer": "busy/trainer", "servers": "busy/servers"},
    ),
    Chart(
        title="Servers",
        unit="servers",
        about="Those that answered when the step ended, and those that had been lost and came back in the meantime.",
        series={"up": "rollout/servers_up", "came back": "rollout/servers_back"},
    ),
]
