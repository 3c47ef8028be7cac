"""Hugging Face folder <-> distributed checkpoint, expert by expert and matrix by matrix, by several threads.

The model is built on torch's meta device: it says names and shapes, and how checkpoints cut tensors, and no weights are ever
in it. One process does all, on the host; what layout a checkpoint was written under, or is to be read under, does not matter.

A converted folder holds `policy/` (weights, as in a run's checkpoint: any layout can read it) and `hf/` (configuration,
tokenizer, processor, chat template, generation config, and the names and dtypes of the tensors).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.serialization import set_crc32_options

from gspo_mm.checkpoint.distributed import CheckpointError, adapters_of, parts_of
from gspo_mm.checkpoint.resumable import Moved, Part, files_of, make
from gspo_mm.checkpoint.stream import Place, Reader, describe, keys_of, write_value
from gspo_mm.config import PolicyConfig
from gspo_mm.config.policy import LoraConfig
from gspo_mm.families.folder import HfFolder, read_hf
from gspo_mm.families.operations import Entry, StackExperts
from gspo_mm.families.table import family_of
from gspo_mm.families.write import (
    Change,
    Template,
    complete,
    copy_template,
    published,
    shard_names,
    template_of,
)
from gspo_mm.hf.headers import HfFolderError, read_json
from gspo_mm.hf.shard import ShardWriter, room_for
from gspo_mm.hf.tensors import held
from gspo_mm.policy.engine import prepare
from gspo_mm.policy.lora import add_adapters
from gspo_mm.policy.model import PolicyModel, padded_vocab
from gspo_mm.policy.parallel import Groups
from gspo_mm.policy.precision import DTYPES
from gspo_mm.policy.spec import has_fused_modules
from gspo_mm.policy.weights import Weights
from gspo_mm.runtime.disk import UncachedFile
from gspo_mm.runtime.loading import loading
from gspo_mm.serving.served import BLOCK, quantization_config
from gspo_mm.sync.quantize import Quantizer

_NAN = "{}: {} holds NaN or infinity, with which a model cannot be used; take an earlier checkpoint, or copy it again"
PART_BYTES = 2 * 10**9  # of a file, roughly; what a kill costs at most, once for each thread
_EXPERTS_MAPPED = 16  # of a file, at a time: its pages count as this process's memory
THREADS = min(8, 1 + (os.cpu_count() or 1))  # one more than can compute, as one waits for the disk


def hf_to_megatron(hf: Path, out: Path, *, experts_layout: str = "auto", check: bool = False) -> int:
    """Write `out` from a Hugging Face folder; returns the number of tensors.

    Weights keep their dtype, or become float32 where the folder mixes them. `out` appears when it is whole, and
    replaces one that was there. `check`: read it back and compare every bit; raises CheckpointError when one differs.
    """
    with loading():
        source = read_hf(hf, experts_layout)
        model = _Model(hf, source)

    def write(entries: list[Entry], path: Path, moved: Moved) -> list[Place]:
        # of this thread: sums that torch.load does not look at, and that take three quarters of torch.save's time
        set_crc32_options(False)
        places: list[Place] = []
        with UncachedFile(path) as file:
            for entry in entries:
                for name, value in model.of_hf(source, entry):
                    places += write_value(file, model.parts[name], value)
                    moved(value.nbytes)
        return places

    def finish(folder: Path, places: list[list[Place]]) -> None:
        shutil.rmtree(folder / "hf", ignore_errors=True)
        copy_template(source, folder / "hf")
        describe(model.chunk, folder / "policy", dict(zip(names, places, strict=True)))
        if check:
            _compare(model, Reader(folder / "policy"), source)

    groups = model.groups()
    names = [f"part-{number:05d}.distcp" for number in range(len(groups))]
    make(
        out,
        _parts([f"policy/{name}" for name in names], groups, model, write),
        finish,
        source=["to-megatron", str(hf.resolve()), files_of(hf), experts_layout],
        title=out.name,
        threads=THREADS,
    )
    return len(source.names())


def megatron_to_hf(
    checkpoint: Path,
    out: Path,
    *,
    hf: Path,
    experts_layout: str = "auto",
    fp8: bool = False,
    check: bool = False,
) -> int:
    """Write a Hugging Face folder from a converted folder or a run's checkpoint; returns the number of tensors.

    `hf`: the folder that it came from (`origin_of`), whose tokenizer and dtypes are taken over. `fp8`: the decoder's matrices
    in blocks with scales, as Qwen publishes its -FP8 folders. Raises CheckpointError.
    """
    policy = checkpoint / "policy"
    with loading():
        template = template_of(hf, experts_layout)
        model, reader = _Model(hf, template, adapters_of(policy)), Reader(policy)
    _refuse_unknown(model, reader)
    change = _quantizer(hf) if fp8 else None
    if fp8 and check:
        raise CheckpointError("--check compares every bit, and --fp8 rounds: leave one of them out")

    def write(entries: list[Entry], path: Path, moved: Moved) -> tuple[int, list[str]]:
        carried = list(template.carried()) if entries is groups[-1] else []
        tensors = len(carried) + sum(len(entry.hf) + 4 * len(entry.megatron) for entry in entries)
        with ShardWriter(path, room=room_for(tensors), cached=False) as file:
            for entry in entries:
                for name, parts in model.to_hf(reader, entry):
                    for last, written in published(template, name, parts, change):
                        file.add(last, written)
                moved(model.size(entry))
            for name, tensor in carried:
                file.add(name, [tensor])
            return file.finish()

    def finish(folder: Path, shards: list[Any]) -> None:
        complete(folder, template, dict(zip(names, shards, strict=True)))
        if fp8:
            _note_fp8(folder, hf, template)
        if check:
            exchanged = template.expert_shapes and template.published_experts == "exchanged"
            _compare(model, reader, read_hf(folder, "published" if exchanged else "auto"))

    groups = model.groups()
    names = shard_names(len(groups))
    make(
        out,
        _parts(names, groups, model, write),
        finish,
        source=[
            "to-hf",
            str(policy.resolve()),
            files_of(policy),
            str(hf.resolve()),
            files_of(hf),
            experts_layout,
            fp8,
        ],
        title=out.name,
        threads=THREADS,
    )
    return len(template.names())


class _Model:
    """The whole model without weights, and what is read of a folder or a checkpoint for it."""

    def __init__(self, hf: Path, source: HfFolder | Template, lora: LoraConfig | None = None) -> None:
        constants = family_of(hf).constants
        dtypes = {source.dtype(name) for name in source.names() if not name.endswith(constants)}
        dtype = next((name for name, dtype in DTYPES.items() if dtypes == {dtype}), "float32")
        config = PolicyConfig.model_validate({"dtype": dtype})
        family, config_of_model, plan = prepare(str(hf), config, seed=0)
        groups = Groups.current()
        with torch.device("meta"):
            self.chunk = PolicyModel(family, config_of_model, config, plan, groups)
        vocab = padded_vocab(config_of_model.get_text_config().vocab_size, plan)
        entries = family.weight_map(config_of_model, padded_vocab=vocab, fused=has_fused_modules())
        self._weights = Weights([self.chunk], entries, plan, groups)
        self._adapters = add_adapters([self.chunk], self._weights, lora, groups)[0] if lora else None
        self.parts = parts_of(self.chunk)
        self._names = {tensor: name for name, tensor in held(self.chunk).items()}

    def groups(self) -> list[list[Entry]]:
        """All entries of the weight map, in its order, by file."""
        groups: list[list[Entry]] = [[]]
        size = 0
        for entry in self._weights.entries:
            if groups[-1] and size + self.size(entry) > PART_BYTES:
                groups.append([])
                size = 0
            groups[-1].append(entry)
            size += self.size(entry)
        return groups

    def size(self, entry: Entry) -> int:
        return sum(self._weights[name].nbytes for name in entry.megatron)

    def of_hf(self, folder: HfFolder, entry: Entry) -> Iterator[tuple[str, torch.Tensor]]:
        """An entry's parameters by name. Raises HfFolderError for one that has another shape, or is not of numbers."""
        experts = range(len(entry.megatron)) if isinstance(entry.op, StackExperts) else [None]
        for expert in experts:
            if not (expert or 0) % _EXPERTS_MAPPED:
                folder.close()
            tensors = [folder.tensor(name, expert) for name in entry.hf]
            names = entry.megatron if expert is None else entry.megatron[expert : expert + 1]
            for name, whole in zip(names, entry.op.to_megatron(tensors), strict=True):
                target = self._weights[name]
                if whole.shape != target.shape:
                    raise HfFolderError(
                        f"{folder.path}: {' + '.join(entry.hf)} gives {tuple(whole.shape)} but {name} is "
                        f"{tuple(target.shape)}; config.json does not describe these weights"
                    )
                value = whole.contiguous()
                if _has_nan(value):
                    names_and_tensors = zip(entry.hf, tensors, strict=True)
                    wrong = next(name for name, tensor in names_and_tensors if _has_nan(tensor))
                    of_expert = "" if expert is None else f" of expert {expert}"
                    raise CheckpointError(_NAN.format(folder.path, wrong + of_expert))
                yield name, value.to(target.dtype)

    def to_hf(self, reader: Reader, entry: Entry) -> Iterator[tuple[str, Iterator[torch.Tensor]]]:
        """An entry's Hugging Face tensors, in parts along their first dim: of stacked experts one by one."""
        if isinstance(entry.op, StackExperts):
            values = (self._value(reader, entry, number) for number in range(len(entry.megatron)))
            yield entry.hf[0], (entry.op.to_hf([value])[0] for value in values)
            return
        values = [self._value(reader, entry, number) for number in range(len(entry.megatron))]
        for name, tensor in zip(entry.hf, entry.op.to_hf(values), strict=True):
            yield name, iter([tensor])

    def entries(self) -> list[Entry]:
        return self._weights.entries

    def _value(self, reader: Reader, entry: Entry, number: int) -> torch.Tensor:
        """A parameter of the checkpoint, adapters merged into it."""

        def read(parameter: torch.Tensor) -> torch.Tensor:
            return reader.value(self.parts[self._names[parameter]])

        parameter = self._weights[entry.megatron[number]]
        value = self._adapters.merged(parameter, read) if self._adapters else read(parameter)
        if _has_nan(value):
            raise CheckpointError(_NAN.format(reader.folder, entry.megatron[number]))
        return value


def _parts(names: list[str], groups: list[list[Entry]], model: _Model, write: Any) -> list[Part]:
    return [
        Part(file=name, size=sum(map(model.size, entries)), write=partial(write, entries))
        for name, entries in zip(names, groups, strict=True)
    ]


def _quantizer(hf: Path) -> Change:
    family = family_of(hf)
    config = family.load_config(str(hf))
    if not family.linear_layers(config):
        raise CheckpointError(
            f"--fp8: no weights of models of type {config.model_type} are written in FP8; leave it out"
        )
    for dim in family.linear_dims(config, attention=1, mlp=1, experts=1):
        if dim.size % BLOCK:
            raise CheckpointError(
                f"--fp8: {dim.name}={dim.size} of {hf} is not made of whole blocks of {BLOCK}, as transformers and SGLang "
                "expect it to be; leave it out"
            )
    return Quantizer(family, config).one


def _note_fp8(folder: Path, hf: Path, template: HfFolder | Template) -> None:
    """Have config.json say which weights are in FP8; those that are carried along are not."""
    family = family_of(hf)
    settings = read_json(folder / "config.json")
    said = quantization_config(family, family.load_config(str(hf)))
    carried = {name.rpartition(".")[0] for name, _ in template.carried()}
    said["modules_to_not_convert"] = sorted({*said["modules_to_not_convert"], *carried})
    text = json.dumps(settings | {"quantization_config": said}, indent=2)
    (folder / "config.json").write_text(text + "\n")


def _has_nan(tensor: torch.Tensor) -> bool:
    """Whether a number is NaN or infinite; many times faster than isfinite of each, for what is contiguous."""
    least, most = torch.aminmax(tensor)
    return not (least.isfinite() and most.isfinite())


def _refuse_unknown(model: _Model, reader: Reader) -> None:
    """Raise CheckpointError for tensors that the model does not have, and that the result would lack."""
    known = keys_of(model.parts.values())
    unknown = sorted(name for name in reader.names() - known if not name.startswith("optimizer."))
    if unknown:
        raise CheckpointError(
            f"{reader.folder} holds {unknown[0]}, which the model of the Hugging Face folder does not have; give --hf, the "
            "folder that the run started from"
        )


def _compare(model: _Model, reader: Reader, folder: HfFolder) -> None:
    """Raise CheckpointError unless every tensor of the checkpoint is, bit for bit, that of `folder`."""
    left = set(folder.names())
    for entry in model.entries():
        for name, parts in model.to_hf(reader, entry):
            left.discard(name)
            for number, part in enumerate(parts):
                expected = folder.tensor(name, number if isinstance(entry.op, StackExperts) else None)
                if not _same(part.to(expected.dtype), expected):
                    raise CheckpointError(
                        f"{name} is not what {folder.path} holds; the conversion is not to be used"
                    )
        folder.close()
    assert not left, f"{sorted(left)[:3]} of {folder.path} are in no entry of the weight map"


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit: 0 and -0 are not."""
    if a.shape != b.shape:
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))
