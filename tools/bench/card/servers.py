"""Stage d: new weights for an SGLang server that shares the card with the trainer, by each way that needs no disk."""

from __future__ import annotations

import io
import itertools
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from tools.bench.card.environment import copy_speed
from tools.bench.card.results import RefusedError, Report
from tools.bench.sync import config_of, make_model, push_once

if TYPE_CHECKING:
    from gspo_mm.config import Config
    from gspo_mm.data.processor import Processor
    from gspo_mm.policy.engine import Policy
    from gspo_mm.rollout.sglang import SGLangEngine
    from gspo_mm.types import EncodedPrompt

GIB = 2**30
_PROBE = 60  # seconds


def measure(
    report: Report,
    mode: str,
    gb: float,
    text: dict[str, Any],
    pushes: int,
    bucket_mb: int,
    dtype: str,
    mem_fraction: float,
    attention_backend: str | None,
    max_gap: float,
) -> None:
    """A policy and a server with a random model of this size."""
    if mode == "distributed":
        check_two_ranks()
    from gspo_mm.data.processor import Processor
    from gspo_mm.policy.engine import Policy
    from gspo_mm.rollout.sglang import SGLangEngine
    from gspo_mm.serving.fleet import Fleet

    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        make_model(folder / "model", gb, **text)
        extra = {"attention-backend": attention_backend} if attention_backend else {}
        server = {"mem_fraction": mem_fraction, "colocate": True, "extra_args": extra}
        config = config_of(folder, mode, bucket_mb, dtype=dtype, **server)
        policy = Policy.from_hf(config.model.path, config.policy, seed=0, total_steps=1)
        processor = Processor(config.model.path, config.data)
        began = time.perf_counter()
        engine = SGLangEngine(config, processor, Fleet(config))
        try:
            report(server_start_s=time.perf_counter() - began)
            push(report, config, policy, engine, processor, pushes=pushes, max_gap=max_gap)
        finally:
            engine.close()


def push(
    report: Report,
    config: Config,
    policy: Policy,
    engine: SGLangEngine,
    processor: Processor,
    *,
    pushes: int,
    max_gap: float,
) -> None:
    """Pushes with and without comparing checksums, memory that the server gives back, and whether it then answers right."""
    from gspo_mm.sync.parity import check_parity
    from gspo_mm.sync.sglang import SGLangPush

    size = sum(tensor.nbytes for _, tensor in policy.export())
    copied = copy_speed(size, 3)
    report(weights_gb=size / 1e9, copy_gb_per_s=copied)
    versions = itertools.count(1)
    for name, verify in (("push", False), ("verified_push", True)):
        sync = config.sync.model_copy(update={"verify": verify})
        way = SGLangPush(config.model_copy(update={"sync": sync}), policy, engine)
        # the first is not counted: it connects
        seconds = median([push_once(way, next(versions))[0] for _ in range(pushes + 1)][1:])
        report(**{f"{name}_s": seconds, f"{name}_gb_per_s": size / seconds / 1e9})
        report.target(f"{name}_of_copy", size / seconds / 1e9 / copied, 0.5)
        if verify:
            before = free_memory()
            way.make_room()
            report(given_back_gib=(free_memory() - before) / GIB)
            report(waking_push_s=push_once(way, next(versions))[0])
        way.close()
    gaps = check_parity(policy, engine, processor, prompts(processor), threshold=max_gap)
    report(logprob_gap={place: gap.mean for place, gap in gaps.items()})


def free_memory() -> int:
    """Bytes of the device that no process has, or of the machine."""
    import psutil
    import torch

    if not torch.cuda.is_available():
        return psutil.virtual_memory().available
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def prompts(processor: Processor) -> list[EncodedPrompt]:
    """Two questions about noise."""
    import numpy as np
    from PIL import Image

    from gspo_mm.types import EncodedImage, Prompt

    found = []
    for number in range(2):
        noise = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).save(file, "PNG")
        image = EncodedImage(
            data=file.getvalue(), key=EncodedImage.key_of(file.getvalue()), width=64, height=64
        )
        content = [{"type": "image"}, {"type": "text", "text": "What is in the image?"}]
        prompt = Prompt(
            key=f"noise {number}",
            messages=({"role": "user", "content": content},),
            images=(image,),
            answer="",
            task="",
        )
        found.append(processor.encode(prompt))
    return found


def check_two_ranks() -> None:
    """Raise RefusedError unless two processes on one device may broadcast: NCCL usually has each rank bring its own."""
    import torch.multiprocessing as mp

    with tempfile.TemporaryDirectory() as made:
        context: Any = mp.start_processes(
            _broadcast, args=(f"{made}/store",), nprocs=2, join=False, daemon=True, start_method="spawn"
        )
        try:
            end = time.monotonic() + _PROBE
            while not context.join(timeout=1):
                if time.monotonic() > end:
                    raise RefusedError(f"two processes on one card: no broadcast within {_PROBE} s")
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            said = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = next((line for line in said if "uplicate GPU" in line), said[-1])
            raise RefusedError(f"two processes on one card: {reason}") from None
        finally:
            for process in context.processes:
                process.kill()


def _broadcast(rank: int, store: str) -> None:
    import torch
    import torch.distributed as dist

    os.environ.pop("LOCAL_RANK", None)
    on_card = torch.cuda.is_available()
    dist.init_process_group(
        "nccl" if on_card else "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    tensor = torch.full((8,), float(rank), device="cuda:0" if on_card else "cpu")
    dist.broadcast(tensor, 0)
    assert float(tensor.sum()) == 0.0
    dist.destroy_process_group()
