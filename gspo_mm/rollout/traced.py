"""One decoding step of a transformers model as a recorded list of operations, so that a token costs little of Python.

Half of a small model's step on a CPU is Python between the operations. torch.jit.trace records them in the time of a few
steps, where torch.compile takes minutes and a C++ compiler. torch 2.14 calls it deprecated: where it is gone, and on GPUs,
every step runs as it is written, with the same numbers.

A recording is used for a number of rows once it has agreed with the model itself on a step of another length than its own.
A mixture whose experts are gone through in a loop is not recorded: the loop's length is that of one step's choice.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from transformers.cache_utils import Cache, LinearAttentionLayer
from transformers.utils import logging

from gspo_mm.rollout.cache import Room, Running, Window, cache_argument


class Step(torch.nn.Module):
    """(token ids [B, 1], positions, mask [B, 1, 1, T], two states of every layer) -> logits [B, V].

    The states are keys and values, of whose T places the last is filled, or what linear attention changes in place.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.cache = cache_argument(model)
        self.kinds: list[type] = []

    def forward(
        self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, *states: torch.Tensor
    ) -> torch.Tensor:
        pairs = zip(self.kinds, states[::2], states[1::2], strict=True)
        return self.run(ids, positions, mask, Cache(layers=[kind(a, b) for kind, a, b in pairs]))

    def run(self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, cache: Any) -> torch.Tensor:
        inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": mask, self.cache: cache}
        outputs = self.model(**inputs, use_cache=True, logits_to_keep=1, return_dict=False)
        return outputs[0][:, -1].float()


class Decoder:
    """Decoding steps of `model`, recorded where that is possible."""

    def __init__(self, model: Any) -> None:
        self._step = Step(model)
        self._recorded: Any = None
        self._agreed: set[int] = set()  # numbers of rows
        loops = getattr(getattr(model, "config", None), "_experts_implementation", "") == "eager"
        self._records = model.device.type == "cpu" and hasattr(torch.jit, "trace") and not loops

    def __call__(
        self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, cache: Any
    ) -> torch.Tensor:
        """Logits [B, V] float32 of the next token; `cache` has one token more afterwards."""
        if not (self._records and all(type(layer) in _KINDS for layer in cache.layers)):
            return self._step.run(ids, positions, mask, cache)
        self._step.kinds = [_KINDS[type(layer)] for layer in cache.layers]
        inputs = (ids, positions, mask, *(state for layer in cache.layers for state in _states(layer)))
        if len(ids) in self._agreed:
            return self._recorded(*inputs)
        before = tuple(tensor.clone() for tensor in inputs)  # a step changes some of them
        logits_BV = self._step(*inputs)
        if self._recorded is None:
            self._recorded = _record(self._step, before)
        elif torch.allclose(self._recorded(*before), logits_BV, rtol=1e-5, atol=1e-5):
            self._agreed.add(len(ids))
        else:
            self._records = False
        return logits_BV


_KINDS: dict[type, type] = {Room: Window, LinearAttentionLayer: Running}


def _states(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(layer, Room):
        return layer.grow(1)
    return layer.conv_states[0], layer.recurrent_states[0]


def _record(step: Step, inputs: tuple[torch.Tensor, ...]) -> Any:
    """Quietly: torch says that it is deprecated and that sizes may become constants, transformers that it has no loss."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.jit.trace(step, inputs, check_trace=False)
    finally:
        logging.set_verbosity(level)
