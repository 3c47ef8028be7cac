"""Nothing of a test's policies stays for the next."""

import gc
from collections.abc import Iterator

import pytest
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher


@pytest.fixture(autouse=True)
def policies_end_with_their_test() -> Iterator[None]:
    """A dispatcher keeps its last probabilities; their graph has hooks that keep the policy, which no collector sees."""
    yield
    for each in gc.get_objects():
        if issubclass(type(each), MoETokenDispatcher):
            each.probs = None
    gc.collect()
