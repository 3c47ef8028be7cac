"""What is compared: losses, each with the clip range of its own paper, under several kinds of off-policyness."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import product
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A way to train. All else is the same for all: model, data, seeds, optimizer, updates per batch."""

    label: str
    config: str  # below configs/
    color: str
    replays: bool = False  # whether updates use the experts that the old log-probs were computed with
    seeds: int | None = None  # as many as other arms if None


# The bounds are those of each paper, but for gspo and gspo_token: theirs are for answers of a thousand tokens, and the configs
# say how they are scaled to short ones.
ARMS = {
    "gspo": Arm(label="GSPO", config="quickstart.yaml", color="#2563eb"),
    # one seed: where all tokens of an answer have its advantage it equals GSPO (eq. 14 and 15 of its paper), as seen here
    "gspo_token": Arm(label="GSPO-token", config="losses/gspo_token.yaml", color="#0891b2", seeds=1),
    "grpo": Arm(label="GRPO", config="losses/grpo.yaml", color="#dc2626"),
    "grpo_replay": Arm(
        label="GRPO + replay", config="losses/grpo.yaml", color="#ea580c", replays=True
    ),
    "sapo": Arm(label="SAPO", config="losses/sapo.yaml", color="#16a34a"),
    "cispo": Arm(label="CISPO", config="losses/cispo.yaml", color="#9333ea"),
    "dr_grpo": Arm(label="Dr. GRPO", config="losses/dr_grpo.yaml", color="#ca8a04"),
    "dapo": Arm(label="DAPO", config="losses/dapo.yaml", color="#64748b"),
    "gmpo": Arm(label="GMPO", config="losses/gmpo.yaml", color="#db2777"),
}  # fmt: skip
MAIN = ("gspo", "grpo", "grpo_replay")  # those of a short comparison beside its first setting

# experts of a layer -> what is set of the tiny model beside them: as many weights are at work for a token
MODELS: dict[int, dict[str, int]] = {
    8: {},
    64: {"num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 12},
}


@dataclass(frozen=True, kw_only=True, order=True)
class Run:
    """One training run."""

    experts: int
    staleness: int  # weight versions between sampling a batch and training on it
    arm: str
    seed: int

    @property
    def setting(self) -> tuple[int, int]:
        return self.experts, self.staleness

    def __str__(self) -> str:
        return f"{self.arm}-experts{self.experts}-stale{self.staleness}-seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much of it."""

    warm_steps: int  # of the supervised start that all arms of a seed share
    steps: int
    prompts: int  # of a step
    group: int  # answers to each
    updates: int  # optimizer steps per batch
    lr: float  # the largest, of all arms
    eval_every: int
    eval_prompts: int
    audit_every: int  # batches between looks at routing decisions
    seeds: int
    fewer_seeds: int  # of the settings after the first
    arms: tuple[str, ...]  # in the settings after the first
    settings: tuple[tuple[int, int], ...]  # (experts, staleness) after the first

    def runs(self, names: tuple[str, ...] = tuple(ARMS)) -> list[Run]:
        """Those of the arms `names`, in the order in which they are made: all arms of a seed, then the next."""
        wanted = [
            ((8, 0), ARMS, self.seeds),
            *((setting, self.arms, self.fewer_seeds) for setting in self.settings),
        ]
        return [
            Run(experts=experts, staleness=staleness, arm=arm, seed=seed)
            for (experts, staleness), arms, seeds in wanted
            for seed, arm in product(range(seeds), arms)
            if arm in names and seed < (ARMS[arm].seeds or seeds)
        ]

    def of_a_run(self) -> dict[str, Any]:
        """What must be equal where a run's result is used again."""
        left_out = ("seeds", "fewer_seeds", "arms", "settings")
        return {key: value for key, value in asdict(self).items() if key not in left_out}


SHORT = Scale(
    warm_steps=100, steps=80, prompts=16, group=16, updates=4, lr=5e-4, eval_every=16, eval_prompts=500, audit_every=5,
    seeds=3, fewer_seeds=2, arms=MAIN, settings=((8, 1), (8, 4), (64, 0)),
)  # fmt: skip
FULL = Scale(
    warm_steps=120, steps=450, prompts=32, group=8, updates=4, lr=5e-4, eval_every=50, eval_prompts=500, audit_every=10,
    seeds=5, fewer_seeds=5, arms=tuple(ARMS), settings=((8, 1), (8, 4), (64, 0), (64, 1), (64, 4)),
)  # fmt: skip
