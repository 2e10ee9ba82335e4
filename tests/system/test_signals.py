"""The first Ctrl-C asks, the second stops; afterwards everything is as it was."""

import signal
import subprocess
import sys
import threading
import time

import pytest

from retrieval.system.signals import graceful

SIGNALS = (signal.SIGINT, signal.SIGTERM)

RUN = """
import signal, sys, time
from retrieval.system.signals import graceful

obedient = sys.argv[1] == "obedient"
before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
try:
    with graceful() as asked:
        print("running", asked(), flush=True)
        while not asked():
            time.sleep(0.005)
        print("asked", flush=True)
        if not obedient:
            time.sleep(600)
        print("finished its batch", flush=True)
except KeyboardInterrupt:
    print("stopped", flush=True)
print("restored", before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)])
"""


def run(kind: str, *numbers: signal.Signals) -> tuple[list[str], int]:
    """A program's lines and exit status; each signal is sent after one more line."""
    command = [sys.executable, "-c", RUN, kind]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = []
        for turn, number in enumerate(numbers):
            lines.append(process.stdout.readline())
            # At once it would count as the same signal.
            time.sleep(0.4 * turn)
            process.send_signal(number)
        lines += process.stdout.readlines()
    return [line.rstrip("\n") for line in lines], process.returncode


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_asks_and_lets_the_run_finish_its_batch(number: signal.Signals) -> None:
    lines = ["running False", "asked", "finished its batch", "restored True"]
    assert run("obedient", number) == (lines, 0)


@pytest.mark.parametrize("second", SIGNALS)
@pytest.mark.parametrize("first", SIGNALS)
def test_the_second_signal_of_either_kind_stops_it_where_it_stands(
    first: signal.Signals, second: signal.Signals
) -> None:
    assert run("deaf", first, second) == (["running False", "asked", "stopped", "restored True"], 0)


def test_a_signal_that_is_sent_twice_at_once_is_one() -> None:
    """As `timeout` sends it: to the process and to its group."""
    with graceful() as asked:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert asked()


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in SIGNALS]


def test_after_the_end_ctrl_c_is_what_it_was() -> None:
    before = handlers()
    with graceful() as asked:
        assert handlers() != before
        signal.raise_signal(signal.SIGINT)
        assert asked()
    assert handlers() == before
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_handlers_are_restored_after_an_error_too(error: type[BaseException]) -> None:
    before = handlers()
    with pytest.raises(error), graceful():
        raise error
    assert handlers() == before


def test_each_run_starts_unasked_and_an_inner_one_keeps_its_signals_to_itself() -> None:
    with graceful() as outer:
        with graceful() as inner:
            signal.raise_signal(signal.SIGTERM)
            assert (inner(), outer()) == (True, False)
        with graceful() as again:
            assert not again()


def test_off_the_main_thread_it_says_false_and_takes_over_no_signal() -> None:
    seen: list[object] = []

    def work() -> None:
        with graceful() as asked:
            seen.extend([asked(), handlers()])

    before = handlers()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False, before]
