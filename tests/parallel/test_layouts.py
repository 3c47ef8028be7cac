"""Every parallel layout computes what one rank computes: log-probs, loss, gradients, and weights after two steps."""

from functools import cache
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gspo_mm.config.layout import Sizes
from gspo_mm.plan.hardware import gpu_of
from gspo_mm.plan.memory import held_by, optimizer_bytes, stages
from gspo_mm.plan.model import read_model
from gspo_mm.plan.setup import Job, Lengths, Policy, Work
from tests.forked import COMMANDS
from tests.parallel.layouts import LAYOUTS, LORA, batches_of, loss_of, measure, policy_config
from tests.tiny_vl import save, tiny_glm, tiny_hybrid, tiny_sinks, tiny_text, tiny_vl, tiny_windows
from tools.check_parity import load_reference, reference_logprobs

# the first layout of a model waits for all of them: a quarter of an hour on a slow and busy machine
pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Mixtures of experts with one dense layer, tied dense models with attention biases, linear attention; odd vocabularies."""
    parent = tmp_path_factory.mktemp("models")
    # three layers for each of four chunks: DeepStack reaches so many, and the first chunk has them all
    moe = tiny_vl(num_hidden_layers=12, mlp_only_layers=[1], vocab_size=250)
    dense = tiny_vl(moe=False, tied=True, num_hidden_layers=6, attention_bias=True, vocab_size=131)
    text = tiny_text(num_hidden_layers=4, mlp_only_layers=[1], norm_topk_prob=False, vocab_size=250)
    text_dense = tiny_text(moe=False, tied=True, num_hidden_layers=4, attention_bias=True, vocab_size=131)
    hybrid = tiny_hybrid(vocab_size=250, linear_num_key_heads=4)
    hybrid_dense = tiny_hybrid(moe=False, tied=True, vocab_size=131)
    windows = tiny_windows(tied=True, vocab_size=131)
    models = {"moe": moe, "dense": dense, "text": text, "text dense": text_dense, "hybrid": hybrid}
    models |= {"hybrid dense": hybrid_dense, "windows": windows}
    models |= {"sigmoid": tiny_glm(vocab_size=250), "sinks": tiny_sinks(vocab_size=250)}
    return {name: save(model, parent / name) for name, model in models.items()}


@pytest.fixture(scope="module")
def measured(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """name -> what its ranks measured; all layouts of one size and model share a launch."""
    out = tmp_path_factory.mktemp("measured")

    @cache
    def launch(ranks: int, model: str) -> str:
        names = [name for name, (size, of, _) in LAYOUTS.items() if (size, of) == (ranks, model)]
        command = ["-m", "tests.parallel.layouts", str(out), *map(str, folders.values()), "--", *names]
        done = COMMANDS.run(*command, ranks=ranks, timeout=1500)
        return "" if done.returncode == 0 else (done.stdout + done.stderr)[-3000:]

    def get(name: str) -> dict[str, Any]:
        fault = launch(*LAYOUTS[name][:2])
        file = out / f"{name}.pt"
        assert file.exists(), f"{name} was not measured: {fault}"
        return torch.load(file, weights_only=True)

    return get


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path]) -> Any:
    """What one rank measures."""

    @cache
    def get(model: str, freeze: tuple[str, ...], aux_loss: float, lora: bool) -> dict[str, Any]:
        plain = {"freeze": list(freeze), "moe": {"aux_loss": aux_loss}, "lora": LORA if lora else None}
        return measure(folders[model], plain)

    return get


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_computes_what_one_rank_computes(name: str, measured: Any, alone: Any) -> None:
    _, model, changes = LAYOUTS[name]
    aux_loss = changes.get("moe", {}).get("aux_loss", 0.0)
    expected = alone(model, tuple(changes.get("freeze", ())), aux_loss, "lora" in changes)
    found = measured(name)
    assert found["exact"].keys() == expected["weights"].keys()
    assert all(found["exact"].values())
    assert found["sent"]
    for ours, theirs in zip(found["logprobs"], expected["logprobs"], strict=True):
        assert (ours - theirs).abs().max() <= 2e-5
    assert found["loss"] == pytest.approx(expected["loss"], abs=2e-5)
    assert found["entropy"] == pytest.approx(expected["entropy"], rel=1e-5)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4)
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-4)
    # of hundreds of decisions a layer, a near tie may end otherwise
    assert found["routing"] == pytest.approx(expected["routing"], abs=0.01)
    for what, tolerance in (("gradients", 1e-4), ("weights", 1e-4)):
        assert found[what].keys() == expected[what].keys()
        for key, tensor in expected[what].items():
            scale = float(tensor.abs().max()) + 1e-12
            assert float((found[what][key] - tensor).abs().max()) / scale <= tolerance, f"{what} of {key}"


@pytest.fixture(scope="module")
def by_transformers(folders: dict[str, Path]) -> dict[str, Any]:
    """Log-probs and gradients of what the layouts of `moe` measure, each sequence by itself."""
    model = load_reference(folders["moe"])
    batches = batches_of(SimpleNamespace(hf=model.config, shares_prompts=False))
    logprobs = [reference_logprobs(model, batch, 0.7) for batch in batches]
    of_loss = loss_of([*range(len(batches))], batches)
    sum(of_loss(i, of_batch, torch.zeros(1))[0] for i, of_batch in enumerate(logprobs)).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"batches": batches, "logprobs": logprobs, "gradients": gradients}


@pytest.mark.parametrize("name", ["tp2 ep2 etp1", "pp2", "cp2"])
def test_answers_in_turns_are_those_of_transformers(
    name: str, measured: Any, by_transformers: dict[str, Any]
) -> None:
    """The second sequence of a batch with images has three turns, and a new picture before each."""
    batch, found = by_transformers["batches"][0], measured(name)
    trained = batch.response_mask[slice(*batch.cu_seqlens[1:3].tolist())].tolist()
    assert [sampled for sampled, _ in groupby(trained)] == [False, True] * 3
    for ours, theirs in zip(found["logprobs"], by_transformers["logprobs"], strict=True):
        assert (ours - theirs).abs().max() <= 2e-5
    for key, theirs in by_transformers["gradients"].items():
        worst = float((found["gradients"][key] - theirs).abs().max() / theirs.abs().max())
        assert worst <= 1e-4, key


@pytest.mark.parametrize("name", LAYOUTS)
def test_ranks_hold_what_a_plan_says(name: str, measured: Any, folders: dict[str, Path]) -> None:
    """Weights and trained numbers of every rank exactly; optimizer state over all ranks, as their shares end at whole buckets."""
    ranks, model, changes = LAYOUTS[name]
    config = policy_config({key: value for key, value in changes.items() if key != "bucket"})
    sizes = Sizes.from_config(config.parallel, ranks)
    policy = Policy(sizes=sizes, width=4, frozen=frozenset(config.frozen), lora=config.lora)
    job = Job(
        model=read_model(str(folders[model])),
        gpu=gpu_of("h100"),
        per_node=8,
        policy=policy,
        work=WORK,
        servers=None,
    )
    planned = [
        held_by(job, layers, first=stage == 0, last=stage == sizes.pp - 1)
        for stage, layers in enumerate(stages(job))
    ]
    found = measured(name)["held"]
    for rank in found:
        plan = planned[rank["stage"]]
        assert rank["weights"] == plan.weights
        assert rank["trained"] == plan.dense + plan.experts
    state = sum(optimizer_bytes(policy, planned[rank["stage"]]) for rank in found)
    assert 4 * sum(rank["state"] for rank in found) == pytest.approx(state, rel=0.01)


WORK = Work(
    prompts=1, group=1, updates=1, lengths=Lengths(prompt=1, image=0, answer=1, longest=1), old=False, reference=False,
    staleness=0, in_flight=1,
)  # fmt: skip
