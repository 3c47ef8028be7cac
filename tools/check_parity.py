"""Compare our policy with transformers' own model, in float32, for any Hugging Face folder of a supported family.

Both compute log-probs and parameter gradients of the same random prompts: ragged, with several images of different
sizes, with the same image twice, and text only. transformers runs each sequence by itself on one rank; we run them
packed, on as many ranks as the parallel layout has.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

    from gspo_mm.policy.engine import Policy
    from gspo_mm.types import MicroBatch

_ROUNDING = 1e-6  # of the largest gradient of all: what is smaller is 0

app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_show_locals=False)


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far two implementations of one model are apart."""

    max_abs_logprob: float  # nats, over all response tokens
    max_rel_grad: (
        float  # over parameters: largest difference by the largest reference gradient of that parameter
    )
    worst_grad: str  # the parameter that gave max_rel_grad
    roundtrip_exact: bool  # Hugging Face -> policy -> Hugging Face changes no bit and misses no tensor


def compare(
    policy: Policy,
    reference: Any,
    batches: list[MicroBatch],
    *,
    temperature: float = 1.0,
    given: list[MicroBatch] | None = None,
) -> Parity:
    """Run both on `batches`, dealt over the data-parallel ranks. A collective of the policy's ranks.

    `given`: the same sequences, packed otherwise, for the policy alone. `policy` must have been loaded from the weights of
    `reference`, which only rank 0 has to have; the others give None. They get the same answer.
    """
    import torch

    from gspo_mm.hf.tensors import held

    weights = [
        torch.randn(b.num_response_tokens, generator=torch.Generator().manual_seed(i))
        for i, b in enumerate(batches)  # of each token in the common loss
    ]
    mine = range(policy.groups.dp.rank(), len(batches), policy.plan.dp)
    ours: dict[int, torch.Tensor] = {}

    def loss_fn(index: int, logprobs_R: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        ours[mine[index]] = logprobs_R.detach().cpu()
        return (logprobs_R * weights[mine[index]].to(logprobs_R.device)).sum(), {}

    policy.backward([(given or batches)[i] for i in mine], loss_fn, temperature=temperature)
    everything = {i: lp for of_rank in policy.ranks.gather(ours) for i, lp in of_rank.items()}
    parities: list[Parity] = []

    def measure(gradients: Iterator[tuple[str, torch.Tensor]]) -> None:
        expected = [reference_logprobs(reference, b, temperature) for b in batches]
        reference.zero_grad()
        torch.stack(
            [(e * w.to(e.device)).sum() for e, w in zip(expected, weights, strict=True)]
        ).sum().backward()
        named = dict(reference.named_parameters())
        largest = max(float(p.grad.abs().max()) for p in named.values() if p.grad is not None)
        errors = {name: _relative(g, named[name].grad, largest) for name, g in gradients if name in named}
        worst = max(errors, key=lambda name: errors[name])
        gap = max(float((everything[i] - e.detach().cpu()).abs().max()) for i, e in enumerate(expected))
        parities.append(
            Parity(
                max_abs_logprob=gap,
                max_rel_grad=errors[worst],
                worst_grad=worst,
                roundtrip_exact=True,
            )
        )

    def check_round_trip(tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        named = held(reference)
        same = {name: torch.equal(tensor.to(named[name].device), named[name]) for name, tensor in tensors}
        parities[0] = replace(parities[0], roundtrip_exact=same.keys() == named.keys() and all(same.values()))

    policy.ranks.stream_to_main(policy.export_gradients(), measure)
    policy.ranks.stream_to_main(policy.export(), check_round_trip)
    return policy.ranks.from_main(parities[0] if parities else None)


def random_batches(model: Any, *, count: int = 2, images: int = 4, seed: int = 0) -> list[MicroBatch]:
    """`random_batch`es, of which every second has no image: of two data-parallel ranks one has text only."""
    return [
        random_batch(model, images=images if i % 2 == 0 else 0, seed=seed + 1000 * i) for i in range(count)
    ]


def _relative(ours: torch.Tensor, reference: torch.Tensor | None, largest: float) -> float:
    """Of the reference's largest element, or of all gradients' where it is rounding: keys' biases have none."""
    if reference is None:  # not touched by this batch
        return float(ours.abs().max())
    scale = float(reference.abs().max())
    scale = scale if scale > _ROUNDING * largest else largest
    return float((ours.to(reference.device) - reference).abs().max()) / scale


def reference_logprobs(model: Any, batch: MicroBatch, temperature: float = 1.0) -> torch.Tensor:
    """Log-probs [R] by transformers, one sequence at a time, positions worked out by itself."""
    import torch

    from gspo_mm.families.table import FAMILIES

    parts: list[torch.Tensor] = []
    offsets = batch.cu_seqlens.tolist()
    patches = _patches_of_images(batch)
    shown = iter(batch.image_index.tolist())
    grids = torch.empty(0, 3, dtype=torch.int64) if batch.image_grid_thw is None else batch.image_grid_thw
    family = FAMILIES[model.config.model_type].family
    tokens, image_token_id = (
        family.tokens_per_image(model.config, grids),
        family.image_token_id(model.config),
    )
    for start, end in pairwise(offsets):
        ids = batch.token_ids[start:end]
        is_response = batch.response_mask[start:end]
        left = int(((ids == image_token_id) & ~is_response).sum()) if image_token_id is not None else 0
        images: list[int] = []
        while left > 0:
            images.append(next(shown))
            left -= tokens[images[-1]]
        inputs: dict[str, Any] = {"input_ids": ids[None].to(model.device)}
        if images:
            if hasattr(model.model, "get_rope_index"):
                inputs["mm_token_type_ids"] = (inputs["input_ids"] == image_token_id).int()
            shown_here = family.hf_inputs(
                model.config, torch.cat([patches[i] for i in images]), grids[images]
            )
            inputs |= {name: tensor.to(model.device) for name, tensor in shown_here.items()}
        with token_by_token(model):
            logits = model(**inputs, use_cache=False).logits[0].float() / temperature
        rows = is_response.nonzero().squeeze(1)
        logprobs = logits[(rows - 1).to(logits.device)].log_softmax(-1)
        parts.append(logprobs.gather(1, ids[rows, None].to(logits.device)).squeeze(1))
    return torch.cat(parts)


@contextmanager
def token_by_token(model: Any) -> Iterator[None]:
    """Have transformers' linear attention go through a sequence token by token, as its equations are written.

    In chunks, it takes differences of sums of log decays in float32, which lose digits: up to 1e-3 of a decay's gradient.
    """
    module: Any = sys.modules[type(model).__module__]
    chunked = {name: rule for name, rule in vars(module).items() if name.startswith("torch_chunk_")}
    for name in chunked:
        setattr(module, name, getattr(module, name.replace("chunk", "recurrent")))
    try:
        yield
    finally:
        for name, rule in chunked.items():
            setattr(module, name, rule)


def _patches_of_images(batch: MicroBatch) -> list[torch.Tensor]:
    if batch.pixel_values is None or batch.image_grid_thw is None:
        return []
    return list(batch.pixel_values.split(batch.image_grid_thw.prod(-1).tolist()))


def random_batch(model: Any, *, images: int = 4, seed: int = 0) -> MicroBatch:
    """One micro-batch of ragged sequences: image 0 alone, all images, image 0 twice, then two of text only; of a model that
    takes no images five of text.

    In the second, text between images is trained as well: answers in turns, whose observations are images.
    """
    import torch

    from gspo_mm.families.table import FAMILIES
    from gspo_mm.types import MicroBatch

    generator = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    config, family = model.config, FAMILIES[model.config.model_type].family
    image_token_id = family.image_token_id(config)
    images = 0 if image_token_id is None else images
    grids = torch.tensor([family.grid_of(config, integer(1, 5), integer(1, 5)) for _ in range(images)])
    grids = grids.reshape(-1, 3)
    tokens = family.tokens_per_image(config, grids)
    pixels = torch.randn(int(grids.prod(-1).sum()), family.patch_dim(config), generator=generator)
    around = [
        getattr(config, f"vision_{side}_token_id", getattr(config, f"image_{side}_token_id", None))
        for side in ("start", "end")
    ]
    # of padding, transformers' embedding takes no gradient
    padding = model.get_input_embeddings().padding_idx
    special = {image_token_id, getattr(config, "video_token_id", None), padding, *around}
    plain = torch.tensor([i for i in range(config.get_text_config().vocab_size) if i not in special])

    def text(low: int, high: int) -> list[int]:
        return plain[torch.randint(len(plain), (integer(low, high),), generator=generator)].tolist()

    shown: list[list[int]] = [[0], list(range(images)), [0, 0]] if images else []
    shown += [[], []] if image_token_id is not None else [[]] * 5
    ids: list[list[int]] = []
    masks: list[list[bool]] = []
    for number, of_sequence in enumerate(shown):
        prompt = text(2, 9)
        mask = [False] * len(prompt)
        for image in of_sequence:
            assert image_token_id is not None
            start, end = around
            prompt += [] if start is None else [start]
            prompt += [image_token_id] * tokens[image]
            prompt += [] if end is None else [end]
            mask += [False] * (len(prompt) - len(mask))
            prompt += text(0, 4)
            mask += [number == 1] * (len(prompt) - len(mask))
        response = text(1, 14)
        ids.append(prompt + response)
        masks.append(mask + [True] * len(response))
    positions = [
        positions_of(model, sequence, grids[of_sequence] if of_sequence else None)
        for sequence, of_sequence in zip(ids, shown, strict=True)
    ]
    return MicroBatch(
        names=tuple(f"random {i}" for i in range(len(ids))),
        token_ids=torch.tensor([t for s in ids for t in s]),
        cu_seqlens=torch.tensor(list(accumulate(map(len, ids), initial=0)), dtype=torch.int32),
        positions=torch.cat(positions, dim=1),
        response_mask=torch.tensor([trained for mask in masks for trained in mask]),
        response_cu_seqlens=torch.tensor(list(accumulate(map(sum, masks), initial=0)), dtype=torch.int32),
        advantages=torch.zeros(len(ids)),
        rollout_logprobs=None,
        pixel_values=pixels if images else None,
        image_grid_thw=grids if images else None,
        image_keys=tuple(f"random-{seed}-{i}" for i in range(images)),
        image_index=torch.tensor([i for of_sequence in shown for i in of_sequence], dtype=torch.int64),
    )


def positions_of(model: Any, ids: list[int], grids: torch.Tensor | None) -> torch.Tensor:
    """Rotary positions [A, L] that transformers works out for a sequence of these ids and images."""
    import torch

    if not hasattr(model.model, "get_rope_index"):
        return torch.arange(len(ids))[None]
    if grids is None:
        return torch.arange(len(ids)).expand(3, -1)
    tokens = torch.tensor([ids])
    types = (tokens == model.config.image_token_id).int()
    return model.model.get_rope_index(tokens, types, image_grid_thw=grids)[0][:, 0]


def load_reference(path: Path) -> Any:
    """transformers' model in float32, without dropout, experts as a plain loop.

    Of weights that are stored in FP8 or MXFP4, it holds what they are in the dtype that we read them in. Those that
    transformers does not find (Qwen3-VL's experts one by one) are what we read.
    """
    import torch
    from transformers import AutoConfig
    from transformers.utils.logging import disable_progress_bar

    from gspo_mm.families.folder import read_hf
    from gspo_mm.families.table import family_of
    from gspo_mm.hf.tensors import held

    disable_progress_bar()
    family, folder = family_of(path), read_hf(path)
    config = AutoConfig.from_pretrained(path)
    if quantized := getattr(config, "quantization_config", None):
        quantized["dequantize"] = True
    model: Any
    model, found = family.auto_class(config).from_pretrained(
        path, config=config, dtype=torch.float32, output_loading_info=True
    )
    for name, tensor in held(model).items():
        read = folder.tensor(name) if name in found["missing_keys"] else tensor
        tensor.data = read.to(folder.dtype(name)).float()
    model.eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def positions_model(hf: Any) -> Any:
    """transformers' model without weights: `random_batch` reads its config and asks it for positions."""
    import torch

    from gspo_mm.families.table import FAMILIES

    with torch.device("meta"):
        return FAMILIES[hf.model_type].family.auto_class(hf).from_config(hf)


@app.command()
def main(
    hf: Annotated[Path, typer.Option(help="Hugging Face folder; no processor or tokenizer is needed.")],
    plan: Annotated[
        str, typer.Option(help="Parallel layout such as tp=2,ep=2,etp=1; its ranks are started here.")
    ] = "",
    images: Annotated[
        int, typer.Option(help="Distinct random images; 0: text only, as of models that see none.", min=0)
    ] = 4,
    seed: Annotated[int, typer.Option(help="Decides prompts, images and the loss's weights.")] = 0,
    experts_layout: Annotated[str, typer.Option(help="auto, published or transformers.")] = "auto",
    tol_logprob: Annotated[float, typer.Option(help="Largest difference of a log-prob, nats.")] = 2e-5,
    tol_grad: Annotated[float, typer.Option(help="Largest relative difference of a gradient.")] = 1e-4,
) -> None:
    """Compare the policy with transformers' own model and print **one line of JSON**.

    Keys: `max_abs_logprob`, `max_rel_grad`, `worst_grad`, `roundtrip_exact`, `plan`. Exit status 0 only when both
    differences are within tolerance and the weights survive the way there and back bit for bit; 1 when not, 2 when
    the folder or the layout cannot be used. Both models are in memory at once, in float32, with gradients:
    transformers' on rank 0, ours spread over the ranks of the plan.

    Examples:

        python tools/check_parity.py --hf data/tiny-model --images 4

        python tools/check_parity.py --hf data/tiny-model --plan tp=2,ep=2,etp=1
    """
    import os

    from gspo_mm.config import PolicyConfig
    from gspo_mm.families.folder import read_hf
    from gspo_mm.policy.engine import Policy
    from gspo_mm.policy.parallel import check_layout
    from gspo_mm.runtime.launch import parse_plan, ranks_needed, start_ranks

    try:
        parallel = parse_plan(plan)
        read_hf(hf, experts_layout)
        check_layout(str(hf), parallel, ranks_needed(parallel))
        start_ranks(ranks_needed(parallel))
        policy = Policy.from_hf(
            str(hf),
            PolicyConfig(dtype="float32", parallel=parallel),
            seed=seed,
            total_steps=1,
            experts_layout=experts_layout,
        )
    except ValueError as error:
        if os.environ.get("RANK", "0") == "0":
            typer.secho(str(error), fg="red", err=True)
        raise typer.Exit(2) from None
    reference = load_reference(hf) if policy.ranks.main else None
    count = 2 * policy.plan.dp * policy.plan.pp
    batches = random_batches(reference or positions_model(policy.hf), count=count, images=images, seed=seed)
    result = compare(policy, reference, batches)
    if policy.ranks.main:
        sys.stdout.write(json.dumps({**asdict(result), "plan": policy.plan.as_dict()}) + "\n")
    within = result.max_abs_logprob <= tol_logprob and result.max_rel_grad <= tol_grad
    raise typer.Exit(0 if within and result.roundtrip_exact else 1)


if __name__ == "__main__":
    app()
