"""Commands in processes of their own that begin at once and can be killed: forked from one that has all imports.

The parent half is `Zygote`; the process itself is this module, run as a script. A command may be told to kill itself
(SIGKILL) in a stage of a round, or before one of the file operations by which its driver finishes a round.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
KILLED = -signal.SIGKILL


class Zygote:
    """Starts `python -m pipelines.MODULE ARGUMENTS` without the seconds that its imports take."""

    def __init__(self, folder: Path) -> None:
        """`folder` is for the commands' output."""
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._count = 0
        assert self._read() == {"ready": True}

    def start(
        self,
        module: str,
        arguments: Sequence[str],
        die_at: int = 0,
        count: bool = False,
        pause: float = 0.0,
        die_in: str = "",
    ) -> "Child":
        """Begins a command; it kills itself before file operation `die_at` of the first round that it finishes, or once
        sites have done what they are asked in stage `die_in` of a round's update, or in "score" after the last round.
        `count` has it say how many there are, in the last line of its output. It rests for `pause` seconds before it
        finishes a round."""
        self._count += 1
        log = self._folder / f"{self._count}.log"
        log.touch()
        asked = {"die_at": die_at, "count": count, "pause": pause, "die_in": die_in}
        self._write(module=module, arguments=list(arguments), log=str(log), **asked)
        return Child(self, self._read()["pid"], log)

    def run(
        self, module: str, arguments: Sequence[str], die_at: int = 0, count: bool = False, die_in: str = ""
    ) -> tuple[int, str]:
        """A command to its end: exit status (negative for a signal) and output."""
        return self.start(module, arguments, die_at, count, die_in=die_in).wait()

    def close(self) -> None:
        """Ends it; its children have been waited for."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.kill()  # an orderly end takes a process with so many imports seconds
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()

    def _write(self, **what: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


class Child:
    """A command under way."""

    def __init__(self, zygote: Zygote, pid: int, log: Path) -> None:
        self._zygote, self.pid, self.log = zygote, pid, log

    def signal(self, number: int) -> None:
        """Sends a signal."""
        os.kill(self.pid, number)

    def wait_for(self, words: str, seconds: float = 120) -> None:
        """Returns once the output has these words."""
        end = time.monotonic() + seconds
        while words not in self.log.read_text():
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.02)

    def wait(self) -> tuple[int, str]:
        """Exit status (negative for a signal) and output."""
        self._zygote._write(wait=self.pid)
        return self._zygote._read()["status"], self.log.read_text()


def _serve() -> None:
    from pipelines import federate, resume, stop  # noqa: F401 - imported for those that are forked

    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if "wait" in asked:
            _, status = os.waitpid(asked["wait"], 0)
            print(json.dumps({"status": os.waitstatus_to_exitcode(status)}), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            _run(asked)
        print(json.dumps({"pid": pid}), flush=True)


def _run(asked: dict[str, Any]) -> None:
    log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if asked["die_at"] or asked["count"]:
        _count_operations(asked["die_at"], asked["count"])
    if asked["die_in"]:
        _die_in(asked["die_in"])
    if asked["pause"]:
        _rest(asked["pause"])
    from importlib import import_module

    module = import_module(f"pipelines.{asked['module']}")
    status = 0
    try:
        (module.STAGE.main if hasattr(module, "STAGE") else module.main)(asked["arguments"])
    except SystemExit as ended:
        status = int(ended.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _rest(seconds: float) -> None:
    from pipelines.recorder import Recorder

    original = Recorder.after_round

    def after_round(self: Recorder, *arguments: Any) -> None:
        time.sleep(seconds)
        original(self, *arguments)

    Recorder.after_round = after_round  # type: ignore[method-assign]


def _die_in(stage: str) -> None:
    """The driver is gone when sites have answered a call, and before it makes anything of their answers."""
    from fedsam_core.federation.engine import InProcessEngine

    original, task = InProcessEngine.call, ""

    def call(self: InProcessEngine, method: str, args: Any, *rest: Any) -> Any:
        nonlocal task
        if method == "advertise":
            asked = next(iter(args.values()))
            task = asked["task"]["purpose"] if json.loads(asked["attempt"])["round"] else ""
        replies = original(self, method, args, *rest)
        if method == stage and task == ("scores" if stage == "score" else "update"):
            os.kill(os.getpid(), signal.SIGKILL)
        return replies

    InProcessEngine.call = call  # type: ignore[method-assign]


def _count_operations(die_at: int, count: bool) -> None:
    """Counts what changes files while the driver finishes a round, in its own thread."""
    import threading

    from pipelines.recorder import Recorder

    done = 0
    counting = False

    def counted(name: str) -> None:
        original = getattr(os, name)

        def operation(*arguments: Any, **options: Any) -> Any:
            nonlocal done
            if counting and threading.current_thread() is threading.main_thread():
                done += 1
                if done == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        setattr(os, name, operation)

    for name in ("replace", "link", "unlink", "mkdir", "rmdir", "fsync", "chmod"):
        counted(name)
    original = Recorder.after_round

    def after_round(self: Recorder, *arguments: Any) -> None:
        nonlocal counting
        counting = True
        try:
            original(self, *arguments)
        finally:
            counting = False
            if count:
                print(f"operations: {done}", flush=True)

    Recorder.after_round = after_round  # type: ignore[method-assign]


if __name__ == "__main__":
    _serve()
