"""Processes of their own, without a new interpreter that imports torch and transformers anew.

They are forked from a server that has imported these two, and nothing of prunekit or of the tests.
What must begin with a new interpreter (the command line, what an import imports) is for
`subprocess`.
"""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["torch", "transformers.models.llama.modeling_llama"])


def _run(code, arguments, folder, output, environment):
    """What the process does: it is in its folder, and writes to two files, before any code runs."""
    os.chdir(folder)
    os.environ.update(environment)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}/{name}", os.O_WRONLY | os.O_CREAT), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})


class Python:
    """`python -c code arguments…`, started in a folder."""

    def __init__(self, code, *arguments, cwd, **environment):
        self.output = tempfile.TemporaryDirectory()
        given = (code, [*map(str, arguments)], str(cwd), self.output.name, environment)
        self.process = _SERVER.Process(target=_run, args=given)
        self.process.start()

    def finish(self, timeout=200):
        """Wait for its end, and return what `subprocess.run` returns."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise subprocess.TimeoutExpired(self.process.name, timeout)
        texts = [self.read(name) for name in ("out", "err")]
        return subprocess.CompletedProcess(self.process.name, self.process.exitcode, *texts)

    def read(self, name="out"):
        """What it has written by now."""
        path = Path(self.output.name, name)
        return path.read_text() if path.exists() else ""


def run_python(code, *arguments, cwd, **environment):
    """Run `python -c code arguments…` in a folder; what `subprocess.run` returns."""
    return Python(code, *arguments, cwd=cwd, **environment).finish()


def run_together(code, *arguments, cwd, number=2):
    """Run as many processes with the environment that torchrun gives them; their results."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_find_port())}
    place |= {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number)}
    started = [
        Python(code, *arguments, cwd=cwd, **place, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank in range(number)
    ]
    return [process.finish() for process in started]


def _find_port():
    """A free port below those that the system hands out by itself.

    One of those might go to somebody else before the first process listens on it: to the second
    process even, which tries to reach the first one meanwhile.
    """
    for port in range(20_000 + os.getpid() % 10_000, 32_000):
        with socket.socket() as tried:
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no free port")


# The command line, with the process's own arguments.
COMMAND = "import sys; sys.argv[0] = 'prunekit'; from prunekit.cli import main; main()"
