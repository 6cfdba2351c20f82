"""`fedsam stop RUN`: ends a run within seconds, wherever its driver is; `fedsam resume RUN` goes on with it.

The request lies beside the lease that the driver holds, in the results store or the run's folder. The driver ends its
sites, frees what they hold, and closes the MLflow run as KILLED. Ctrl-C and SIGTERM to the command that started the
run, and `ray job stop`, do the same.
"""

import sys
import time
from collections.abc import Sequence

from cluster.lease import STALE_SECONDS, ask_to_stop, described, is_over, last_beat, newest
from fedsam_core.errors import ClusterError, ConfigError
from pipelines import console
from pipelines.checkpoints import finished_rounds
from pipelines.commits import last_committed, results_store
from pipelines.config import Config
from pipelines.resume import config_of_run, resume_parser
from pipelines.run_folder import RunFolder
from pipelines.stage import guarded

_PATIENCE_SECONDS = 60.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Stops, and exits with 0 once the run has ended."""
    options = resume_parser("fedsam stop", __doc__ or "").parse_intermixed_args(arguments)
    sys.exit(guarded(lambda: stop(config_of_run(options.run, options.overrides))))


def stop(config: Config) -> None:
    """Asks the run's driver to end, and waits until it has.

    Raises:
        ConfigError: the run has no driver.
        ClusterError: it gives no sign, or does not end.
    """
    store, run = results_store(config), str(config.run)
    number, holder = newest(store, run)
    if holder is None or is_over(store, run, number, holder):
        raise ConfigError(f"run {run} is not running: `fedsam resume {run}` goes on with it, if it is not finished")
    ask_to_stop(store, run, number)
    console.out.print(console.plain(f"asked {described(holder)} to stop run {run}"))
    end = time.monotonic() + _PATIENCE_SECONDS
    beat, changed = last_beat(store, run, number), time.monotonic()
    while not is_over(store, run, number, holder):
        time.sleep(0.2)
        if (now := last_beat(store, run, number)) != beat:
            beat, changed = now, time.monotonic()
        if time.monotonic() - changed > STALE_SECONDS or time.monotonic() > end:
            raise ClusterError(
                f"{described(holder)}, which drives run {run}, was last heard of {beat} and does not end: kill it "
                f"there; `fedsam resume {run}` takes over what gives no sign for {STALE_SECONDS:g} s"
            )
    said = f"run {run} has ended after round {last_round(config)}: `fedsam resume {run}` goes on"
    console.out.print(console.plain(said))


def last_round(config: Config) -> int:
    """The last finished round of the run that the configuration names; -1 before there is a checkpoint."""
    run = str(config.run)
    here = finished_rounds(RunFolder(config.work_dir / "runs" / run))
    there = -1 if config.storage.results is None else last_committed(results_store(config), run)
    return max([*here, there])


if __name__ == "__main__":
    main()
