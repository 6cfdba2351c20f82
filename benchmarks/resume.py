"""Kills runs at random moments, and in the midst of their checkpoints, and compares what resumed ones come to.

    python benchmarks/resume.py [--kills 20] [--seed 0] [--parts moments operations asleep ray]

Runs of three synthetic sites in one process. Each is killed (SIGKILL to the whole process) after a number of rounds and
then a time that are drawn, every second one once more after it was resumed, and then resumed to its end. A last run is
killed before every single operation by which its driver changes a file to finish a round. All final global states, and
all that the sites keep, must equal those of runs that nobody killed; `fedsam verify` must find nothing wrong. Then a
driver that is held until another has taken its run over, and a run on a local Ray cluster: its driver actor is killed,
its entry point is killed, it is stopped, interrupted, and terminated as `ray job stop` does it.
"""

import argparse
import os
import random
import re
import signal
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.runs import Runs
from support.zygote import KILLED

SETTINGS = {
    "SCAFFOLD, local norms, 8 bits up and down": [
        "selection={name: own, lora: {encoder: [q, v], rank: 2}, local: [encoder.norms]}",
        "federation.scaffold=true",
        "federation.bits=8",
        "federation.broadcast_bits=8",
    ],
    "kept optimiser, local norms, FedAdam, 12 bits down": [
        "selection={name: own, lora: {encoder: [q, v], rank: 2}, local: [encoder.norms]}",
        "learning.keep_optimizer=true",
        "federation.strategy.kind=fedadam",
        "federation.broadcast_bits=12",
    ],
    "product-sketch, 16 bits up, 8 down": [
        "selection=lora",
        "rank=2",
        "federation.rule=product-sketch",
        "federation.bits=16",
        "federation.broadcast_bits=8",
    ],
}


ROUNDS = 4
PARTS = ("moments", "operations", "asleep", "ray")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="runs that are killed at a random moment")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what of it to do")
    options = parser.parse_args()
    with TemporaryDirectory(prefix="fedsam-resume-") as folder:
        runs = Runs(Path(folder), "learning.local_steps=2", f"federation.rounds={ROUNDS}")
        try:
            wrong = 0
            if "moments" in options.parts:
                wrong += random_moments(runs, options.kills, random.Random(options.seed))
            if "operations" in options.parts:
                wrong += every_operation(runs)
            if "asleep" in options.parts:
                wrong += asleep(runs)
            if "ray" in options.parts:
                wrong += on_ray(runs)
        finally:
            runs.zygote.close()
    sys.exit(1 if wrong else 0)


def random_moments(runs: Runs, kills: int, rng: random.Random) -> int:
    """How many of the killed runs did not come to the same end."""
    expected, seconds = {}, {}
    for number, (name, more) in enumerate(SETTINGS.items()):
        runs.goes_well("federate", *runs.settings(f"whole-{number}", *more))
        began = time.monotonic()
        runs.goes_well("federate", *runs.settings(f"again-{number}", *more))
        seconds[name] = time.monotonic() - began
        expected[name] = runs.result(f"whole-{number}")
        assert runs.result(f"again-{number}") == expected[name]
        print(f"{name}: {seconds[name]:.1f} s uninterrupted", flush=True)
    equal = 0
    for number in range(kills):
        name = list(SETTINGS)[number % len(SETTINGS)]
        run, killed = f"killed-{number}", list[str]()
        while len(killed) < 1 + number % 2:
            rounds, moment = rng.randint(0, ROUNDS), rng.uniform(0, seconds[name] / ROUNDS)
            child = runs.zygote.start(*runs.command(run, *SETTINGS[name]))
            while (
                _rounds(child.log.read_text()) < rounds and psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE
            ):
                time.sleep(0.02)
            time.sleep(moment)
            child.signal(signal.SIGKILL)
            status, said = child.wait()
            if status == KILLED:
                killed.append(f"{moment:.1f} s after {rounds} rounds ({_rounds(said)} told)")
            elif killed:
                break  # it was faster, but was killed once
            else:
                run += "-again"
        module, arguments = runs.command(run, *SETTINGS[name])
        status, said = runs.tries(module, *arguments)
        assert status == 0 or "has come to its end" in said, said
        same = runs.result(run) == expected[name]
        runs.goes_well("verify", str(runs.path(run)))
        equal += same
        print(f"{run}: {name}; killed at {', '.join(killed)}: {_said(same)}", flush=True)
    print(f"{equal} of {kills} equal", flush=True)
    return kills - equal


def every_operation(runs: Runs) -> int:
    """A run that is killed before each file operation of a round's end, one after the other: 1 if it came to another
    end, else 0."""
    more = next(iter(SETTINGS.values()))
    status, said = runs.zygote.run("federate", runs.settings("counted", *more), count=True)
    assert status == 0, said
    operations = int(next(line for line in said.splitlines() if line.startswith("operations:")).split()[1])
    more = [*more, f"federation.rounds={operations + 2}"]
    runs.goes_well("federate", *runs.settings("whole", *more))
    for at in range(1, operations + 1):
        status, said = runs.zygote.run("federate", runs.settings("killed", *more), die_at=at)
        assert status == KILLED, said
    runs.goes_well("federate", *runs.settings("killed", *more))
    runs.goes_well("verify", str(runs.path("killed")))
    same = runs.result("killed") == runs.result("whole")
    print(f"killed before each of {operations} file operations of a checkpoint: {_said(same)}", flush=True)
    return int(not same)


def asleep(runs: Runs) -> int:
    """A run whose driver is held (SIGSTOP) until another has taken the run over: 1 if either ends otherwise than it
    should, else 0."""
    more = next(iter(SETTINGS.values()))
    runs.goes_well("federate", *runs.settings("awake", *more))
    first = runs.zygote.start("federate", runs.settings("asleep", *more), pause=1)
    first.wait_for("round 1:")
    first.signal(signal.SIGSTOP)
    began = time.monotonic()
    second = runs.zygote.start("federate", runs.settings("asleep", *more), pause=1)
    second.wait_for("goes on after round ")
    taken = time.monotonic() - began
    first.signal(signal.SIGCONT)
    status, said = first.wait()
    same = status == 2 and "was taken over by another driver" in " ".join(said.split())
    status, said = second.wait()
    same = same and status == 0 and runs.result("asleep") == runs.result("awake")
    same = same and runs.in_mlflow("asleep").info.status == "FINISHED"
    runs.goes_well("verify", str(runs.path("asleep")))
    print(f"a driver that was asleep, taken over after {taken:.1f} s: {_said(same)}", flush=True)
    return int(not same)


def on_ray(runs: Runs) -> int:
    """A run on a local Ray cluster whose driver actor, then whose entry point is killed, which is then stopped,
    interrupted and terminated, each in another round: 1 if it came to another end, or left a process behind, else 0."""
    more = [*next(iter(SETTINGS.values())), "federation.rounds=30", "engine.site.cpus=0.2"]
    runs.goes_well("federate", *runs.settings("whole-ray", *more))
    left = set[int]()
    for how in ("driver actor", "entry point", "stop", "Ctrl-C", "SIGTERM"):
        child = runs.zygote.start("federate", runs.settings("on-ray", *more, "engine.kind=ray"))
        child.wait_for(": loss ", 300)  # a round more than before
        inside = {process.pid for process in psutil.Process(child.pid).children(recursive=True)}
        began = time.monotonic()
        if how == "driver actor":
            found = re.search(r"driver: process (\d+)", child.log.read_text())
            assert found
            os.kill(int(found[1]), signal.SIGKILL)
        elif how == "stop":
            runs.goes_well("stop", "on-ray", f"work_dir={runs.folder}")
        else:
            signals = {"entry point": signal.SIGKILL, "Ctrl-C": signal.SIGINT, "SIGTERM": signal.SIGTERM}
            child.signal(signals[how])
        status, said = child.wait()
        while alive := set(filter(_lives, inside)):
            # After SIGKILL two of Ray's agents wait for a minute for the head, which is gone, to tell it so.
            if time.monotonic() - began > 180:
                break
            time.sleep(0.1)
        left |= alive
        seconds = time.monotonic() - began
        print(
            f"{how}: status {status}, {len(inside)} processes gone after {seconds:.1f} s, {len(alive)} left", flush=True
        )
        print("    " + said.strip().splitlines()[-1], flush=True)
    runs.goes_well("federate", *runs.settings("on-ray", *more, "engine.kind=ray"))
    runs.goes_well("verify", str(runs.path("on-ray")))
    same = runs.result("on-ray") == runs.result("whole-ray")
    print(f"on Ray, resumed five times: {_said(same)}", flush=True)
    return int(not same or bool(left))


def _lives(pid: int) -> bool:
    """Whether a process is there, and not only waits for its parent to take note of its end."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _rounds(said: str) -> int:
    """How many rounds a command has told of."""
    return sum(line.startswith("round ") and "loss" in line for line in said.splitlines())


def _said(same: bool) -> str:
    return "equal" if same else "OTHER"


if __name__ == "__main__":
    main()
