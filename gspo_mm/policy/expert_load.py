"""How evenly tokens spread over experts, per layer: counted while the policy trains, reported once per step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter

from gspo_mm.policy.model import PolicyModel
from gspo_mm.policy.parallel import Groups


def routers(chunks: Iterable[PolicyModel]) -> Iterator[tuple[PolicyModel, int, torch.nn.Module]]:
    """The chunk, the layer of the whole model and the router of each mixture on this rank's stage.

    A router gives, for the rows of `chunk.real_rows` [N], weights and choices [N, experts].
    """
    for chunk in chunks:
        for layer in getattr(chunk.language.decoder, "layers", []):
            for module in layer.modules():
                if isinstance(module, TopKRouter):
                    yield chunk, layer.layer_number - 1, module


class ExpertLoad:
    """Counts the tokens that each expert of each mixture layer on this rank's stage is given; padding left out."""

    def __init__(self, chunks: list[PolicyModel]) -> None:
        self._counts: dict[int, torch.Tensor] = {}  # by layer of the whole model, [experts] int64
        for chunk, layer, router in routers(chunks):
            router.register_forward_hook(self._hook(chunk, layer))

    def _hook(self, chunk: PolicyModel, layer: int) -> Any:
        def count(router: torch.nn.Module, _: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
            if router.training:  # an update, not a look at log-probs
                chosen_NE = output[1].detach().view(len(chunk.real_rows), -1)[chunk.real_rows] != 0
                counts_E = chosen_NE.sum(0)
                self._counts[layer] = self._counts[layer] + counts_E if layer in self._counts else counts_E

        return count

    def take(self, groups: Groups) -> dict[str, float]:
        """Metrics since the last call, the same on every rank; none for a dense model. A collective.

        moe/load_max/<layer>  tokens of the busiest expert over those of an even spread: 1 is even, E / top-k the worst
        moe/load_max          the largest of these
        moe/unused            fraction of all experts that got no token
        """
        layers = sorted(self._counts)
        most: dict[int, float] = {}
        unused = experts = 0
        if layers:
            counts_LE = torch.stack([self._counts[layer] for layer in layers])
            dist.all_reduce(counts_LE, group=groups.tp_dp_cp)
            ratios = counts_LE.max(1).values / counts_LE.float().mean(1).clamp(min=1e-9)
            most = dict(zip(layers, ratios.tolist(), strict=True))
            unused, experts = int((counts_LE == 0).sum()), counts_LE.numel()
        self._counts.clear()
        of_stages: list[Any] = [(most, unused, experts)]
        if groups.pp.size() > 1:
            of_stages = [None] * groups.pp.size()
            dist.all_gather_object(of_stages, (most, unused, experts), group=groups.pp)
        ratios_of = {layer: ratio for of_stage, _, _ in of_stages for layer, ratio in of_stage.items()}
        if not ratios_of:
            return {}
        return {
            "moe/load_max": max(ratios_of.values()),
            "moe/unused": sum(u for _, u, _ in of_stages) / sum(e for _, _, e in of_stages),
            **{f"moe/load_max/{layer:02d}": ratio for layer, ratio in sorted(ratios_of.items())},
        }
