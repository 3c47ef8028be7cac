"""`rollout` and `sync`: how answers are sampled, and how new weights get to what samples them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from gspo_mm.config.base import NonNegative, Positive, Section
from gspo_mm.config.engines import ENGINES
from gspo_mm.config.environment import EnvironmentConfig
from gspo_mm.config.server_options import refuse_options


class SamplingConfig(Section):
    temperature: Annotated[float, Field(ge=0.0)] = Field(
        default=1.0, description="divides logits, of the policy too; 1: the model's own distribution"
    )
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=1.0,
        description="below 1, as top_k above 0, answers are of a truncated distribution: off-policy against log-probs, "
        "which are of the whole one",
    )
    top_k: NonNegative = Field(default=0, description="0: off")
    max_new_tokens: Positive = Field(default=64, description="of an answer, in all of its turns together")


class SGLangConfig(Section):
    """`rollout.sglang`: the servers that answer, where rollout.engine=sglang."""

    start: Literal["here", "beside", "elsewhere"] = Field(
        default="here",
        description="here: on rank 0's machine; beside: on every machine of the trainer; elsewhere: `gspo-mm serve` "
        "starts them, on any machine that shares run.dir",
    )
    servers: Positive = Field(
        default=1, description="servers to start, with start=beside on each machine; or to wait for"
    )
    urls: list[str] = Field(
        default=[],
        description="servers that somebody else keeps running, instead of starting any; their keys, if they have some, are "
        "read from GSPO_MM_API_KEY and GSPO_MM_ADMIN_KEY",
    )
    python: str | None = Field(
        default=None, description="interpreter of the environment that has sglang; null: this one"
    )
    host: str | None = Field(
        default=None,
        description="address that servers listen on, for start=elsewhere that of the cluster's own network; null: "
        "loopback, or with start=beside on several machines the address that leads to rank 0",
    )
    colocate: bool = Field(
        default=False,
        description="servers on the trainer's own GPUs give their memory back while the policy trains",
    )
    tp: Positive = Field(default=1, description="GPUs of one server: its tensor-parallel size")
    ep: Positive = Field(default=1, description="expert-parallel size within tp")
    dp: Positive = Field(default=1, description="data-parallel attention groups within tp")
    fp8: bool = Field(
        default=False,
        description="the decoder's matrices in FP8 with a scale per 128 x 128 block; router, vision tower, output layer "
        "and embeddings stay in policy.dtype",
    )
    mem_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        default=0.8, description="GPU memory for weights and key/value cache"
    )
    max_tokens: Positive | None = Field(
        default=None, description="tokens in the key/value cache; null: what mem_fraction allows"
    )
    context_length: Positive | None = Field(
        default=None,
        description="null: data.max_prompt_tokens + rollout.sampling.max_new_tokens, and what rollout.environment may give back",
    )
    max_running: Positive | None = Field(
        default=None, description="sequences decoded together; null: sglang's own"
    )
    max_images: Positive | None = Field(default=None, description="images per prompt; null: no limit")
    extra_args: dict[str, bool | int | float | str] = Field(
        default={},
        description="further options of sglang.launch_server, by name: {attention-backend: fa3}; those that other keys "
        "decide, or that change what is sampled, are refused",
    )
    start_timeout: Positive = Field(default=1800, description="seconds until a started server must be ready")
    request_timeout: Positive = Field(default=1800, description="seconds until a group must be answered")
    down_timeout: Positive = Field(
        default=1800, description="seconds without any server, or without a trainer, before giving up"
    )
    max_restarts: NonNegative = Field(default=5, description="of one server in a row before it is left out")
    max_logprob_gap: Annotated[float, Field(gt=0.0)] = Field(
        default=0.1,
        description="mean |log-prob of server - of policy| in nats above which the comparison before the first step, "
        "and of `gspo-mm preflight`, stops the run; while it goes on, a prompt whose answers differ by more is compared again",
    )
    max_group_gap: Annotated[float, Field(gt=0.0)] = Field(
        default=1.0,
        description="the same over the answers to one prompt, sampled with the policy's own version, above which a run stops",
    )

    @model_validator(mode="after")
    def _extra_args_leave_the_model_as_it_is(self) -> SGLangConfig:
        # FP8 servers keep scales of their key/value cache among the weights; memory given back loses them, no push
        # brings them, and SGLang reads them again after each
        if self.fp8 and self.colocate:
            raise ValueError(
                "rollout.sglang.fp8=true with rollout.sglang.colocate=true: memory that servers give back holds scales "
                "which no push brings; set one of them to false"
            )
        for name in ("load-format", "quantization", "model-path"):
            if self.fp8 and name in self.extra_args:
                raise ValueError(
                    f"rollout.sglang.extra_args.{name}={self.extra_args[name]} contradicts rollout.sglang.fp8=true, "
                    "which decides what servers load; leave it out, or set fp8=false"
                )
        refuse_options(self.extra_args)
        return self

    @model_validator(mode="after")
    def _sizes_fit(self) -> SGLangConfig:
        for name, size in (("ep", self.ep), ("dp", self.dp)):
            if self.tp % size:
                raise ValueError(
                    f"rollout.sglang.{name}={size} does not divide rollout.sglang.tp={self.tp}; both share one server's "
                    "GPUs"
                )
        if self.colocate and self.urls:
            raise ValueError(
                "rollout.sglang.colocate=true is for servers on the trainer's own GPUs, which rollout.sglang.urls are not; "
                "set rollout.sglang.colocate=false"
            )
        return self


def _known_engine(name: str) -> str:
    if name not in ENGINES:
        *first, last = map(repr, ENGINES)
        raise ValueError(f"rollout.engine={name!r} is refused: input should be {', '.join(first)} or {last}")
    return name


class RolloutConfig(Section):
    engine: Annotated[str, AfterValidator(_known_engine)] = Field(
        default="embedded", description="embedded: transformers, in this process; sglang: servers"
    )
    prompts_per_step: Positive = Field(default=16, description="groups sampled for one step")
    group_size: Annotated[int, Field(ge=2)] = Field(default=8, description="completions per prompt (G)")
    sampling: SamplingConfig = SamplingConfig()
    environment: EnvironmentConfig | None = Field(
        default=None, description="what answers a turn of the model; null: an answer has one turn"
    )
    max_batch: Positive = Field(default=256, description="sequences decoded together by the embedded engine")
    max_in_flight: Positive = Field(default=256, description="groups asked of servers at a time")
    max_staleness: NonNegative = Field(
        default=0,
        description="versions that weights may be ahead of a trained token; 0: sample, then train, in turn",
    )
    start_ahead: Literal["early", "late"] = Field(
        default="early",
        description="with max_staleness, groups for later steps start when the trainer asks for a batch, or late, when it "
        "has got it: better where servers are busy with one batch alone, as on a CPU",
    )
    oversample: Annotated[float, Field(ge=1.0, le=2.0)] = Field(
        default=1.0,
        description="groups started per group trained on; the slowest are given up, and come first in the next step",
    )
    drop_dead_groups: bool = Field(
        default=False,
        description="sample another group for each whose rewards are all equal (DAPO), at most four times prompts_per_step",
    )
    on_update: Literal["retract", "in_place", "finish"] = Field(
        default="retract",
        description="answers under way when new weights are there: retract computes their cache again, in_place keeps it, "
        "finish lets them end with the old weights first",
    )
    sglang: SGLangConfig = SGLangConfig()
    replay: str | None = Field(
        default=None, description="a run folder whose saved rollouts are trained on instead of sampling"
    )

    @property
    def serves(self) -> bool:
        """Whether servers answer beside the training."""
        return ENGINES[self.engine].serves and self.replay is None

    @property
    def keeps_cache(self) -> bool:
        """Whether servers go on from keys and values of the old weights when new ones come."""
        return self.on_update == "in_place"

    @model_validator(mode="after")
    def _sampling_explores(self) -> RolloutConfig:
        if self.sampling.temperature == 0:
            raise ValueError(
                "rollout.sampling.temperature=0 makes all completions of a group equal, so no advantage can exist; "
                "use 1.0"
            )
        return self

    @model_validator(mode="after")
    def _colocated_servers_sleep(self) -> RolloutConfig:
        if self.sglang.colocate and self.max_staleness:
            raise ValueError(
                f"rollout.max_staleness={self.max_staleness} samples while the policy trains, and with "
                "rollout.sglang.colocate=true servers sleep meanwhile; set one of them to 0 or false"
            )
        return self

    @model_validator(mode="after")
    def _engine_can(self) -> RolloutConfig:
        if self.sglang.fp8 and self.engine != "sglang":
            raise ValueError(
                f"rollout.sglang.fp8=true with rollout.engine={self.engine}: only servers hold weights in FP8; set "
                "rollout.engine=sglang, or rollout.sglang.fp8=false"
            )
        if not ENGINES[self.engine].serves:
            for name, off in (("max_staleness", 0), ("oversample", 1.0)):
                if getattr(self, name) != off:
                    raise ValueError(
                        f"rollout.{name}={getattr(self, name)} needs servers that sample beside the trainer; set "
                        f"rollout.engine=sglang, or rollout.{name}={off}"
                    )
        return self


class SyncConfig(Section):
    """How new weights reach SGLang servers; the embedded engine is in the same process and copies."""

    mode: Literal["disk", "tensor", "distributed"] = Field(
        default="distributed",
        description="distributed: NCCL (gloo without GPUs) straight to the servers; tensor: through the memory of "
        "GPUs that trainer and servers share; disk: through a folder that all machines see",
    )
    folder: str | None = Field(
        default=None,
        description="where mode=disk writes; null: the run folder. /dev/shm for servers on one machine",
    )
    bucket_mb: Positive = Field(default=512, description="weights under way at a time, in MiB")
    verify: bool = Field(
        default=True,
        description="compare checksums of some tensors, the vision tower's among them, after each push",
    )
    timeout: Positive = Field(default=600, description="seconds that one push may take")
