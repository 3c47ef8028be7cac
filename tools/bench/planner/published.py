"""Runs that others have published: what was run, how long it took, and where that is written.

What a source does not say is an assumption, and stands in `assumed`. No number of ours is among them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gspo_mm.config.layout import Sizes
from gspo_mm.plan.hardware import gpu_of
from gspo_mm.plan.model import read_model
from gspo_mm.plan.setup import Job, Lengths, Policy, Servers, Work
from gspo_mm.plan.step import Plan

NEMO = "NVIDIA-NeMo/RL docs/about/performance-summary.md, v0.7"
NEMO_4 = "NVIDIA-NeMo/RL docs/about/performance-summary.md, v0.4"
NEMO_OLD = "docs.nvidia.com/nemo/rl performance summary, release between v0.4 and v0.7"
VERL = "verl-project/verl docs/advance/fully_async.md, 30B Model Mode Experiment; grpo_30b_a3b_base_math_megatron_96_32.sh"
ZOO = "yanring/Megatron-MoE-ModelZoo best_practice/Qwen3/readme.md, 256 H100"
PAI = "alibaba/Pai-Megatron-Patch issue 658"
GEO3K = "verl-project/verl issue 7203"
BRIDGE = "NVIDIA Megatron-Bridge, card of Qwen3.6-35B-A3B"
SYNC = "verl-project/verl docs/advance/fully_async.md, checkpoint-engine ablation"
MILES = "radixark/miles and NeMo RL, on pushes of weights"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One measurement."""

    name: str
    source: str
    job: Job
    # what was measured, from the plan of it
    what: Callable[[Plan], float]
    measured: float
    unit: str = "s"
    assumed: str = ""
    # why the plan cannot be expected to know this; such runs are shown and not fitted
    outside: str = ""


def of_step(plan: Plan) -> float:
    return plan.step


def _lengths(mean: float, longest: int, prompt: float = 150.0, image: float = 0.0) -> Lengths:
    return Lengths(prompt=prompt, image=image, answer=mean - prompt, longest=int(longest - prompt))


def _servers(gpus: int, tp: int, *, colocated: bool, fraction: float = 0.6) -> Servers:
    return Servers(
        number=gpus // tp, tp=tp, dp=1, fp8=False, fraction=fraction, max_running=None, colocated=colocated
    )


@dataclass(frozen=True, kw_only=True)
class _Nemo:
    """A row of NeMo RL's tables; layout [tp, cp, ep, pp] of training and tp of generation."""

    gpu: str
    model: str
    gpus: int
    layout: tuple[int, int, int, int]
    serve: int
    mean: float
    longest: int
    answers: int
    seconds: float
    updates: int = 1
    # GPUs of generation where it has its own
    apart: int = 0
    staleness: int = 0
    source: str = NEMO
    recompute: Any = "none"
    more: dict[str, Any] = field(default_factory=dict)

    def run(self) -> Run:
        tp, cp, ep, pp = self.layout
        training = self.gpus - self.apart
        first = 11 if "235" in self.model and pp == 8 else None
        if "235" in self.model and pp == 4:
            first = 23  # of 94 layers; the recipes give the ends of the pipeline one layer less
        sizes = Sizes(
            tp=tp, cp=cp, ep=ep, etp=1, pp=pp, dp=training // (tp * cp * pp),
            first_stage_layers=first, last_stage_layers=first,
        )  # fmt: skip
        # recipes of one step off have HybridEP, which sends as DeepEP does
        flex = bool(self.apart) and self.gpu == "h100"
        policy = Policy(sizes=sizes, recompute=self.recompute, micro_tokens=self.longest, flex=flex)
        work = Work(
            prompts=self.answers // 32,
            group=32,
            updates=self.updates,
            lengths=_lengths(self.mean, self.longest),
            old=self.updates > 1,
            reference=True,
            staleness=self.staleness,
            in_flight=self.answers // 32 * (1 + self.staleness),
        )
        job = Job(
            model=read_model(self.model),
            gpu=gpu_of(self.gpu),
            per_node=4 if self.gpu == "gb200" else 8,
            policy=policy,
            work=work,
            servers=_servers(
                self.apart or self.gpus,
                self.serve,
                colocated=not self.apart,
                fraction=0.8 if self.apart else 0.6,
            ),
            push="distributed" if self.apart else "tensor",
        )
        release = "" if self.source == NEMO else ", older" if self.source == NEMO_OLD else ", v0.4"
        mode = f"{self.staleness} off" if self.staleness else "in turn"
        return Run(
            name=f"{self.model.removeprefix('Qwen3-')}, {self.gpus} {self.gpu}, {self.longest // 1024}k, {mode}{release}",
            source=self.source,
            job=job,
            what=of_step,
            measured=self.seconds,
            assumed="prompts of 150 tokens; log-probs of a reference in each step, the policy's own where updates are several",
        )


_A3B, _A22B, _32B = "Qwen3-30B-A3B", "Qwen3-235B-A22B", "Qwen3-32B"
_ROWS = [
    _Nemo(gpu="h100", model=_A3B, gpus=32, layout=(1, 1, 8, 1), serve=2, mean=3203, longest=4096, answers=2048,
          seconds=192, updates=4, source=NEMO_OLD),
    _Nemo(gpu="h100", model=_A3B, gpus=32, layout=(1, 1, 8, 2), serve=2, mean=3203, longest=4096, answers=2048,
          seconds=152, updates=4, apart=16, staleness=1, source=NEMO_OLD),
    _Nemo(gpu="gb200", model=_A3B, gpus=16, layout=(1, 1, 16, 1), serve=1, mean=3203, longest=4096, answers=2048,
          seconds=221, updates=4, source=NEMO_OLD),
    _Nemo(gpu="h100", model=_A22B, gpus=128, layout=(2, 2, 16, 8), serve=16, mean=5719, longest=8192, answers=512,
          seconds=395, recompute="full", source=NEMO_OLD),
    _Nemo(gpu="h100", model=_A3B, gpus=32, layout=(1, 1, 8, 1), serve=2, mean=3198, longest=4096, answers=2048, seconds=171),
    _Nemo(gpu="h100", model=_A3B, gpus=32, layout=(1, 1, 8, 2), serve=2, mean=3203, longest=4096, answers=2048,
          seconds=141, apart=16, staleness=1),
    _Nemo(gpu="h100", model=_A3B, gpus=192, layout=(1, 1, 8, 1), serve=2, mean=3203, longest=4096, answers=2048,
          seconds=33.1, updates=4, apart=64, staleness=8),
    _Nemo(gpu="h100", model=_A3B, gpus=32, layout=(4, 8, 8, 1), serve=2, mean=8170, longest=40960, answers=2048,
          seconds=2022, updates=4, recompute="full"),
    _Nemo(gpu="h100", model=_A22B, gpus=128, layout=(2, 2, 16, 8), serve=16, mean=5719, longest=8192, answers=512,
          seconds=367, recompute="full"),
    _Nemo(gpu="h100", model=_A22B, gpus=256, layout=(2, 2, 16, 8), serve=16, mean=5698, longest=8192, answers=512,
          seconds=285, recompute="full"),
    _Nemo(gpu="h100", model=_A22B, gpus=256, layout=(4, 1, 16, 8), serve=8, mean=5695, longest=8192, answers=512,
          seconds=204, apart=128, staleness=1, recompute="full"),
    _Nemo(gpu="h100", model=_32B, gpus=32, layout=(4, 1, 1, 4), serve=4, mean=3256, longest=4096, answers=2048, seconds=323),
    _Nemo(gpu="h100", model=_32B, gpus=64, layout=(4, 1, 1, 4), serve=4, mean=3258, longest=4096, answers=2048,
          seconds=161, apart=32, staleness=1),
    _Nemo(gpu="gb200", model=_A3B, gpus=16, layout=(1, 1, 16, 1), serve=1, mean=3198, longest=4096, answers=2048, seconds=186),
    _Nemo(gpu="gb200", model=_A3B, gpus=16, layout=(1, 1, 8, 1), serve=1, mean=3200, longest=4096, answers=2048,
          seconds=242, apart=8, staleness=1),
    _Nemo(gpu="gb200", model=_A22B, gpus=64, layout=(2, 2, 16, 4), serve=8, mean=5707, longest=8192, answers=512,
          seconds=268, recompute="full"),
    _Nemo(gpu="gb200", model=_A22B, gpus=128, layout=(2, 2, 16, 4), serve=8, mean=5711, longest=8192, answers=512,
          seconds=210, recompute="full"),
    _Nemo(gpu="gb200", model=_A22B, gpus=128, layout=(4, 1, 16, 4), serve=8, mean=5699, longest=8192, answers=512,
          seconds=160, apart=64, staleness=1, recompute="full"),
    _Nemo(gpu="gb200", model=_32B, gpus=16, layout=(2, 1, 1, 4), serve=2, mean=3254, longest=4096, answers=2048, seconds=295),
    _Nemo(gpu="gb200", model=_32B, gpus=32, layout=(2, 1, 1, 1), serve=1, mean=3255, longest=4096, answers=2048,
          seconds=140, apart=16, staleness=1),
]  # fmt: skip


def _verl() -> list[Run]:
    """Qwen3-30B-A3B-Base on 128 H20 in turn, and with 96 of them for servers."""
    # at 2,000 tokens and more the reference's pass on 32 GPUs would need half of an H20's FLOP/s
    assumed = "answers of 1,200 tokens (the source says at most 8,192), prompts of 150, no recomputation"
    work = Work(
        prompts=512, group=16, updates=4, lengths=Lengths(prompt=150, image=0, answer=1200, longest=8192),
        old=True, reference=True, staleness=0, in_flight=512,
    )  # fmt: skip

    def job(training: int, serving: int, *, staleness: int) -> Job:
        sizes = Sizes(tp=2, cp=2, ep=8, etp=1, dp=training // 4)
        return Job(
            model=read_model(_A3B),
            gpu=gpu_of("h20"),
            per_node=8,
            policy=Policy(sizes=sizes, micro_tokens=10240, offload=True, flex=True),
            work=Work(**{**vars(work), "staleness": staleness, "old": not staleness}),
            servers=_servers(serving, 4, colocated=not staleness, fraction=0.7),
        )

    together, apart = job(128, 128, staleness=0), job(32, 96, staleness=1)

    eager = "its servers launch kernels one by one (enforce_eager), ours replay CUDA graphs"
    offload = "on GPUs that servers share, weights, gradients and optimizer state come from the host for each stage and go back"

    def run(name: str, job: Job, what: Callable[[Plan], float], seconds: float, outside: str = "") -> Run:
        name = f"30B-A3B, 128 h20, 8k: {name}"
        return Run(
            name=name, source=VERL, job=job, what=what, measured=seconds, assumed=assumed, outside=outside
        )

    return [
        run("rollout", together, lambda plan: plan.sampling, 348, eager),
        run("old log-probs", together, lambda plan: plan.training.old, 28.7, offload),
        run("reference", together, lambda plan: plan.training.reference, 20.9, offload),
        run("update", together, lambda plan: plan.training.update, 86.3, offload),
        run("step", together, of_step, 498, f"{eager}; {offload}"),
        run("reference on 32", apart, lambda plan: plan.training.reference, 50.1),
        run("update on 32", apart, lambda plan: plan.training.update, 207),
        run("step, 96 serve", apart, of_step, 283),
    ]


def _training(
    name: str, source: str, model: str, gpu: str, sizes: Sizes, answers: int, sequence: int, **more: Any
) -> Job:
    """A step of training alone, on full sequences."""
    lengths = Lengths(prompt=0, image=more.pop("image", 0), answer=sequence, longest=sequence)
    work = Work(
        prompts=answers,
        group=1,
        updates=1,
        lengths=lengths,
        old=False,
        reference=False,
        staleness=0,
        in_flight=1,
    )
    return Job(
        model=read_model(model), gpu=gpu_of(gpu), per_node=8, work=work, servers=None,
        policy=Policy(sizes=sizes, micro_tokens=sequence, **more), imbalance=1.0,
    )  # fmt: skip


def _pretraining() -> list[Run]:
    """Steps of pre-training, with tokens spread evenly over experts by force. The ends of the pipeline are one layer short."""
    update: Callable[[Plan], float] = lambda plan: plan.training.update  # noqa: E731
    found = []
    for name, source, gpu, answers, seconds, recompute, layout in (
        (
            "A2A tp2 ep8 pp32",
            ZOO,
            "h100",
            2048,
            24.2,
            "selective",
            {"tp": 2, "ep": 8, "pp": 32, "vpp": 3, "dp": 4},
        ),
        (
            "DeepEP tp2 ep32 pp8",
            ZOO,
            "h100",
            2048,
            19.7,
            "selective",
            {"tp": 2, "ep": 32, "pp": 8, "vpp": 4, "dp": 16},
        ),
        (
            "DeepEP tp4 ep8 pp8",
            ZOO,
            "h100",
            2048,
            29.0,
            "none",
            {"tp": 4, "ep": 8, "pp": 8, "vpp": 4, "dp": 8},
        ),
        (
            "A2A tp2 ep8 pp32",
            PAI,
            "h800",
            2048,
            22.4,
            "selective",
            {"tp": 2, "ep": 8, "pp": 32, "vpp": 3, "dp": 4},
        ),
        (
            "A2A tp2 ep8 pp32, full",
            PAI,
            "h800",
            4096,
            43.5,
            "full",
            {"tp": 2, "ep": 8, "pp": 32, "vpp": 3, "dp": 4},
        ),
    ):
        last = 94 // layout["pp"] if layout["pp"] < 32 else 2
        sizes = Sizes(**layout, etp=1, first_stage_layers=last, last_stage_layers=last)
        job = _training(
            name, source, _A22B, gpu, sizes, answers, 4096, recompute=recompute, flex="DeepEP" in name
        )
        found.append(
            Run(name=f"235B update, 256 {gpu}, {name}", source=source, job=job, what=update, measured=seconds)
        )
    return found


def _images() -> list[Run]:
    def tflops(plan: Plan) -> float:
        return plan.training.flops / plan.training.update / plan.job.policy.sizes.world_size / 1e12

    found = []
    padded = "sequences are padded, and how long they are is not said: padding counts in its FLOP/s and does not in ours"
    for name, sequence, measured, outside, layout in (
        ("16 h100, unpacked", 4096, 57.7, padded, {"pp": 2, "ep": 8, "dp": 8}),
        ("32 h100, packed 8k, cp2", 8192, 84.8, "", {"pp": 2, "ep": 8, "cp": 2, "dp": 8}),
    ):
        job = _training(name, BRIDGE, "Qwen3.6-35B-A3B", "h100", Sizes(**layout), 32, sequence, image=512)
        found.append(
            Run(
                name=f"35B-A3B with images, {name}", source=BRIDGE, job=job, what=tflops, measured=measured, unit="TFLOP/s",
                outside=outside,
                assumed="sequences of 4,096 and 8,192 tokens, an image of 512 in each; 32 in a batch, as its FLOP/s and seconds "
                "make them; no recomputation",
            )
        )  # fmt: skip
    work = Work(
        prompts=32, group=5, updates=1, lengths=Lengths(prompt=600, image=350, answer=1470, longest=2048),
        old=True, reference=True, staleness=0, in_flight=32,
    )  # fmt: skip
    job = Job(
        model=read_model("Qwen3.5-9B"), gpu=gpu_of("h800"), per_node=8, work=work,
        servers=_servers(8, 8, colocated=True, fraction=0.35),
        policy=Policy(sizes=Sizes(tp=2, dp=4), recompute="full", micro_tokens=4096, offload=True, packed=False,
                      frozen=frozenset({"vision"})),
    )  # fmt: skip
    why = (
        "a pass of one sequence takes 65 ms a layer, fifty times its products: linear attention without packing, and weights "
        "that come from the host and go back"
    )
    for name, what, seconds, outside in (
        ("rollout", lambda plan: plan.sampling, 29, ""),
        ("old log-probs", lambda plan: plan.training.old, 84, why),
        ("reference", lambda plan: plan.training.reference, 82, why),
        ("update", lambda plan: plan.training.update, 91, why),
    ):
        found.append(
            Run(
                name=f"9B with images, 8 h800: {name}", source=GEO3K, job=job, what=what, measured=seconds, outside=outside,
                assumed="2,073 tokens a sequence, from its 143 tokens/s a GPU; 600 of them prompt, of those 350 image",
            )
        )  # fmt: skip
    return found


def _pushes() -> list[Run]:
    """By NCCL broadcasts, as ours; the faster ways of the sources (RDMA, resharding) are not ours."""
    found = []
    for model, gpu, seconds, source in (
        (_A3B, "h100", 2.67, MILES),
        (_A22B, "h100", 10.75, MILES),
        (_A3B, "h20", 4.38, SYNC),
        (_A22B, "h20", 23.7, SYNC),
    ):
        job = _NEMO[0].job
        job = Job(**{**vars(job), "model": read_model(model), "gpu": gpu_of(gpu), "push": "distributed",
                     "servers": _servers(16, 8, colocated=False)})  # fmt: skip
        found.append(
            Run(
                name=f"push of {model.removeprefix('Qwen3-')}, {gpu}",
                source=source,
                job=job,
                what=lambda plan: plan.push,
                measured=seconds,
            )
        )
    return found


_NEMO = [row.run() for row in _ROWS]
RUNS: list[Run] = [*_NEMO, *_verl(), *_pretraining(), *_images(), *_pushes()]
