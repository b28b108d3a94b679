from __future__ import annotations

import math
import os
import signal
import threading
from pathlib import Path

import pytest

from factorization_memory.training.guard import (
    GracefulStop,
    TrainingDivergedError,
    check_finite,
)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_asks_second_interrupts_and_handlers_come_back(number: signal.Signals) -> None:
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    with GracefulStop() as stop:
        assert stop.requested is None
        os.kill(os.getpid(), number)
        assert stop.requested == number.name
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert {each: signal.getsignal(each) for each in before} == before


def test_a_closed_terminal_asks_however_often_it_says_so() -> None:
    before = signal.getsignal(signal.SIGHUP)
    with GracefulStop() as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.requested == "SIGHUP"
        os.kill(os.getpid(), signal.SIGTERM)  # the end of a session sends both
        os.kill(os.getpid(), signal.SIGHUP)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGHUP) == before


def test_an_ignored_hangup_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with GracefulStop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.requested is None
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_another_thread_signals_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def enter() -> None:
        with GracefulStop() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [(None, before)]


def test_finite_steps_pass() -> None:
    check_finite(3, [1.0, 2.0], 0.5, [["en:0"], ["en:1"]], None)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_loss_names_step_rows_and_checkpoint(bad: float) -> None:
    with pytest.raises(TrainingDivergedError) as caught:
        check_finite(7, [1.0, bad], math.nan, [["en:0"], ["ja:5"]], Path("run/checkpoints/step-00000005"))
    message = str(caught.value)
    assert "step 7" in message
    assert "ja:5" in message
    assert "en:0" not in message
    assert "step-00000005" in message


def test_a_bad_gradient_names_all_rows_up_to_eight() -> None:
    with pytest.raises(TrainingDivergedError, match=r"en:7 and 4 more.*no checkpoint was saved yet"):
        check_finite(7, [1.0], math.inf, [[f"en:{index}" for index in range(12)]], None)
