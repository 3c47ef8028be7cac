"""A policy as a megatron-core distributed checkpoint: written by all ranks, read back under any other layout.

Every tensor is stored once, by its name and place in the whole model; the optimizer's float32 copies and moments
too (`fully_reshardable`). So tensor-, expert-, pipeline- or data-parallel sizes may change between save and load.

torch.distributed.checkpoint unpickles the folder's metadata on reading: load checkpoints that you wrote or trust.
Hugging Face folders (safetensors) are the form to exchange.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import shutil
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import gspo_mm.policy  # noqa: F401  # isort: skip  # before megatron-core, which it keeps from looking for kernels in vain
import torch
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from torch.distributed.checkpoint.api import CheckpointException

from gspo_mm.config.policy import LoraConfig
from gspo_mm.policy.compat import is_quantized, make_optimizer_state, write_checkpoints_by_thread
from gspo_mm.policy.engine import Policy
from gspo_mm.policy.model import PolicyModel, quiet_megatron
from gspo_mm.types import GspoError

_EXTRA = "._extra_state"  # in the names of what Transformer Engine keeps beside weights, one for each of grouped experts
logger = logging.getLogger(__name__)


class CheckpointError(GspoError, ValueError):
    """A distributed checkpoint that is not there, is of another model, or cannot be read."""


class Saving:
    """A checkpoint on its way to disk, by a thread of each rank. Begun by all ranks, and finished by all of them.

    megatron-core's own background writers copy nothing that is on the host already, or fork a process that holds
    gloo's threads. Here all tensors are copied first, so training may go on at once; the files are then written by
    megatron's function, and the metadata, which makes a checkpoint of them, by `finish`.
    """

    def __init__(self, request: AsyncRequest, *, background: bool) -> None:
        self._request = request
        rank, buckets, results = request.async_fn_args or (0, [], None)
        if background:
            buckets = [
                (
                    file,
                    key,
                    (data, [(item, tensor.detach().to("cpu", copy=True)) for item, tensor in tensors]),
                )
                for file, key, (data, tensors) in buckets
            ]
        elif request.preload_fn is not None:
            buckets = request.preload_fn()
        self._arguments = (rank, buckets, results)
        self._thread = threading.Thread(target=self._write, name="checkpoint", daemon=True)
        self._thread.start()

    def _write(self) -> None:
        try:
            if self._request.async_fn is not None:
                self._request.async_fn(*self._arguments)
        except Exception:  # `finish` misses its result and raises on every rank
            logger.exception("writing a checkpoint failed")

    @property
    def written(self) -> bool:
        """Whether this rank's files are on disk."""
        return not self._thread.is_alive()

    def finish(self) -> None:
        """Wait for the files of all ranks and write the metadata. Raises CheckpointException on every rank."""
        self._thread.join()
        finalize(self._request)


def save_policy(policy: Policy, folder: Path, *, background: bool = False) -> Saving:
    """Begin to write weights and optimizer into `folder`, which is created; call `finish` of what this returns.

    A collective; the folder is shared by all ranks. `background`: the policy may be trained on before `finish`, at
    the price of a copy of this rank's part in host memory.
    """
    metadata = _metadata()
    model = _model_part(policy.chunks, metadata)
    content: dict[str, Any] = {**model, "optimizer_steps": policy.optimizer.step_count}
    if policy.config.lora:
        content["lora"] = policy.config.lora.model_dump()
    if policy.optimizer.step_count:  # before the first step it has no state, which megatron does not expect
        content["optimizer"] = policy.optimizer.inner.sharded_state_dict(
            model, is_loading=False, metadata=metadata
        )
    if policy.ranks.main:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    policy.ranks.barrier()
    return Saving(_request(content, folder, metadata), background=background)


def request_of(chunks: list[PolicyModel], folder: Path) -> AsyncRequest:
    """What megatron-core would write into `folder` of weights alone."""
    metadata = _metadata()
    return _request(_model_part(chunks, metadata), folder, metadata)


def finalize(request: AsyncRequest) -> None:
    """Write the metadata of what was requested, and is on disk."""
    with _quiet():
        for step in request.finalize_fns:
            step()


def load_policy(policy: Policy, folder: Path) -> None:
    """Continue exactly where `save_policy` was called, under this or another layout. A collective.

    Raises CheckpointError when the folder is not a checkpoint of this model.
    """
    steps = common_of(folder).get("optimizer_steps", 0)
    if not steps:
        load_weights(policy.chunks, folder)
        policy.optimizer.take_over_parameters()
    else:
        _load_all(policy, folder)
    policy.optimizer.step_count = steps
    policy.forget_features()


def _load_all(policy: Policy, folder: Path) -> None:
    metadata, inner = _metadata(), policy.optimizer.inner
    for part in inner.chained_optimizers:
        if not getattr(part, "is_stub_optimizer", False):
            make_optimizer_state(part)
    model = _model_part(policy.chunks, metadata)
    wanted = {**model, "optimizer": inner.sharded_state_dict(model, is_loading=True, metadata=metadata)}
    _dequantize(model)
    found = _read(wanted, folder)
    _fill(policy.chunks, found)
    policy.optimizer.load_state(_as_chained(found["optimizer"], len(inner.chained_optimizers)))


def load_weights(chunks: list[PolicyModel], folder: Path) -> None:
    """Fill the model from a checkpoint of weights, or from a run's, whose optimizer is left out."""
    wanted = _model_part(chunks, _metadata())
    _dequantize(wanted)
    _fill(chunks, _read(wanted, folder))


def _dequantize(model: dict[str, Any]) -> None:
    """Make what is read in pieces a plain tensor.

    An MLP's first weight is cut into gate and up; in FP8 each would be read with a scale of its own, and both put together
    with that of one.
    """
    for part in (part for of_chunk in model.values() for part in of_chunk.values()):
        if isinstance(part, ShardedTensorFactory) and is_quantized(part.data):
            part.data = part.data.dequantize()


def _metadata() -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": state.get_data_parallel_group(with_context_parallel=True),
    }


def _model_part(chunks: list[PolicyModel], metadata: dict[str, Any]) -> dict[str, Any]:
    keys = ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]
    return {key: _of_chunk(chunk, metadata) for key, chunk in zip(keys, chunks, strict=True)}


def _of_chunk(chunk: PolicyModel, metadata: dict[str, Any]) -> dict[str, Any]:
    """Tensors by name, without the extra state of Transformer Engine's modules, which local ones neither have nor read.

    It holds scales of FP8 that the recipes here work out at each use (`delayed`, which is refused, would need them).
    """
    whole = chunk.sharded_state_dict(metadata=metadata)
    return {name: part for name, part in whole.items() if _EXTRA not in name}


def _request(content: dict[str, Any], folder: Path, metadata: dict[str, Any]) -> AsyncRequest:
    plain = {key: value for key, value in metadata.items() if key != "dp_cp_group"}
    write_checkpoints_by_thread()
    with _quiet():
        request = dist_checkpointing.save(
            content, str(folder), content_metadata=plain, async_sharded_save=True, async_strategy="mcore"
        )
    assert request is not None
    return request


def parts_of(chunk: PolicyModel) -> dict[str, Any]:
    """How checkpoints name and cut the tensors of a model chunk."""
    return _of_chunk(chunk, _metadata())


def adapters_of(folder: Path) -> LoraConfig | None:
    """`policy.lora` of the run that wrote a checkpoint. Raises CheckpointError when it is none."""
    found = common_of(folder).get("lora")
    return LoraConfig.model_validate(found) if found else None


def common_of(folder: Path) -> dict[str, Any]:
    """What is not a tensor: the optimizer's step count among it."""
    if not (folder / "metadata.json").is_file():
        raise CheckpointError(f"{folder} is no distributed checkpoint (no metadata.json in it); name another")
    with _quiet():
        return dist_checkpointing.load_common_state_dict(str(folder))


def _read(wanted: dict[str, Any], folder: Path) -> dict[str, Any]:
    common_of(folder)
    try:
        with _quiet():
            return cast(dict[str, Any], dist_checkpointing.load(wanted, str(folder)))
    except (CheckpointException, CheckpointingException, RuntimeError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{folder} is a checkpoint of another model, or damaged: {reason}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the notices that torch's checkpoint code has for megatron-core's use of it."""
    with quiet_megatron(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint")
        yield


@torch.no_grad()
def _fill(chunks: list[PolicyModel], found: dict[str, Any]) -> None:
    for index, chunk in enumerate(chunks):
        of_chunk = found["model" if len(chunks) == 1 else f"model{index}"]
        missing, unexpected = chunk.load_state_dict(of_chunk, strict=False)
        assert not unexpected, unexpected
        assert all(_EXTRA in name for name in missing), missing


def _as_chained(found: dict[Any, Any], count: int) -> Any:
    """The optimizer's part, for a rank with `count` chained optimizers (dense, and experts where ep > 1).

    A checkpoint written with experts in an optimizer of their own, read where there is one for all, or the other
    way round, holds the same tensors under one level more or less.
    """
    if count == 1 and 0 in found:
        dense = found.pop(0)
        found.pop(1, None)
        return {**dense, **found}
    if count == 2 and "optimizer" in found:
        common = {key: found.pop(key) for key in list(found) if key not in (0, 1)}
        for index in (0, 1):
            own = copy.deepcopy(common)
            for group in own["optimizer"]["param_groups"]:
                group["is_expert_parallel"] = bool(index)
            found[index] = {**own, **found[index]}
    return found
