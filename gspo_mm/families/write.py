"""Write Hugging Face folders: the family's published layout always, whole or not at all.

Reading is in folder.py, whose docstring describes the two layouts of fused experts; other families publish experts one by
one.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from gspo_mm.families.folder import HfFolder, expert_kind, read_hf
from gspo_mm.families.operations import StackExperts
from gspo_mm.families.table import family_of
from gspo_mm.hf.headers import INDEX, SINGLE, HfFolderError, read_json
from gspo_mm.hf.shard import ShardWriter
from gspo_mm.runtime.disk import publish, refusal, sync

logger = logging.getLogger(__name__)

TEMPLATE = "tensors.json"
CARRIED = "carried.safetensors"

type Named = tuple[str, torch.Tensor]
# what a tensor is written as, by name
type Change = Callable[[str, torch.Tensor], Iterator[Named]]

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
    with whole_folder(path, durable=durable) as temporary:
        _fill(temporary, origin, tensors, shard_bytes)
    return path


@contextmanager
def whole_folder(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """An empty folder to fill in the block, which then takes the place of `path`. Raises HfFolderError when the disk refuses."""
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        if durable:
            for item in [*temporary.iterdir(), temporary]:
                sync(item)
        publish(temporary, path)
        if durable:
            sync(path.parent)
    except OSError as error:
        raise HfFolderError(f"{path} cannot be written: {refusal(error, folder=path.parent)}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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


def _fill(folder: Path, origin: HfFolder | Template, tensors: Iterable[Named], shard_bytes: int) -> None:
    shards, written = _write_shards(folder, origin, tensors, shard_bytes)
    missing = set(origin.names()) - written - _tied_names(origin.path)
    if missing:
        raise HfFolderError(
            f"{len(missing)} tensors of {origin.path} were not given, first {min(missing)}; export the whole model"
        )
    files = shard_names(len(shards))
    for number, file in enumerate(files):
        (folder / f"part-{number:05d}").rename(folder / file)
    complete(folder, origin, dict(zip(files, shards, strict=True)))


def shard_names(count: int) -> list[str]:
    """Names of a folder's files of weights, where there are that many."""
    if count == 1:
        return [SINGLE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def complete(folder: Path, origin: HfFolder | Template, shards: dict[str, Shard]) -> None:
    """All that belongs beside the files of weights, `shards` by name."""
    _warn_of_square_experts(origin)
    if len(shards) > 1:
        weight_map = {name: file for file, (_, names) in shards.items() for name in names}
        index = {
            "metadata": {"total_size": sum(size for size, _ in shards.values())},
            "weight_map": weight_map,
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
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


# bytes, tensor names
type Shard = tuple[int, list[str]]


def published(
    origin: HfFolder | Template, name: str, parts: Iterable[torch.Tensor], change: Change | None = None
) -> Iterator[tuple[str, Iterable[torch.Tensor]]]:
    """What published checkpoints hold of a tensor in transformers' in-memory layout, in the dtypes of `origin`.

    `parts` make up the tensor along its first dim, and are one for each of fused experts; those of what comes out are made
    when they are asked for. `change` gets whole matrices, experts one by one. Raises HfFolderError for a name that is not in
    `origin`.
    """
    if name not in origin:
        raise HfFolderError(f"{name} is not in {origin.path}, so a folder like it cannot hold it")
    dtype, kind = origin.dtype(name), expert_kind(name)
    cast = (part.detach().to("cpu", dtype) for part in parts)
    named = origin.prefixes.published
    if kind in origin.expert_shapes and (origin.published_experts == "apart" or change):
        op = StackExperts(gated=kind == "gate_up_proj")
        for expert, one in enumerate(cast):
            for apart, matrix in zip(op.names_apart(name, expert), op.apart(one[0]), strict=True):
                for last, value in change(apart, matrix) if change else [(apart, matrix)]:
                    yield named(last), [value]
    elif kind in origin.expert_shapes and origin.published_experts == "exchanged":
        # torch turns a matrix five times as fast as a stack of them
        yield named(name), (one[0].T.contiguous()[None] for one in cast)
    elif change:
        (whole,) = cast
        yield from ((named(last), [value]) for last, value in change(name, whole))
    else:
        yield named(name), cast


def _write_shards(
    folder: Path, origin: HfFolder | Template, tensors: Iterable[Named], shard_bytes: int
) -> tuple[list[Shard], set[str]]:
    """Files `part-NUMBER` as tensors come; none is kept in memory."""
    shards: list[Shard] = []
    with ExitStack() as files:

        def begin() -> ShardWriter:
            room = min(
                2**18, 2**13 + shard_bytes // 32
            )  # for the header: more tensors than that go into the next file
            return files.enter_context(ShardWriter(folder / f"part-{len(shards):05d}", room=room))

        def add(name: str, size: int, parts: Iterable[torch.Tensor]) -> None:
            nonlocal file
            if not file.takes(name) or (file.size and file.size + size > shard_bytes):
                shards.append(file.finish())
                file = begin()
            file.add(name, parts)

        file, written = begin(), set[str]()
        for name, tensor in tensors:
            stack = expert_kind(name) in origin.expert_shapes
            for last, parts in published(origin, name, tensor.split(1) if stack else [tensor]):
                size = (
                    parts[0].nbytes
                    if isinstance(parts, list)
                    else tensor.numel() * origin.dtype(name).itemsize
                )
                add(last, size, parts)
            written.add(name)
        for name, tensor in origin.carried():
            add(name, tensor.nbytes, [tensor])
        shards.append(file.finish())
    return shards, written


def _tied_names(path: Path) -> set[str]:
    """Second names of shared tensors, which a folder may store or leave out."""
    family = family_of(path)
    return {"lm_head.weight"} if family.is_tied(family.load_config(str(path))) else set()
