"""Log-probs over a vocabulary split over gloo ranks equal those of one rank."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from gspo_mm.loss.logprobs import linear_logprobs
from tests.unit.test_logprobs import DIM, plain

VOCAB = 37


def inputs(rows: int, tokens: int) -> Any:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(tokens, DIM, generator=generator, dtype=torch.float64) * 3
    weight = torch.randn(rows, DIM, generator=generator, dtype=torch.float64)
    return hidden, weight, torch.randint(VOCAB, (tokens,), generator=generator)


def work(rank: int, size: int, folder: str, rows: int, tokens: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    hidden, weight, targets = inputs(rows * size, tokens)
    hidden.requires_grad_()
    own = weight[rank * rows : (rank + 1) * rows].clone().requires_grad_()
    found, entropy = linear_logprobs(
        hidden,
        own,
        targets,
        vocab=VOCAB,
        temperature=0.7,
        entropy=True,
        group=dist.group.WORLD,
        chunk_tokens=4,
    )
    (found * torch.arange(tokens)).sum().backward()
    part = hidden.grad.clone()
    dist.all_reduce(part)
    torch.save([found.detach(), entropy, part, own.grad], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("size", "rows", "tokens"), [(2, 19, 11), (2, 40, 11), (3, 13, 11), (2, 19, 0)], ids=str
)
def test_a_split_vocabulary_gives_the_whole_ones_results(
    size: int, rows: int, tokens: int, tmp_path: Path
) -> None:
    """With 40 rows each, the second rank holds padding only."""
    mp.spawn(work, args=(size, str(tmp_path), rows, tokens), nprocs=size)
    hidden, weight, targets = inputs(rows * size, tokens)
    hidden.requires_grad_()
    weight.requires_grad_()
    expected, expected_entropy = plain(hidden, weight, targets, 0.7)
    (expected * torch.arange(tokens)).sum().backward()
    of_rank = [torch.load(tmp_path / f"{rank}.pt") for rank in range(size)]
    for found, entropy, grad_hidden, _ in of_rank:
        torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-12)
        torch.testing.assert_close(entropy, expected_entropy.detach(), rtol=0, atol=1e-12)
        torch.testing.assert_close(grad_hidden, hidden.grad, rtol=0, atol=1e-11)
    torch.testing.assert_close(torch.cat([r[3] for r in of_rank]), weight.grad, rtol=0, atol=1e-11)
