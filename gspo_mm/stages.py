"""Builds every stage of the pipeline from its section of the config. Imports torch; `config` does not."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gspo_mm.advantage import is_dead
from gspo_mm.config import Config
from gspo_mm.data.faults import BadSample
from gspo_mm.data.odd import odd_ones
from gspo_mm.data.processor import Processor
from gspo_mm.data.source import PromptSource
from gspo_mm.environment.pool import make
from gspo_mm.families.table import family_of
from gspo_mm.inputs import check_answers
from gspo_mm.policy.engine import Policy
from gspo_mm.policy.reference import Reference
from gspo_mm.reward.rewards import Rewards, load_rewards
from gspo_mm.rollout.engine import Opening, RolloutEngine, ServingEngine, opening_of
from gspo_mm.rollout.replay import Replay
from gspo_mm.rollout.scheduler import Scheduler
from gspo_mm.runtime.dist import Ranks, ranks_here
from gspo_mm.runtime.preempt import StopRequest
from gspo_mm.runtime.threads import share_of_cores
from gspo_mm.serving.launch import workers_beside_trainer
from gspo_mm.sync.parity import Gap, check_parity
from gspo_mm.sync.push import WeightPush, push_of
from gspo_mm.types import EncodedPrompt, SamplingParams

logger = logging.getLogger(__name__)

_LOOKED_AT = 256  # training samples whose pictures' headers are read before the first step
_ODD_PROMPTS = 8  # of them that servers and policy are compared on


@dataclass(frozen=True, kw_only=True)
class Stages:
    """What `train.py` runs a batch through, left to right.

    Rank 0 alone has an engine (unless the run is replayed) and held-out prompts; the rest is on every rank.
    """

    ranks: Ranks
    processor: Processor
    source: PromptSource
    held_out: list[EncodedPrompt]
    # prompts with images, to check that the model sees; where there are none, others, to compare servers on
    canary: list[EncodedPrompt]
    opening: Opening | None  # of the engine; None when the run is replayed
    engine: RolloutEngine | None
    scheduler: Scheduler | None  # beside servers: groups run while the trainer trains
    replay: Replay | None
    reward: Rewards
    policy: Policy
    weights: WeightPush
    reference: Reference | None
    sampling: SamplingParams

    @property
    def servers(self) -> ServingEngine | None:
        """The engine, where it answers beside the training."""
        return self.engine if isinstance(self.engine, ServingEngine) else None

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Close the engine when the block is left, and report to its servers why."""
        try:
            yield
        except BaseException as error:
            self._close(f"the run stopped: {error or type(error).__name__}")
            raise
        self._close("the run has ended")

    def _close(self, reason: str) -> None:
        if self.scheduler:
            self.scheduler.close()
        self.reward.close()
        self.source.close()
        self.weights.close()
        if self.engine:
            self.engine.close(reason)
        if self.opening:
            self.opening.close(reason)


def build_stages(
    config: Config,
    ranks: Ranks,
    *,
    total_steps: int,
    resumed: Mapping[str, Any] | None = None,
    stop: StopRequest | None = None,
) -> Stages:
    """Load model, processor, shards and reward file. Raises a GspoError naming what is missing, or StoppedError.

    `resumed`, on rank 0: the state of the checkpoint that the run goes on from. Its place in the shards is looked at
    before the model is loaded.
    """
    stop = stop or StopRequest()
    stop.obey(ranks, "before the model was loaded")
    logger.info("loading %s", config.model.path)
    set_threads(config)
    with ranks.together():
        opening = None if config.rollout.replay else opening_of(config, stop, main=ranks.main)
    torch.manual_seed(config.run.seed)
    reward = load_rewards(config.reward, config.data.reward_files())
    with ranks.together():
        if ranks.main:
            check_answers(config, reward)
    processor = processor_of(config)
    source = training_prompts(config, processor, reward, ranks, resumed)
    policy = Policy.from_hf(
        config.model.path,
        config.policy,
        seed=config.run.seed,
        total_steps=total_steps,
        experts_layout=config.model.experts_layout,
        ranks=ranks,
    )
    stop.obey(ranks, "when the model was loaded")
    held_out: list[EncodedPrompt] = []
    canary: list[EncodedPrompt] = []
    with ranks.together():
        if ranks.main:
            held_out = held_out_prompts(config, processor, reward, quarantine(config, "validation"))
            source.hold_out(held_out)
            canary = canary_prompts(config, processor, held_out)
        engine = opening.open(processor) if opening else None
    return Stages(
        ranks=ranks,
        processor=processor,
        source=source,
        held_out=held_out,
        canary=ranks.from_main(canary),
        opening=opening,
        engine=engine,
        scheduler=build_scheduler(config, engine, source, reward)
        if isinstance(engine, ServingEngine)
        else None,
        replay=Replay(config.rollout.replay) if config.rollout.replay else None,
        reward=reward,
        policy=policy,
        weights=push_of(config)(config, policy, engine),
        reference=Reference(policy) if config.loss.kl_coef else None,
        sampling=SamplingParams(**config.rollout.sampling.model_dump()),
    )


def training_prompts(
    config: Config, processor: Processor, reward: Rewards, ranks: Ranks, resumed: Mapping[str, Any] | None
) -> PromptSource:
    source = PromptSource(
        config.data,
        processor,
        seed=config.run.seed,
        split="train",
        quarantine=quarantine(config, "train") if ranks.main else None,
        check=reward.check,
    )
    with ranks.together():
        if ranks.main and resumed:
            source.load((resumed.get("scheduler") or resumed)["source"])
    return source


def build_scheduler(
    config: Config, engine: ServingEngine, source: PromptSource, reward: Rewards
) -> Scheduler:
    return Scheduler(
        config.rollout,
        source,
        engine,
        score=reward.start,
        is_dead=lambda group: is_dead(group, config.advantage),
        sampling=SamplingParams(**config.rollout.sampling.model_dump()),
    )


def check_servers(config: Config, stages: Stages) -> Mapping[str, Gap]:
    """The parity preflight on the canary prompts and on training prompts with odd pictures: `check_parity`."""
    prompts = stages.canary
    with stages.ranks.together():
        if stages.servers:
            prompts = [*prompts, *odd_prompts(config, stages.processor)]
    return check_parity(
        stages.policy,
        stages.servers,
        stages.processor,
        prompts,
        threshold=config.rollout.sglang.max_logprob_gap,
    )


def quarantine(config: Config, split: str) -> Path:
    """The file that lists the split's unusable samples."""
    return config.run.path / f"quarantine-{split}.jsonl"


def held_out_prompts(
    config: Config, processor: Processor, reward: Rewards, quarantine: Path | None = None
) -> list[EncodedPrompt]:
    """The first `train.eval_prompts` validation prompts in shard order: the same ones at every evaluation."""
    if not config.data.validation:
        return []
    source = PromptSource(
        config.data,
        processor,
        seed=config.run.seed,
        split="validation",
        quarantine=quarantine,
        check=reward.check,
    )
    return source.all(config.train.eval_prompts)


def canary_prompts(
    config: Config, processor: Processor, held_out: list[EncodedPrompt]
) -> list[EncodedPrompt]:
    """A few prompts, with images if there are any: held-out ones, or training ones (read apart) if nothing is held out."""
    candidates = held_out
    if not held_out:
        with closing(PromptSource(config.data, processor, seed=config.run.seed, split="train")) as source:
            candidates = source.take(64)
    found = [p for p in candidates if p.prompt.images]
    if not found and processor.image_token_id is not None:
        logger.warning("no prompt with an image was found: whether the model sees is not checked")
    return (found or candidates)[: config.train.canary_prompts]


def odd_prompts(config: Config, processor: Processor) -> list[EncodedPrompt]:
    """Training prompts whose pictures are unlike the others', out of the first ones."""
    found = []
    with closing(PromptSource(config.data, processor, seed=config.run.seed, split="train")) as source:
        chosen = odd_ones(source.look(_LOOKED_AT), _ODD_PROMPTS)
    for prompt in chosen:
        with suppress(BadSample):  # counted when its turn to be trained on comes
            found.append(processor.encode(prompt))
    return found


def processor_of(config: Config) -> Processor:
    """What makes prompts for `rollout.engine`, with the tools of `rollout.environment`. Raises BadEnvironmentError."""
    environment = None
    if config.rollout.environment:
        environment = make(config.rollout.environment, family_of(config.model.path).box_unit)
    return Processor(
        config.model.path,
        config.data,
        keep_pixels=not config.rollout.serves,
        tools=getattr(environment, "tools", ()),
        shows_pages=getattr(environment, "shows_pages", False),
    )


def set_threads(config: Config) -> None:
    """Share the cores among the ranks of this machine, and servers that sample on them while the policy trains.

    OMP_NUM_THREADS is stronger.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    processes = ranks_here()
    if config.rollout.max_staleness and not torch.cuda.is_available():
        processes += workers_beside_trainer(config)
    torch.set_num_threads(share_of_cores(processes))
