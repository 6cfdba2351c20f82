"""Which node and which GPU is whose: pure functions over what the cluster says it has.

A site's own node announces the custom resource `site_<id>`, with the id exactly as it stands in the cohort:
`ray start --address=HEAD:6379 --resources='{"site_RUNMC": 1}'`. A site whose resource exists is pinned to it; where no
site of the run has one (a laptop, a single big machine) sites go wherever there is room.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import ray
from pydantic import Field, field_validator

from fedsam_core.errors import ClusterError
from fedsam_core.settings import Settings

# Actors hold a sliver of their site's resource: it pins them, and leaves room for a second run at the same site.
_PIN = 0.001
_PARTS = 10_000  # the finest share of a resource that Ray books
_SITE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class SiteNeeds(Settings):
    """What one site's actor asks of Ray."""

    cpus: float = Field(
        0.5, ge=0, description="CPUs that a site's actor reserves; half a CPU lets three sites share a laptop's two"
    )
    gpus: float | None = Field(
        None,
        ge=0,
        description="GPUs a site reserves (a fraction shares one); unset: one, or an equal share where nodes have "
        "fewer GPUs than sites, or none where they have none",
    )
    pin: Literal["auto", "always", "never"] = Field(
        "auto",
        description="hold each site to nodes with its resource site_<id>: auto = where the cluster has such resources",
    )

    @field_validator("gpus")
    @classmethod
    def _whole_beyond_one(cls, gpus: float | None) -> float | None:
        if gpus is not None and gpus > 1 and gpus != int(gpus):
            raise ValueError("more than one GPU must be a whole number of them")
        return gpus


@dataclass(frozen=True)
class Node:
    """A living node: its address and what it has in all (not what is free)."""

    name: str
    cpus: float = 0.0
    gpus: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)
    id: str = ""


@dataclass(frozen=True)
class ActorOptions:
    """What a site's actor is created with."""

    cpus: float
    gpus: float
    resources: Mapping[str, float]

    def to_ray(self) -> dict[str, Any]:
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, "resources": dict(self.resources)}


def site_resource(site: str) -> str:
    """Name of the custom resource that stands for a site's own node.

    Raises:
        ClusterError: the id cannot be part of a resource name.
    """
    if not _SITE_ID.fullmatch(site):
        raise ClusterError(
            f"site id {site!r} cannot name a Ray resource: use letters, digits, '_', '.' and '-', and begin with a "
            "letter or digit"
        )
    return f"site_{site}"


def cluster_nodes() -> tuple[Node, ...]:
    """The living nodes of the connected cluster, with what they have in all."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return tuple(
        Node(
            name=node["NodeManagerAddress"],
            cpus=node["Resources"].get("CPU", 0.0),
            gpus=node["Resources"].get("GPU", 0.0),
            resources=dict(node["Resources"]),
            id=node["NodeID"],
        )
        for node in nodes
        if node["Alive"]
    )


def plan(sites: Iterable[str], nodes: Sequence[Node], needs: SiteNeeds) -> dict[str, ActorOptions]:
    """What each site's actor is created with. Says what is wanted; whether it can be had is `preflight`'s."""
    sites = sorted(sites)
    pinned = needs.pin == "always" or (needs.pin == "auto" and any(home_nodes(site, nodes) for site in sites))
    options = {}
    for site in sites:
        own = _own_share(site, sites, nodes) if pinned else _share(len(sites), nodes)
        options[site] = ActorOptions(
            cpus=needs.cpus,
            gpus=needs.gpus if needs.gpus is not None else own,
            resources={site_resource(site): _PIN} if pinned else {},
        )
    return options


def _own_share(site: str, sites: Sequence[str], nodes: Sequence[Node]) -> float:
    """GPUs of a pinned site: it has one if its own nodes have, whatever the neighbours have. Of several with GPUs the
    most crowded node decides: Ray may put it there."""
    homes = [node for node in home_nodes(site, nodes) if node.gpus > 0]
    return min((_share(sum(bool(home_nodes(one, [node])) for one in sites), [node]) for node in homes), default=0.0)


def _share(sites: int, nodes: Sequence[Node]) -> float:
    """GPUs for each of so many sites on the same nodes: one, or as large a part of one as gives all of them theirs."""
    gpus = sum(int(node.gpus) for node in nodes)
    if not gpus:
        return 0.0
    return 1.0 if sites <= gpus else math.floor(_PARTS / math.ceil(sites / gpus)) / _PARTS


def preflight(sites: Iterable[str], nodes: Sequence[Node], needs: SiteNeeds) -> None:
    """Finds out whether all sites fit into the cluster at once; a Ray actor that does not fit would wait for ever.

    Raises:
        ClusterError: names every site that does not fit, what it lacks, what the cluster has, and the fix.
    """
    sites = sorted(sites)
    if not nodes:
        raise ClusterError("the Ray cluster has no living node: start one with `ray start --head`")
    wanted = plan(sites, nodes, needs)
    free = {id(node): _Free(node.cpus, [_PARTS] * int(node.gpus)) for node in nodes}
    problems = []
    for site in sites:
        options = wanted[site]
        homes = home_nodes(site, nodes) if options.resources else nodes
        if not homes:
            resource = site_resource(site)
            known = sorted({name for node in nodes for name in node.resources if name.startswith("site_")})
            problems.append(
                f"site {site} needs the resource {resource}, the cluster has "
                f"{', '.join(known) or 'no site_* resource'}: "
                f"start its node with --resources='{{\"{resource}\": 1}}' or set pin=never"
            )
            continue
        if not any(free[id(node)].take(options) for node in homes):
            problems.append(_no_room(site, options, homes, free))
    if problems:
        raise ClusterError("; ".join(problems))


def home_nodes(site: str, nodes: Sequence[Node]) -> list[Node]:
    """The nodes that announce the site's resource."""
    return [node for node in nodes if node.resources.get(site_resource(site), 0.0) > 0]


@dataclass
class _Free:
    """What a node has left: CPUs, and of each GPU so many of its parts, since a share of one never spreads over two."""

    cpus: float
    gpus: list[int]

    def places(self, gpus: float) -> list[int]:
        """The GPUs that such a need would be met by: one for a share, several whole ones, or too few."""
        fit = [index for index, left in enumerate(self.gpus) if left >= _parts(gpus)]
        return fit[: math.ceil(gpus)]

    def take(self, options: ActorOptions) -> bool:
        """Books what an actor asks for, all of it or nothing; whether it was there."""
        places = self.places(options.gpus)
        if self.cpus < options.cpus or len(places) < math.ceil(options.gpus):
            return False
        self.cpus -= options.cpus
        for index in places:
            self.gpus[index] -= _parts(options.gpus)
        return True


def _parts(gpus: float) -> int:
    """Of one GPU, what such a need takes: Ray cuts what is finer than its parts off."""
    return int(_PARTS * min(gpus, 1) + 1e-6)


def _no_room(site: str, options: ActorOptions, homes: Sequence[Node], free: Mapping[int, _Free]) -> str:
    """One line on a site for which no node has enough left: what it asks for and what its nodes have."""
    where = "its nodes" if options.resources else "the nodes"
    offers = ", ".join(
        f"{node.name} {free[id(node)].cpus:g} of {node.cpus:g} CPU and {sum(free[id(node)].gpus) / _PARTS:g} of "
        f"{node.gpus:g} GPU"
        for node in homes
    )
    fixes = []
    if all(free[id(node)].cpus < options.cpus for node in homes):
        fixes.append("lower cpus or add CPUs")
    if all(len(free[id(node)].places(options.gpus)) < options.gpus for node in homes):
        fixes.append("lower gpus (a fraction shares one) or add GPUs")
    return (
        f"site {site} needs {options.cpus:g} CPU and {options.gpus:g} GPU on one node, {where} have left after the "
        f"other sites: {offers}: {' and '.join(fixes) or 'lower cpus or gpus, or add a node'}"
    )
