"""Coroutines run beside the calling thread; their results, their faults and the caller's change of mind get across."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from gspo_mm.runtime.background import Background
from tests.waiting import PATIENCE


@pytest.fixture
def background() -> Iterator[Background]:
    background = Background("test")
    yield background
    background.close()


class Endless:
    """A coroutine that goes on until it is cancelled."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.cancelled = threading.Event()

    async def __call__(self) -> None:
        self.begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


async def fail(error: BaseException) -> None:
    raise error


def test_work_runs_in_another_thread(background: Background) -> None:
    async def name() -> str:
        return threading.current_thread().name

    assert background.run(name()) == "test"


def test_work_goes_on_while_the_caller_does_something_else(background: Background) -> None:
    heard = threading.Event()

    async def speak() -> int:
        heard.set()
        return 7

    future = background.start(speak())
    assert heard.wait(PATIENCE)
    assert future.result(PATIENCE) == 7


@pytest.mark.parametrize("error", [ValueError("x"), TimeoutError("its own")])
def test_faults_reach_the_caller(background: Background, error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)):
        background.run(fail(error))


def test_a_result_that_takes_longer_than_a_look_is_waited_for(background: Background) -> None:
    async def slow() -> int:
        await asyncio.sleep(0.1)
        return 7

    assert background.run(slow()) == 7


def test_an_interrupt_from_the_keyboard_cancels_the_work(background: Background) -> None:
    work = Endless()
    waiting = threading.get_ident()

    def interrupt() -> None:
        while not work.begun.is_set() or sys._current_frames()[waiting].f_code.co_name != "wait":
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    try:
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            background.run(work())
    finally:
        signal.signal(signal.SIGINT, before)
    assert work.cancelled.wait(PATIENCE)


def test_a_future_that_is_cancelled_cancels_its_work(background: Background) -> None:
    work = Endless()
    future = background.start(work())
    assert work.begun.wait(PATIENCE)
    future.cancel()
    assert work.cancelled.wait(PATIENCE)


def test_closing_ends_work_and_thread_and_may_be_repeated() -> None:
    background = Background("closing")
    work = Endless()
    future = background.start(work())
    assert work.begun.wait(PATIENCE)
    background.close()
    assert work.cancelled.is_set()
    assert future.cancelled()
    assert "closing" not in {thread.name for thread in threading.enumerate()}
    background.close()
