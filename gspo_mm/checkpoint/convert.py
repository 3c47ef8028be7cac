"""Hugging Face folder <-> distributed checkpoint, tensor by tensor, on the ranks of any layout.

A converted folder holds `policy/` (weights, as in a run's checkpoint: any layout can read it) and `hf/` (configuration,
tokenizer, processor, chat template, generation config, and the names and dtypes of the tensors).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gspo_mm.checkpoint.distributed import CheckpointError, adapters_of, load_weights, save_weights
from gspo_mm.config import ParallelConfig, PolicyConfig
from gspo_mm.config.policy import LoraConfig
from gspo_mm.families.folder import HfFolder, read_hf
from gspo_mm.families.table import family_of
from gspo_mm.families.write import Template, copy_template, template_of, write_hf
from gspo_mm.hf.tensors import held
from gspo_mm.policy.engine import build_chunks, prepare
from gspo_mm.policy.lora import add_adapters
from gspo_mm.policy.model import PolicyModel, padded_vocab
from gspo_mm.policy.parallel import Groups
from gspo_mm.policy.precision import DTYPES
from gspo_mm.policy.spec import has_fused_modules
from gspo_mm.policy.weights import Weights
from gspo_mm.runtime.dist import Ranks


def hf_to_megatron(
    hf: Path, out: Path, parallel: ParallelConfig, *, experts_layout: str = "auto", check: bool = False
) -> int:
    """Write `out` from a Hugging Face folder; returns the number of tensors. A collective.

    Weights keep their dtype, or become float32 where the folder mixes them. `out` appears when it is whole, and
    replaces one that was there. `check`: read it back and compare every bit; raises CheckpointError when one differs.
    """
    source = read_hf(hf, experts_layout)
    ranks, chunks, weights = _build(hf, source, parallel)
    weights.load(source)
    temporary = out.with_name(f".tmp-{out.name}")
    with ranks.together():
        if ranks.main:
            shutil.rmtree(temporary, ignore_errors=True)
            copy_template(source, temporary / "hf")
    save_weights(ranks, chunks, temporary / "policy")
    if check:
        for chunk in chunks:
            for tensor in held(chunk).values():
                tensor.data.fill_(torch.nan)
        load_weights(chunks, temporary / "policy")
        _compare(ranks, weights, source)
    with ranks.together():
        if ranks.main:
            shutil.rmtree(out, ignore_errors=True)
            temporary.rename(out)
    return len(source.names())


def megatron_to_hf(
    checkpoint: Path,
    out: Path,
    parallel: ParallelConfig,
    *,
    hf: Path,
    experts_layout: str = "auto",
    check: bool = False,
) -> int:
    """Write a Hugging Face folder from a converted folder or a run's checkpoint; returns the number of tensors.

    `hf`: the folder that it came from (`origin_of`), whose tokenizer and dtypes are taken over. The layout is that of
    the ranks at work, whatever wrote the checkpoint. A collective. Raises CheckpointError.
    """
    template = template_of(hf, experts_layout)
    ranks, chunks, weights = _build(hf, template, parallel, lora=adapters_of(checkpoint / "policy"))
    load_weights(chunks, checkpoint / "policy")
    ranks.stream_to_main(
        weights.export(), lambda tensors: write_hf(out, hf, tensors, experts_layout=experts_layout)
    )
    if check:
        exchanged = template.expert_shapes and template.published_experts == "exchanged"
        _compare(ranks, weights, read_hf(out, "published" if exchanged else "auto"))
    return len(template.names())


def _build(
    hf: Path, source: HfFolder | Template, parallel: ParallelConfig, *, lora: LoraConfig | None = None
) -> tuple[Ranks, list[PolicyModel], Weights]:
    """The model's parts of this rank, without optimizer or gradients."""
    constants = family_of(hf).constants
    dtypes = {source.dtype(name) for name in source.names() if not name.endswith(constants)}
    dtype = next((name for name, dtype in DTYPES.items() if dtypes == {dtype}), "float32")
    config = PolicyConfig.model_validate({"dtype": dtype, "parallel": parallel.model_dump()})
    family, config_of_model, plan = prepare(str(hf), config, seed=0)
    groups = Groups.current()
    chunks = build_chunks(family, config_of_model, config, plan, groups)
    vocab = padded_vocab(config_of_model.get_text_config().vocab_size, plan)
    entries = family.weight_map(config_of_model, padded_vocab=vocab, fused=has_fused_modules())
    weights = Weights(chunks, entries, plan, groups)
    if lora:
        add_adapters(chunks, weights, lora, groups)
    return Ranks(), chunks, weights


def _compare(ranks: Ranks, weights: Weights, folder: HfFolder) -> None:
    """Raise CheckpointError unless every tensor of the model is, bit for bit, that of `folder`."""

    def look(tensors: Iterator[tuple[str, Any]]) -> None:
        left = set(folder.names())
        for name, tensor in tensors:
            left.discard(name)
            expected = folder.tensor(name)
            if not torch.equal(tensor.cpu().to(expected.dtype), expected):
                raise CheckpointError(
                    f"{name} is not what {folder.path} holds; the conversion is not to be used"
                )
        assert not left, f"{sorted(left)[:3]} of {folder.path} are in no entry of the weight map"

    ranks.stream_to_main(weights.export(), look)
