"""What a node finds when it looks at itself: versions, clock, disks, GPUs, keys, prepared scans.

`look` is a plain function that needs no Ray; `look_at_nodes` has every node of a cluster call it. Whoever asks judges
the answers (`pipelines.doctor`). No answer holds a secret: of a site's key the public part, of credentials their kind.
"""

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.store import open_store
from fedsam_core.data.cohort import CohortConfig, list_cohort
from fedsam_core.data.preprocess import MANIFEST, PreparedCohort
from fedsam_core.errors import DataError, FedsamError
from fedsam_core.federation.config import FederationConfig
from fedsam_core.federation.engine import describe_failure
from fedsam_core.federation.policy import read_policy
from fedsam_core.hashing import file_sha256, stable_hash
from fedsam_core.secagg.keyfiles import passphrase_from_environment, read_identity, read_roster

PACKAGES = ("torch", "ray", "numpy", "peft", "monai", "segment-anything", "cryptography", "safetensors")
"""Whose versions decide whether nodes understand each other and compute the same."""

_GPU_QUERY = ("nvidia-smi", "--query-gpu=name,memory.total,memory.used", "--format=csv,noheader,nounits")

T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """What a node is to look at.

    Attributes:
        sites: whose node it is, or may be.
        shares: where each site's prepared share is.
        cohort: where the scans are.
        work_dir: of the run, where a phantom lies.
        federation: names roster and keys.
        checkpoint: SAM's weights.
        folders: whose disks are looked at; they need not exist.
        s3_endpoint: of the stores.
        s3: whether anything lies in a bucket.
        code_hash: gives the hash of fedsam's sources where it is called.
        read_all: read every prepared case, not just the list of them.
    """

    sites: tuple[str, ...]
    shares: Mapping[str, str]
    cohort: CohortConfig
    work_dir: Path
    federation: FederationConfig
    checkpoint: Path | None
    folders: tuple[Path, ...]
    s3_endpoint: str | None
    s3: bool
    code_hash: Callable[[], str]
    read_all: bool = True


@dataclass(frozen=True)
class Gpu:
    """A GPU as its driver names it; bytes."""

    name: str
    total: int
    free: int


@dataclass(frozen=True)
class Disk:
    """Of a folder that is there, or will be made: bytes free, and which disk it is."""

    free: int
    device: int
    writable: bool


@dataclass(frozen=True)
class SiteFacts:
    """A site as its node sees it. Of each pair one is empty: what was found, or why not.

    Attributes:
        key, key_problem: public part (hex) of the site's own key.
        roster, roster_problem: hash of the roster that this node pins.
        listed: the key that this roster lists for the site (hex).
        share: hash of the prepared cases.
        classes: of the prepared cohort.
        made_with: hash of preparation settings and classes, which all sites must share.
        share_problem: what is wrong with the prepared share.
        is_damaged: there is a share, and it is not as it was written.
        scans_problem: why the scans cannot be listed.
        scan_bytes: of the files that hold the scans.
    """

    key: str = ""
    key_problem: str = ""
    roster: str = ""
    roster_problem: str = ""
    listed: str = ""
    share: str = ""
    classes: tuple[str, ...] = ()
    made_with: str = ""
    share_problem: str = ""
    is_damaged: bool = False
    scans_problem: str = ""
    scan_bytes: int = 0


@dataclass(frozen=True)
class NodeFacts:
    """A node as it sees itself.

    Attributes:
        name: of the machine, or its address.
        versions: by package; "python" and "fedsam" (of which it is the sources' hash) among them.
        cuda: version of CUDA that torch was built for; "" for a build without.
        gpus: all of the machine's, whatever Ray books.
        memory: bytes of main memory.
        clock: seconds since 1970.
        clock_off: seconds by which it is ahead of who asked, known to within `clock_error`.
        disks: by folder.
        checkpoint, checkpoint_problem: SHA-256 of the weights, or why there is none.
        s3_keys: kind of credentials that were found for buckets, "" for none.
        mlflow_keys: which of the variables for MLflow's login are set.
        ray_auth, ray_tls: whether its Ray wants a token, and encrypts.
        sites: by id.
    """

    name: str
    versions: dict[str, str]
    cuda: str
    gpus: tuple[Gpu, ...]
    memory: int
    clock: float
    disks: dict[str, Disk]
    checkpoint: str
    checkpoint_problem: str
    s3_keys: str
    mlflow_keys: tuple[str, ...]
    ray_auth: bool
    ray_tls: bool
    sites: dict[str, SiteFacts] = field(default_factory=dict)
    clock_off: float = 0.0
    clock_error: float = 0.0


def look(question: Question) -> NodeFacts:
    """What this process's node finds. Nothing is written, and what cannot be found out is an answer too."""
    path = question.checkpoint
    checkpoint, checkpoint_problem = _try(lambda: "" if path is None else file_sha256(path), "")
    return NodeFacts(
        name=platform.node(),
        versions={**versions(), "fedsam": question.code_hash()[:12]},
        cuda=_cuda(),
        gpus=gpus(),
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        disks={str(folder): disk(folder.expanduser()) for folder in question.folders},
        checkpoint=checkpoint,
        checkpoint_problem=checkpoint_problem,
        s3_keys=_s3_keys() if question.s3 else "",
        mlflow_keys=tuple(
            name for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD") if os.environ.get(name)
        ),
        ray_auth=os.environ.get("RAY_AUTH_MODE") == "token",
        ray_tls=os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"),
        sites={site: _site(site, question) for site in question.sites},
        clock=time.time(),
    )


def look_at_nodes(
    questions: Mapping[str, tuple[str, Question]], deadline: float
) -> tuple[dict[str, NodeFacts], dict[str, str]]:
    """Has nodes of the connected cluster look at themselves, all at once; books no CPU.

    Args:
        questions: by node id, the node's name and what it is asked.
        deadline: seconds for all.

    Returns:
        What was found by node id, and by node id why others did not answer.
    """
    remote = ray.remote(look)
    now = ray.remote(_now)
    end = time.monotonic() + deadline
    refs, clocks = {}, {}
    for node, (_, question) in questions.items():
        here = NodeAffinitySchedulingStrategy(node, soft=False)
        refs[node] = remote.options(num_cpus=0, max_retries=0, scheduling_strategy=here).remote(question)
        clocks[node] = now.options(num_cpus=0, max_retries=0, scheduling_strategy=here)
    facts: dict[str, NodeFacts] = {}
    silent: dict[str, str] = {}
    for node, ref in refs.items():
        name = questions[node][0]
        try:
            found = ray.get(ref, timeout=max(0.0, end - time.monotonic()))
            off, within = _clock_off(lambda: ray.get(clocks[node].remote(), timeout=max(1.0, end - time.monotonic())))  # noqa: B023
        except ray.exceptions.GetTimeoutError:
            silent[node] = f"{name} does not answer within {deadline:g} s"
            ray.cancel(ref, force=True)
        except Exception as error:  # a node without fedsam, another Python, a worker that died
            cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
            silent[node] = f"{name}: {describe_failure(cause or error)[:300]}"
        else:
            facts[node] = replace(found, name=name, clock_off=off, clock_error=within)
    return facts, silent


def _now() -> float:
    return time.time()


def _clock_off(ask: Callable[[], float], times: int = 3) -> tuple[float, float]:
    """Seconds by which a clock is ahead of this one, and by how much that may be wrong: the shortest of some trips."""
    trips = []
    for _ in range(times):
        before = time.time()
        there = ask()
        after = time.time()
        trips.append((after - before, there - (before + after) / 2))
    took, off = min(trips)
    return off, took / 2


def gpus() -> tuple[Gpu, ...]:
    """The machine's GPUs; none where there is no driver. Ray hides them from a task that books none, so torch is not
    asked."""
    if shutil.which(_GPU_QUERY[0]) is None:
        return ()
    try:
        answer = subprocess.run(_GPU_QUERY, capture_output=True, text=True, timeout=20, check=True).stdout  # noqa: S603
        rows = [[cell.strip() for cell in line.split(",")] for line in answer.splitlines() if line.strip()]
        return tuple(Gpu(name, int(total) * 2**20, (int(total) - int(used)) * 2**20) for name, total, used in rows)
    except (subprocess.SubprocessError, OSError, ValueError):
        return ()  # a driver that is broken is none


def disk(folder: Path) -> Disk:
    """The disk that a folder lies on, or would."""
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    return Disk(shutil.disk_usage(there).free, there.stat().st_dev, os.access(there, os.W_OK))


def versions() -> dict[str, str]:
    """Of Python and of `PACKAGES`."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "missing"
    return found


def _cuda() -> str:
    import torch

    return torch.version.cuda or ""


def _s3_keys() -> str:
    """How botocore would sign; what it would sign with stays in there."""
    import botocore.session

    credentials = botocore.session.get_session().get_credentials()
    return "" if credentials is None else str(credentials.method)


def _site(site: str, question: Question) -> SiteFacts:
    facts: dict[str, object] = {}

    def policy() -> FederationConfig:
        return read_policy().tighten(question.federation)

    federation, problem = _try(policy, None)
    if federation is None:
        facts["roster_problem"] = problem
    elif federation.roster is not None:
        path, key_path = federation.roster, federation.key_dir.expanduser() / f"{site}.key"
        roster, facts["roster_problem"] = _try(lambda: read_roster(path), None)
        if roster is not None:
            facts["roster"] = roster.hash
            facts["listed"] = roster.keys[site].hex() if site in roster.keys else ""
        facts["key"], facts["key_problem"] = _try(
            lambda: read_identity(key_path, passphrase_from_environment()).public.hex(), ""
        )
    facts |= _share(question.shares[site], question)
    size, facts["scans_problem"] = _try(lambda: _scan_bytes(site, question), 0)
    return SiteFacts(**facts, scan_bytes=size)  # type: ignore[arg-type]


def _share(url: str, question: Question) -> dict[str, object]:
    try:
        store = open_store(url, question.s3_endpoint, patience=0)
        if not store.exists(MANIFEST):
            return {"share_problem": f"{url} is not prepared"}
        share = PreparedCohort.open(store)
        if not share.is_complete():
            return {"share_problem": f"{url} lacks prepared cases"}
    except FedsamError as error:
        return {"share_problem": describe_failure(error)}
    if question.read_all:
        for case in share.cohort.cases:
            _, problem = _try(lambda: share.load(case.id), None)  # noqa: B023 - called at once
            if problem:
                return {"share_problem": problem, "is_damaged": True}
    made_with = stable_hash([share.config.model_dump(mode="json"), list(share.cohort.classes)])
    return {"share": share.cohort.hash, "made_with": made_with, "classes": tuple(share.cohort.classes)}


def _scan_bytes(site: str, question: Question) -> int:
    if question.cohort.source == "phantom":
        return 0  # made on the spot
    listing = list_cohort(question.cohort, question.work_dir, site=site)
    if not listing.cases:
        where = (question.cohort.sites or {}).get(site, question.cohort.path)
        raise DataError(f"{where} has no case of site {site} as this node sees it")
    return sum(_size(path) for files in listing.cases for path in (files.image, files.label))


def _size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return (
        sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else path.stat().st_size
    )


def _try(work: Callable[[], T], otherwise: T) -> tuple[T, str]:
    """What `work` gives, and ""; or `otherwise`, and why."""
    try:
        return work(), ""
    except (FedsamError, OSError) as error:
        return otherwise, describe_failure(error)
