"""Read a Hugging Face folder tensor by tensor.

A trap lies in fused experts. Published checkpoints of some families store `gate_up_proj` [E, D, 2F] and `down_proj` [E, F, D];
transformers keeps [E, 2F, D] and [E, D, F] in memory, and saves a model that it did not load in just that layout.
Everything inside the program is in transformers' in-memory layout; reading decides by dims against config.json and
refuses to guess. Experts that are stored one by one need no decision. write.py writes, stored.py reads what is in yet
other forms or has older names (names.py).

E experts, D hidden, F inner size of an expert.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch

from gspo_mm.families.stored import Stored
from gspo_mm.families.table import family_of
from gspo_mm.hf.headers import Header, HfFolderError

type Layout = Literal["published", "transformers"]

logger = logging.getLogger(__name__)

# tensors that older versions of transformers saved and that are computed: transformers ignores them too
_COMPUTED = re.compile(r"(^|\.)(rotary_emb|rotary_pos_emb)\.inv_freq$|(^|\.)position_ids$")

# tensors that tell what a folder is: what their names look like -> what that means and what to do
_TELLING = {
    r"\.lora_|^base_model\.": "it holds an adapter beside its model: merge it with peft's merge_and_unload and save again",
    r"\.weight_scale|\.qweight$|\.qzeros$|\.scales$|\.input_scale$|\.absmax$": "its weights are quantised: take the "
    "checkpoint in BF16 that it was made from",
}


def read_hf(path: str | Path, experts_layout: str = "auto") -> HfFolder:
    """Open a folder, after a look at the headers of its files: they hold the model of its config.json, and no more.

    `experts_layout`: auto, published or transformers (see the module docstring). Raises HfFolderError otherwise.
    """
    return HfFolder(Path(path), experts_layout)


class HfFolder:
    """The tensors of a folder in transformers' in-memory layout; iterating yields (name, tensor)."""

    def __init__(self, path: Path, experts_layout: str = "auto") -> None:
        self.path = path
        self._family = family_of(path)
        self._hf = self._family.load_config(str(path))
        vocab = self._hf.get_text_config().vocab_size
        self._entries = self._family.weight_map(self._hf, padded_vocab=vocab, fused=False)
        self._stored = Stored(path, self._entries, self._family.prefixes)
        self._carried = [name for name in self._stored.headers if name.startswith(self._family.carried)]
        self._headers = {
            n: header for n, header in self._stored.headers.items() if n not in set(self._carried)
        }
        self.expert_shapes = self._family.expert_shapes(self._hf)
        self.published_experts = self._family.published_experts
        self.prefixes = self._family.prefixes
        self.experts_layout: Layout | None = None
        self._compare_with_config()
        if self.expert_shapes:
            self.experts_layout = self._decide_layout(experts_layout)

    def names(self) -> list[str]:
        return list(self._headers)

    def tensor(self, name: str, expert: int | None = None) -> torch.Tensor:
        """One tensor, or of a fused one that expert as [1, ...]. Raises HfFolderError for a name that is not in the folder."""
        self._header(name)
        tensor = self._stored.tensor(name, expert)
        stacked = expert_kind(name) in self.expert_shapes and name not in self._stored.apart
        return tensor.transpose(1, 2) if stacked and self.experts_layout == "published" else tensor

    def close(self) -> None:
        """Give back the memory that files are mapped to; reading goes on as before."""
        self._stored.close()

    def dtype(self, name: str) -> torch.dtype:
        return _DTYPES[self._header(name).dtype]

    def __contains__(self, name: str) -> bool:
        return name in self._headers

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name in self._headers:
            yield name, self.tensor(name)

    def carried(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors that are in no weight map and are written again as they are."""
        for name in self._carried:
            yield name, self._stored.tensor(name)

    def _compare_with_config(self) -> None:
        """Names against the weight map, shapes against transformers' model.

        Tensors that need no training are left out of this folder: a tied output layer that is the embedding, and
        what is computed.
        """
        with torch.device("meta"):
            reference = self._family.auto_class(self._hf).from_config(self._hf)
        self._drop_tied(reference.all_tied_weights_keys)
        needed = {name for entry in self._entries for name in entry.hf}
        if computed := [name for name in self._headers.keys() - needed if _COMPUTED.search(name)]:
            logger.warning(
                "%s: %s is computed, not read, and not written again", self.path, ", ".join(sorted(computed))
            )
            self._headers = {name: header for name, header in self._headers.items() if name not in computed}
        self._refuse_other_names(needed)
        for name, tensor in reference.state_dict().items():
            self._refuse_other_shape(name, tuple(tensor.shape))

    def _drop_tied(self, tied: dict[str, str]) -> None:
        """`tied`: second name -> first name of tensors that config.json says are one."""
        for second, first in tied.items():
            if second not in self or first not in self:
                continue
            if not _equal(self.tensor(first), self.tensor(second)):
                raise HfFolderError(
                    f"{self.path}: config.json says tie_word_embeddings=true, but {second} differs from {first}; "
                    "transformers would use both and SGLang only the latter: set tie_word_embeddings=false in config.json "
                    f"where {second} was trained, or take it out of the files"
                )
            del self._headers[second]

    def _refuse_other_names(self, needed: set[str]) -> None:
        missing, extra = sorted(needed - self._headers.keys()), sorted(self._headers.keys() - needed)
        for pattern, meaning in _TELLING.items():
            if telling := next((name for name in extra if re.search(pattern, name)), None):
                raise HfFolderError(f"{self.path} holds {telling}: {meaning}")
        if missing == ["lm_head.weight"]:
            raise HfFolderError(
                f"{self.path}: config.json says tie_word_embeddings=false, but no file holds lm_head.weight; set it to "
                "true where output layer and embedding are one, or download the weights again"
            )
        if missing and extra:
            raise HfFolderError(
                f"{self.path} holds {_some(extra)}, where the model of its config.json has {_some(missing)}; "
                "use the names that transformers saves, or the config.json of these weights"
            )
        if missing:
            raise HfFolderError(
                f"{self.path} lacks {_some(missing)}, which the model of its config.json has; download or copy it again, "
                "or use the config.json of these weights"
            )
        if extra:
            raise HfFolderError(
                f"{self.path} holds {_some(extra)}, which the model of its config.json does not have and training would "
                "lose; take that out of the files, or use the config.json of these weights"
            )

    def _refuse_other_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self:
            return
        found = self._header(name).shape
        # of experts the other dims are compared when their layout is decided
        is_other = found[:1] != shape[:1] if expert_kind(name) in self.expert_shapes else found != shape
        if is_other:
            raise HfFolderError(
                f"{self.path}: {name} is {found} but config.json makes it {shape}; use the config.json of these weights"
            )

    def _header(self, name: str) -> Header:
        if name not in self._headers:
            raise HfFolderError(
                f"{self.path} has no tensor {name}; it is not the model that its config.json describes"
            )
        return self._headers[name]

    def _decide_layout(self, wanted: str) -> Layout | None:
        """From the shape of every fused expert tensor: none may contradict. One of the two kinds is never square.

        None where all are stored one by one.
        """
        found: set[Layout] = set()
        for name, header in self._headers.items():
            shape = self.expert_shapes.get(expert_kind(name))
            if shape is None:
                continue
            on_disk = header.shape[1:]
            if on_disk not in (shape, shape[::-1]):
                raise HfFolderError(
                    f"{self.path}: {name} is {on_disk} per expert but config.json makes it {shape[::-1]} or {shape}"
                )
            if shape[0] != shape[1] and name not in self._stored.apart:
                found.add("transformers" if on_disk == shape else "published")
        if len(found) > 1:
            raise HfFolderError(f"{self.path} mixes both layouts of fused experts; save it again")
        if not found:
            return None
        layout = found.pop()
        if wanted not in ("auto", layout):
            raise HfFolderError(
                f"model.experts_layout={wanted} but the experts in {self.path} are in the {layout} layout; use auto"
            )
        return layout


def expert_kind(name: str) -> str:
    """`gate_up_proj` or `down_proj` for a fused expert tensor, else something that is neither."""
    parent, _, last = name.rpartition(".")
    return last if parent.endswith(".experts") else ""


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same numbers, whatever their dtypes."""
    return a.shape == b.shape and all(
        torch.equal(x.double(), y.double()) for x, y in zip(a.split(4096), b.split(4096), strict=True)
    )


def _some(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
