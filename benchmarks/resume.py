"""Kills runs at random moments, and in the midst of their checkpoints, and compares what resumed ones come to.

    python benchmarks/resume.py [--kills 20] [--seed 0]

Runs of three synthetic sites in one process. Each is killed (SIGKILL to the whole process) at a moment drawn between
its start and its end, every second one once more after it was resumed, and then resumed to its end. A last run is
killed before every single operation by which its driver changes a file to finish a round. All final global states, and
all that the sites keep, must equal those of runs that nobody killed; `fedsam verify` must find nothing wrong.
"""

import argparse
import random
import sys
import time
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.zygote import KILLED, Zygote

from fedsam_core.federation.state import read_note

SETTINGS = {
    "SCAFFOLD, local norms, 8 bits up and down": [
        "selection={name: own, lora: {encoder: [q, v], rank: 2}, train: [head], local: [encoder.norms]}",
        "federation.scaffold=true",
        "federation.bits=8",
        "federation.broadcast_bits=8",
    ],
    "kept optimiser, local norms, FedAdam, 12 bits down": [
        "selection={name: own, lora: {encoder: [q, v], rank: 2}, train: [head], local: [encoder.norms]}",
        "learning.keep_optimizer=true",
        "federation.strategy.kind=fedadam",
        "federation.broadcast_bits=12",
    ],
    "product-sketch, 16 bits up, 8 down": [
        "selection=flap",
        "rank=2",
        "federation.rule=product-sketch",
        "federation.bits=16",
        "federation.broadcast_bits=8",
    ],
}


class Runs:
    """Runs in one working folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.zygote = Zygote(folder / "logs")

    def settings(self, run: str, rounds: int, more: list[str]) -> list[str]:
        return [
            "name=small",
            f"run={run}",
            f"work_dir={self.folder}",
            "cohort.name=small",
            "cohort.source=phantom",
            "cohort.phantom.cases_per_site=4",
            "cohort.phantom.test_per_site=1",
            "cohort.phantom.shape=[10, 32, 32]",
            "model.backbone=vit_t",
            "model.image_size=32",
            "engine.kind=in-process",
            f"federation.rounds={rounds}",
            f"federation.site_dir={self.folder / 'sites'}",
            "learning.local_steps=2",
            *more,
        ]

    def command(self, run: str, more: list[str]) -> tuple[str, list[str]]:
        """What goes on with a run, or begins it where it was killed before that."""
        if (self.folder / "runs" / run / "run.json").is_file():
            return "resume", [run, f"work_dir={self.folder}"]
        return "federate", self.settings(run, 4, more)

    def result(self, run: str) -> str:
        """Hash of the last global state and of all that the sites keep for themselves."""
        found = sha256(
            read_note((self.folder / "runs" / run / "state.safetensors").read_bytes())["state_hash"].encode()
        )
        for path in sorted((self.folder / "sites" / run).rglob("*.safetensors")):
            found.update(path.relative_to(self.folder / "sites" / run).as_posix().encode() + path.read_bytes())
        return found.hexdigest()

    def goes_well(self, module: str, arguments: list[str]) -> str:
        """A command that must end well; its output."""
        status, said = self.zygote.run(module, arguments)
        assert status == 0, said
        return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="runs that are killed at a random moment")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    with TemporaryDirectory(prefix="fedsam-resume-") as folder:
        runs = Runs(Path(folder))
        try:
            wrong = random_moments(runs, options.kills, random.Random(options.seed))
            wrong += every_operation(runs)
        finally:
            runs.zygote.close()
    sys.exit(1 if wrong else 0)


def random_moments(runs: Runs, kills: int, rng: random.Random) -> int:
    """How many of the killed runs did not come to the same end."""
    expected, seconds = {}, {}
    for number, (name, more) in enumerate(SETTINGS.items()):
        runs.goes_well("federate", runs.settings(f"whole-{number}", 4, more))
        began = time.monotonic()
        runs.goes_well("federate", runs.settings(f"again-{number}", 4, more))
        seconds[name] = time.monotonic() - began
        expected[name] = runs.result(f"whole-{number}")
        assert runs.result(f"again-{number}") == expected[name]
        print(f"{name}: {seconds[name]:.1f} s uninterrupted", flush=True)
    equal = 0
    for number in range(kills):
        name = list(SETTINGS)[number % len(SETTINGS)]
        run, killed = f"killed-{number}", list[str]()
        for _ in range(1 + number % 2):
            moment = rng.uniform(0, seconds[name])
            child = runs.zygote.start(*runs.command(run, SETTINGS[name]))
            time.sleep(moment)
            child.signal(9)
            status, said = child.wait()
            last = [line.split(":")[0] for line in said.splitlines() if line.startswith("round ")][-1:]
            where = last[0] if last else "before round 1"
            killed.append(f"{moment:.1f} s ({where})" if status == KILLED else "no time, it had ended")
        status, said = runs.zygote.run(*runs.command(run, SETTINGS[name]))
        assert status == 0 or "has come to its end" in said, said
        runs.goes_well("verify", [str(runs.folder / "runs" / run)])
        same = runs.result(run) == expected[name]
        equal += same
        print(f"{run}: {name}; killed at {', '.join(killed)}: {'equal' if same else 'OTHER'}", flush=True)
    print(f"{equal} of {kills} equal", flush=True)
    return kills - equal


def every_operation(runs: Runs) -> int:
    """A run that is killed before each file operation of a round's end, one after the other."""
    more = next(iter(SETTINGS.values()))
    status, said = runs.zygote.run("federate", runs.settings("counted", 2, more), count=True)
    assert status == 0, said
    operations = int(next(line for line in said.splitlines() if line.startswith("operations:")).split()[1])
    runs.goes_well("federate", runs.settings("whole", operations + 2, more))
    arguments = runs.settings("killed", operations + 2, more)
    for at in range(1, operations + 1):
        status, said = runs.zygote.run("federate", arguments, die_at=at)
        assert status == KILLED, said
    runs.goes_well("federate", arguments)
    runs.goes_well("verify", [str(runs.folder / "runs" / "killed")])
    same = runs.result("killed") == runs.result("whole")
    how = "equal" if same else "OTHER"
    print(f"killed before each of {operations} file operations of a checkpoint: {how}", flush=True)
    return int(not same)


if __name__ == "__main__":
    main()
