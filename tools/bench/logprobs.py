"""Log-probs from hidden states: chunked, without full logits, against the straightforward log_softmax."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    import torch

app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_show_locals=False)


def chunked(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    from gspo_mm.loss.logprobs import linear_logprobs

    return linear_logprobs(hidden, weight, targets, vocab=len(weight), temperature=0.9, entropy=True)[0]


def straightforward(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    import torch

    logprobs = ((hidden @ weight.T).float() / 0.9).log_softmax(-1)
    with torch.no_grad():
        _entropy = -(logprobs.exp() * logprobs).sum(-1)  # as training reports it
    return logprobs.gather(1, targets[:, None]).squeeze(1)


PATHS: dict[str, Callable[..., torch.Tensor]] = {"chunked": chunked, "log_softmax": straightforward}


def inputs(vocab: int, tokens: int, hidden: int, dtype: str) -> Any:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    states = torch.randn(tokens, hidden, generator=generator, device=device)
    weight = torch.randn(vocab, hidden, generator=generator, device=device) * hidden**-0.5
    targets = torch.randint(vocab, (tokens,), generator=generator, device=device)
    wanted = getattr(torch, dtype)
    return states.to(wanted).requires_grad_(), weight.to(wanted).requires_grad_(), targets


def step(path: str, tensors: Any) -> float:
    """Forward and backward once; seconds."""
    import torch

    for tensor in tensors[:2]:
        tensor.grad = None
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    PATHS[path](*tensors).sum().backward()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def extra_memory(path: str, sizes: tuple[Any, ...], threads: int, answer: Any) -> None:
    """Peak bytes above inputs and their gradients, in a process of its own."""
    import torch

    torch.set_num_threads(threads)
    tensors = inputs(*sizes)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(path, tensors)
        peak = torch.cuda.max_memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = _resident("VmRSS")
        step(path, tensors)
        peak = _resident("VmHWM")
    answer.send(peak - before - sum(t.grad.nbytes for t in tensors[:2]))


def _resident(key: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024


def measure_memory(path: str, sizes: tuple[Any, ...], threads: int) -> int:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=extra_memory, args=(path, sizes, threads, sender))
    process.start()
    process.join()
    return receiver.recv()


@app.command()
def main(
    vocab: Annotated[int, typer.Option(help="Rows of the output weight.", min=2)] = 151_936,
    tokens: Annotated[int, typer.Option(help="Trained tokens of a micro-batch.", min=1)] = 4096,
    hidden: Annotated[int, typer.Option(help="Hidden size; Qwen3-VL-30B-A3B has 2048.", min=1)] = 2048,
    repeat: Annotated[
        int, typer.Option(help="Timed steps of each, in turn, after one to warm up.", min=1)
    ] = 3,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    threads: Annotated[int, typer.Option(help="CPU threads; 0: all.", min=0)] = 0,
) -> None:
    """Time, peak extra memory and gradients of forward and backward, side by side; the last line is JSON.

    "Extra" is what comes on top of hidden states, weight and their gradients, measured in a process of its own
    (resident memory without CUDA, allocated memory with). Both also report the entropy, as a training step does.

    Example, small:

        python tools/bench/logprobs.py --tokens 512 --hidden 256
    """
    import torch

    threads = threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    sizes = (vocab, tokens, hidden, dtype)
    memory = {path: measure_memory(path, sizes, threads) for path in PATHS}
    tensors = inputs(*sizes)
    times: dict[str, list[float]] = {path: [] for path in PATHS}
    gradients: dict[str, list[torch.Tensor]] = {}
    for number in range(repeat + 1):
        for path in PATHS:
            seconds = step(path, tensors)
            if number:
                times[path].append(seconds)
            elif path not in gradients:
                gradients[path] = [t.grad for t in tensors[:2]]
    error = max(
        float((a - b).abs().max() / b.abs().max())
        for a, b in zip(gradients["chunked"], gradients["log_softmax"], strict=True)
    )
    medians = {path: median(values) for path, values in times.items()}
    table = Table(
        title=f"vocabulary {vocab:,}, {tokens:,} tokens, hidden {hidden}, {dtype}, {threads} threads"
    )
    for column in ("", "seconds (median)", "min .. max", "extra memory"):
        table.add_column(column, justify="right")
    for path, values in times.items():
        spread = f"{min(values):.2f} .. {max(values):.2f}"
        table.add_row(path, f"{medians[path]:.2f}", spread, f"{memory[path] / 2**30:.2f} GiB")
    Console().print(table)
    result = {
        "time_ratio": medians["chunked"] / medians["log_softmax"],
        "memory_ratio": memory["chunked"] / memory["log_softmax"],
        "max_rel_grad_difference": error,
    }
    typer.echo(json.dumps({key: float(f"{value:.4g}") for key, value in result.items()}))


if __name__ == "__main__":
    app()
