"""What is planned: a model on GPUs under a layout, its servers, and the lengths that decide how much there is to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import lcm
from typing import Literal

from gspo_mm.config import Config
from gspo_mm.config.layout import PlanError, Sizes, round_up
from gspo_mm.config.policy import LoraConfig
from gspo_mm.plan.hardware import IMBALANCE, LATENCY_NETWORK, LATENCY_NVLINK, Efficiency, Gpu, gpu_of
from gspo_mm.plan.model import Model, read_model

SHARE_OF_LONGEST = 0.25


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Mean tokens. What a user does not say is a share of the config's limits; the plan prints what it took."""

    # of a prompt, with those of its image
    prompt: float
    # of those, the image's
    image: float
    answer: float
    # at which answers are cut off
    longest: int

    @property
    def sequence(self) -> float:
        return self.prompt + self.answer


@dataclass(frozen=True, kw_only=True)
class Servers:
    """SGLang servers, all alike."""

    number: int
    tp: int
    # data-parallel attention groups within tp
    dp: int
    fp8: bool
    # of GPU memory, for weights and cache
    fraction: float
    # sequences decoded together at most; None: what the cache holds
    max_running: int | None
    # on the trainer's own GPUs, asleep while it trains
    colocated: bool

    @property
    def gpus(self) -> int:
        return self.number * self.tp


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How the policy is held and computed; the settings of `policy` that cost memory or time."""

    sizes: Sizes
    # bytes of a weight outside of FP8
    width: int = 2
    fp8: bool = False
    fp8_weights: bool = False
    moment_bytes: int = 4
    offload: bool = False
    frozen: frozenset[str] = frozenset()
    lora: LoraConfig | None = None
    recompute: Literal["none", "selective", "full"] = "none"
    micro_tokens: int = 16384
    # bytes kept for features of images
    feature_cache: float = 0.0
    keeps_features: bool = False
    # tokens reach their experts by DeepEP, once for each node
    flex: bool = False
    # sequences are put one behind the other without padding; not so in some published runs
    packed: bool = True


@dataclass(frozen=True, kw_only=True)
class Work:
    """One training step."""

    prompts: int
    group: int
    updates: int
    lengths: Lengths
    # passes for log-probs before the updates: of the policy itself, and of a reference
    old: bool
    reference: bool
    staleness: int
    # groups asked of servers at a time
    in_flight: int

    @property
    def answers(self) -> int:
        return self.prompts * self.group

    @property
    def tokens(self) -> float:
        return self.answers * self.lengths.sequence


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything a plan is worked out from."""

    model: Model
    gpu: Gpu
    # GPUs of a node
    per_node: int
    policy: Policy
    work: Work
    # None: the embedded engine, whose answers are not planned
    servers: Servers | None
    push: Literal["disk", "tensor", "distributed"] = "distributed"
    # bytes of weights under way in a push
    bucket: float = 512 * 2**20
    # tokens of the busiest expert-parallel rank over the mean
    imbalance: float = IMBALANCE
    efficiency: Efficiency = field(default_factory=Efficiency)

    @property
    def gpus(self) -> int:
        own = self.servers.gpus if self.servers and not self.servers.colocated else 0
        return self.policy.sizes.world_size + own

    @property
    def domain(self) -> int:
        """GPUs that NVLink joins."""
        return (
            max(self.per_node, self.gpu.domain)
            if self.gpu.domain > 8
            else min(self.per_node, self.gpu.domain)
        )

    def link(self, ranks: int) -> float:
        """Bytes/s of a GPU within a group of so many neighbouring ranks."""
        return (self.gpu.nvlink if ranks <= self.domain else self.gpu.network) * self.efficiency.links

    def latency(self, ranks: int) -> float:
        """Seconds of a collective of theirs without its bytes."""
        return LATENCY_NVLINK if ranks <= self.domain else LATENCY_NETWORK

    @property
    def padded_vocab(self) -> int:
        """Rows of embedding and output layer, as policy/model.py pads them."""
        return round_up(self.model.vocab, 64 * lcm(8, self.policy.sizes.tp))


def job_of(
    config: Config,
    *,
    nodes: int,
    rollout_nodes: int,
    per_node: int,
    gpu: str,
    lengths: Mapping[str, int | None] | None = None,
    efficiency: Efficiency | None = None,
) -> Job:
    """The job that `submit.sh` would start for this config. Raises PlanError, PlanError or ConfigError in one sentence."""
    model, world = read_model(config.model.path), nodes * per_node
    sizes = Sizes.from_config(config.policy.parallel, world)
    sizes.check_model(model.dims)
    work = _work(config, model, lengths or {})
    _check_batch(config, sizes)
    return Job(
        model=model,
        gpu=gpu_of(gpu),
        per_node=per_node,
        policy=_policy(config, sizes),
        work=work,
        servers=_servers(config, nodes=nodes, rollout_nodes=rollout_nodes, per_node=per_node),
        push=config.sync.mode,
        bucket=config.sync.bucket_mb * 2**20,
        efficiency=efficiency or Efficiency(),
    )


def _check_batch(config: Config, sizes: Sizes) -> None:
    prompts, parts = config.rollout.prompts_per_step, config.train.updates_per_batch * sizes.dp
    if prompts % parts:
        raise PlanError(
            f"rollout.prompts_per_step={prompts} cannot be split into train.updates_per_batch={config.train.updates_per_batch} "
            f"updates over {sizes.dp} data-parallel ranks; use a multiple of {parts}"
        )


def _policy(config: Config, sizes: Sizes) -> Policy:
    policy = config.policy
    return Policy(
        sizes=sizes,
        width=4 if policy.dtype == "float32" else 2,
        fp8=policy.fp8.recipe is not None,
        fp8_weights=policy.fp8.primary_weights,
        moment_bytes=2 if policy.optimizer.moments == "bfloat16" else 4,
        offload=policy.optimizer.offload,
        frozen=frozenset(policy.frozen),
        lora=policy.lora,
        recompute=policy.recompute,
        micro_tokens=policy.micro_batch_tokens,
        feature_cache=policy.vision_cache_mb * 2**20 if policy.keeps_features else 0.0,
        keeps_features=policy.keeps_features,
        flex=policy.moe.dispatcher == "flex",
    )


def _work(config: Config, model: Model, lengths: Mapping[str, int | None]) -> Work:
    longest = config.rollout.sampling.max_new_tokens
    prompt = lengths.get("prompt") or config.data.max_prompt_tokens / 4
    image = lengths.get("image")
    if image is None:
        # a tower is there to be used: half of the prompt is an image
        image = prompt / 2 if model.vision else 0
    answer = lengths.get("answer") or longest * SHARE_OF_LONGEST
    for name, value, limit, key in (
        ("answer", answer, longest, "rollout.sampling.max_new_tokens"),
        ("prompt", prompt, config.data.max_prompt_tokens, "data.max_prompt_tokens"),
        ("image", image, prompt, "--prompt"),
    ):
        if value > limit:
            raise PlanError(
                f"--{name} {value:g} is more than {key}={limit:g} allows; lower it, or raise the other"
            )
    return Work(
        prompts=config.rollout.prompts_per_step,
        group=config.rollout.group_size,
        updates=config.train.updates_per_batch,
        lengths=Lengths(prompt=prompt, image=image, answer=answer, longest=longest),
        old=config.train.updates_per_batch > 1,
        reference=config.loss.kl_coef != 0,
        staleness=config.rollout.max_staleness,
        in_flight=config.rollout.max_in_flight,
    )


def _servers(config: Config, *, nodes: int, rollout_nodes: int, per_node: int) -> Servers | None:
    """As submit.sh starts them: on nodes of their own, or on the trainer's GPUs; None where they are not the run's."""
    sglang = config.rollout.sglang
    if not config.rollout.serves:
        if rollout_nodes:
            raise PlanError(
                f"--rollout-nodes {rollout_nodes} with rollout.engine={config.rollout.engine}: only SGLang has servers; "
                "set rollout.engine=sglang, or leave --rollout-nodes out"
            )
        return None
    if sglang.urls:
        return None  # of somebody else
    elsewhere = bool(rollout_nodes) or sglang.start == "elsewhere"
    if not elsewhere and not sglang.colocate:
        raise PlanError(
            f"all {nodes * per_node} GPUs train, and none is left for servers; give them nodes with --rollout-nodes, or share "
            "GPUs with rollout.sglang.colocate=true"
        )
    here = nodes if sglang.start == "beside" and not elsewhere else max(1, rollout_nodes)
    if sglang.servers * sglang.tp > per_node:
        raise PlanError(
            f"rollout.sglang.servers={sglang.servers} of tp={sglang.tp} need {sglang.servers * sglang.tp} GPUs on each node, "
            f"which has {per_node}; lower one of them"
        )
    return Servers(
        number=sglang.servers * here,
        tp=sglang.tp,
        dp=sglang.dp,
        fp8=sglang.fp8,
        fraction=sglang.mem_fraction,
        max_running=sglang.max_running,
        colocated=not elsewhere,
    )
