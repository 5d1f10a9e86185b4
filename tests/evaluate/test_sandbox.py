"""Programs that misbehave do not pass, do no harm, and leave nothing behind."""

import os
import sys
from pathlib import Path

import pytest

from moekit.errors import UnsupportedError
from moekit.evaluate import sandbox

pytestmark = pytest.mark.skipif(os.name != "posix", reason="limits of a process are POSIX's")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="/proc and namespaces are Linux's")


def left_behind() -> list[str]:
    """Returns the processes that live in a sandbox's folder, and the folders."""
    folders = [str(path) for path in Path(os.environ.get("TMPDIR", "/tmp")).glob(f"{sandbox.FOLDER}*")]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            folders += [where for where in [os.readlink(process / "cwd")] if sandbox.FOLDER in where]
        except OSError:  # it has just ended
            continue
    return folders


def test_a_program_that_comes_to_its_end_passes() -> None:
    outcome = sandbox.run("import math\nassert math.sqrt(4) == 2\nprint('so far')")
    assert outcome == (True, "passed", "so far\n")


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("def f(:", "SyntaxError"),
        ("raise ValueError('bad')", "ValueError: bad"),
        ("import sys; sys.exit(0)\nassert False", "SystemExit: 0"),
        ("exit()\nassert False", "NameError"),  # the interpreter's own for people is not there
        ("import os; os._exit(0)\nassert False", ""),
        ("import os; os.abort()", ""),
        ("import torch", "No module named 'torch'"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("import sys; sys.setrecursionlimit(10**8)\ndef f(n): return [f(n + 1)]\nf(0)", ""),
        ("data = bytearray(1 << 33)", "MemoryError"),
        ("kept = []\nwhile True: kept.append(bytes(1 << 24))", "MemoryError"),
        ("file = open('large', 'wb')\nwhile True: file.write(bytes(1 << 20))", "File too large"),
        ("import sys\nassert sys.stdin.read()", "AssertionError"),  # the job is not to be read again
        ("import os\nos.lseek(0, 0, 0)\nassert os.read(0, 10)", ""),
        ("import os\nfor n in range(3, 64):\n try: os.write(n, b'0' * 32)\n except OSError: pass\nos._exit(0)", ""),
    ],
)
def test_a_program_that_does_not_fails(program: str, said: str) -> None:
    outcome = sandbox.run(program, memory=1 << 28)
    assert outcome.status == "failed", outcome
    assert not outcome.passed
    assert said in outcome.output
    assert not left_behind()


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(100)",
        "import os, time; os.close(1); os.close(2); time.sleep(100)",
        "import signal, time; [signal.signal(n, signal.SIG_IGN) for n in range(1, 9)]; time.sleep(100)",
        "while True: print('x' * 10**6)",
    ],
)
def test_a_program_without_end_is_ended(program: str) -> None:
    outcome = sandbox.run(program, seconds=0.6)
    assert outcome[:2] == (False, "timeout")
    assert len(outcome.output) <= sandbox.OUTPUT
    assert not left_behind()


def test_much_output_is_dropped_and_no_failure() -> None:
    outcome = sandbox.run("for _ in range(1000): print('x' * 1000)")
    assert outcome.passed
    assert outcome.output == ("x" * 1000 + "\n") * 65 + "x" * (sandbox.OUTPUT - 65 * 1001)


@LINUX
def test_what_a_program_started_ends_with_it() -> None:
    if not sandbox.isolation().command:
        pytest.skip("no namespaces here")
    children = "import os, time\nfor _ in range(20):\n if os.fork() == 0:\n  os.setsid()\n  time.sleep(100)\n"
    assert sandbox.run(children).passed
    assert not left_behind()
    assert sandbox.run(children + "time.sleep(100)", seconds=0.6).status == "timeout"
    assert not left_behind()


@LINUX
def test_processes_are_few() -> None:
    if os.geteuid() == 0 and not sandbox.isolation().drop:
        pytest.skip("root has no limit of processes, and cannot become nobody: the interpreter's files are root's")
    outcome = sandbox.run("import os, time\nwhile True:\n if os.fork() == 0: time.sleep(100)", seconds=5.0)
    assert "Resource temporarily unavailable" in outcome.output
    assert not left_behind()


def test_the_environment_and_the_folder_are_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "password")
    outcome = sandbox.run("import os\nprint(dict(os.environ), os.listdir())")
    assert outcome.passed
    assert "SECRET" not in outcome.output
    assert outcome.output.endswith(" []\n")


@LINUX
def test_the_parents_environment_is_out_of_reach() -> None:
    if not sandbox.isolation().command:
        pytest.skip("no namespaces here")
    outcome = sandbox.run(f"print(open('/proc/{os.getpid()}/environ').read())")
    assert not outcome.passed
    assert "PermissionError" in outcome.output


@LINUX
def test_there_is_no_network() -> None:
    if not sandbox.isolation().command:
        pytest.skip("no namespaces here")
    program = "import socket\nsocket.create_connection(('127.0.0.1', {}), 2)"
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port), 2).close()  # from out here it can be reached
        outcome = sandbox.run(program.format(port))
    assert "Network is unreachable" in outcome.output


def test_a_machine_that_cannot_limit_a_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox.isolation.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(os, "name", "nt")
        with pytest.raises(UnsupportedError, match="POSIX systems only"):
            sandbox.run("pass")
    with monkeypatch.context() as patch:
        patch.setattr(sandbox, "PROBE", "raise OSError('no limits here')")
        with pytest.raises(UnsupportedError, match="cannot be contained here: OSError: no limits here"):
            sandbox.run("pass")
    sandbox.isolation.cache_clear()
