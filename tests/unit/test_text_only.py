"""Models that take text alone: no tower, no image processor, a tokenizer; and their folders' variants."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from gspo_mm.config import DataConfig, PolicyConfig
from gspo_mm.config.layout import PlanError
from gspo_mm.data.faults import BadSample
from gspo_mm.data.processor import Processor
from gspo_mm.families.folder import read_hf
from gspo_mm.families.table import family_of
from gspo_mm.families.write import write_hf
from gspo_mm.hf.headers import HfFolderError
from gspo_mm.policy.engine import Policy
from gspo_mm.rollout.embedded import EmbeddedEngine
from gspo_mm.types import EncodedPrompt, GspoError, Prompt, SamplingParams
from tests.tiny_vl import save, tiny_text
from tests.unit.test_processor import encoded, prompt
from tools.make_tiny_model import make_tiny_model

# as Qwen3's own template does it: a content that is no text counts for nothing
TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- set content = message.content if message.content is string else '' -%}"
    "{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "qwen3_moe"
    make_tiny_model(path, family="qwen3_moe")
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture(scope="module")
def processor(folder: Path) -> Processor:
    return Processor(str(folder), DataConfig(train=["x"]))


def configure(path: Path, **values: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | values))


# prompts


def test_parts_of_a_message_are_read_as_its_text(processor: Processor, folder: Path) -> None:
    whole = Prompt(key="k", messages=({"role": "user", "content": "1 + 2 ="},), images=(), answer=3, task="t")
    it = processor.encode(whole)
    theirs = AutoTokenizer.from_pretrained(folder)
    chat: Any = theirs.apply_chat_template(list(whole.messages), add_generation_prompt=True)
    assert it.token_ids == tuple(chat["input_ids"])
    assert "1 + 2 =" in theirs.decode(it.token_ids)
    assert processor.encode(prompt("1 + ", "2 =")).token_ids == it.token_ids
    assert it.pixel_values is None
    assert it.image_grid_thw is None


def test_tokens_without_rows_are_refused_and_rows_without_tokens_are_not(
    folder: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(folder, tmp_path / "hf"))
    tokens = len(AutoTokenizer.from_pretrained(folder))
    configure(path, vocab_size=tokens - 1)
    with pytest.raises(
        HfFolderError, match=rf"tokenizer has {tokens} tokens but the model only {tokens - 1} rows"
    ):
        Processor(str(path), DataConfig(train=["x"]))
    configure(path, vocab_size=tokens + 100)
    Processor(str(path), DataConfig(train=["x"]))


def test_positions_count_on_one_axis(processor: Processor) -> None:
    assert torch.equal(processor.positions(torch.tensor([5, 5, -1]), None), torch.tensor([[0, 1, 2]]))


def test_answers_end_where_the_template_ends_them(processor: Processor, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert processor.stop_token_ids[0] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert processor.encode_response("3")[-1] == processor.stop_token_ids[0]


def test_a_prompt_with_an_image_is_refused_by_the_models_type(processor: Processor) -> None:
    with pytest.raises(
        BadSample, match="image refused: it shows 1, and models of type qwen3_moe take text alone"
    ):
        processor.encode(prompt(encoded(64, 64), "1 + 2 ="))


def test_freezing_what_is_not_there_is_refused(folder: Path) -> None:
    config = PolicyConfig(dtype="float32", freeze=["vision", "projector"])
    with pytest.raises(PlanError, match="names vision and projector, and models of type qwen3_moe take text"):
        Policy.from_hf(str(folder), config, seed=0, total_steps=1)


# folders


@pytest.mark.parametrize("layout", ["published", "transformers"])
def test_experts_fused_or_one_by_one_are_read_and_written_one_by_one(layout: str, tmp_path: Path) -> None:
    model = tiny_text(num_hidden_layers=2)
    source = read_hf(save(model, tmp_path / "source", layout=layout))
    named = dict(model.named_parameters())
    assert dict.fromkeys(named, True) == {name: torch.equal(tensor, named[name]) for name, tensor in source}
    written = write_hf(tmp_path / "out", tmp_path / "source", source)
    stored = load_file(written / "model.safetensors")
    assert stored["model.layers.1.mlp.experts.7.down_proj.weight"].shape == (64, 24)
    assert not any(name.endswith(("gate_up_proj", "experts.down_proj")) for name in stored)
    loaded = dict(AutoModelForCausalLM.from_pretrained(written).named_parameters())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in named.items())
    for asked in ("auto", "published"):
        read_hf(written, asked)


@pytest.mark.parametrize(
    ("moe", "values", "message"),
    [
        (False, {"use_sliding_window": True, "max_window_layers": 1}, "use_sliding_window=True with layers"),
        (True, {"use_sliding_window": True, "sliding_window": 64}, "use_sliding_window=True with layers"),
        (
            False,
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}},
            "rope_type='yarn' is not supported",
        ),
        (True, {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type='linear'"),
        (
            True,
            {"num_experts_per_tok": 1, "norm_topk_prob": True},
            "num_experts_per_tok=1 .*single one leaves the router untrained; use a model with 2 to 8",
        ),
        (True, {"num_experts_per_tok": 9, "norm_topk_prob": False}, "use a model with 1 to 8 experts"),
        (False, {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
    ],
)  # fmt: skip
def test_a_variant_that_is_not_supported_is_refused_by_name(
    moe: bool, values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = save(tiny_text(moe=moe, num_hidden_layers=2), tmp_path / "hf")
    if "rope_scaling" in values:  # as folders of transformers 4 have it
        config = json.loads((path / "config.json").read_text())
        del config["rope_parameters"]
        (path / "config.json").write_text(json.dumps(config))
    configure(path, **values)
    with pytest.raises(HfFolderError, match=message):
        read_hf(path)


def test_a_window_that_is_off_is_no_window(tmp_path: Path) -> None:
    path = save(tiny_text(moe=False, num_hidden_layers=2), tmp_path / "hf")
    configure(path, use_sliding_window=False, sliding_window=64, max_window_layers=1)
    read_hf(path)


# servers


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mlp_only_layers": [1]}, "decoder layer 1 is dense"),
        ({"tied": True}, "tie_word_embeddings=true, which SGLang ignores in a mixture of experts of type qwen3_moe"),
    ],
)  # fmt: skip
def test_what_sglang_would_compute_in_another_way_is_refused(
    values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = save(tiny_text(num_hidden_layers=2, **values), tmp_path / "hf")
    family = family_of(path)
    with pytest.raises(GspoError, match=message):
        family.check_served(family.load_config(str(path)))


@pytest.mark.parametrize("moe", [True, False])
def test_what_servers_may_hold_in_fp8_is_every_matrix_of_the_decoder(moe: bool, tmp_path: Path) -> None:
    path = save(tiny_text(moe=moe, num_hidden_layers=2, tied=not moe), tmp_path / "hf")
    family = family_of(path)
    hf = family.load_config(str(path))
    family.check_served(hf)
    listed = {name for names in family.linear_layers(hf).values() for name in names}
    stored = load_file(path / "model.safetensors")
    matrices = {name for name, tensor in stored.items() if tensor.dim() == 2}
    kept = {name for name in matrices if name.endswith((".mlp.gate.weight", "embed_tokens.weight"))}
    assert listed == matrices - kept - {"lm_head.weight"}


# decoding


@pytest.mark.parametrize("records", [True, False])
def test_windows_and_sinks_are_decoded_as_transformers_computes_them(records: bool, tmp_path: Path) -> None:
    """Answers grow beyond the window of 8, of prompts that are shorter and longer than it."""
    model = make_tiny_model(tmp_path / "hf", family="gpt_oss")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "sinks")):
                parameter.normal_()
    processor = Processor(str(tmp_path / "hf"), DataConfig(train=["x"]))
    engine = EmbeddedEngine(str(tmp_path / "hf"), processor, dtype=torch.float32, max_batch=64)
    engine._decode._records = records
    generator = torch.Generator().manual_seed(0)
    engine.load_weights(model.named_parameters(), version=1)
    prompts = [
        EncodedPrompt(
            prompt=prompt(),
            token_ids=tuple(int(i) for i in torch.randint(300, (length,), generator=generator)),
            pixel_values=None,
            image_grid_thw=None,
        )
        for length in (3, 19, 8)
    ]
    sampling = SamplingParams(temperature=1.0, max_new_tokens=12)
    for encoded_prompt, answers in zip(
        prompts, engine.generate(prompts, group_size=2, sampling=sampling, seed=0), strict=True
    ):
        for answer in answers:
            ids = torch.tensor([[*encoded_prompt.token_ids, *answer.token_ids]])
            with torch.no_grad():
                logprobs = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
            rows = torch.arange(len(encoded_prompt.token_ids) - 1, ids.shape[1] - 1)
            expected = logprobs[rows, torch.tensor(answer.token_ids)]
            torch.testing.assert_close(torch.tensor(answer.logprobs), expected, rtol=0, atol=2e-5)
