"""Which Hugging Face folder a checkpoint came from, found without loading anything."""

from __future__ import annotations

from pathlib import Path

from gspo_mm.config import load_config
from gspo_mm.types import GspoError


def origin_of(checkpoint: Path, hf: Path | None) -> Path:
    """`hf` where it is given, else the checkpoint's own hf/, else model.path of the run that the checkpoint lies in.

    Raises GspoError when there is none.
    """
    if not (checkpoint / "policy").is_dir():
        raise GspoError(
            f"{checkpoint} has no policy/ in it; name a checkpoint such as RUN/checkpoints/step-00000100"
        )
    run = checkpoint.resolve().parent.parent / "config.yaml"
    found, said_by = hf, "--hf"
    if found is None and (checkpoint / "hf").is_dir():
        found, said_by = checkpoint / "hf", "the converted folder"
    if found is None and run.is_file():
        found, said_by = Path(load_config(run, any_world=True).model.path), f"model.path of {run}"
    if found is None:
        raise GspoError(
            f"{checkpoint} is in no run folder and has no hf/; give --hf, the Hugging Face folder that the run started from"
        )
    if not (found / "config.json").is_file():
        raise GspoError(
            f"{found} ({said_by}) has no config.json; give --hf, the Hugging Face folder that the run started from"
        )
    return found
