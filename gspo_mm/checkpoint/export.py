"""The policy as a Hugging Face folder, at the end of a run."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from gspo_mm.config import ModelConfig
from gspo_mm.families.write import whole_folder, write_hf
from gspo_mm.hf.shard import ShardWriter, room_for
from gspo_mm.policy.engine import Policy


def export_hf(policy: Policy, path: Path, model: ModelConfig) -> None:
    """Write the policy as a Hugging Face folder like the one it started from. A collective; rank 0 writes."""
    policy.ranks.stream_to_main(
        policy.export(),
        lambda tensors: write_hf(path, model.path, tensors, experts_layout=model.experts_layout),
    )


def export_adapters(policy: Policy, path: Path, model: ModelConfig) -> None:
    """Write the adapters of `policy.lora` as a folder that peft loads beside the model. A collective; rank 0 writes."""
    lora = policy.config.lora
    assert lora is not None
    of_ranks = policy.ranks.gather([adapters.own_pairs() for adapters in policy.adapters])
    pairs = {key: pair for of_rank in of_ranks for found in of_rank for key, pair in found.items()}
    with policy.ranks.together():
        if not policy.ranks.main:
            return
        stacks: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        tensors: dict[str, torch.Tensor] = {}
        for key, pair in sorted(pairs.items(), key=lambda item: _in_order(item[0])):
            if key.endswith(".weight"):
                tensors |= _under(key.removesuffix(".weight"), *pair)
            else:
                stacks.setdefault(key.rpartition(".")[0], []).append(pair)
        for name, of_experts in stacks.items():
            # peft wraps both stacks of a layer's experts, one around the other: [E*r, in] and [out, r*E], experts innermost
            parent = name.rpartition(".")[0] + (".base_layer" if name.endswith("gate_up_proj") else "")
            a = torch.cat([a for a, _ in of_experts])
            b = torch.stack([b for _, b in of_experts], dim=-1).flatten(1)
            tensors |= _under(parent, a, b)
        settings = {
            "peft_type": "LORA",
            "base_model_name_or_path": model.path,
            "r": lora.rank,
            "lora_alpha": lora.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "inference_mode": True,
            "target_modules": [key.removesuffix(".weight") for key in pairs if key.endswith(".weight")],
            "target_parameters": list(stacks),
        }
        with whole_folder(path) as folder:
            with ShardWriter(folder / "adapter_model.safetensors", room=room_for(len(tensors))) as file:
                for name, tensor in tensors.items():
                    file.add(name, [tensor])
                file.finish()
            (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _under(module: str, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
    name = f"base_model.model.{module}"
    return {f"{name}.lora_A.weight": a.contiguous(), f"{name}.lora_B.weight": b.contiguous()}


def _in_order(key: str) -> tuple[str, int]:
    """Experts by number."""
    parent, _, last = key.rpartition(".")
    return (parent, int(last)) if last.isdigit() else (key, 0)
