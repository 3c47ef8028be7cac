"""The folders that servers load: like model.path, with experts one by one, and in FP8 where that is asked for.

With rollout.sglang.fp8 the decoder's matrices are in DeepSeek-V3's format, in which Qwen publishes its -FP8 checkpoints:
float8_e4m3fn with one float32 scale per block of 128 x 128, activations quantised as they come. Router, vision tower,
output layer, embeddings and norms stay as they are. What is quantised is `Family.linear_layers` and nothing else, name
by name; what is kept is the rest of the weight map. `sync/quantize.py` quantises.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from gspo_mm.config import Config
from gspo_mm.families.base import Family
from gspo_mm.families.operations import Entry, StackExperts
from gspo_mm.families.stored import SCALE
from gspo_mm.families.table import family_of
from gspo_mm.families.write import TEMPLATE, copy_files
from gspo_mm.hf.headers import fp8_block, is_mxfp4
from gspo_mm.serving.launch import workers_beside_trainer
from gspo_mm.serving.registry import servers_folder
from gspo_mm.types import GspoError

BLOCK = 128


class BlockSizeError(GspoError, ValueError):
    """A model whose matrices, as a server cuts them over its GPUs, are not made of whole blocks."""


def served(config: Config) -> Config:
    """`config` for whoever starts servers: where model.path says another format than theirs, it is another folder.

    So with rollout.sglang.fp8, and without it for a model that is stored in FP8 or MXFP4. The folder is model.path without its
    weights; servers start with random ones and get the right ones by a push.
    Raises BlockSizeError when SGLang could not cut the model into blocks.
    """
    path = Path(config.model.path)
    if not config.rollout.sglang.fp8 and not fp8_block(path) and not is_mxfp4(path):
        return config
    template = str(served_template(config))
    return config.model_copy(update={"model": config.model.model_copy(update={"path": template})})


def served_template(config: Config) -> Path:
    """A folder without weights, for `write_hf`, and for servers to start from.

    Experts are named one by one, so that nothing larger than a matrix is ever gathered. The folder's name says its
    contents, so it is never changed. Raises BlockSizeError.
    """
    check_blocks(config)
    source, parent = Path(config.model.path), servers_folder(config.run.path)
    family = family_of(source)
    hf = family.load_config(str(source))
    settings = json.loads((source / "config.json").read_text())
    settings.pop("quantization_config", None)
    quantized: Collection[str] = ()
    if config.rollout.sglang.fp8:
        settings["quantization_config"] = quantization_config(family, hf)
        quantized = quantized_names(family, hf)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".model-") as made:
        folder = Path(made) / "model"
        folder.mkdir()
        copy_files(source, folder)
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        dtypes = tensor_dtypes(
            tensor_names(weight_map(family, hf)),
            quantized=quantized,
            kept=config.policy.dtype,
            constants=family.constants,
        )
        (folder / TEMPLATE).write_text(json.dumps(dtypes, indent=1) + "\n")
        target = parent / f"model-{_digest(folder)}"
        with suppress(OSError):  # it is there already
            folder.rename(target)
    return target


def quantization_config(family: Family, hf: Any) -> dict[str, Any]:
    """What config.json says about a folder in this format, as transformers and SGLang read it."""
    quantized = quantized_names(family, hf)
    # modules by name: a parameter that is no module's weight would stand for all of those beside it
    names = [n for n in tensor_names(weight_map(family, hf)) if n.endswith((".weight", ".bias"))]
    kept = {name.rpartition(".")[0] for name in names if name not in quantized}
    kept -= {name.rpartition(".")[0] for name in quantized}
    kept |= {*family.kept_by_servers}
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": sorted(map(family.prefixes.published, kept)),
    }


def quantized_names(family: Family, hf: Any) -> frozenset[str]:
    """Hugging Face's names of the weights that are quantised, experts one by one."""
    return frozenset(name for parts in family.linear_layers(hf).values() for name in parts)


def tensor_names(entries: Iterable[Entry]) -> Iterator[str]:
    """Hugging Face's names of all tensors of a weight map, experts one by one unless servers take them together."""
    for entry in entries:
        if isinstance(entry.op, StackExperts) and not entry.op.together:
            for expert in range(len(entry.megatron)):
                yield from entry.op.names_apart(entry.hf[0], expert)
        else:
            yield from entry.hf


def tensor_dtypes(
    names: Iterable[str], *, quantized: Collection[str], kept: str, constants: tuple[str, ...] = ()
) -> dict[str, str]:
    """Names and dtypes of all tensors of a folder; `kept`: dtype of what is not quantised, nor one of `constants`."""
    dtypes: dict[str, str] = {}
    for name in names:
        if name in quantized:
            dtypes |= {name: "float8_e4m3fn", name + SCALE: "float32"}
        else:
            dtypes[name] = "float32" if name.endswith(constants) else kept
    return dtypes


def weight_map(family: Family, hf: Any) -> list[Entry]:
    return family.weight_map(hf, padded_vocab=hf.get_text_config().vocab_size, fused=False)


def check_served(config: Config) -> None:
    """Raise GspoError when servers of `config` could not compute what the policy computes."""
    family = family_of(config.model.path)
    family.check_served(family.load_config(config.model.path))
    if workers_beside_trainer(config) and not (family.served_on_cpu or torch.cuda.is_available()):
        raise GspoError(
            f"SGLang's attention without GPUs cannot compute {config.model.path}, which has sinks or windows; set "
            "rollout.engine=embedded, or start servers where GPUs are"
        )
    check_blocks(config)


def check_blocks(config: Config) -> None:
    """Raise BlockSizeError unless every server GPU gets whole blocks of every merged matrix.

    SGLang's demands (layers/quantization/fp8.py): `validate_block_quant_shapes` of linear layers,
    `create_fp8_moe_weight_` of experts, and `per_token_group_quant_fp8` of what is multiplied with them.
    """
    sglang, path = config.rollout.sglang, config.model.path
    if not sglang.fp8:
        return
    family = family_of(path)
    hf = family.load_config(path)
    if not family.linear_layers(hf):
        raise BlockSizeError(
            f"rollout.sglang.fp8=true: servers are sent nothing in FP8 of models of type {hf.model_type}; set "
            "rollout.sglang.fp8=false"
        )
    attention, experts = sglang.tp // sglang.dp, sglang.tp // sglang.ep
    for dim in family.linear_dims(hf, attention=attention, mlp=sglang.tp, experts=experts):
        if dim.size % (BLOCK * dim.ways):
            cut = f" over {dim.ways} GPUs" if dim.ways > 1 else ""
            fix = f"{dim.relief}, or set " if dim.ways > 1 and dim.size % BLOCK == 0 else "set "
            raise BlockSizeError(
                f"rollout.sglang.fp8=true with rollout.sglang.tp={sglang.tp} ep={sglang.ep} dp={sglang.dp}: "
                f"{dim.name}={dim.size} of {path}{cut} is not made of whole blocks of {BLOCK}; {fix}"
                "rollout.sglang.fp8=false"
            )


def _digest(folder: Path) -> str:
    """Of all files' names and contents."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:12]
