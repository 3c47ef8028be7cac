"""Write Hugging Face folders: the family's published layout always, whole or not at all.

Reading is in folder.py, whose docstring describes the two layouts of fused experts; other families publish experts one by
one.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from gspo_mm.families.folder import HfFolder, expert_kind, read_hf
from gspo_mm.families.operations import StackExperts
from gspo_mm.families.table import family_of
from gspo_mm.hf.headers import INDEX, SINGLE, HfFolderError, read_json
from gspo_mm.runtime.disk import refusal, sync

logger = logging.getLogger(__name__)

TEMPLATE = "tensors.json"
CARRIED = "carried.safetensors"

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".index.json")


def write_hf(
    path: str | Path,
    source: str | Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    experts_layout: str = "auto",
    shard_bytes: int = 5 * 10**9,
    durable: bool = True,
) -> Path:
    """Write `tensors` (HF names, transformers' in-memory layout) as a folder like `source` with new weights.

    `source` is a Hugging Face folder, or the files of one without its weights (`copy_template`).

    Experts go out in the published layout, each tensor in the dtype it has in `source` (BF16 for FP8);
    configuration, tokenizer, processor and chat template are copied. The folder appears under its name only when it is whole, and
    replaces one that was there. `experts_layout` is that of `source`, as in `read_hf`;
    with `durable` false the files need not outlive a crash of the machine.
    Raises HfFolderError when the names are not those of `source`, or when the disk refuses.
    """
    path, origin = Path(path), template_of(source, experts_layout)
    temporary = path.with_name(f".tmp-{path.name}")
    _warn_of_square_experts(origin)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _fill(temporary, origin, tensors, shard_bytes)
        if durable:
            for item in [*temporary.iterdir(), temporary]:
                sync(item)
        _publish(temporary, path)
        if durable:
            sync(path.parent)
    except OSError as error:
        raise HfFolderError(f"{path} cannot be written: {refusal(error, folder=path.parent)}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


class Template:
    """What a folder without weights must hold when they are written again: names and dtypes of all tensors."""

    def __init__(self, path: Path) -> None:
        family = family_of(path)
        self.path = path
        self.expert_shapes = family.expert_shapes(family.load_config(str(path)))
        self.published_experts = family.published_experts
        self.prefixes = family.prefixes
        self._dtypes: dict[str, str] = json.loads((path / TEMPLATE).read_text())

    def names(self) -> list[str]:
        return list(self._dtypes)

    def dtype(self, name: str) -> torch.dtype:
        return getattr(torch, self._dtypes[name])

    def __contains__(self, name: str) -> bool:
        return name in self._dtypes

    def carried(self) -> Iterator[tuple[str, torch.Tensor]]:
        if (self.path / CARRIED).is_file():
            with safe_open(self.path / CARRIED, framework="pt") as file:
                yield from ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118


def template_of(source: str | Path, experts_layout: str = "auto") -> HfFolder | Template:
    """`source` as something that new weights can be written like."""
    path = Path(source)
    return Template(path) if (path / TEMPLATE).is_file() else read_hf(path, experts_layout)


def copy_template(origin: HfFolder, folder: Path) -> None:
    """Everything of a Hugging Face folder but the weights, whose names and dtypes are noted."""
    folder.mkdir(parents=True)
    copy_files(origin.path, folder)
    unquantize_config(folder)
    dtypes = {name: str(origin.dtype(name)).removeprefix("torch.") for name in origin.names()}
    (folder / TEMPLATE).write_text(json.dumps(dtypes, indent=1) + "\n")
    if carried := {name: tensor.contiguous() for name, tensor in origin.carried()}:
        save_file(carried, folder / CARRIED, metadata={"format": "pt"})


def copy_files(origin: Path, folder: Path) -> None:
    """Everything of a Hugging Face folder but the weights."""
    for file in sorted(origin.iterdir()):
        weights = file.name.endswith(_WEIGHT_SUFFIXES) or file.name == TEMPLATE
        if file.is_file() and not file.name.startswith(".") and not weights:
            shutil.copyfile(file, folder / file.name)


def unquantize_config(folder: Path) -> None:
    """Have config.json say that the weights are in the format that the tensors have."""
    file = folder / "config.json"
    settings = read_json(file)
    if settings.pop("quantization_config", None):
        file.write_text(json.dumps(settings, indent=2) + "\n")


def _fill(
    folder: Path, origin: HfFolder | Template, tensors: Iterable[tuple[str, torch.Tensor]], shard_bytes: int
) -> None:
    shards, written = _write_shards(folder, origin, tensors, shard_bytes)
    missing = set(origin.names()) - written - _tied_names(origin.path)
    if missing:
        raise HfFolderError(
            f"{len(missing)} tensors of {origin.path} were not given, first {min(missing)}; export the whole model"
        )
    _name_shards(folder, shards)
    copy_files(origin.path, folder)
    if isinstance(origin, HfFolder):
        unquantize_config(folder)


def _warn_of_square_experts(origin: HfFolder | Template) -> None:
    square = [name for name, (rows, columns) in origin.expert_shapes.items() if rows == columns]
    if square and origin.published_experts == "exchanged":
        logger.warning(
            "%s experts of %s are square: transformers decides their layout by dims alone and will not transpose the "
            "published one that is written; SGLang and this program read it rightly",
            square[0],
            origin.path,
        )


type _Shard = tuple[str, int, list[str]]  # file name, bytes, tensor names


def _write_shards(
    folder: Path, origin: HfFolder | Template, tensors: Iterable[tuple[str, torch.Tensor]], shard_bytes: int
) -> tuple[list[_Shard], set[str]]:
    shards: list[_Shard] = []
    pending: dict[str, torch.Tensor] = {}
    size = 0

    def flush() -> None:
        name = f"part-{len(shards):05d}"
        save_file(pending, folder / name, metadata={"format": "pt"})
        shards.append((name, size, list(pending)))
        pending.clear()

    def add(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
        nonlocal size
        tensor = tensor.detach().to("cpu", dtype, copy=True).contiguous()
        if pending and size + tensor.nbytes > shard_bytes:
            flush()
            size = 0
        pending[name] = tensor
        size += tensor.nbytes

    written: set[str] = set()
    for name, tensor in tensors:
        if name not in origin:
            raise HfFolderError(f"{name} is not in {origin.path}, so a folder like it cannot hold it")
        for published, part in _published(origin, name, tensor):
            add(origin.prefixes.published(published), part, origin.dtype(name))
        written.add(name)
    for name, tensor in origin.carried():
        add(name, tensor, tensor.dtype)
    flush()
    return shards, written


def _published(
    origin: HfFolder | Template, name: str, tensor: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    """What published checkpoints hold of a tensor that transformers has."""
    kind = expert_kind(name)
    if kind not in origin.expert_shapes:
        yield name, tensor
    elif origin.published_experts == "apart":
        yield from StackExperts(gated=kind == "gate_up_proj").all_apart(name, tensor)
    else:
        yield name, tensor.transpose(1, 2) if origin.published_experts == "exchanged" else tensor


def _name_shards(folder: Path, shards: list[_Shard]) -> None:
    if len(shards) == 1:
        (folder / shards[0][0]).rename(folder / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for number, (part, _, names) in enumerate(shards, start=1):
        final = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / part).rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": sum(size for _, size, _ in shards)}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _publish(temporary: Path, path: Path) -> None:
    old = path.with_name(f".old-{path.name}")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    temporary.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _tied_names(path: Path) -> set[str]:
    """Second names of shared tensors, which a folder may store or leave out."""
    family = family_of(path)
    return {"lm_head.weight"} if family.is_tied(family.load_config(str(path))) else set()
