"""Every mistake in a config is one sentence that names key, value and fix, told without importing torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from gspo_mm.config import (
    Config,
    ConfigError,
    LossConfig,
    ParallelConfig,
    check_world,
    load_config,
    parse_config,
    save_config,
)

MINIMAL = """
run: {name: a}
model: {path: m}
data: {train: [a.tar]}
reward: {file: r.yaml}
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(MINIMAL)
    return path


def load(path: Path, *overrides: str) -> Config:
    return load_config(path, list(overrides))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stepz=3", ["train.stepz=3", "did you mean steps"]),
        ("nonsense=1", ["nonsense=1", "known keys"]),
        ("train.steps=1.5", ["train.steps=1.5", "whole number"]),
        ("train.steps=0", ["train.steps=0", "greater than or equal to 1"]),
        ("train.steps=ten", ["train.steps='ten'", "valid integer"]),
        ("policy.optimizer.lr=0", ["policy.optimizer.lr=0", "greater than 0"]),
        ("loss.clip_low=0", ["loss.clip_low=0", "greater than 0"]),
        ("loss.clip_high=-0.1", ["loss.clip_high=-0.1", "greater than 0"]),
        ("loss.clip_low=0.2", ["loss.clip_low=0.2", "loss.allow_wide_clip=true"]),
        ("loss.level=sentence", ["loss.level='sentence'", "sequence"]),
        (
            "rollout.prompts_per_step=7",
            ["rollout.prompts_per_step=7", "train.updates_per_batch=2", "multiple of 2"],
        ),
        ("rollout.group_size=1", ["rollout.group_size=1"]),
        ("rollout.sampling.temperature=0", ["rollout.sampling.temperature=0", "use 1.0"]),
        ("policy.parallel.tp=2", ["tp=2", "1 started", "start 2"]),
        ("policy.parallel.dp=3", ["dp=3", "needs 3 ranks", "1 started"]),
        ("policy.parallel.ep=2", ["ep=2", "1 started"]),
        ("run.name=../x", ["run.name='../x'"]),
        ("data.train=[]", ["data.train=[]", "at least 1"]),
        ("data.train=a.tar", ["data.train='a.tar'", "valid list"]),
        ("data.train=[{name: a, shards: [x], wieght: 2}]", ["data.train.0.wieght=2", "did you mean weight"]),
        ("data.train=[{name: a, shards: [x], weight: 0}]", ["data.train.0.weight=0", "greater than 0"]),
        ("data.train=[{name: a, shards: []}]", ["data.train.0.shards=[]", "at least 1"]),
        ("data.train=[{shards: [x]}]", ["data.train.0.name is missing"]),
        ("data.train=[y, {name: a, shards: [x]}]", ["data.train.0='y'"]),
        (
            "data.train=[{name: a, shards: [x]}, {name: a, shards: [y]}]",
            ["data.train", "two sources with name=a"],
        ),
        (
            "data.min_image_pixels=64000001",
            ["data.min_image_pixels=64000001", "data.max_image_pixels=64000000", "lower it"],
        ),
        ("data.max_image_pixels=400000000", ["data.max_image_pixels=400000000", "less than or equal to"]),
        (
            "data.curriculum={key: d, start: 1, end: 2, samples: 9, smaples: 9}",
            ["data.curriculum.smaples=9", "did you mean samples"],
        ),
        (
            "data.curriculum={key: d, start: 3, end: 2, samples: 9}",
            ["data.curriculum.start=3", "data.curriculum.end=2", "swap them"],
        ),
    ],
)
def test_a_wrong_value_is_named_with_its_fix(config_file: Path, override: str, words: list[str]) -> None:
    assert_told(config_file, override, words)


def test_a_plain_list_and_a_mixture_are_both_sources(config_file: Path) -> None:
    (only,) = load(config_file).data.sources("train")
    assert (only.name, only.shards, only.weight) == ("", ["a.tar"], 1.0)
    assert load(config_file).data.sources("validation") == []
    mixed = load(config_file, "data.train=[{name: a, shards: [x], weight: 2}, {name: b, shards: [y]}]")
    assert [(s.name, s.weight) for s in mixed.data.sources("train")] == [("a", 2.0), ("b", 1.0)]
    save_config(mixed, config_file)
    assert load_config(config_file) == mixed


def assert_told(config_file: Path, override: str, words: list[str]) -> None:
    """In one sentence."""
    with pytest.raises(ConfigError) as caught:
        load(config_file, override)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


# servers, the way of weights to them, and what comes of answers that are older than the weights
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rollout.engine=vllm", ["rollout.engine='vllm'", "'embedded' or 'sglang'"]),
        ("rollout.sglang.servrs=2", ["rollout.sglang.servrs=2", "did you mean servers"]),
        ("rollout.sglang.start=there", ["rollout.sglang.start='there'", "'here', 'beside' or 'elsewhere'"]),
        ("rollout.sglang.servers=0", ["rollout.sglang.servers=0", "greater than or equal to 1"]),
        ("rollout.sglang.tp=0", ["rollout.sglang.tp=0", "greater than or equal to 1"]),
        ("rollout.sglang.ep=2", ["rollout.sglang.ep=2", "rollout.sglang.tp=1", "divide"]),
        ("rollout.sglang={tp: 4, ep: 3}", ["rollout.sglang.ep=3", "rollout.sglang.tp=4", "divide"]),
        ("rollout.sglang={tp: 4, dp: 8}", ["rollout.sglang.dp=8", "rollout.sglang.tp=4", "divide"]),
        ("rollout.sglang.mem_fraction=1.0", ["rollout.sglang.mem_fraction=1.0", "less than 1"]),
        ("rollout.sglang.mem_fraction=80", ["rollout.sglang.mem_fraction=80", "less than 1"]),
        ("rollout.sglang.max_tokens=0", ["rollout.sglang.max_tokens=0", "greater than or equal to 1"]),
        ("rollout.sglang.fp8=8", ["rollout.sglang.fp8=8", "valid boolean"]),
        ("rollout.sglang.urls=http://a:1", ["rollout.sglang.urls='http://a:1'", "valid list"]),
        ("rollout.sglang.extra_args=[a]", ["rollout.sglang.extra_args=['a']", "valid dictionary"]),
        ("rollout.sglang.start_timeout=0", ["rollout.sglang.start_timeout=0", "greater than or equal to 1"]),
        ("rollout.sglang.request_timeout=-1", ["rollout.sglang.request_timeout=-1", "greater than"]),
        ("rollout.sglang.down_timeout=0.5", ["rollout.sglang.down_timeout=0.5", "whole number"]),
        ("rollout.sglang.max_restarts=-1", ["rollout.sglang.max_restarts=-1", "greater than or equal to 0"]),
        ("rollout.sglang.max_logprob_gap=0", ["rollout.sglang.max_logprob_gap=0", "greater than 0"]),
        ("rollout.max_in_flight=0", ["rollout.max_in_flight=0", "greater than or equal to 1"]),
        ("rollout.max_staleness=-1", ["rollout.max_staleness=-1", "greater than or equal to 0"]),
        (
            "rollout.max_staleness=2",
            ["rollout.max_staleness=2", "rollout.engine=sglang", "rollout.max_staleness=0"],
        ),
        (
            "rollout.oversample=1.5",
            ["rollout.oversample=1.5", "rollout.engine=sglang", "rollout.oversample=1.0"],
        ),
        (
            "rollout={engine: sglang, oversample: 0.9}",
            ["rollout.oversample=0.9", "greater than or equal to 1"],
        ),
        ("rollout={engine: sglang, oversample: 2.5}", ["rollout.oversample=2.5", "less than or equal to 2"]),
        ("rollout.on_update=abort", ["rollout.on_update='abort'", "'retract', 'in_place' or 'finish'"]),
        ("sync.mode=email", ["sync.mode='email'", "'disk'", "'distributed'"]),
        ("sync.bucket_mb=0", ["sync.bucket_mb=0", "greater than or equal to 1"]),
        ("sync.timeout=0", ["sync.timeout=0", "greater than or equal to 1"]),
        ("sync.verify=2", ["sync.verify=2", "valid boolean"]),
        ("sync.foldr=/dev/shm", ["sync.foldr='/dev/shm'", "did you mean folder"]),
        ("loss.correction.kind=clip", ["loss.correction.kind='clip'", "'none', 'truncate' or 'mask'"]),
        (
            "loss.correction.low=1.01",
            ["loss.correction.low=1.01", "loss.correction.high=1.02", "low <= 1 <= high"],
        ),
        ("loss.correction.low=-0.5", ["loss.correction.low=-0.5", "low <= 1 <= high"]),
        ("loss.correction.high=0.99", ["loss.correction.high=0.99", "low <= 1 <= high"]),
        (
            "loss.correction={kind: mask, low: 1.0, high: 1.0}",
            ["loss.correction.low=1, loss.correction.high=1", "loss.correction.kind=mask", "leave room"],
        ),
    ],
)
def test_a_wrong_value_of_servers_sync_or_correction_is_named_with_its_fix(
    config_file: Path, override: str, words: list[str]
) -> None:
    assert_told(config_file, override, words)


@pytest.mark.parametrize(
    "override",
    [
        "rollout={engine: sglang, max_staleness: 4, oversample: 1.25, drop_dead_groups: true, max_in_flight: 1}",
        "rollout={engine: sglang, on_update: in_place, sglang: {tp: 8, ep: 8, dp: 4}}",
        "rollout={engine: sglang, sglang: {urls: ['http://a:1'], extra_args: {attention-backend: fa3, watchdog: 9}}}",
        "sync={mode: disk, folder: /dev/shm, verify: false}",
        "loss.correction={kind: truncate, low: 1.0, high: 1.0}",
        "loss.correction={kind: mask, low: 0.9, high: 1.0}",
    ],
)
def test_sections_of_servers_sync_and_correction_are_read(config_file: Path, override: str) -> None:
    config = load(config_file, override)
    save_config(config, config_file)
    assert load_config(config_file) == config


def test_two_mistakes_are_both_told(config_file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(config_file, "train.steps=0", "foo=1")
    assert len(str(caught.value).splitlines()) == 2


def test_a_learning_rate_that_yaml_reads_as_text_gets_a_hint(config_file: Path) -> None:
    config_file.write_text(MINIMAL + 'policy: {optimizer: {lr: "1e-6"}}\n')
    with pytest.raises(ConfigError, match=r"write 1\.0e-6"):
        load(config_file)


def test_a_missing_section_is_named(config_file: Path) -> None:
    config_file.write_text("run: {name: a}\nmodel: {path: m}\ndata: {train: [a.tar]}\n")
    with pytest.raises(ConfigError, match="key reward is missing"):
        load(config_file)


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "a: [1\n"])
def test_a_file_that_is_no_mapping_is_refused(config_file: Path, text: str) -> None:
    config_file.write_text(text)
    with pytest.raises(ConfigError, match=str(config_file)):
        load(config_file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load(tmp_path / "none.yaml")


def test_an_override_without_equals_is_refused(config_file: Path) -> None:
    with pytest.raises(ConfigError, match="key=value"):
        load(config_file, "train.steps")


def test_an_override_that_yaml_cannot_read_is_named(config_file: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"override data\.train=\[x-\{0\.\.3\}\.tar\] has a value that YAML cannot"
    ):
        load(config_file, "data.train=[x-{0..3}.tar]")
    assert load(config_file, 'data.train=["x-{0..3}.tar"]').data.train == ["x-{0..3}.tar"]


def test_interpolation_and_overrides_combine(config_file: Path) -> None:
    config_file.write_text(MINIMAL + "train: {steps: 7}\nsft: {steps: '${train.steps}'}\n")
    assert load(config_file).sft.steps == 7
    assert load(config_file, "train.steps=9").sft.steps == 9


def test_an_unresolvable_interpolation_is_told(config_file: Path) -> None:
    with pytest.raises(ConfigError, match="nothing"):
        load(config_file, "run.dir=${nothing}")


def test_the_saved_config_reads_back_equal(config_file: Path, tmp_path: Path) -> None:
    config = load(config_file, "loss.clip_low=0.0005", "policy.freeze=[vision]")
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


def test_a_wide_clip_is_for_token_level_or_on_request() -> None:
    assert LossConfig(level="token", clip_low=0.2, clip_high=0.28).clip_high == 0.28
    assert LossConfig(clip_low=0.2, allow_wide_clip=True).clip_low == 0.2
    assert LossConfig(clip_low=0.01, clip_high=0.01).clip_low == 0.01
    with pytest.raises(ValueError, match="allow_wide_clip"):
        LossConfig(level="sequence_token", clip_high=0.011)


def test_the_world_size_must_be_filled_exactly() -> None:
    check_world(ParallelConfig(tp=2, pp=2, cp=1, ep=4, etp=1), world_size=8)
    check_world(ParallelConfig(tp=2, ep=2, etp=1), world_size=2)
    with pytest.raises(ValueError, match="needs a multiple of 3 ranks but 8 started"):
        check_world(ParallelConfig(tp=3), world_size=8)
    with pytest.raises(ValueError, match="needs 4 ranks but 8 started"):
        check_world(ParallelConfig(tp=2, dp=2), world_size=8)
    with pytest.raises(ValueError, match="ep=3"):
        check_world(ParallelConfig(ep=3), world_size=8)


def test_ranks_from_the_environment_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "run": {"name": "a"},
        "model": {"path": "m"},
        "data": {"train": ["a.tar"]},
        "reward": {"file": "r"},
        "rollout": {"prompts_per_step": 6},
    }
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="over 4 data-parallel ranks; use a multiple of 8"):
        parse_config(values)


def test_loading_a_config_imports_neither_torch_nor_transformers(config_file: Path) -> None:
    script = (
        "import sys\n"
        "from gspo_mm.config import load_config\n"
        "import gspo_mm.cli\n"
        f"load_config({str(config_file)!r})\n"
        "print([m for m in ('torch', 'transformers', 'megatron', 'numpy') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
