"""Weights in FP8 on a real server that holds them so: loaded, and looked at there.

FP8 products need a GPU (tests/gpu/test_fp8_push.py), so nothing is answered here. SGLang's weights checker turns every
layer's bytes and scales back into bfloat16 where it holds them, merged, which shows each block to be in its place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest
import torch

from gspo_mm.config import Config
from gspo_mm.data.processor import Processor
from gspo_mm.families.folder import read_hf
from gspo_mm.families.table import family_of
from gspo_mm.policy.engine import Policy
from gspo_mm.rollout.sglang import SGLangEngine
from gspo_mm.serving import host
from gspo_mm.serving.admin import call_all
from gspo_mm.serving.fleet import Fleet
from gspo_mm.serving.served import served
from gspo_mm.serving.server import ServerError
from gspo_mm.sync.checksums import checksum
from gspo_mm.sync.quantize import Quantizer, quantize
from gspo_mm.sync.sglang import SGLangPush
from tests.conftest import run_tool
from tests.sglang.conftest import MakeConfig
from tests.sglang.test_push import MODES, perturb


def layers_in(names: Iterable[str]) -> str:
    """What the names of a decoder's layers begin with, before their numbers."""
    return next(name for name in names if ".layers." in name).partition(".layers.")[0] + ".layers"


@pytest.fixture(scope="module", params=["qwen3_vl_moe", "qwen3_moe"])
def wide(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of dims that blocks fit into; dense models are in test_loading.py."""
    path = tmp_path_factory.mktemp("wide") / "model"
    dims = ["hidden_size=256", "head_dim=64", "moe_intermediate_size=384", "num_experts=4"]
    settings = [item for dim in dims for item in ("--set", f"text.{dim}")]
    run_tool("make_tiny_model.py", path, "--family", request.param, *settings)
    return path


def config_of(make_config: MakeConfig, wide: Path, *, mode: str = "disk", fp8: bool = True) -> Config:
    return make_config(
        "fp8",
        model={"path": str(wide)},
        policy={"dtype": "bfloat16"},
        rollout={"sglang": {"fp8": fp8}},
        sync={"mode": mode},
    )


@pytest.fixture(scope="module")
def fp8_config(make_config: MakeConfig, wide: Path) -> Config:
    return config_of(make_config, wide)


@pytest.fixture(scope="module")
def policy(fp8_config: Config) -> Policy:
    return Policy.from_hf(fp8_config.model.path, fp8_config.policy, seed=0, total_steps=10)


@pytest.fixture(scope="module")
def fp8_engine(fp8_config: Config) -> Iterator[SGLangEngine]:
    """Never asked for its health: that samples a token, and without a GPU nothing multiplies in FP8."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "_HEALTH_EVERY", 1e9)
        engine = SGLangEngine(
            fp8_config, Processor(fp8_config.model.path, fp8_config.data), Fleet(served(fp8_config))
        )
        yield engine
        engine.close()


def push_of(config: Config, policy: Policy, engine: SGLangEngine) -> SGLangPush:
    """Of a run that has just found its server."""
    for server in engine.fleet.up():
        engine.fleet.holding(server).audited = False
    return SGLangPush(config, policy, engine)


def held(engine: SGLangEngine) -> dict[str, str]:
    """Checksums of the layers that the server holds in FP8, turned back into bfloat16."""
    (server,) = engine.fleet.up()
    (reply,) = call_all([server], "/weights_checker", timeout=600, action="checksum", skip_tensor_list=[""])
    (rank,) = reply["ranks"]
    return rank["checksums"]


def merged(folder: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The same of transformers' tensors: quantized, turned back, and merged as SGLang does."""

    def back(tensor: torch.Tensor) -> torch.Tensor:
        weight, scales = quantize(tensor)
        each = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
        return (weight.float() * each).bfloat16()

    sums = {}
    for number in range(3):
        ours, server = f"{layers_in(folder)}.{number}", f"model.layers.{number}"
        q, k, v, o = (back(folder[f"{ours}.self_attn.{x}_proj.weight"]) for x in "qkvo")
        sums |= {f"{server}.self_attn.qkv_proj.weight": torch.cat([q, k, v])}
        sums |= {f"{server}.self_attn.o_proj.weight": o}
        for fused, name in (("gate_up_proj", "w13"), ("down_proj", "w2")):
            stack = torch.stack([back(one) for one in folder[f"{ours}.mlp.experts.{fused}"]])
            sums |= {f"{server}.mlp.experts.{name}_weight": stack}
    return {name: checksum(tensor) for name, tensor in sums.items()}


def test_a_server_without_a_trainer_gets_the_model_in_fp8(
    fp8_config: Config, fp8_engine: SGLangEngine, wide: Path
) -> None:
    before = held(fp8_engine)
    assert before.keys() == family_of(wide).linear_layers(family_of(wide).load_config(str(wide))).keys()
    SGLangPush.serve_folder(fp8_config, fp8_engine)
    assert held(fp8_engine) == merged(dict(read_hf(wide)))
    assert not set(before.values()) & set(held(fp8_engine).values()), "the server started with other weights"


@pytest.mark.parametrize("mode", MODES)
def test_every_block_of_the_policys_weights_is_in_its_place_after_each_push(
    mode: str, make_config: MakeConfig, wide: Path, policy: Policy, fp8_engine: SGLangEngine
) -> None:
    push = push_of(config_of(make_config, wide, mode=mode), policy, fp8_engine)
    for version in (1, 2):
        perturb(policy, seed=version + 10 * MODES.index(mode))
        wanted = merged(dict(policy.export()))
        assert not set(wanted.values()) & set(held(fp8_engine).values())
        push.push(version=version)
        assert held(fp8_engine) == wanted
    push.close()


def test_a_trainer_that_does_not_quantize_is_told(
    make_config: MakeConfig, wide: Path, policy: Policy, fp8_engine: SGLangEngine
) -> None:
    """The server takes bfloat16 for its FP8 layers and says nothing."""
    push = push_of(config_of(make_config, wide, mode="distributed", fp8=False), policy, fp8_engine)
    first = r"model\.layers\.0\.mlp\.experts\.w13_weight;"
    with pytest.raises(
        ServerError, match=f"not hold the same layers in FP8: 12 are held so only, first {first}"
    ):
        push.push(version=3)
    push.close()


def test_a_layer_that_only_the_server_quantizes_is_told(
    make_config: MakeConfig,
    wide: Path,
    policy: Policy,
    fp8_engine: SGLangEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = f"{layers_in(read_hf(wide).names())}.2.self_attn.o_proj.weight"
    init = Quantizer.__init__

    def without(self: Quantizer, *args: object) -> None:
        init(self, *args)  # pyright: ignore[reportArgumentType]
        self._quantized -= {name}

    monkeypatch.setattr(Quantizer, "__init__", without)
    push = push_of(config_of(make_config, wide, mode="tensor"), policy, fp8_engine)
    with pytest.raises(
        ServerError, match=r"1 are held so only, first model\.layers\.2\.self_attn\.o_proj\.weight"
    ):
        push.push(version=3)
    push.close()
