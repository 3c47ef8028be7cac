"""MFU is FLOPs over time, devices and peak, told only where all four are known."""

import pytest

from gspo_mm.observe.throughput import peak_flops, peak_memory, throughput
from gspo_mm.types import Work


def test_phases_are_told_apart_and_divided_by_devices() -> None:
    found = throughput(
        Work(tokens=1000, forward=int(2e12), update=int(6e12)),
        {"time/update": 2.0, "time/old_logprobs": 1.0},
        devices=3,
        peak=10e12,
    )
    assert found == {
        "tokens_per_second/update": 500.0,
        "tflops_per_device/update": 1.0,
        "mfu/update": pytest.approx(0.1),
        "tokens_per_second/old_logprobs": 1000.0,
        "tflops_per_device/old_logprobs": pytest.approx(2 / 3),
        "mfu/old_logprobs": pytest.approx(1 / 15),
    }


def test_an_unknown_peak_gives_no_mfu(monkeypatch: pytest.MonkeyPatch) -> None:
    found = throughput(Work(tokens=1, update=int(1e12)), {"time/update": 1.0}, devices=1, peak=None)
    assert "mfu/update" not in found
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H100 PCIe")
    assert peak_flops() == 756e12
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H200")
    assert peak_flops(fp8=True) == 2 * 989e12
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Some GPU")
    assert peak_flops() is None


def test_a_skipped_pass_has_no_speed() -> None:
    skipped = Work(tokens=1, forward=int(1e12))
    assert throughput(skipped, {"time/old_logprobs": 0.0}, devices=1, peak=1.0) == {}


def test_memory_is_that_of_this_process() -> None:
    assert 0.05 < peak_memory() < 1000
