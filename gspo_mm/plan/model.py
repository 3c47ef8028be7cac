"""What a config.json says of a model's size: parameters by part, and FLOPs, exactly as transformers builds it.

No torch and no transformers: both would take longer to import than the whole plan. Tests compare with transformers' models
and with the FLOP polynomials of the families (families/cost.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from gspo_mm.config.layout import ModelDims, PlanError
from gspo_mm.families.published import NAMES, PUBLISHED
from gspo_mm.families.table import FAMILIES
from gspo_mm.families.traits import Traits
from gspo_mm.hf.headers import read_json
from gspo_mm.plan.vision import Vision, vision_of

type Json = Mapping[str, Any]

# how ranks share a part: cut over tensor-parallel ranks, over expert- and expert-tensor-parallel ones, or whole on each
type Cut = Literal["tp", "experts", "whole"]


class UnplannedError(PlanError):
    """A model of a family whose sizes are not worked out here."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Parameters that are cut and frozen alike."""

    # embedding, attention, mlp, experts, router, norms, output, vision or projector
    name: str
    number: int
    cut: Cut
    # as policy.freeze names it
    group: Literal["language", "router", "vision", "projector"] = "language"
    # matrices of decoder layers, which FP8 recipes hold in FP8
    in_fp8: bool = False


@dataclass(frozen=True, kw_only=True)
class Linear:
    """Linear attention (gated delta net) of a layer."""

    key: int  # width of all keys
    value: int  # width of all values
    key_heads: int
    heads: int  # value heads
    key_head: int
    value_head: int
    kernel: int

    @property
    def matrices(self) -> int:
        """Rows of the projections in, and what the convolution sees."""
        return 2 * self.key + 2 * self.value + 2 * self.heads

    @property
    def state(self) -> int:
        """Numbers that a sequence keeps in this layer, whatever its length."""
        return self.heads * self.key_head * self.value_head


@dataclass(frozen=True, kw_only=True)
class Model:
    """A decoder with its tower."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    head: int
    vocab: int
    tied: bool
    dense_ffn: int
    experts: int
    chosen: int
    expert_ffn: int
    shared_ffn: int
    # per layer: whether it is a mixture of experts, whether its attention is linear, and how many tokens it sees (0: all)
    mixtures: tuple[bool, ...]
    linears: tuple[bool, ...]
    windows: tuple[int, ...]
    linear: Linear | None
    qkv_bias: bool
    output_bias: bool
    # of its family
    traits: Traits
    vision: Vision | None

    @property
    def layers(self) -> int:
        return len(self.mixtures)

    @property
    def queries(self) -> int:
        return self.heads * self.head

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head

    @property
    def dims(self) -> ModelDims:
        return ModelDims(
            hidden=self.hidden,
            num_layers=self.layers,
            num_heads=self.heads,
            num_kv_groups=self.kv_heads,
            num_experts=self.experts,
            expert_ffn=self.expert_ffn,
            deepstack_levels=self.vision.levels if self.vision else 0,
            linear_heads=self.linear.key_heads if self.linear else 0,
            spread_groups=self.kv_heads if self.traits.sinks else 0,
            expert_biases=self.traits.expert_biases,
        )

    def layer(self, number: int) -> list[Part]:
        """Parameters of a decoder layer."""
        return self._kinds[self.mixtures[number], self.linears[number]]

    @cached_property
    def _kinds(self) -> dict[tuple[bool, bool], list[Part]]:
        """Of each kind of layer: whether it is a mixture, and whether its attention is linear."""
        return {kind: self._layer(*kind) for kind in set(zip(self.mixtures, self.linears, strict=True))}

    def _layer(self, mixture: bool, linear: bool) -> list[Part]:
        parts = self._linear_attention() if linear else self._attention()
        if not mixture:
            mlp = 3 * self.hidden * self.dense_ffn
            return [*parts, Part(name="mlp", number=mlp, cut="tp", in_fp8=True)]
        experts = 3 * self.hidden * self.expert_ffn * self.experts
        parts += [
            Part(name="experts", number=experts, cut="experts", in_fp8=True),
            Part(name="router", number=self.hidden * self.experts, cut="whole", group="router"),
        ]
        if self.traits.expert_biases:
            biases = self.experts * (2 * self.expert_ffn + self.hidden)
            parts += [
                Part(name="norms", number=biases, cut="experts"),
                Part(name="norms", number=self.experts, cut="whole", group="router"),
            ]
        if self.shared_ffn:
            shared = 3 * self.hidden * self.shared_ffn
            gate = self.hidden if self.traits.shared_gate else 0
            parts += [
                Part(name="mlp", number=shared, cut="tp", in_fp8=True),
                Part(name="norms", number=gate, cut="whole"),
            ]
        return parts

    def _attention(self) -> list[Part]:
        inner = self.queries * (1 + self.traits.gated) + 2 * self.keys
        norms = 2 * self.hidden + (2 * self.head if self.traits.norms_queries else 0)
        matrices = self.hidden * inner + self.queries * self.hidden
        small = (inner if self.qkv_bias else 0) + (self.heads if self.traits.sinks else 0)
        return [
            Part(name="attention", number=matrices, cut="tp", in_fp8=True),
            Part(name="norms", number=small, cut="tp"),
            Part(name="norms", number=norms + (self.hidden if self.output_bias else 0), cut="whole"),
        ]

    def _linear_attention(self) -> list[Part]:
        it = self.linear
        assert it is not None
        matrices = self.hidden * it.matrices + it.value * self.hidden
        small = (2 * it.key + it.value) * it.kernel + 2 * it.heads
        return [
            Part(name="attention", number=matrices, cut="tp", in_fp8=True),
            Part(name="attention", number=small, cut="tp"),
            Part(name="norms", number=2 * self.hidden + it.value_head, cut="whole"),
        ]

    def embedding(self, vocab: int | None = None) -> Part:
        return Part(name="embedding", number=(vocab or self.vocab) * self.hidden, cut="tp")

    def output(self, vocab: int | None = None) -> list[Part]:
        """Last norm and output layer, which may be the embedding."""
        norm = Part(name="norms", number=self.hidden, cut="whole")
        if self.tied:
            return [norm]
        return [norm, Part(name="output", number=(vocab or self.vocab) * self.hidden, cut="tp")]

    def tower(self) -> list[Part]:
        if self.vision is None:
            return []
        return [
            Part(name="vision", number=self.vision.number, cut="whole", group="vision"),
            Part(name="projector", number=self.vision.projector, cut="whole", group="projector"),
        ]

    @cached_property
    def parameters(self) -> int:
        """Of the whole model, each once."""
        parts = [self.embedding(), *self.output(), *self.tower()]
        parts += [part for number in range(self.layers) for part in self.layer(number)]
        return sum(part.number for part in parts)

    # --- FLOPs of a forward pass, multiply-adds as 2, as families/cost.py counts them

    @cached_property
    def flops_token(self) -> int:
        """Per token: all matrices of the layers, of experts the chosen ones."""
        return sum(self.flops_layer(number) for number in range(self.layers))

    def flops_layer(self, number: int) -> int:
        found = 0
        for part in self.layer(number):
            if part.name == "experts":
                found += 2 * part.number * self.chosen // self.experts
            elif part.name != "norms":
                found += 2 * part.number
        if self.mixtures[number] and self.traits.shared_gate:
            found += 2 * self.hidden  # the shared expert's gate
        if self.linears[number]:
            assert self.linear is not None
            # two vectors of a number a head are not multiplied; a state is asked, corrected and read
            found += 2 * 3 * self.linear.state - 2 * 2 * self.linear.heads
        return found

    @property
    def flops_pair(self) -> int:
        """Per pair of a query and a key that it sees, in one layer."""
        return 4 * self.queries

    def seen(self, context: float) -> float:
        """Keys that a token with `context` tokens up to it sees, of all layers."""
        return sum(min(context, each) for each in self._reach)

    def pairs(self, length: float) -> float:
        """Pairs in a sequence, of all layers."""
        return sum(self.layer_pairs(number, length) for number in range(self.layers))

    def layer_pairs(self, number: int, length: float) -> float:
        beyond = max(0.0, length - self._reach[number])
        return (length**2 - beyond**2) / 2

    @cached_property
    def _reach(self) -> list[float]:
        """Tokens that each layer sees."""
        return [
            0.0 if linear else window or float("inf")
            for linear, window in zip(self.linears, self.windows, strict=True)
        ]

    @property
    def flops_row(self) -> int:
        """Per token whose log-prob is wanted."""
        return 2 * self.hidden * self.vocab

    def flops_image(self, tokens: float) -> float:
        """Of an image of so many image tokens."""
        return self.vision.flops(tokens) if self.vision and tokens else 0.0

    @property
    def active(self) -> int:
        """Parameters that a token of text meets."""
        idle = sum(self.mixtures) * 3 * self.hidden * self.expert_ffn * (self.experts - self.chosen)
        return self.parameters - idle - sum(part.number for part in self.tower())


def read_model(path: str) -> Model:
    """The model of a folder's config.json or, where there is none, of the published one that is called like the folder.

    Raises PlanError where neither is there, and for a family that cannot be planned.
    """
    file = Path(path) / "config.json"
    if file.is_file():
        return model_of(read_json(file), name=Path(path).name, source=str(file))
    if known := PUBLISHED.get(Path(path).name.lower().removesuffix("-fp8")):
        return model_of(known, name=Path(path).name, source=path)
    raise PlanError(
        f"model.path={path} has no config.json, and no model of that name is at hand; put its config.json there, or set "
        f"model.path to one of {', '.join(sorted(NAMES))}"
    )


def model_of(config: Json, *, name: str, source: str) -> Model:
    """From the contents of a config.json. Raises PlanError naming a key that is missing."""
    row = FAMILIES.get(config.get("model_type", ""))
    if row is None or row.traits is None:
        raise UnplannedError(
            f"{source}: model_type={config.get('model_type')!r} cannot be planned; those that can are "
            f"{', '.join(kind for kind, row in FAMILIES.items() if row.traits)}"
        )
    text: Json = config.get("text_config") or config
    try:
        return _read(config, text, row.traits, name)
    except KeyError as missing:
        raise PlanError(
            f"{source} has no {missing.args[0]}, which a plan needs; take the model's own config.json"
        ) from None


def _read(config: Json, text: Json, traits: Traits, name: str) -> Model:
    mixtures = _mixtures(text) if traits.mixture else (False,) * text["num_hidden_layers"]
    layers, experts = len(mixtures), _experts(text) if any(mixtures) else 0
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    biases = bool(text.get("attention_bias"))
    seen = config.get("vision_config")
    return Model(
        name=name,
        hidden=text["hidden_size"],
        heads=text["num_attention_heads"],
        kv_heads=text["num_key_value_heads"],
        head=text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"],
        vocab=text["vocab_size"],
        tied=bool(tied),
        dense_ffn=text.get("intermediate_size") or 0,
        experts=experts,
        chosen=text["num_experts_per_tok"] if experts else 0,
        expert_ffn=text[traits.expert_width] if experts else 0,
        shared_ffn=_shared(text) if experts else 0,
        mixtures=mixtures,
        linears=_linears(text, layers) if traits.linear else (False,) * layers,
        windows=_windows(text, layers),
        linear=_linear(text) if traits.linear else None,
        qkv_bias=biases if traits.qkv_bias is None else traits.qkv_bias,
        output_bias=biases if traits.output_bias is None else traits.output_bias,
        traits=traits,
        vision=vision_of(seen, traits.tower, text["hidden_size"]) if seen else None,
    )


def _windows(text: Json, layers: int) -> tuple[int, ...]:
    """Of each layer how many tokens it sees; 0: all."""
    kinds = text.get("layer_types") or ("",) * layers
    return tuple(text["sliding_window"] if kind == "sliding_attention" else 0 for kind in kinds)


def _linears(text: Json, layers: int) -> tuple[bool, ...]:
    if kinds := text.get("layer_types"):
        return tuple(kind == "linear_attention" for kind in kinds)
    every = text.get("full_attention_interval", 4)
    return tuple(bool((i + 1) % every) for i in range(layers))


def _linear(text: Json) -> Linear:
    keys, values = text["linear_num_key_heads"], text["linear_num_value_heads"]
    return Linear(
        key=keys * text["linear_key_head_dim"],
        value=values * text["linear_value_head_dim"],
        key_heads=keys,
        heads=values,
        key_head=text["linear_key_head_dim"],
        value_head=text["linear_value_head_dim"],
        kernel=text["linear_conv_kernel_dim"],
    )


def _mixtures(text: Json) -> tuple[bool, ...]:
    """Of each layer whether it has experts."""
    first, every = text.get("first_k_dense_replace", 0), text.get("decoder_sparse_step", 1)
    dense = set(text.get("mlp_only_layers") or ())
    return tuple(
        number >= first and number not in dense and (number + 1) % every == 0
        for number in range(text["num_hidden_layers"])
    )


def _experts(text: Json) -> int:
    """Published folders and transformers have other names for it."""
    names = ("num_experts", "n_routed_experts", "num_local_experts")
    return next((text[name] for name in names if name in text), 0) or text[names[0]]


def _shared(text: Json) -> int:
    """Inner size of the experts that every token passes."""
    if "n_shared_experts" in text:
        return text["n_shared_experts"] * text["moe_intermediate_size"]
    return text.get("shared_expert_intermediate_size", 0)
