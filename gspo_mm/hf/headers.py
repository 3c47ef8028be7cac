"""The weight files of a Hugging Face folder, by their headers: no torch is imported and no tensor read.

A folder that transformers, SGLang and we could read as different weights is refused: an index beside a
`model.safetensors` of its own, an index that is not of its files, an adapter, weights in a quantised format other than FP8
blocks and MXFP4 (families/stored.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gspo_mm.types import GspoError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
FP8 = "F8_E4M3"
BYTES = "U8"

_FULL = "take the checkpoint in BF16 that it was made from"


class HfFolderError(GspoError, ValueError):
    """A Hugging Face folder that cannot be read, written or trained."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a file says about one tensor."""

    file: Path
    # safetensors' word, one of FLOATS, FP8 or BYTES
    dtype: str
    shape: tuple[int, ...]


def read_headers(path: Path) -> dict[str, Header]:
    """Headers of all tensors of a folder, file by file. Raises HfFolderError unless it is plain what the folder holds."""
    _refuse_other_formats(path)
    files, index = _locate(path)
    found: dict[str, Header] = {}
    for file in files:
        for name, header in _of_file(file):
            if name in found:
                raise HfFolderError(
                    f"{path} holds {name} twice, in {found[name].file.name} and {file.name}; "
                    "take away the one that is not to be used"
                )
            found[name] = header
    if not found:
        raise HfFolderError(f"{path}: {files[0].name} holds no tensors; download or copy it again")
    if index is not None:
        _compare_with_index(path, found, index)
    readable = (*FLOATS, FP8) if fp8_block(path) else (*FLOATS, BYTES) if is_mxfp4(path) else FLOATS
    for name, header in found.items():
        if header.dtype not in readable:
            raise HfFolderError(
                f"{path}: {name} is stored as {header.dtype}, and only {', '.join(FLOATS)} can be trained; {_FULL}"
            )
    return found


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises HfFolderError when it cannot be read or is something else."""
    try:
        value = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise HfFolderError(f"{file} cannot be read ({error}); download or copy it again") from None
    if not isinstance(value, dict):
        raise HfFolderError(f"{file} holds no JSON object; download or copy it again")
    return value


def fp8_block(path: Path) -> tuple[int, int] | None:
    """Size of the blocks that the folder's FP8 matrices have a scale for; None: it has no such matrices."""
    settings = read_json(path / "config.json").get("quantization_config")
    if not isinstance(settings, dict) or settings.get("quant_method") != "fp8":
        return None
    block = settings.get("weight_block_size")
    is_dynamic = settings.get("activation_scheme", "dynamic") == "dynamic"
    if (
        not is_dynamic
        or settings.get("fmt", "e4m3") != "e4m3"
        or not isinstance(block, list)
        or len(block) != 2
    ):
        return None
    return block[0], block[1]


def is_mxfp4(path: Path) -> bool:
    """Whether the folder's config.json says that matrices are in MXFP4."""
    settings = read_json(path / "config.json").get("quantization_config")
    return isinstance(settings, dict) and settings.get("quant_method") == "mxfp4"


def _refuse_other_formats(path: Path) -> None:
    if (path / "adapter_config.json").is_file() or (path / "adapter_model.safetensors").is_file():
        raise HfFolderError(
            f"{path} holds an adapter (adapter_config.json or adapter_model.safetensors), which is not read; merge it "
            "into its model (peft's merge_and_unload, then save_pretrained), or take it away where the weights "
            "beside it are to be used without it"
        )
    if fp8_block(path) or is_mxfp4(path):
        return
    config = read_json(path / "config.json")
    for settings in (config, config.get("text_config")):
        for key in ("quantization_config", "compression_config"):
            if isinstance(settings, dict) and settings.get(key):
                method = settings[key].get("quant_method", "?") if isinstance(settings[key], dict) else "?"
                raise HfFolderError(
                    f"{path} is quantised (quant_method={method} in the {key} of config.json), and such weights cannot "
                    f"be read or trained, but for FP8 in blocks with dynamic activations, and MXFP4; {_FULL}"
                )


def _locate(path: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The files that hold the weights, and the index (tensor name -> file name) where there is one."""
    single = path / SINGLE
    if not (path / INDEX).is_file():
        if not single.is_file():
            raise HfFolderError(f"{path} has no {SINGLE} and no {INDEX}; {_what_is_there(path)}")
        return [single], None
    index = read_json(path / INDEX).get("weight_map")
    if not index or not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
        raise HfFolderError(f"{path / INDEX} has no weight_map of names and files; download or copy it again")
    files = sorted(set(index.values()))
    others = [file for file in files if file != SINGLE]
    if others and single.is_file():
        newest = max((single, path / INDEX), key=lambda file: file.stat().st_mtime).name
        raise HfFolderError(
            f"{path} holds {SINGLE} and {INDEX}, which names {others[0]}: transformers would read the one, SGLang the "
            f"other; take away what is old, {SINGLE} or the index with its files ({newest} is the newer)"
        )
    for file in files:
        if not (path / file).is_file():
            raise HfFolderError(
                f"{path} is incomplete: {file} is named in {INDEX} but not there; download or copy it again"
            )
    return [path / file for file in files], index


def _what_is_there(path: Path) -> str:
    """Which weights a folder has instead of ours, and what to do."""
    if any(path.glob("*.safetensors")):
        return "its .safetensors files are nothing without an index: download or copy the folder again, whole"
    if any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth")):
        return (
            "its weights are pickles (.bin, .pt, .pth), which are not read: load them with transformers' from_pretrained "
            "and write them with save_pretrained"
        )
    if any(path.glob("*.gguf")):
        return f"GGUF files are not read; {_FULL}"
    return "download the weights first"


def _of_file(file: Path) -> Iterator[tuple[str, Header]]:
    from safetensors import SafetensorError, safe_open

    try:
        with file.open("rb") as start:
            begin = start.read(64)
        if begin.startswith(b"version https://git-lfs"):
            raise HfFolderError(
                f"{file} is a pointer of git-lfs and holds no weights; run `git lfs pull` in its folder"
            )
        with safe_open(file, framework="np") as handle:
            for name in handle.keys():  # noqa: SIM118 (it is no mapping)
                part = handle.get_slice(name)
                yield name, Header(file=file, dtype=part.get_dtype(), shape=tuple(part.get_shape()))
    except (OSError, SafetensorError) as error:
        reason = "it is empty" if file.is_file() and not file.stat().st_size else str(error)
        raise HfFolderError(
            f"{file} cannot be read ({reason}): it is cut off, damaged or no safetensors file; download or copy it again"
        ) from None


def _compare_with_index(path: Path, found: dict[str, Header], index: dict[str, str]) -> None:
    for name, file in index.items():
        if name not in found or found[name].file != path / file:
            raise HfFolderError(
                f"{path}: {INDEX} says that {name} is in {file}, which does not hold it; the index is of other files: "
                "download or copy the folder again, whole"
            )
    if unnamed := found.keys() - index.keys():
        name = min(unnamed)
        raise HfFolderError(
            f"{path}: {found[name].file.name} holds {name}, which {INDEX} does not name; the index is of other files: "
            "download or copy the folder again, whole"
        )
