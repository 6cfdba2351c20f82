"""Groups of like values in the flat vector of shared parameters: each has its own clip, and its own lanes.

LoRA's A and B are apart, because B starts from zero. Where sites have different ranks, LoRA's rows (of A) and columns
(of B) fall into bands: a band is summed over the sites whose rank reaches it.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedsam_core.selection import ALL_KINDS, Kind, ManifestEntry, ParameterManifest


@dataclass(frozen=True)
class Group:
    """Values that are clipped and rounded alike.

    Attributes:
        index: intp [size], their places in the manifest's flat vector, upwards.
        sites: who has them; None for all.
    """

    index: NDArray[np.intp]
    sites: tuple[str, ...] | None = None


def tensor_groups(
    manifest: ParameterManifest,
    kinds: Collection[Kind] = ALL_KINDS,
    sites: Sequence[str] = (),
    ranks: Mapping[str, int] | None = None,
) -> dict[str, Group]:
    """The groups of the shared values of these kinds, by name, in the manifest's order.

    Args:
        sites: of the run.
        ranks: by site, where a site's LoRA rank is lower than the selection's; see `bands`.
    """
    known = tuple(sorted(ranks.items())) if ranks else ()
    return dict(_groups(manifest.shared, frozenset(kinds), tuple(sites) if known else (), known))


@lru_cache(maxsize=4)  # of a run: all kinds, and those of each stage; sites in one process share them, 8 bytes a value
def _groups(
    shared: Sequence[ManifestEntry], kinds: Collection[Kind], sites: Sequence[str], ranks: Sequence[tuple[str, int]]
) -> dict[str, Group]:
    places: dict[str, list[NDArray[np.intp]]] = {}
    members: dict[str, tuple[str, ...] | None] = {}
    stop = 0
    for entry in shared:
        start, stop = stop, stop + entry.numel
        if entry.kind not in kinds:
            continue
        flat = np.arange(start, stop, dtype=np.intp)
        name = entry.group if entry.kind == "whole" else f"{entry.group}.{entry.kind[-1]}"
        for suffix, part, who in _parts(entry, flat, sites, dict(ranks)):
            places.setdefault(name + suffix, []).append(part)
            members[name + suffix] = who
    groups = {name: Group(np.concatenate(parts), members[name]) for name, parts in places.items()}
    for group in groups.values():
        group.index.setflags(write=False)
    return groups


def bands(rank: int, sites: Sequence[str], ranks: Mapping[str, int]) -> list[tuple[int, int, tuple[str, ...] | None]]:
    """First and last (exclusive) component of each band of a LoRA of this rank, and the sites that have it."""
    reach = {site: min(ranks.get(site, rank), rank) for site in sites}
    edges = sorted({rank, *reach.values()})
    found: list[tuple[int, int, tuple[str, ...] | None]] = []
    for low, high in zip([0, *edges[:-1]], edges, strict=True):
        who = tuple(site for site in sorted(sites) if reach[site] >= high)
        found.append((low, high, None if len(who) == len(sites) else who))
    return found


def beyond_rank(manifest: ParameterManifest, rank: int) -> NDArray[np.intp]:
    """Places (intp) in the flat vector of the LoRA components that a site of this rank does not have."""
    places: list[NDArray[np.intp]] = [np.empty(0, np.intp)]
    for entry in manifest.shared:
        place = manifest.places[entry.name]
        table = np.arange(place.start, place.stop, dtype=np.intp).reshape(entry.shape)
        if entry.kind == "lora_A":
            places.append(table[rank:].ravel())
        elif entry.kind == "lora_B":
            places.append(table[:, rank:].ravel())
    return np.sort(np.concatenate(places))


def _parts(
    entry: ManifestEntry, flat: NDArray[np.intp], sites: Sequence[str], ranks: Mapping[str, int]
) -> list[tuple[str, NDArray[np.intp], tuple[str, ...] | None]]:
    """An entry's places, cut into bands: (suffix of the group's name, places, sites)."""
    if entry.kind == "whole" or not ranks:
        return [("", flat, None)]
    rank = entry.shape[0] if entry.kind == "lora_A" else entry.shape[1]
    table = flat.reshape(entry.shape)
    found = []
    for low, high, who in bands(rank, sites, ranks):
        part = table[low:high] if entry.kind == "lora_A" else table[:, low:high]
        found.append((f"[{low}:{high}]", part.ravel(), who))
    return found
