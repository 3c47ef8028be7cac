"""Folders of Qwen2.5-VL: names old and new, flat configs, variants that are refused by name. Costs 6 s."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from gspo_mm.config import PolicyConfig, load_config
from gspo_mm.families.folder import read_hf
from gspo_mm.families.table import FAMILIES, family_of
from gspo_mm.families.write import copy_template, write_hf
from gspo_mm.hf.headers import HfFolderError
from gspo_mm.policy.engine import Policy
from gspo_mm.serving.served import quantization_config
from gspo_mm.serving.server import Server
from gspo_mm.sync.buckets import Bucket
from gspo_mm.sync.checksums import Checksums
from gspo_mm.sync.distributed import DistributedSender
from gspo_mm.sync.tensor import TensorSender
from gspo_mm.types import GspoError
from tests.tiny_vl import save, tiny_windows


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_windows(num_hidden_layers=2, tied=True)


@pytest.fixture
def folder(model: Any, tmp_path: Path) -> Path:
    return save(model, tmp_path / "hf")


def configure(path: Path, change: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))


def flat(config: dict[str, Any]) -> None:
    """As published folders have it, from before transformers nested the decoder's settings."""
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    config |= {k: v for k, v in text.items() if k not in ("model_type", "layer_types")}
    config |= {"rope_theta": rope["rope_theta"]}
    config |= {"rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}}


def rename(path: Path, change: Any) -> None:
    file = path / "model.safetensors"
    save_file({change(n): t for n, t in load_file(file).items()}, file, metadata={"format": "pt"})


def assert_equal(found: Any, model: Any) -> None:
    found, expected = dict(found), dict(model.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("nested", [True, False], ids=["nested config", "flat config"])
@pytest.mark.parametrize("by_template", [False, True], ids=["from the folder", "from a converted folder"])
@pytest.mark.parametrize("names", ["published", "transformers"])
def test_both_namings_are_read_and_the_published_one_is_written(
    names: str, by_template: bool, nested: bool, model: Any, folder: Path, tmp_path: Path
) -> None:
    prefixes = family_of(folder).prefixes
    if names == "transformers":
        rename(folder, prefixes.in_memory)
        assert "model.language_model.norm.weight" in load_file(folder / "model.safetensors")
    if not nested:
        configure(folder, flat)
    assert_equal(read_hf(folder), model)
    source = folder
    if by_template:
        source = tmp_path / "template"
        copy_template(read_hf(folder), source)
    out = write_hf(tmp_path / "out", source, read_hf(folder))
    written = load_file(out / "model.safetensors")
    assert {name.split(".")[0] for name in written} == {"model", "visual"}
    assert {"model.norm.weight", "model.layers.1.self_attn.q_proj.bias"} <= written.keys()
    assert_equal(AutoModelForImageTextToText.from_pretrained(out).named_parameters(), model)
    assert_equal(read_hf(out), model)


def test_a_tensor_under_both_names_is_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.language_model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(HfFolderError, match=r"under two names, .*norm\.weight and .*; take one out"):
        read_hf(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_act": "gelu"}, r"hidden_act='gelu' is not supported; use 'silu'"),
        ({"use_sliding_window": True, "max_window_layers": 1, "layer_types": None}, "use_sliding_window=True"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}, "'yarn'"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 4, 4]}}, "that sum to 8"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, r"mrope_section=\[16, 24, 24\] .*sum to 8"),
        ({"num_attention_heads": 5}, "hidden_size=64 is no multiple of num_attention_heads=5"),
    ],
    ids=str,
)  # fmt: skip
def test_variants_that_are_not_supported_are_refused_by_name(
    values: dict[str, Any], message: str, folder: Path
) -> None:
    configure(folder, lambda config: config["text_config"].update(values))
    with pytest.raises(HfFolderError, match=message):
        read_hf(folder)


@pytest.mark.parametrize(
    ("vision", "served"),
    [
        ({"patch_size": 14}, True),
        ({"patch_size": 16}, False),
        ({"patch_size": 14, "hidden_size": 1176}, False),
    ],
    ids=str,
)
def test_towers_that_sglang_would_leave_out_are_not_served(vision: dict[str, Any], served: bool) -> None:
    hf = tiny_windows().config
    for key, value in vision.items():
        setattr(hf.vision_config, key, value)
    family = FAMILIES["qwen2_5_vl"].family
    if served:
        family.check_served(hf)
        return
    with pytest.raises(GspoError, match=r"patches of \d+ numbers .*SGLang encodes patches of 1176 alone"):
        family.check_served(hf)


def test_servers_know_tensors_by_their_published_names(model: Any, folder: Path) -> None:
    family, stored = family_of(folder), load_file(folder / "model.safetensors")
    of_server = {family.whole_tensor(name) for name, _ in model.named_parameters()} - {None}
    assert of_server < stored.keys()
    assert {"model.norm.weight", "visual.merger.ln_q.weight", "visual.patch_embed.proj.weight"} < of_server
    kept = quantization_config(family, model.config)["modules_to_not_convert"]
    assert all(any(key.startswith(f"{name}.") for key in stored) for name in kept)
    listed = {name for names in family.linear_layers(model.config).values() for name in names}
    matrices = {n for n, t in model.named_parameters() if t.dim() == 2 and ".language_model.layers." in n}
    assert listed == matrices


class Listener:
    """Stands for servers and their process group: notes the names that it is sent."""

    servers = ()

    def __init__(self) -> None:
        self.names: list[str] = []

    def send(self, bucket: Bucket, _: Any) -> Listener:
        self.names += bucket.names
        return self

    def wait(self) -> None:
        pass

    def start_raw(self, _: str, requests: list[Any]) -> list[Any]:
        return requests

    def requests(self, _: TensorSender, bucket: Bucket, servers: Any) -> list[Any]:
        self.send(bucket, servers)
        return []


def test_servers_are_sent_published_names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(Path("configs/quickstart_sglang.yaml"), [f"model.path={folder}"], any_world=True)
    policy = Policy.from_hf(str(folder), PolicyConfig(dtype="float32"), seed=0, total_steps=1)
    over_groups = Listener()
    over_tensors: Any = Listener()
    monkeypatch.setattr(TensorSender, "_requests", lambda *arguments: over_tensors.requests(*arguments))
    TensorSender(config, policy)._send(policy.export(), over_tensors)
    sender = DistributedSender(config, policy)
    monkeypatch.setattr(sender, "_groups", {0: over_groups})
    sender._send_all([Server(name="s", generation="1", state="up")], Checksums(policy.family))
    stored = sorted(load_file(folder / "model.safetensors"))
    assert sorted(over_tensors.names) == sorted(over_groups.names) == stored
