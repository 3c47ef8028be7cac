"""Which checkpoint of a run is meant, and which Hugging Face folder it came from, found without loading anything."""

from __future__ import annotations

from pathlib import Path

from gspo_mm.checkpoint.store import Store
from gspo_mm.config import load_config
from gspo_mm.types import GspoError


def checkpoint_of(source: Path, step: str | None) -> Path:
    """`source` itself, or where it is a run folder the checkpoint of `step`: a number, best or last, which is the default.

    Raises GspoError without one.
    """
    folder = source / "checkpoints"
    if not folder.is_dir():
        if step is not None:
            raise GspoError(f"{source} is no run folder (no checkpoints/ in it), so leave out --step")
        return source
    store = Store(folder, keep=1)
    if step is None or step == "last":
        if (newest := store.latest()) is None:
            raise GspoError(f"{folder} holds no whole checkpoint; let the run write one, or name another run")
        return newest
    if step == "best":
        if (best := store.best()) is None:
            raise GspoError(
                f"{folder} has no checkpoint whose held-out accuracy is known; set train.eval_every and checkpoint.keep_best"
            )
        return best
    if not step.isdecimal():
        raise GspoError(f"--step {step} is no step; give a number, best or last")
    if not store.is_whole(store.path(int(step))):
        there = ", ".join(str(number) for number, _ in store.whole())
        raise GspoError(f"{folder} has no whole checkpoint of step {step}; there are {there or 'none'}")
    return store.path(int(step))


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
