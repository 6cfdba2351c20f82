"""`fedsam demo`: a federation of three synthetic hospitals on this machine.

Starts a local Ray cluster, prepares the phantom cohort, submits the federation as a Ray job, follows it, and stops what
it started. Needs no GPU, no account and no scans.
"""

import argparse
import sys
from collections.abc import Sequence

from cluster import jobs
from pipelines import console, prepare
from pipelines.config import Config, load_config
from pipelines.stage import guarded
from pipelines.submit import stage_command, submit


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the demo."""
    parser = argparse.ArgumentParser(
        prog="fedsam demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the demo's own")
    parser.add_argument("--tls", action="store_true", help="encrypt what Ray's processes say to each other")
    options = parser.parse_intermixed_args(arguments)
    sys.exit(guarded(lambda: demo(load_config("demo", options.overrides), options.tls)))


def demo(config: Config, tls: bool = False) -> None:
    """Prepares, federates as a Ray job, and leaves nothing running."""
    console.out.print("[bold]1/3[/] the cohort: three hospitals with a different scanner each")
    prepare.run(config)
    console.out.print("\n[bold]2/3[/] a local Ray cluster")
    with jobs.local_cluster(tls=tls) as address:
        console.out.print(f"Ray is up: dashboard and jobs at {address}")
        console.out.print("\n[bold]3/3[/] the federation, as a Ray job")
        submit(stage_command("federate", config), address)
    console.out.print("Ray is stopped.")
