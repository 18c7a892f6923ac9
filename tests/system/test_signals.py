"""A first signal ends in good order, a second one at once, and a lost page with one line.

Handlers exist only inside the context managers.
"""

import json
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
        "from mebp_triton.system.signals import interrupting, noting\n"
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
    script = """
import sys
print("torch" in sys.modules)
import mebp_triton, mebp_triton.cli.main
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler, signal.getsignal(signal.SIGTERM) == 0)
"""
    assert ended(script)[1] == "False\nTrue True\n", "torch takes seconds, in which no signal would be heard"
    assert signals.ECHO_SECONDS > 0


# --- lost pages -----------------------------------------------------------------------------------------------------

CUT = "os.truncate(path, 4096); "
CASES = {
    "torch": CUT + "mapped.bytes.view(torch.int64).sum()",
    "torch, in several threads": CUT + "torch.set_num_threads(4); mapped.bytes.view(torch.float32).exp().sum()",
    "numpy, with the lock held": CUT + "mapped.bytes.numpy()[-1]",
    "a thread": CUT + "import threading; t = threading.Thread(target=lambda: mapped.bytes.sum()); t.start(); t.join()",
    "another fault": "os.kill(os.getpid(), signal.SIGBUS)",
    "no fault": "pass",
}
# Each case runs in a fork of a process that has imported torch and computed nothing yet.
PROGRAM = """
import json, os, signal, sys, torch
from pathlib import Path
from mebp_triton.system.mapped_file import MappedFile
from mebp_triton.system.signals import reporting_lost_pages
directory = Path(sys.argv[1])
results = {}
for name, code in json.loads(sys.stdin.read()).items():
    child = os.fork()
    if child == 0:
        for number, stream in ((1, "out"), (2, "err")):
            os.dup2(os.open(directory / f"{name}.{stream}", os.O_CREAT | os.O_WRONLY), number)
        path = directory / f"{name}.safetensors"
        path.write_bytes(bytes(16 << 20))
        mapped = MappedFile(path, path.stat().st_size)
        with reporting_lost_pages():
            exec(code)
        os.write(1, b"went on")
        os.kill(os.getpid(), signal.SIGBUS)  # now the system's own handler ends the process
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    results[name] = [code, *((directory / f"{name}.{stream}").read_text() for stream in ("out", "err"))]
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    """Exit code, output, errors and file of each case."""
    directory = tmp_path_factory.mktemp("faults")
    command = [sys.executable, "-c", PROGRAM, str(directory)]
    done = subprocess.run(command, input=json.dumps(CASES), capture_output=True, text=True, timeout=300, check=True)
    return {name: (*result, directory / f"{name}.safetensors") for name, result in json.loads(done.stdout).items()}


@pytest.mark.parametrize("name", [name for name, code in CASES.items() if CUT in code])
def test_a_file_cut_short_while_it_is_read(faults, name):
    code, out, err, path = faults[name]
    assert (code, out) == (1, "")
    assert err == f"mebp: error: {path} was cut short while it was in use: what was saved before is whole\n"


def test_other_lost_pages_are_named_for_what_they_are(faults):
    code, out, err, _ = faults["another fault"]
    assert (code, out) == (1, "") and "a page of a mapped file cannot be read: the disk failed" in err


def test_afterwards_the_signal_is_the_systems_again(faults):
    code, out, _, _ = faults["no fault"]
    assert (code, out) == (-signal.SIGBUS, "went on")
