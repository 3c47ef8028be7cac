"""How a server is started: its options and its environment, and whether this machine has what it needs."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from gspo_mm.config import Config, SGLangConfig
from gspo_mm.families.table import family_of
from gspo_mm.families.write import TEMPLATE
from gspo_mm.hf.processor import load_processor, size_within
from gspo_mm.runtime.dist import ranks_here, world_size
from gspo_mm.runtime.seeds import derive_seed
from gspo_mm.serving import cpu
from gspo_mm.serving.server import Server, ServerError

# what torchrun and Slurm set for the trainer's ranks must not reach a server
_RANK_VARIABLES = {
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
}  # fmt: skip


def trainer_machines(config: Config) -> int:
    """On how many machines the trainer starts servers."""
    return world_size() // ranks_here() if config.rollout.sglang.start == "beside" else 1


def workers_beside_trainer(config: Config) -> int:
    """Processes that sample on this machine, of servers that the trainer starts."""
    sglang = config.rollout.sglang
    started = config.rollout.engine == "sglang" and sglang.start != "elsewhere" and not sglang.urls
    return sglang.servers * sglang.tp if started else 0


def first_gpus(sglang: SGLangConfig, *, training: int, present: int) -> range:
    """The first GPU of each server of a machine. Raises ServerError when there are too few."""
    taken = 0 if sglang.colocate else training
    end = taken + sglang.servers * sglang.tp
    if end > present:
        beside = f" beside the {taken} that train" if taken else ""
        raise ServerError(
            f"rollout.sglang.servers={sglang.servers} of tp={sglang.tp} need {end - taken} GPUs{beside}, and this machine has "
            f"{present}; start fewer, run them elsewhere with `gspo-mm serve`, or share GPUs by rollout.sglang.colocate=true"
        )
    return range(taken, end, sglang.tp)


def server_environment(
    config: Config, folder: Path, private: Path, *, on_gpus: bool, threads: int
) -> dict[str, str]:
    """Variables of a server's process. `folder`: where things for all servers are; `private`: this one's own."""
    env = {
        k: v for k, v in os.environ.items() if k not in _RANK_VARIABLES and not k.startswith("TORCHELASTIC_")
    }
    if not config.policy.keeps_features:
        # SGLang keeps image features by the image's content and forgets them on no weight update: answers would
        # go on seeing with the tower that the server started with
        env["SGLANG_VLM_CACHE_SIZE_MB"] = "0"
    # where the server's own processes meet; a TCPStore, SGLang's default, listens on all interfaces
    env["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"] = f"file://{private}/store"
    # what a convolution of linear attention remembers of the last tokens, which SGLang rounds to bfloat16 by itself; the
    # states themselves it holds in float32, or in what config.json's mamba_ssm_dtype says
    env["SGLANG_MAMBA_CONV_DTYPE"] = config.policy.dtype
    if not on_gpus:
        env |= cpu.environment(folder)
        env.setdefault("OMP_NUM_THREADS", str(threads))
    return env


def server_options(config: Config, server: Server, *, on_gpus: bool) -> dict[str, Any]:
    """Options of sglang.launch_server, by name."""
    sglang = config.rollout.sglang
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    options: dict[str, Any] = {
        "model-path": str(Path(config.model.path).absolute()),
        "host": host,
        "port": int(port),
        "api-key": server.api_key,
        "admin-api-key": server.admin_key,
        "dtype": config.policy.dtype,
        "mem-fraction-static": sglang.mem_fraction,
        "context-length": sglang.context_length or config.longest,
        "tp-size": sglang.tp,
        "ep-size": sglang.ep,
        # servers that drew the same random numbers would give the same answers
        "random-seed": derive_seed(config.run.seed, "server", server.name, server.generation) % 2**31,
        "skip-server-warmup": True,
        "enable-priority-scheduling": True,  # evaluation goes first
    }
    if (Path(config.model.path) / TEMPLATE).is_file():
        # model.path has no weights then (served.py); a push brings them before anything is asked. Scales of the
        # key/value cache are drawn as well, from seed 1234: negative on CPU and CUDA, which SGLang takes for none
        options["load-format"] = "dummy"
    if sglang.dp > 1:
        options |= {"dp-size": sglang.dp, "enable-dp-attention": True}
    if sglang.max_tokens:
        options["max-total-tokens"] = sglang.max_tokens
    if sglang.max_running:
        options["max-running-requests"] = sglang.max_running
    if sglang.max_images:
        options["limit-mm-data-per-request"] = f'{{"image": {sglang.max_images}}}'
    if size := _image_size(config):
        options["mm-process-config"] = json.dumps({"image": {"size": size}})
    if on_gpus:
        options |= {"base-gpu-id": server.first_gpu, "enable-memory-saver": sglang.colocate}
    else:
        options |= cpu.ARGUMENTS
    return options | dict(family_of(config.model.path).server_options) | dict(sglang.extra_args)


def _image_size(config: Config) -> dict[str, int] | None:
    """`size` of the servers' image processor, where the config decides it. As `size` all families' take limits."""
    data, family = config.data, family_of(config.model.path)
    if not (data.min_pixels or data.max_pixels):
        return None
    processor, hf = load_processor(config.model.path)
    if family.image_token_id(hf) is None:
        return None
    own, counted = processor.image_processor.size, family.pixels_counted(hf)
    return size_within(own, least=data.min_pixels, most=data.max_pixels, counted=counted)


def check_installed(python: str | None) -> None:
    """Raise ServerError unless the interpreter has sglang."""
    if python is None:
        try:
            importlib.metadata.version("sglang")
        except importlib.metadata.PackageNotFoundError:
            raise ServerError(
                "rollout.engine=sglang needs sglang: pip install 'gspo-mm[sglang]', or name the interpreter of an "
                "environment that has it in rollout.sglang.python"
            ) from None
        return
    probe = [python, "-c", "import importlib.metadata as m; m.version('sglang')"]
    try:
        done = subprocess.run(probe, capture_output=True, text=True)
    except OSError as error:
        raise ServerError(f"rollout.sglang.python={python} cannot be run: {error.strerror}") from None
    if done.returncode:
        raise ServerError(f"rollout.sglang.python={python} has no sglang; pip install sglang there")
