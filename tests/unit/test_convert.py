"""Conversions go on after a kill, refuse what is not right in one sentence, and leave nothing half-written."""

import fcntl
import json
import os
import re
import resource
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gspo_mm.checkpoint import convert, resumable
from gspo_mm.checkpoint.convert import hf_to_megatron, megatron_to_hf
from gspo_mm.checkpoint.distributed import load_weights
from gspo_mm.config import PolicyConfig
from gspo_mm.families.folder import read_hf
from gspo_mm.families.stored import dequantize
from gspo_mm.families.table import family_of
from gspo_mm.families.write import write_hf
from gspo_mm.policy.engine import Policy
from gspo_mm.serving.served import quantization_config
from gspo_mm.sync.quantize import quantize
from gspo_mm.types import GspoError
from tests.tiny_vl import IN_BLOCKS, made_of_blocks, save, tiny_vl
from tools.make_tiny_model import make_tiny_model

EXPERTS = "model.language_model.layers.1.mlp.experts.gate_up_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_vl(num_hidden_layers=3), tmp_path_factory.mktemp("model") / "hf", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def converted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("converted") / "megatron"
    hf_to_megatron(folder, path, check=True)
    return path


@pytest.fixture
def many_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "PART_BYTES", 60_000)
    monkeypatch.setattr(convert, "THREADS", 2)


type Convert = Callable[[Path], Any]


@pytest.fixture(params=["to megatron", "to hf"])
def conversion(request: pytest.FixtureRequest, folder: Path, converted: Path) -> Convert:
    if request.param == "to megatron":
        return lambda out: hf_to_megatron(folder, out, check=True)
    return lambda out: megatron_to_hf(converted, out, hf=converted / "hf", check=True)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@contextmanager
def interrupted(monkeypatch: pytest.MonkeyPatch, *, after: int) -> Iterator[None]:
    """The conversion in the block ends as by ctrl-C, when that many files are whole."""
    original, lock, done = resumable._write_one, threading.Lock(), []

    def write_one(*args: Any) -> Any:
        with lock:
            if len(done) == after:
                raise KeyboardInterrupt
            done.append(original(*args))
            return done[-1]

    with monkeypatch.context() as context:
        context.setattr(resumable, "_write_one", write_one)
        with pytest.raises(KeyboardInterrupt):
            yield


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "qwen3_5_moe", "qwen2_5_vl", "gpt_oss"])
def test_megatron_core_reads_what_is_written_of_a_family_and_it_comes_back(
    family: str, tmp_path: Path
) -> None:
    make_tiny_model(tmp_path / "hf", family=family)
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    config = PolicyConfig.model_validate({"dtype": "float32"})
    policy = Policy.from_hf(str(tmp_path / "hf"), config, seed=0, total_steps=1)
    before = read_hf(tmp_path / "hf")
    for chunk in policy.chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(torch.nan)
    load_weights(policy.chunks, tmp_path / "megatron" / "policy")
    assert [name for name, tensor in policy.export() if not torch.equal(tensor, before.tensor(name))] == []
    megatron_to_hf(tmp_path / "megatron", tmp_path / "out", hf=tmp_path / "megatron" / "hf")
    after = read_hf(tmp_path / "out")
    assert set(after.names()) == set(before.names())
    assert [name for name in before.names() if not torch.equal(after.tensor(name), before.tensor(name))] == []


@pytest.mark.usefixtures("many_files")
def test_what_is_whole_is_not_written_again_after_a_kill(
    conversion: Convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversion(tmp_path / "whole")
    rest = tmp_path / ".tmp-out"
    with interrupted(monkeypatch, after=3):
        conversion(tmp_path / "out")
    records = [path for path in sorted((rest / ".parts").iterdir()) if path.name != "source.json"]
    assert len(records) == 3
    files = [rest / re.sub(r"^policy-", "policy/", record.name.removesuffix(".json")) for record in records]
    files[0].write_bytes(files[0].read_bytes()[:-1])  # not what its record says
    kept = [file.stat().st_ino for file in files]
    conversion(tmp_path / "out")
    out = [tmp_path / "out" / file.relative_to(rest) for file in files]
    assert [file.stat().st_ino == inode for file, inode in zip(out, kept, strict=True)] == [False, True, True]
    found, expected = bytes_of(tmp_path / "out"), bytes_of(tmp_path / "whole")
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name] and name != "policy/.metadata"] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.usefixtures("many_files")
def test_the_rest_of_another_conversion_is_not_gone_on_with(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(folder, tmp_path / "source")
    with interrupted(monkeypatch, after=2):
        hf_to_megatron(source, tmp_path / "out")
    before = bytes_of(tmp_path / ".tmp-out")
    os.utime(source / "model.safetensors")
    with pytest.raises(
        GspoError, match=r"\.tmp-out is the unfinished rest of another conversion.*remove it, or"
    ):
        hf_to_megatron(source, tmp_path / "out")
    assert bytes_of(tmp_path / ".tmp-out") == before
    with (tmp_path / ".tmp-out" / ".parts" / "source.json").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(GspoError, match=r"another process writes .*\.tmp-out: wait for it"):
            hf_to_megatron(source, tmp_path / "out")


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_refuses_is_one_sentence_and_leaves_nothing(conversion: Convert, tmp_path: Path) -> None:
    sentence = (
        r"(part-00000\.distcp|model\.safetensors) cannot be read or written: file too large; raise the limit"
    )
    with files_of_at_most(100_000), pytest.raises(GspoError, match=sentence):
        conversion(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses_at_the_end_of_a_run_is_one_sentence_too(folder: Path, tmp_path: Path) -> None:
    with (
        files_of_at_most(100_000),
        pytest.raises(GspoError, match=r"out cannot be written: file too large; raise"),
    ):
        write_hf(tmp_path / "out", folder, read_hf(folder))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
def test_what_is_no_number_is_named(
    number: float, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(folder, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors[EXPERTS][2, 3, 5] = number
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GspoError, match=rf"{re.escape(EXPERTS)} of expert 2 holds NaN or infinity"):
        hf_to_megatron(source, tmp_path / "megatron")
    with monkeypatch.context() as context:
        context.setattr(convert, "_has_nan", lambda _: False)
        hf_to_megatron(source, tmp_path / "megatron")
    with pytest.raises(
        GspoError, match=r"layers\.1\.mlp\.experts\.local_experts\.2\.linear_fc1\.weight holds NaN"
    ):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "out", hf=source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["megatron", "source"]


def test_a_checkpoint_that_is_not_whole_is_named(converted: Path, folder: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(converted, tmp_path / "broken")
    file = broken / "policy" / "part-00000.distcp"
    content = file.read_bytes()
    for damage, sentence in (
        (content[:-100], r"part-00000\.distcp is cut off; take another checkpoint"),
        (content[:4] + bytes(400) + content[404:], r"part-00000\.distcp is damaged where \S+ is"),
        (None, r"part-00000\.distcp is not there; take another checkpoint"),
    ):
        file.unlink() if damage is None else file.write_bytes(damage)
        with pytest.raises(GspoError, match=sentence):
            megatron_to_hf(broken, tmp_path / "out", hf=folder)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_a_folder_that_is_not_whole_is_named(folder: Path, tmp_path: Path) -> None:
    source = shutil.copytree(folder, tmp_path / "source")
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(GspoError, match=r"model\.safetensors cannot be read .*download or copy it again"):
        hf_to_megatron(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_checkpoint_of_another_model_is_refused_by_a_tensor(converted: Path, tmp_path: Path) -> None:
    for layers, sentence in (
        (2, r"holds language\.decoder\.layers\.2\."),
        (4, r"language\.decoder\.layers\.3\.\S+ is not in it"),
    ):
        other = save(tiny_vl(num_hidden_layers=layers), tmp_path / f"hf{layers}", dtype=torch.bfloat16)
        with pytest.raises(GspoError, match=sentence):
            megatron_to_hf(converted, tmp_path / "out", hf=other)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".tmp-out").exists()


def in_fp8(kind: str, path: Path) -> tuple[Path, Path]:
    """A model's folder, and what `--fp8` makes of it."""
    folder = save(made_of_blocks(kind), path / "hf", dtype=torch.bfloat16)
    hf_to_megatron(folder, path / "megatron")
    megatron_to_hf(path / "megatron", path / "out", hf=folder, fp8=True)
    return folder, path / "out"


def test_fp8_is_written_as_it_is_read(tmp_path: Path) -> None:
    folder, out = in_fp8("mixture", tmp_path)
    said = json.loads((out / "config.json").read_text())["quantization_config"]
    family = family_of(folder)
    assert said == quantization_config(family, family.load_config(str(folder)))
    stored = load_file(out / "model.safetensors")
    assert EXPERTS not in stored
    before, after = read_hf(folder), read_hf(out)
    rounded = set()
    for name in before.names():
        if name.endswith("_proj") or (name.endswith("_proj.weight") and "language_model.layers" in name):
            rounded.add(name)
            matrices = before.tensor(name) if before.tensor(name).dim() == 3 else before.tensor(name)[None]
            halves = [m for matrix in matrices for m in (matrix.chunk(2) if "gate_up" in name else [matrix])]
            expected = torch.cat([dequantize(*quantize(half), (128, 128)) for half in halves])
            assert torch.equal(after.tensor(name).flatten(0, -2), expected), name
        else:
            assert torch.equal(after.tensor(name), before.tensor(name)), name
    assert len(rounded) == 4 * 6


@pytest.mark.parametrize("kind", [kind for kind in IN_BLOCKS if kind != "mixture"])
def test_transformers_reads_what_is_written_in_fp8(kind: str, tmp_path: Path) -> None:
    """Without a GPU it turns blocks back itself. It has no names for Qwen3-VL's experts in FP8, Qwen's own folders among them."""
    folder, out = in_fp8(kind, tmp_path)
    family = family_of(folder)
    auto = family.auto_class(family.load_config(str(folder)))
    model, report = auto.from_pretrained(out, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(report.values()), report
    found = model.state_dict()
    for name, tensor in read_hf(out):
        assert torch.equal(found[name].to(tensor.dtype), tensor), name


def test_fp8_in_blocks_that_are_not_whole_is_refused(converted: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(GspoError, match=r"--fp8: hidden_size=64 of .* is not made of whole blocks of 128"):
        megatron_to_hf(converted, tmp_path / "out", hf=folder, fp8=True)
