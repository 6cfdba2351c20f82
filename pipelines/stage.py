"""What all stages share: their arguments, their help, and how an error ends them."""

import argparse
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedsam_core.errors import FedsamError
from pipelines import console
from pipelines.config import Config, configs, describe, load_config

INTERRUPTED = 130
FAILED = 2


@dataclass(frozen=True)
class Stage:
    """A step of the workflow: runs as `fedsam NAME`, as `python -m pipelines.NAME` and as a Ray job."""

    name: str
    doc: str
    run: Callable[[Config], None]

    def main(self, arguments: Sequence[str] | None = None) -> None:
        """Parses the arguments, runs the stage, and exits with its status."""
        parser = argparse.ArgumentParser(
            prog=f"fedsam {self.name}",
            description=self.doc,
            epilog=_keys(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_config_arguments(parser)
        options = parser.parse_intermixed_args(arguments)
        sys.exit(guarded(lambda: self.run(config_from(options))))


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """`--config FILE key=value ... [--strict]`."""
    parser.add_argument(
        "--config", metavar="FILE", help=f"YAML file, or a committed experiment: {', '.join(configs())}"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file")
    parser.add_argument(
        "--strict", action="store_true", help="stop at the first case that cannot be used (cohort.strict=true)"
    )


def config_from(options: argparse.Namespace) -> Config:
    """The configuration that these arguments ask for. Raises ConfigError."""
    strict = ["cohort.strict=true"] if options.strict else []
    return load_config(options.config, [*options.overrides, *strict])


def guarded(work: Callable[[], None]) -> int:
    """Runs `work`; a `FedsamError` becomes one line on stderr. Returns the exit status.

    SIGTERM ends it as Ctrl-C does: what is open is closed, and a run can be resumed.
    """
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, _terminated)
    try:
        work()
    except FedsamError as error:
        console.err.print(f"[bold red]error:[/] {console.plain(' '.join(str(error).split()))}")
        return FAILED
    except PermissionError as error:
        where = console.plain(str(error.filename or "a file"))
        console.err.print(f"[bold red]error:[/] {where}: {error.strerror}; check the rights of the file and its folder")
        return FAILED
    except KeyboardInterrupt as error:
        console.err.print(console.plain(str(error) or "interrupted"))
        return INTERRUPTED
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return 0


def interrupt() -> None:
    """Ends what `guarded` runs, from another thread, wherever it is. Not by SIGINT where that can be helped: a shell's
    background jobs ignore it."""
    heeded = callable(signal.getsignal(signal.SIGTERM))
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM if heeded else signal.SIGINT)


def _terminated(number: int, frame: object) -> None:
    raise KeyboardInterrupt("terminated")


def _keys() -> str:
    rows = describe()
    width = max(len(key) for key, _, _ in rows) + 2
    lines = [f"  {key:<{width}}{meaning} [{default}]" for key, default, meaning in rows]
    return "settings, as key=value or as YAML (defaults in brackets):\n" + "\n".join(lines)
