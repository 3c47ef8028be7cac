"""An answer ends at every token that the folder names as an end, and a reference response with the template's."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from gspo_mm.config import DataConfig
from gspo_mm.data.processor import Processor
from gspo_mm.hf.headers import HfFolderError

HEAD = "{%- for m in messages -%}<|im_start|>{{ m.role }}\n"
TEXT = "{%- if m.content is string -%}{{ m.content }}{%- else -%}{{ m.content[-1].text }}{%- endif -%}"
FOOT = "{%- endfor -%}{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"
CHATML = HEAD + TEXT + "{{ '<|im_end|>\n' }}" + FOOT


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model's folder without a word about the end anywhere but in its chat template."""
    path = Path(shutil.copytree(tiny_model, tmp_path / "hf"))
    (path / "generation_config.json").unlink()
    for file, change in (("tokenizer_config.json", _drop_eos), ("config.json", _drop_text_eos)):
        values = json.loads((path / file).read_text())
        change(values)
        (path / file).write_text(json.dumps(values))
    return path


def _drop_eos(values: dict[str, Any]) -> None:
    values.pop("eos_token")


def _drop_text_eos(values: dict[str, Any]) -> None:
    values["text_config"].pop("eos_token_id")


def write(folder: Path, file: str, **values: Any) -> None:
    path = folder / file
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | values))


def template(folder: Path, text: str) -> None:
    (folder / "chat_template.jinja").write_text(text)


def make(folder: Path) -> Processor:
    return Processor(str(folder), DataConfig(train=["x"]))


def ids(folder: Path, *tokens: str) -> list[int]:
    return [AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(token) for token in tokens]


def stops(folder: Path) -> list[str]:
    return [make(folder)._tokenizer.decode([i]) for i in make(folder).stop_token_ids]


END, DOCUMENT, BOX, QUAD = "<|im_end|>", "<|endoftext|>", "<|box_end|>", "<|quad_end|>"


def test_the_template_alone_is_enough(folder: Path) -> None:
    assert stops(folder) == [END]


def test_generation_config_joins_and_does_not_replace(folder: Path) -> None:
    """With <|endoftext|> alone, answers would run on past the end of their turn."""
    write(folder, "generation_config.json", eos_token_id=ids(folder, DOCUMENT)[0])
    assert stops(folder) == [END, DOCUMENT]
    assert make(folder).encode_response("7")[-1:] == ids(folder, END)


def test_every_place_counts(folder: Path) -> None:
    document, box, quad, vision = ids(folder, DOCUMENT, BOX, QUAD, "<|vision_pad|>")
    write(folder, "generation_config.json", eos_token_id=[document, box, document])
    write(folder, "config.json", eos_token_id=[quad])
    write(folder, "tokenizer_config.json", eos_token="<|vision_pad|>")
    assert set(make(folder).stop_token_ids) == {*ids(folder, END), document, box, quad, vision}
    assert len(make(folder).stop_token_ids) == 5


def test_the_text_config_counts_where_generation_config_says_nothing(folder: Path) -> None:
    """That is what transformers does."""
    document, box = ids(folder, DOCUMENT, BOX)
    config = json.loads((folder / "config.json").read_text())
    write(folder, "config.json", text_config=config["text_config"] | {"eos_token_id": box})
    assert stops(folder) == [END, BOX]
    write(folder, "generation_config.json", eos_token_id=document)
    assert stops(folder) == [END, DOCUMENT]
    write(folder, "generation_config.json", eos_token_id=None)
    assert stops(folder) == [END, BOX]


def test_the_order_of_generation_config_does_not_decide_what_a_response_ends_with(folder: Path) -> None:
    write(folder, "generation_config.json", eos_token_id=ids(folder, DOCUMENT, END))
    assert make(folder).encode_response("7")[-1:] == ids(folder, END)
    assert make(folder).encode_response("7").count(*ids(folder, DOCUMENT)) == 0


@pytest.mark.parametrize(
    ("text", "end"),
    [
        (CHATML, END),
        (HEAD + TEXT + "{{ '<|quad_end|>' }}" + FOOT, QUAD),
        (HEAD + TEXT + "{{ '\n<|box_end|>\n\n' }}" + FOOT, "\n" + BOX),
        (HEAD + TEXT + "{{ eos_token }}" + FOOT, DOCUMENT),
        (HEAD + TEXT + "{% if not loop.last %}<|im_end|>\n{% endif %}" + FOOT, END),
        (HEAD + "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}" + TEXT + "<|im_end|>" + FOOT, END),
        (HEAD + "{{ m.content[-1].text | trim | upper }}<|im_end|>\n" + FOOT, END),
        (HEAD + "{{ m.content + '<|im_end|>' }}" + FOOT, END),
        (HEAD + TEXT + "{% if m.role == 'user' %}<|box_end|>{% else %}<|quad_end|>{% endif %}" + FOOT, QUAD),
    ],
)  # fmt: skip
def test_the_end_is_what_the_template_writes_behind_an_answer(folder: Path, text: str, end: str) -> None:
    template(folder, text)
    write(folder, "tokenizer_config.json", eos_token=DOCUMENT)
    processor = make(folder)
    token = end.strip()
    assert list(processor.stop_token_ids[:1]) == ids(folder, token)
    assert set(processor.stop_token_ids) == {*ids(folder, token, DOCUMENT)}
    response = processor.encode_response("The answer is 7")
    assert processor._tokenizer.decode(response) == "The answer is 7" + end
    assert response[-1:] == ids(folder, token)


def test_an_end_that_is_no_special_token_is_one(folder: Path) -> None:
    template(folder, HEAD + TEXT + "</answer>" + FOOT)
    assert stops(folder) == ["</answer>"]


def test_an_end_in_plain_letters_that_generation_config_names_is_one(folder: Path) -> None:
    """No added token: a word of the vocabulary, as base models have."""
    template(folder, HEAD + TEXT + "]" + FOOT)
    write(folder, "generation_config.json", eos_token_id=ids(folder, "]")[0])
    assert stops(folder) == ["]"]


@pytest.mark.parametrize(
    "text",
    [HEAD + TEXT + FOOT, HEAD + TEXT + "\n" + FOOT, "{{ messages[0].content[0].text }}", "{{ raise() }}"],
)
def test_a_template_without_an_end_is_named_and_the_tokenizers_is_taken(
    folder: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    template(folder, text)
    write(folder, "tokenizer_config.json", eos_token=DOCUMENT)
    write(folder, "generation_config.json", eos_token_id=ids(folder, QUAD))
    with caplog.at_level(logging.WARNING):
        processor = make(folder)
    assert (
        "ends an answer with no token; supervised training ends it with <|endoftext|>, named by tokenizer"
        in caplog.text
    )
    assert list(processor.stop_token_ids) == ids(folder, DOCUMENT, QUAD)
    assert processor.encode_response("7")[-1:] == ids(folder, DOCUMENT)


def test_a_folder_that_names_no_end_is_refused(folder: Path) -> None:
    template(folder, HEAD + TEXT + "\n" + FOOT)
    with pytest.raises(HfFolderError, match=r"names a token that ends an answer; name one as eos_token"):
        make(folder)


def test_an_end_of_several_tokens_is_refused(folder: Path) -> None:
    template(folder, HEAD + TEXT + "\n### End\n" + FOOT)
    write(folder, "tokenizer_config.json", eos_token=DOCUMENT)
    with pytest.raises(
        HfFolderError, match=r"ends an answer with '### End', for which the tokenizer has no token"
    ):
        make(folder)


@pytest.mark.parametrize("wrong", [448, 10**6, -1])
def test_an_end_outside_the_vocabulary_is_named_and_stops_nothing(
    folder: Path, wrong: int, caplog: pytest.LogCaptureFixture
) -> None:
    write(folder, "generation_config.json", eos_token_id=[wrong, *ids(folder, DOCUMENT)])
    with caplog.at_level(logging.WARNING):
        assert stops(folder) == [END, DOCUMENT]
    assert f"eos_token_id {wrong} in generation_config.json is none of the model's 448 tokens" in caplog.text


@pytest.mark.parametrize("wrong", ["<|im_end|>", True, [[1]], 1.5])
def test_an_end_that_is_no_number_is_refused(folder: Path, wrong: Any) -> None:
    write(folder, "generation_config.json", eos_token_id=wrong)
    with pytest.raises(
        HfFolderError, match=r"eos_token_id in generation_config\.json is .*; it must be a token's number"
    ):
        make(folder)


def test_it_is_said_at_the_start(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    document, end = ids(folder, DOCUMENT, END)
    write(folder, "generation_config.json", eos_token_id=[document, end])
    with caplog.at_level(logging.INFO):
        make(folder)
    assert (
        f"an answer ends at <|im_end|> ({end}: chat template, generation_config.json) or "
        f"<|endoftext|> ({document}: generation_config.json); supervised training ends it with '<|im_end|>'"
    ) in caplog.text


# the rest of the processor's folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: (p / "chat_template.jinja").unlink(), r"has no chat template; copy chat_template\.jinja"),
        (lambda p: (p / "processor_config.json").unlink(), r"has no processor .*preprocessor_config\.json"),
        (lambda p: (p / "tokenizer.json").unlink(), r"has no processor that transformers can load"),
        (lambda p: (p / "tokenizer.json").write_text("{"), r"has no processor that transformers can load"),
        (lambda p: text_config(p, vocab_size=420), r"tokenizer has 423 tokens but the model only 420 rows .*embeddings\(423\)"),
        (lambda p: text_config(p, vocab_size=422), r"tokenizer has 423 tokens but the model only 422 rows"),
        (lambda p: write(p, "config.json", image_token_id=7), r"image_token_id=7 for <\|image_pad\|>, but .* has 419"),
        (lambda p: write(p, "config.json", vision_start_token_id=8), r"vision_start_token_id=8 for <\|vision_start\|>"),
        (lambda p: write(p, "config.json", video_token_id=419), r"video_token_id=419 for <\|video_pad\|>, but"),
        (lambda p: rename_token(p, "<|image_pad|>"), r"image_token_id=419 for <\|image_pad\|>, but the tokenizer has no such"),
        (lambda p: vision_config(p, patch_size=16), r"has patch_size=8 but vision_config\.patch_size of config\.json is 16"),
        (lambda p: vision_config(p, spatial_merge_size=1), r"has merge_size=2 but vision_config\.spatial_merge_size"),
    ],
)  # fmt: skip
def test_a_processor_that_is_not_the_models_is_refused(
    folder: Path, change: Callable[[Path], Any], message: str
) -> None:
    change(folder)
    with pytest.raises(HfFolderError, match=message):
        make(folder)


@pytest.mark.parametrize("rows", [423, 512])
def test_rows_without_tokens_are_fine(folder: Path, rows: int) -> None:
    text_config(folder, vocab_size=rows)
    make(folder)


def text_config(folder: Path, **values: Any) -> None:
    write(
        folder,
        "config.json",
        text_config=json.loads((folder / "config.json").read_text())["text_config"] | values,
    )


def vision_config(folder: Path, **values: Any) -> None:
    before = json.loads((folder / "config.json").read_text())["vision_config"]
    write(folder, "config.json", vision_config=before | values)


def rename_token(folder: Path, token: str) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_text((folder / file).read_text().replace(token, "<|other|>"))
