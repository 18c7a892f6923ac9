"""A first signal ends in good order, a second one at once; nothing is installed but within."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from mebp_triton.system import signals
from mebp_triton.system.errors import Interrupted
from mebp_triton.system.signals import SIGNALS, interrupting, noting


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


def ended(code, **environment):
    """Exit code, output and errors of a process of its own, whose environment is of no launcher."""
    kept = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_RUN_ID"}
    start = (
        "import os, signal, time\n"
        "from mebp_triton.signals import Interrupted, interrupting, noting\n"
        "def tell(number):\n"
        "    os.kill(os.getpid(), number)\n"
    )
    command = [sys.executable, "-c", start + code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=kept | environment)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("number", SIGNALS)
def test_a_first_signal_interrupts(number):
    before = handlers()
    with pytest.raises(Interrupted) as raised, interrupting():  # noqa: PT012
        assert handlers() != before
        os.kill(os.getpid(), number)
    assert raised.value.number == number and str(raised.value) == "" and isinstance(raised.value, KeyboardInterrupt)
    assert handlers() == before


@pytest.mark.parametrize("number", SIGNALS)
def test_a_first_signal_is_noted(number, capfd):
    before = handlers()
    with noting() as noted:
        assert noted() == 0 and capfd.readouterr().err == ""
        os.kill(os.getpid(), number)
        assert noted() == number
        assert capfd.readouterr().err == "\nmebp: stopping as soon as this step is done; once more stops at once\n"
    assert noted() == number and handlers() == before
    with noting(announce=False) as noted:
        os.kill(os.getpid(), number)
        assert noted() == number
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("which", ["noting", "interrupting"])
@pytest.mark.parametrize(("second", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_second_signal_exits_at_once(which, second, code):
    """Whatever is being done about the first one."""
    script = f"""
with {which}():
    try:
        tell(signal.SIGINT)
    finally:
        print("tidying", flush=True)
        tell(signal.{second})
        time.sleep(60)
        print("never")
"""
    found, out, err = ended(script)
    assert (found, out) == (code, "tidying\n") and err.endswith("\nmebp: stopped at once\n") and "Traceback" not in err


def test_what_a_launcher_hands_on_is_one_signal():
    """torchrun sends its processes the signal that the terminal has sent them already."""
    script = """
with noting() as noted:
    tell(signal.SIGINT)
    tell(signal.SIGINT)
    print(noted(), flush=True)
    time.sleep(1.1)
    tell(signal.SIGINT)
    print("never")
"""
    assert ended(script, TORCHELASTIC_RUN_ID="none")[:2] == (130, "2\n")
    assert ended(script)[:2] == (130, "")


def test_what_was_ignored_stays_ignored():
    script = """
signal.signal(signal.SIGINT, signal.SIG_IGN)
with noting() as noted, interrupting():
    tell(signal.SIGINT)
    tell(signal.SIGINT)
print(noted(), signal.getsignal(signal.SIGINT) is signal.SIG_IGN)
"""
    assert ended(script)[:2] == (0, "0 True\n")


def test_importing_and_other_threads_install_nothing():
    before, seen = handlers(), []

    def within():
        with interrupting(), noting() as noted:
            seen.append((handlers(), noted()))

    thread = threading.Thread(target=within)
    thread.start()
    thread.join()
    assert seen == [(before, 0)]
    script = (
        "print(signal.getsignal(signal.SIGINT) is signal.default_int_handler, signal.getsignal(signal.SIGTERM) == 0)"
    )
    assert ended("import mebp_triton, mebp_triton.cli\n" + script)[1] == "True True\n"
    assert signals.ECHO_SECONDS > 0
