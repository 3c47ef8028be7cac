"""Make a small random folder of a supported family, Qwen3-VL-MoE by default: weights, tokenizer, processor, chat template.

It is the real architecture at a millionth of the size, so that everything which runs on a 30B checkpoint runs
here in seconds on a CPU: DeepStack, interleaved multi-axis rotary positions, grouped queries, routed experts.

Two deliberate differences from a model that `from_config(...).save_pretrained(...)` writes: Qwen3-VL's fused experts are
stored in the published checkpoints' axis order (gate_up_proj [E, hidden, 2*inter], down_proj [E, inter, hidden]),
which serving engines insist on, and the tokenizer is a byte-level BPE of a few hundred tokens, one per digit, which
knows the words of the digit tasks, so that prompts and answers are short.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from tiny_families import KINDS, TEXT, TOWER, Family, Kind

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel

app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_show_locals=False)

# Qwen's special tokens, in Qwen's order.
SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
# One token each, yet ordinary text that decoding keeps, as Qwen3 does with <think> and <tool_call>.
PLAIN_TOKENS = ["<answer>", "</answer>"]

# ChatML with Qwen's way of marking images.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' -}}"
    "{%- if message.content is string -%}{{- message.content -}}"
    "{%- else -%}{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- elif part.type == 'video' -%}{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}"
    "{%- elif 'text' in part -%}{{- part.text -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

# What the tokenizer learns its words from; the questions are those of tools/make_shards.py.
CORPUS = [
    "user\n", "assistant\n", "system\n", "Which digit is this?", "What is the sum of the digits?", "How many 3s are there?",
    "Which digit is the largest?", "Where is the 7? Give its box in pixels.", "[12,40,35,63]", "What is in the image?",
    "The answer is ", "Answer with a number.", "Look at the picture and count the objects. Read the text in it.",
    "Which of the two pictures shows a larger digit? The first. The second. Yes. No. left right top bottom",
]  # fmt: skip
# What it learns besides for models that call tools.
TOOL_TOKENS = ["<tool_call>", "</tool_call>"]
TOOL_CORPUS = ['{"name":"zoom_in","arguments":{"box":[125,250,375,500]}}', "tool\n", "Error: "]

# Qwen2's split: letters with one leading sign or space, every digit by itself, runs of signs, line ends.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_tiny_model(
    out: Path,
    *,
    family: str = "qwen3_vl_moe",
    seed: int = 0,
    patch_size: int | None = None,
    image_size: int = 64,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    tools: bool = False,
    ends: float | None = None,
    force: bool = False,
) -> PreTrainedModel:
    """Write the model folder `out` and return the model (float32).

    `text` and `vision` override single values of the two halves of the config, for instance
    `text={"num_key_value_heads": 4}`; `text={"tie_word_embeddings": True}` ties the embeddings.
    `ends`: about how often the next token is to be the one that ends a turn, of embeddings that are not tied.
    Images of `image_size` squared keep their size; up to 4x as many pixels are admitted, fewer are scaled up.
    With `tools` the tokenizer knows the words of a call, too.

    Raises FileExistsError unless `force`, ValueError when the expert dims would make the layout ambiguous.
    """
    import torch
    import transformers
    from transformers import AutoProcessor, GenerationConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()

    if out.exists() and not force:
        raise FileExistsError(f"{out} exists; choose another folder or pass --force to replace it")
    kind = KINDS[Family(family)]
    tokenizer = _tokenizer(kind, tools=tools)
    config = _config(kind, tokenizer, patch_size, image_size, text or {}, vision or {})
    head = "ForConditionalGeneration" if kind.vision else "ForCausalLM"
    model_class = getattr(transformers, kind.classes + head)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).float().eval()
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):  # zeros would hide where it is left out
                torch.nn.init.normal_(buffer, std=0.1)
    stop = [tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")]
    if ends:
        _end_often(model, stop[0], ends)
    model.generation_config = GenerationConfig(eos_token_id=stop, pad_token_id=stop[1], bos_token_id=stop[1])

    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.save_pretrained(partial)
    if family == Family.QWEN3_VL_MOE:
        _store_published_layout(partial / "model.safetensors", config.text_config)
    processor = _processor(kind, tokenizer, config.vision_config, image_size) if kind.vision else tokenizer
    processor.save_pretrained(partial)
    AutoProcessor.from_pretrained(partial)  # the folder must load, or it is not published
    if out.exists():
        shutil.rmtree(out)
    partial.rename(out)
    return model


def _end_often(model: Any, token: int, share: float) -> None:
    """Let `token` be about that share of what is drawn, whatever it follows: all text has one feature, which it alone reads."""
    import torch

    tokens, head = (layer.weight for layer in (model.get_input_embeddings(), model.get_output_embeddings()))
    with torch.no_grad():
        # beside it all others are small, so that norms make of it the root of their number
        tokens[:, 0] = 30.0
        head[:, 0] = 0.0
        head[token] = 0.0
        head[token, 0] = math.log(share / (1 - share) * head.shape[0]) / math.sqrt(head.shape[1])


def train_tokenizer(special: list[str] = SPECIAL_TOKENS, *, tools: bool = False) -> Tokenizer:
    """Byte-level BPE: any text can be written, the words of the corpus are single tokens, digits never merge."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    corpus, plain = (CORPUS + TOOL_CORPUS, PLAIN_TOKENS + TOOL_TOKENS) if tools else (CORPUS, PLAIN_TOKENS)
    tokenizer.train_from_iterator(corpus * 2, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in plain])
    return tokenizer


def _tokenizer(kind: Kind, *, tools: bool) -> Any:
    from transformers import PreTrainedTokenizerFast

    special, template = [kind.name_of(token) for token in SPECIAL_TOKENS], CHAT_TEMPLATE
    for name in SPECIAL_TOKENS:
        template = template.replace(name, kind.name_of(name))
    return PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(special, tools=tools),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=special,
        chat_template=template,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


def _config(
    kind: Kind,
    tokenizer: Any,
    patch_size: int | None,
    image_size: int,
    text: dict[str, Any],
    vision: dict[str, Any],
) -> Any:
    import transformers

    config_class = getattr(transformers, f"{kind.classes}Config")
    token = tokenizer.convert_tokens_to_ids
    ends = {"eos": "<|im_end|>", "pad": "<|endoftext|>", "bos": "<|endoftext|>"}
    values = TEXT | {"vocab_size": -(-len(tokenizer) // 64) * 64} | kind.text
    values |= {f"{name}_token_id": token(end) for name, end in ends.items()} | text
    if "rope_parameters" not in text:
        values["rope_parameters"] = _rope(kind, values["head_dim"])
    if kind.vision is None:
        return config_class(**values, dtype="float32")
    if kind is KINDS[Family.QWEN2_5_VL]:
        del values["head_dim"]  # is hidden_size / num_attention_heads
    patch = vision.get("patch_size", patch_size or kind.patch_size)
    tower = TOWER | {"patch_size": patch, "out_hidden_size": values["hidden_size"]}
    config = config_class(
        text_config=values,
        vision_config=tower | kind.vision(patch, image_size) | vision,
        image_token_id=token(kind.name_of("<|image_pad|>")),
        video_token_id=token(kind.name_of("<|video_pad|>")),
        **{
            f"{kind.around}_{side}_token_id": token(kind.name_of(f"<|vision_{side}|>"))
            for side in ("start", "end")
        },
        tie_word_embeddings=text.get("tie_word_embeddings", False),
        dtype="float32",
    )
    # transformers does not write it, and SGLang reads it in layer_types' place
    if "linear_num_key_heads" in values:
        config.text_config.full_attention_interval = text.get("full_attention_interval", 4)
    return config


def _rope(kind: Kind, head_dim: int) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
    if kind.turned < 1:
        rope["partial_rotary_factor"] = kind.turned
    if kind.vision is None:
        return rope | kind.rope
    half = int(head_dim * kind.turned) // 2
    side = half * 5 // 16  # Qwen3-VL's split of 64 frequencies is 24 time, 20 height, 20 width
    rope["mrope_section"] = [half - 2 * side, side, side]
    return rope | ({"mrope_interleaved": True} if kind.interleaved else {})


def _processor(kind: Kind, tokenizer: Any, vision: Any, image_size: int) -> Any:
    import transformers

    shape = {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
    }
    pixels = image_size**2 * (vision.temporal_patch_size if kind.counts_frames else 1)
    half = [0.5, 0.5, 0.5]
    whole, video, image = (getattr(transformers, name) for name in kind.processor)
    return whole(
        image_processor=image(
            **shape,
            size={"shortest_edge": pixels // 4, "longest_edge": pixels * 4},
            image_mean=half,
            image_std=half,
        ),
        video_processor=video(**shape),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )


def _store_published_layout(path: Path, text: Any) -> None:
    """Rewrite fused experts as published checkpoints keep them (see the module docstring)."""
    from safetensors.torch import load_file, save_file

    hidden, inter = text.hidden_size, text.moe_intermediate_size
    if hidden in (inter, 2 * inter):
        raise ValueError(
            f"moe_intermediate_size={inter} with hidden_size={hidden} makes both expert layouts equal in shape, so no "
            "reader could tell them apart; use another moe_intermediate_size"
        )
    published = {"gate_up_proj": (hidden, 2 * inter), "down_proj": (inter, hidden)}
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if ".experts." in name and tuple(tensor.shape[1:]) != published[name.rsplit(".", 1)[-1]]:
            tensors[name] = tensor.transpose(1, 2).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


def _overrides(items: list[str]) -> dict[str, dict[str, Any]]:
    values: dict[str, dict[str, Any]] = {"text": {}, "vision": {}}
    for item in items:
        key, _, value = item.partition("=")
        half, _, name = key.partition(".")
        if half not in values or not name or not value:
            raise typer.BadParameter(f"{item!r} is not of the form text.KEY=JSON or vision.KEY=JSON")
        try:
            values[half][name] = json.loads(value)
        except json.JSONDecodeError:
            raise typer.BadParameter(f"the value in {item!r} is not JSON; quote text as '\"...\"'") from None
    return values


@app.command()
def main(
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not exist (or pass --force).")],
    family: Annotated[
        Family, typer.Option(help="With images or text alone; mixture of experts, or dense.")
    ] = Family.QWEN3_VL_MOE,
    seed: Annotated[
        int, typer.Option(help="Decides the random weights; the tokenizer does not depend on it.")
    ] = 0,
    patch_size: Annotated[
        int | None,
        typer.Option(
            help="Pixels per patch side (8; Qwen2.5-VL 14); 2x2 patches are one image token: 8 gives 16 for 64x64."
        ),
    ] = None,
    image_size: Annotated[int, typer.Option(help="Side of the images it is meant for, in pixels.")] = 64,
    tools: Annotated[bool, typer.Option("--tools", help="The words of a tool's call are tokens.")] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override a config value: text.KEY=JSON or vision.KEY=JSON."),
    ] = None,
    ends: Annotated[
        float | None, typer.Option(help="About how often the next token ends a turn, for answers in turns.")
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace the folder if it exists.")] = False,
) -> None:
    """Make a small random **Qwen3-VL-MoE** (or another family's) folder that `from_pretrained` loads.

    About 1.2 million parameters: 3 decoder layers 128 wide, 8 experts of which 2 are used, a 3-block vision tower 64
    wide feeding all three decoder layers (DeepStack). It knows nothing: teach it with `gspo-mm sft`.

    Examples:

        python tools/make_tiny_model.py models/tiny

        python tools/make_tiny_model.py models/tiny-dense --family qwen3_vl

        python tools/make_tiny_model.py models/tiny-text --family qwen3_moe

        python tools/make_tiny_model.py models/odd --set text.num_key_value_heads=1 --set text.num_experts=6
    """
    values = _overrides(set_ or [])
    try:
        model = make_tiny_model(
            out,
            family=family,
            seed=seed,
            patch_size=patch_size,
            image_size=image_size,
            tools=tools,
            ends=ends,
            force=force,
            **values,
        )
    except (FileExistsError, ValueError) as error:
        typer.secho(str(error), fg="red", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"{out}: {family} with {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    app()
