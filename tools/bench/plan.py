"""How far `gspo-mm plan` is off: runs that others have published, planned; and the fit of its few efficiencies to them.

    python tools/bench/plan.py            errors with the efficiencies that ship
    python tools/bench/plan.py --fit      fits them again, then leaves out one job at a time (some minutes; needs scipy)

An error is planned / measured - 1. Leave-one-out: a run is planned with efficiencies that were fitted to the others alone, where
"others" leaves out every measurement of the same job, and of the same row in another release of its source.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from statistics import median
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from gspo_mm.plan.hardware import Efficiency
from gspo_mm.plan.step import plan_of
from tools.bench.planner.published import RUNS, Run

# what a fitted efficiency may be: outside of these it would mean something else. None of the runs decides dense_layer
BOUNDS = {
    "products": (0.2, 0.8),
    "experts": (0.1, 0.8),
    "decode": (0.3, 0.9),
    "links": (0.2, 0.9),
    "expert_layer": (1e-3, 1e-2),
    "decode_layer": (2e-5, 5e-4),
    "decode_step": (1e-3, 2e-2),
    "push": (0.1, 0.9),
    "push_start": (0.1, 3.0),
}
# errors beyond this count less: one run that is planned wrongly must not bend the rest
_ROBUST = 0.25


def main(fit: Annotated[bool, typer.Option(help="fit the efficiencies again")] = False) -> None:
    """Print the error of each run; with --fit the efficiencies, and errors of leaving each out."""
    shipped = Efficiency()
    best = fitted(RUNS, shipped) if fit else shipped
    left_out: dict[str, float] = {}
    for row in dict.fromkeys(map(row_of, RUNS)) if fit else ():
        alone = fitted([run for run in RUNS if row_of(run) != row], best)
        left_out |= {run.name: error_of(run, alone) for run in RUNS if row_of(run) == row}
    table = Table(box=None, pad_edge=False)
    for name in ("run", "measured", "planned", "error", "left out"):
        table.add_column(name, justify="left" if name == "run" else "right")
    for run in RUNS:
        error = error_of(run, best)
        alone = f"{left_out[run.name]:+.0%}" if run.name in left_out else ""
        mark = " *" if run.outside else ""
        planned = f"{run.measured * (1 + error):.4g}"
        table.add_row(run.name + mark, f"{run.measured:g} {run.unit}", planned, f"{error:+.0%}", alone)
    console = Console(width=120)
    console.print(table)
    inside = [run for run in RUNS if not run.outside]
    say(console, "fitted", [error_of(run, best) for run in inside])
    if left_out:
        say(console, "left out", [left_out[run.name] for run in inside])
        say(console, "left out, with those that are not fitted", list(left_out.values()))
    for why in dict.fromkeys(run.outside for run in RUNS if run.outside):
        console.print(f"* not fitted: {why}")
    console.print(", ".join(f"{name}={value:.3g}" for name, value in asdict(best).items()))


def say(console: Console, what: str, errors: Sequence[float]) -> None:
    sizes = [abs(error) for error in errors]
    console.print(
        f"{what}: median |error| {median(sizes):.0%}, largest {max(sizes):.0%}, above 50 %: {sum(s > 0.5 for s in sizes)} of "
        f"{len(sizes)}"
    )


def planned(run: Run, efficiency: Efficiency) -> float:
    return run.what(plan_of(replace(run.job, efficiency=efficiency)))


def error_of(run: Run, efficiency: Efficiency) -> float:
    return planned(run, efficiency) / run.measured - 1


def row_of(run: Run) -> str:
    """What measurements of one job have in common, and of the same row in another release of its source."""
    return run.name.split(", older")[0].split(":")[0]


def fitted(runs: Sequence[Run], start: Efficiency) -> Efficiency:
    """Least squares of log(planned / measured), robust, within BOUNDS."""
    from scipy.optimize import least_squares

    names = list(BOUNDS)
    inside = [run for run in runs if not run.outside]
    low, high = ([math.log(bound[i]) for bound in BOUNDS.values()] for i in (0, 1))

    def efficiency(logs: Sequence[float]) -> Efficiency:
        return replace(start, **{name: math.exp(value) for name, value in zip(names, logs, strict=True)})

    def errors(logs: Sequence[float]) -> list[float]:
        return [math.log(planned(run, efficiency(logs)) / run.measured) for run in inside]

    first = [
        min(max(math.log(getattr(start, name)), a + 1e-6), b - 1e-6)
        for name, a, b in zip(names, low, high, strict=True)
    ]
    found = least_squares(
        errors, first, bounds=(low, high), loss="soft_l1", f_scale=_ROBUST, diff_step=1e-3, ftol=1e-4
    )
    return efficiency(found.x)


if __name__ == "__main__":
    typer.run(main)
