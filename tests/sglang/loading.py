"""SGLang's own model and loader, in processes of their own: python -m tests.sglang.loading (FOLDER DTYPE TENSORS OUT)...

Each of them is forked behind the imports, which take longest. It builds the model of FOLDER on the CPU, fills it with NaN, and
lets its `load_weights` read the safetensors file TENSORS. OUT gets what its parameters hold then, OUT.json which of them have no
value; in float32 also which have none where one tensor is left out, or sent under another name. Where TENSORS is FOLDER, SGLang
loads it as a server does that was started with it.
"""

from __future__ import annotations

import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import batched
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

type Tensors = Iterable[tuple[str, torch.Tensor]]


def import_all() -> None:
    """What `build` needs, models' files among them."""
    import sglang.benchmark.one_batch
    import sglang.srt.model_loader
    import sglang.srt.models.registry  # noqa: F401


def build(folder: str, dtype: str, load_format: str) -> torch.nn.Module:
    """As a server's scheduler does, on one device."""
    from sglang.benchmark.one_batch import _init_process_global_configs
    from sglang.srt.configs.device_config import DeviceConfig
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed import bootstrap
    from sglang.srt.model_loader import get_model
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import PortArgs, ServerArgs

    sinks = json.loads(Path(folder, "config.json").read_text())["model_type"] == "gpt_oss"
    backend = "triton" if sinks else "torch_native"  # demanded for sinks; nothing is attended to here
    server = ServerArgs(
        model_path=folder,
        device="cpu",
        dtype=dtype,
        attention_backend=backend,
        load_format=load_format,
        disable_overlap_schedule=True,
    )
    server.resolve_once()
    publish(server, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))
    _init_process_global_configs()
    config = ModelConfig.from_server_args(server)
    port = PortArgs.init_new(server).nccl_port
    bootstrap.init_parallel_runtime(server_args=server, device="cpu", dist_port=port)
    bootstrap.init_layer_runtime(model_config=config)
    return get_model(
        model_config=config,
        load_config=LoadConfig(load_format=load_format),
        device_config=DeviceConfig("cpu"),
    )


def main() -> None:
    import_all()
    for job in batched(sys.argv[1:], 4):
        if not (child := os.fork()):
            try:
                load_into(*job)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            sys.exit(f"{job} failed")


def load_into(folder: str, dtype: str, tensors: str, out: str) -> None:
    model = build(folder, dtype, "auto" if tensors == folder else "dummy")
    parameters = dict(model.named_parameters())
    if tensors != folder:
        Path(f"{out}.json").write_text(json.dumps(loaded_from(load_file(tensors), model, parameters, dtype)))
    save_file({name: parameter.detach().contiguous() for name, parameter in parameters.items()}, out)


def loaded_from(
    sent: dict[str, torch.Tensor],
    model: torch.nn.Module,
    parameters: dict[str, torch.nn.Parameter],
    dtype: str,
) -> dict[str, Any]:
    """Load them; names of parameters without a value."""

    def load(tensors: Tensors) -> list[str]:
        """Names of parameters that have no value afterwards."""
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.fill_(math.nan)
        model.load_weights(tensors)  # pyright: ignore[reportCallIssue]
        return sorted(name for name, parameter in parameters.items() if parameter.float().isnan().any())

    def changed(change: Callable[[str], Tensors]) -> dict[str, list[str]]:
        """For each tensor; of one that the loader refuses, none."""
        unfilled: dict[str, list[str]] = {}
        for name in sent:
            with suppress(KeyError):
                unfilled[name] = load(
                    [
                        pair
                        for other in sent
                        for pair in (change(other) if other == name else [(other, sent[other])])
                    ]
                )
        return unfilled

    report: dict[str, Any] = {"all": load(sent.items())}
    if dtype == "float32":
        report["left out"] = changed(lambda name: [])
        report["renamed"] = changed(lambda name: [(f"{name.rpartition('.')[0]}.other", sent[name])])
        load(sent.items())
    return report


if __name__ == "__main__":
    main()
