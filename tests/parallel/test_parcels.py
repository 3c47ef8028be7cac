"""Shares arrive whole on every rank, and an image's bytes once on every machine."""

import json
from pathlib import Path

from tests.forked import COMMANDS
from tests.parallel.parcels import DP_RANK_OF, IMAGE, SHARES, told


def test_every_rank_has_its_shares_and_each_machine_was_sent_each_image_once(tmp_path: Path) -> None:
    done = COMMANDS.run("-m", "tests.parallel.parcels", str(tmp_path), ranks=4)
    assert done.returncode == 0, done.stderr[-3000:]
    of_ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    for found, dp_rank in zip(of_ranks, DP_RANK_OF, strict=True):
        assert found["shares"] == json.loads(json.dumps(told(SHARES[dp_rank])))
    # from rank 0 to the other machine, and from the first rank of each machine to its neighbour
    assert [[to for to, _ in it["sent"]] for it in of_ranks] == [[2, 1], [], [3], []]
    images = [[size // IMAGE for _, size in it["sent"]] for it in of_ranks]
    assert images == [[7, 4], [], [4], []]  # all seven to the other machine; a rank is given what it shows
