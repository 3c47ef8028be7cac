"""What shares each rank gets, and how many bytes each sends for it. Run on ranks; every two make a machine.

torchrun --nproc-per-node 4 -m tests.parallel.parcels OUT
"""

import json
import os
import socket
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from gspo_mm.policy.parcels import passed_on
from gspo_mm.runtime.dist import Ranks
from gspo_mm.types import EncodedImage, Share, TrainSequence

DP_RANK_OF = [0, 1, 1, 0]  # each is computed on two machines
IMAGE = 100_000  # bytes of an image


def image(number: int) -> EncodedImage:
    data = bytes([number]) * IMAGE
    return EncodedImage(data=data, key=EncodedImage.key_of(data), width=number, height=1)


def share(numbers: Iterable[int]) -> Share:
    """A sequence a number, with an image of that number and one that all have."""
    members = tuple(
        TrainSequence(
            name=f"s{number}",
            token_ids=np.arange(number, number + 9, dtype=np.int32),
            trained=np.arange(9) >= 4,
            images=(image(number), image(0)),
            advantage=number / 3,
            rollout_logprobs=-np.arange(5, dtype=np.float32) if number % 2 else None,
        )
        for number in numbers
    )
    return Share(micro_batches=(members, ()), num_sequences=6, num_tokens=30)


SHARES = [[share([1, 2]), share([3])], [share([4, 5, 6]), share([])]]


def told(shares: list[Share]) -> list[object]:
    """All that is in them."""
    return [
        [
            [it.num_sequences, it.num_tokens, len(it.micro_batches)],
            [
                [
                    s.name,
                    s.token_ids.tolist(),
                    s.trained.tolist(),
                    [[i.key, EncodedImage.key_of(i.data), i.width, i.height] for i in s.images],
                    s.advantage,
                    None if s.rollout_logprobs is None else s.rollout_logprobs.tolist(),
                ]
                for members in it.micro_batches
                for s in members
            ],
        ]
        for it in shares
    ]


def main() -> None:
    out = Path(sys.argv[1])
    rank = int(os.environ["RANK"])
    socket.gethostname = lambda: f"machine-{rank // 2}"
    ranks = Ranks()
    sent = []
    send = ranks.send

    def counted(data: memoryview, to: int) -> None:
        sent.append((to, len(data)))
        send(data, to)

    ranks.send = counted
    mine = passed_on(SHARES if ranks.main else None, ranks, DP_RANK_OF)
    (out / f"{rank}.json").write_text(json.dumps({"shares": told(mine), "sent": sent}))


if __name__ == "__main__":
    main()
