"""`gspo-mm status RUN`: where a run stands, by what it has written into its folder."""

from __future__ import annotations

import json
import re
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from statistics import fmean, median
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from gspo_mm.checkpoint.owner import owner_of
from gspo_mm.checkpoint.store import Store
from gspo_mm.observe.health import Health
from gspo_mm.observe.metrics import read_metrics
from gspo_mm.runtime import watchdog
from gspo_mm.serving.registry import registered
from gspo_mm.types import GspoError

_WINDOW = 20  # steps that a mean is taken over
_SILENT = 60.0  # seconds without a sign of life after which a run on another machine is doubted
_LOGGED = re.compile(r"^[\d-]+ [\d:,]+ (WARNING|ERROR) +\S+: (.*)", re.MULTILINE)

type Status = dict[str, Any]


def status_of(run: Path) -> Status:
    """All that is shown, by name; what is not known is left out. Raises GspoError when `run` is no run folder."""
    if not (run / "config.yaml").exists():
        raise GspoError(f"{run} is no run folder (no config.yaml in it)")
    lines = read_metrics(run)
    place = _json(run / watchdog.FILE)
    steps = place.get("steps") or yaml.safe_load((run / "config.yaml").read_text())["train"]["steps"]
    step = max([line["step"] for line in lines] + [place.get("step", 0)])
    found: Status = {"run": str(run), "state": "", "step": step, "steps": steps}
    found |= _life(run, place, ended=(run / "summary.json").exists() and step >= steps)
    found |= _speed(lines, left=steps - step) | _answers(lines)
    found["verdict"] = Health(lines).verdict()
    found |= _servers(run) | _checkpoint(run) | _log(run)
    hangs = sorted((run / watchdog.FOLDER).glob("*"))
    return found | ({"hang": str(hangs[-1])} if hangs else {})


def _life(run: Path, place: dict[str, Any], *, ended: bool) -> Status:
    owner, lives = owner_of(run)
    ago = time.time() - place["time"] if place else None
    if lives is None and ago is not None:  # it runs elsewhere, if it does
        lives = ago < _SILENT
    state = "ended" if ended else "stopped"
    if owner:
        state = "running" if lives else "silent" if lives is None else "died"
    found: Status = {"state": state}
    if owner:
        found["owner"] = owner
    if state == "running" and place:
        found |= {"phase": place.get("phase", ""), "progress_seconds_ago": max(0.0, ago or 0.0)}
    return found


def _speed(lines: list[Status], *, left: int) -> Status:
    times = [line["time/step"] for line in lines[-_WINDOW:] if "time/step" in line]
    if not times:
        return {}
    found: Status = {"seconds_per_step": median(times), "seconds_left": median(times) * max(left, 0)}
    rates = [line["tokens_per_second"] for line in lines[-_WINDOW:] if "tokens_per_second" in line]
    return found | ({"tokens_per_second": fmean(rates)} if rates else {})


def _answers(lines: list[Status]) -> Status:
    found: Status = {}
    for key, name in (("reward", "reward/mean"), ("accuracy", "accuracy"), ("loss", "sft/loss")):
        if values := [line[name] for line in lines if name in line]:
            found[key] = {"first": fmean(values[:_WINDOW]), "last": fmean(values[-_WINDOW:])}
    if held_out := [line["eval/accuracy"] for line in lines if "eval/accuracy" in line]:
        found["held_out"] = {"first": held_out[0], "best": max(held_out), "last": held_out[-1]}
    return found


def _servers(run: Path) -> Status:
    folder = run / "servers"
    try:
        servers = registered(folder) if folder.is_dir() else []
    except PermissionError:
        return {"servers": "another user's, who alone may look"}
    return {"servers": {server.name: server.reason or server.state for server in servers}} if servers else {}


def _checkpoint(run: Path) -> Status:
    latest = Store(run / "checkpoints", keep=1).latest()
    if latest is None:
        return {}
    return {
        "checkpoint": str(latest),
        "checkpoint_seconds_ago": max(0.0, time.time() - (latest / "state.json").stat().st_mtime),
    }


def _log(run: Path) -> Status:
    text = (run / "log.txt").read_text(errors="replace") if (run / "log.txt").exists() else ""
    said = _LOGGED.findall(text)
    errors = [message for level, message in said if level == "ERROR"]
    found: Status = {
        "restarts": text.count(f": resuming {run} after step "),
        "warnings": len(said) - len(errors),
        "errors": len(errors),
    }
    return found | ({"last_error": errors[-1]} if errors else {})


def _json(file: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        return json.loads(file.read_text())
    return {}


# --- for people

_COLOURS = {"running": "green", "ended": "green", "stopped": "yellow", "silent": "red", "died": "red"}
_MEANINGS = {
    "silent": f"it gives no sign of life for {_SILENT:g} s",
    "died": "it was killed; the same command continues it",
    "stopped": "the same command continues it",
}


def show(found: Status, console: Console) -> None:
    """One row for each thing that is known."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", justify="right")
    table.add_column(overflow="fold")
    for name, text in _rows(found):
        table.add_row(name, text)
    console.print(table)


def _rows(found: Status) -> list[tuple[str, str]]:
    state = found["state"]
    meaning = f" ({_MEANINGS[state]})" if state in _MEANINGS else ""
    rows = [("run", found["run"]), ("state", f"[{_COLOURS[state]}]{state}[/]{meaning}")]
    if "owner" in found:
        rows.append(("owner", found["owner"]))
    where = (
        f", {found['phase']}, progress {_span(found['progress_seconds_ago'])} ago" if "phase" in found else ""
    )
    rows.append(("step", f"{found['step']} of {found['steps']}{where}"))
    if "seconds_per_step" in found:
        speed = f"{found['seconds_per_step']:.3g} s a step"
        speed += f", {found['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in found else ""
        left = f", {_span(found['seconds_left'])} left" if state == "running" else ""
        rows.append(("speed", speed + left))
    for name in ("reward", "accuracy", "held_out", "loss"):
        if name in found:
            best = f", best {found[name]['best']:.4g}" if "best" in found[name] else ""
            text = f"{found[name]['first']:.4g} -> {found[name]['last']:.4g}{best}"
            rows.append((name.replace("_", "-"), text))
    rows.append(("verdict", found["verdict"]))
    if servers := found.get("servers"):
        shown = servers if isinstance(servers, str) else ", ".join(f"{n} {s}" for n, s in servers.items())
        rows.append(("servers", shown))
    kept = (
        f"{found['checkpoint']}, {_span(found['checkpoint_seconds_ago'])} ago"
        if "checkpoint" in found
        else "none"
    )
    rows += [("checkpoint", kept), ("restarts", str(found["restarts"]))]
    rows.append(("log", f"{found['warnings']} warnings, {found['errors']} errors"))
    if "last_error" in found:
        rows.append(("last error", f"[red]{found['last_error']}[/]"))
    if "hang" in found:
        rows.append(("stacks of a hang", found["hang"]))
    return rows


def _span(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
