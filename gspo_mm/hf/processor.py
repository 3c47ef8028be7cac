"""A Hugging Face folder's processor, compared with the model that it is to feed.

Of a model that takes text alone transformers' processor is the tokenizer itself.
"""

from __future__ import annotations

from typing import Any

from gspo_mm.hf.headers import HfFolderError

_SPECIAL = ("image_token", "video_token", "vision_start_token", "vision_end_token")
# the image processor's word -> that of config.json's vision_config
_PATCHES = {
    "patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "merge_size": "spatial_merge_size",
}


def load_processor(path: str) -> tuple[Any, Any]:
    """transformers' processor and config. Raises HfFolderError unless every token and patch it makes is the model's."""
    from transformers import AutoConfig, AutoProcessor

    try:
        processor: Any = AutoProcessor.from_pretrained(path)
        hf: Any = AutoConfig.from_pretrained(path)
    except Exception as error:  # transformers raises what the folder's files lead it into
        raise HfFolderError(
            f"{path} has no processor that transformers can load ({' '.join(str(error).split())[:200]}); copy tokenizer, "
            "preprocessor_config.json or processor_config.json, and chat template from the model that it was made from"
        ) from None
    if processor.chat_template is None:
        raise HfFolderError(
            f"{path} has no chat template; copy chat_template.jinja from the model that it was made from"
        )
    _check_tokens(path, processor, hf)
    for ours, theirs in _PATCHES.items() if hasattr(processor, "image_processor") else ():
        if not (hasattr(processor.image_processor, ours) and hasattr(hf.vision_config, theirs)):
            continue  # not every family has all of them
        made, wanted = getattr(processor.image_processor, ours), getattr(hf.vision_config, theirs)
        if made != wanted:
            raise HfFolderError(
                f"{path}: the image processor has {ours}={made} but vision_config.{theirs} of config.json is {wanted}; "
                "use preprocessor_config.json of this model"
            )
    return processor, hf


def size_within(own: Any, *, least: int | None, most: int | None, counted: int) -> dict[str, int]:
    """An image processor's `size` with other limits, in pixels of an image; None keeps its own.

    `counted`: how often it counts each of them.
    """
    limits = {"shortest_edge": least, "longest_edge": most}
    return dict(own) | {edge: pixels * counted for edge, pixels in limits.items() if pixels}


def tokenizer_of(processor: Any) -> Any:
    return getattr(processor, "tokenizer", processor)


def _check_tokens(path: str, processor: Any, hf: Any) -> None:
    vocab, rows = tokenizer_of(processor).get_vocab(), hf.get_text_config().vocab_size
    tokens = max(vocab.values()) + 1
    if tokens > rows:
        raise HfFolderError(
            f"{path}: the tokenizer has {tokens} tokens but the model only {rows} rows (vocab_size); use the "
            f"model's own tokenizer, or give it more rows with transformers' resize_token_embeddings({tokens}) and save it"
        )
    for name in _SPECIAL:
        if not (hasattr(processor, name) and hasattr(hf, f"{name}_id")):
            continue
        token, wanted = getattr(processor, name), getattr(hf, f"{name}_id")
        found = vocab.get(token)
        if found != wanted:
            has = "has no such token" if found is None else f"has {found}"
            raise HfFolderError(
                f"{path}: config.json says {name}_id={wanted} for {token}, but the tokenizer {has}; use the model's own "
                "tokenizer, or correct config.json"
            )
