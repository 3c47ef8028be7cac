"""GPUs and their networks, from their makers' sheets; and the few efficiencies with which published runs use them.

A sheet's number is a bound, what a run reaches is a share of it. Each share below is one number for all GPUs and models, and
`tools/bench/plan.py` fits them to runs that others have published, and prints how far off the plan then is.
"""

from __future__ import annotations

from dataclasses import dataclass

from gspo_mm.config.layout import PlanError

GB, TB, TERA = 1e9, 1e12, 1e12


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU and its part of the node's network."""

    name: str
    # usable bytes, as the driver reports them: less than the sheet's
    memory: float
    # of that memory, bytes/s
    bandwidth: float
    # dense matrix products, FLOP/s
    bf16: float
    # 0: no FP8
    fp8: float
    # to GPUs of the same NVLink domain, bytes/s in one direction
    nvlink: float
    # GPUs in that domain
    domain: int
    # to other nodes, bytes/s in one direction: a network adapter for each GPU
    network: float

    def peak(self, *, fp8: bool) -> float:
        """Of dense products, in FP8 where it is asked for and there."""
        return self.fp8 if fp8 and self.fp8 else self.bf16


# NVIDIA's data sheets: H100 SXM, H200 SXM, DGX B200, GB200 NVL72. H800 and H20 are sold in China alone and have no public sheet:
# theirs are the numbers that are commonly given, not a maker's. Memory is what the driver reports. Networks are those of the
# reference systems: an adapter of 400 Gb/s for each GPU.
GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu(name="h100", memory=85.0 * GB, bandwidth=3.35 * TB, bf16=989 * TERA, fp8=1979 * TERA,
            nvlink=450 * GB, domain=8, network=50 * GB),
        Gpu(name="h200", memory=150.0 * GB, bandwidth=4.8 * TB, bf16=989 * TERA, fp8=1979 * TERA,
            nvlink=450 * GB, domain=8, network=50 * GB),
        Gpu(name="h800", memory=85.0 * GB, bandwidth=3.35 * TB, bf16=989 * TERA, fp8=1979 * TERA,
            nvlink=200 * GB, domain=8, network=50 * GB),
        Gpu(name="h20", memory=102.0 * GB, bandwidth=4.0 * TB, bf16=148 * TERA, fp8=296 * TERA,
            nvlink=450 * GB, domain=8, network=50 * GB),
        Gpu(name="b200", memory=191.0 * GB, bandwidth=8.0 * TB, bf16=2250 * TERA, fp8=4500 * TERA,
            nvlink=900 * GB, domain=8, network=50 * GB),
        Gpu(name="gb200", memory=197.0 * GB, bandwidth=8.0 * TB, bf16=2500 * TERA, fp8=5000 * TERA,
            nvlink=900 * GB, domain=72, network=50 * GB),
    )
}  # fmt: skip


def gpu_of(name: str) -> Gpu:
    """Raises PlanError for one that is not in the table."""
    if (gpu := GPUS.get(name.lower())) is None:
        raise PlanError(f"--gpu {name} is not known; use one of {', '.join(GPUS)}")
    return gpu


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """What runs reach of the sheets. The defaults are the fit of `tools/bench/plan.py`; see there for its errors."""

    # share of dense FLOP/s in the matrix products of a pass over packed tokens
    products: float = 0.48
    # the same in products of experts, which are narrow and have few rows each
    experts: float = 0.31
    # share of memory bandwidth when a decoding server reads weights and cache
    decode: float = 0.67
    # share of a link's bandwidth in collectives; part of them hides behind products, so it is high
    links: float = 0.9
    # seconds that the host needs to launch a dense layer's forward: some 25 kernels of 20 µs. No run decides this one
    dense_layer: float = 0.5e-3
    # the same of a mixture of experts: routing and sorting too, and waiting for the counts of tokens
    expert_layer: float = 4.4e-3
    # seconds of a decoding step beyond memory traffic, for each layer: launching and synchronising its kernels
    decode_layer: float = 0.05e-3
    # seconds of a decoding step that no layer takes: scheduling, sampling, answering
    decode_step: float = 9.8e-3
    # share of one adapter's bandwidth that a push of weights reaches
    push: float = 0.59
    # seconds of a push before the first weights: servers pause, drop their cache, and are told what comes
    push_start: float = 1.35


# how many times the mean the busiest expert-parallel rank gets: memory must hold it, and time waits for it. Without an auxiliary
# loss, as in RL, loads drift apart; a run's report shows its own (moe/load_max, of single experts). An assumption, not a fit.
IMBALANCE = 1.3

# bytes of CUDA's context and of torch's, cuBLAS' and Transformer Engine's kernels and workspaces on a GPU
CONTEXT = 1.2 * GB
# bytes of NCCL's buffers for each communicator that a rank is a member of (NCCL_BUFFSIZE 4 MiB x channels x protocols)
COMMUNICATOR = 0.15 * GB
# bytes of a server that has given its memory back: context and CUDA graphs
ASLEEP = 3 * GB
# of memory that is asked for, what the allocator holds beyond: blocks of other sizes than are wanted next
FRAGMENTS = 1.06
# seconds of a small collective between GPUs of one NVLink domain, and over the network: launch and flight, without its bytes
LATENCY_NVLINK, LATENCY_NETWORK = 15e-6, 40e-6
# bytes/s of a GPU to its host's memory, of a file system that all nodes share, and host memory's for a GPU's share of the cores
HOST, FILES, HOST_MEMORY = 50 * GB, 2 * GB, 25 * GB
