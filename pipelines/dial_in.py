"""Runs whose sites dial in: opening the gateway, and the engines of a run and of its preparation."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from cluster.gateway.aggregator import Gateway, GatewayEngine
from cluster.gateway.hospital import federate_beginning, prepare_beginning
from fedsam_core.data.cohort import list_cohort
from fedsam_core.errors import ConfigError
from fedsam_core.federation.preparation import CohortSpec
from fedsam_core.federation.site import SiteSpec
from pipelines import console
from pipelines.config import Config


@contextmanager
def gateway_session(config: Config) -> Iterator[Gateway | None]:
    """The gateway with all sites connected; None where the configured engine is another.

    Raises:
        ConfigError: a setting that hospitals of their own cannot go by.
        ClusterError: the address is taken, or a site does not dial in.
    """
    if config.engine.kind != "gateway":
        yield None
        return
    with Gateway(config.engine.gateway, _sites(config)) as gateway:
        gateway.wait(partial(_tell, config.engine.gateway.listen))
        yield gateway


def preparing_engine(gateway: Gateway, location: str, specs: Sequence[CohortSpec]) -> GatewayEngine:
    """An engine over sites that prepare; what is at `location` here is elsewhere there, under the same name."""
    name = _name(location)
    return gateway.engine("prepare", {spec.site: prepare_beginning(spec, name) for spec in specs})


def run_engine(gateway: Gateway, config: Config, specs: Sequence[SiteSpec]) -> GatewayEngine:
    """An engine over the sites of a run."""
    return gateway.engine("federate", {s.site: federate_beginning(s, _name(s.cohort, 2)) for s in specs})


def _name(location: str, last: int = 1) -> str:
    return location.rstrip("/").split("/")[-last]


def _sites(config: Config) -> tuple[str, ...]:
    """Whom the run waits for."""
    if config.federation.roster is None:
        raise ConfigError("engine.kind=gateway needs the consortium's keys: set federation.roster (see `fedsam keys`)")
    if config.cohort.sites is not None:
        return tuple(sorted(config.cohort.sites))
    if config.cohort.source != "phantom":
        raise ConfigError(
            "engine.kind=gateway: every hospital has a folder of its own. Name them: cohort.sites={charite: own, ucl: "
            "own}; where the folder is, each says in its own file"
        )
    return tuple(sorted({files.site for files in list_cohort(config.cohort, config.work_dir).cases}))


def _tell(listen: str, missing: Sequence[str]) -> None:
    if missing:
        console.out.print(f"at {listen}, waiting for {', '.join(missing)} to dial in (`fedsam site serve` there)")
    else:
        console.out.print("all sites are connected")
