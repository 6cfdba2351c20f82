"""Hospitals as processes of their own, with keys of their own, over mutual TLS on the loopback."""

import asyncio
import json
import logging
import ssl
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from support.consortium import Consortium, until
from support.federations import small_federation, small_specs

from cluster.gateway.aggregator import Gateway
from cluster.gateway.certificates import create_authority, create_request, sign_site
from cluster.gateway.hospital import federate_beginning, prepare_beginning
from cluster.gateway.transport import PROCESS_HEADER, REFUSED, client_context, send
from fedsam_core.data.cohort import CohortConfig
from fedsam_core.data.preprocess import PreparedCohort, PreprocessConfig
from fedsam_core.data.sources.phantom import PhantomConfig
from fedsam_core.federation.config import FederationConfig
from fedsam_core.federation.engine import Engine, InProcessEngine, in_process
from fedsam_core.federation.preparation import CohortSite, CohortSpec, prepare_shares
from fedsam_core.federation.rounds import run_rounds
from fedsam_core.federation.site import FederatedSite, SiteSpec
from fedsam_core.store import LocalStore

SITES = ("site-a", "site-b", "site-c", "site-d")
SHARE = "phantom-1"
COHORT = CohortConfig(
    name="phantom",
    source="phantom",
    phantom=PhantomConfig(sites=4, cases_per_site=5, test_per_site=1, shape=(10, 32, 32)),
)


@pytest.fixture
def consortium(tmp_path: Path) -> Iterator[Consortium]:
    own = Consortium(tmp_path, SITES)
    try:
        yield own
    finally:
        own.end()


def cohort_specs(consortium: Consortium, prepared: str, work: Path) -> list[CohortSpec]:
    return [
        CohortSpec(
            run="prepare-1",
            site=site,
            sites=SITES,
            seed=0,
            federation=FederationConfig(roster=consortium.roster, key_dir=consortium.folder / "all-keys"),
            cohort=COHORT,
            preprocess=PreprocessConfig(ct_window="auto"),  # has the sites sum their histograms
            work_dir=work,
            prepared=prepared,
        )
        for site in SITES
    ]


def run_specs(consortium: Consortium, folder: Path, run: str) -> list[SiteSpec]:
    """Of a run over the shares in `folder`, each below its site's name."""
    prepared = PreparedCohort.open(*(LocalStore(folder / site) for site in SITES))
    pins = {"roster": consortium.roster, "key_dir": consortium.folder / "all-keys", "attempts": 2, "deadline_s": 120}
    return [
        spec.model_copy(update={"cohort": str(folder / spec.site), "run": run})
        for spec in small_specs(prepared, rounds=3, **pins)
    ]


def states(engine: Engine, spec: SiteSpec, between: Callable[[int], None] = lambda number: None) -> list[str]:
    """Hashes of the global states, and who was lost in each round."""
    federation, _ = small_federation(engine, spec)
    told: list[str] = []

    def after(report: Any, _: Any) -> None:
        told.append(f"{report.state_hash} without {sorted(report.lost)}")
        between(report.round)

    run_rounds(federation, after)
    return told


class Interrupted:
    """An engine at one of whose calls something happens to the sites."""

    def __init__(self, engine: Engine, at: Callable[[str, int], None]) -> None:
        self._engine, self._at, self._seen = engine, at, 0
        self.sites, self.share, self.close = engine.sites, engine.share, engine.close

    def call(self, method: str, args: Mapping[str, Mapping[str, Any]], deadline: float) -> Any:
        self._seen += method == "fit"
        self._at(method, self._seen)
        return self._engine.call(method, args, deadline)


class Reference(InProcessEngine):
    """The same sites in one process, of which one is gone at the second round's fit, and is then another object."""

    def __init__(self, specs: list[SiteSpec]) -> None:
        super().__init__({spec.site: FederatedSite(spec) for spec in specs})
        self._specs, self._fits = specs, 0

    def call(self, method: str, args: Mapping[str, Mapping[str, Any]], deadline: float) -> Any:
        self._fits += method == "fit"
        if method == "fit" and self._fits == 2:
            left = {site: keywords for site, keywords in args.items() if site != "site-d"}
            self._sites["site-d"] = FederatedSite(self._specs[3])
            replies, lost = super().call(method, left, deadline)
            return replies, {**lost, "site-d": "its process was restarted"}
        return super().call(method, args, deadline)


def test_four_processes_agree_with_one_whatever_befalls_them(
    consortium: Consortium, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They prepare and train; others try to get in; one is killed in the middle of a round, and comes back."""
    keys = consortium.folder / "all-keys"  # the reference has all keys in one place, and the gateway none
    keys.mkdir()
    for site in SITES:
        (keys / f"{site}.key").write_bytes((consortium.folder / site / "keys" / f"{site}.key").read_bytes())
        (keys / f"{site}.key").chmod(0o600)
    here = cohort_specs(consortium, str(tmp_path / "reference"), tmp_path / "work")
    inside = prepare_shares(in_process(here, CohortSite), here)
    expected = states(Reference(specs := run_specs(consortium, tmp_path / "reference", "run-1")), specs[0])
    assert [" without ['site-d']" in state for state in expected] == [False, True, False]

    for site in SITES:
        consortium.serve(site)
    missing: list[tuple[str, ...]] = []
    with Gateway(consortium.gateway, SITES) as gateway:
        gateway.wait(lambda names: missing.append(tuple(names)))
        assert (missing[0], missing[-1]) == (SITES, ())
        there = cohort_specs(consortium, "/nowhere", Path("/nowhere"))
        engine = gateway.engine("prepare", {spec.site: prepare_beginning(spec, SHARE) for spec in there})
        across = prepare_shares(engine, there)
        engine.close()
        assert (across.hash, across.config) == (inside.hash, inside.config)
        assert {share["url"] for share in across.shares.values()} == {""}

        specs = [spec.model_copy(update={"run": "run-1", "cohort": "/nowhere"}) for spec in specs]
        engine = gateway.engine("federate", {spec.site: federate_beginning(spec, SHARE) for spec in specs})

        def befall(method: str, fits: int) -> None:
            if (method, fits) == ("fit", 2):  # keys are shared, and all train
                consortium.kill("site-d")
                consortium.serve("site-d")
            if (method, fits) == ("unmask", 3):
                cut(gateway, "site-b")

        def between(number: int) -> None:
            if number == 1:
                intrude(consortium, tmp_path / "others", caplog)
                mislead(gateway, consortium)

        assert states(Interrupted(engine, befall), specs[0], between) == expected
        engine.close()
    for site in SITES:
        until(lambda site=site: "the run is over" in consortium.log(site))
        text = consortium.log(site)
        assert text.count("agreed") >= 2
        assert "Traceback" not in text
    assert "the link to the aggregator was lost" in consortium.log("site-b")
    asked = [path.read_text() for path in (tmp_path / "site-a" / "work" / "asked").glob("*.yaml")]
    assert ["local_steps: 2" in text for text in sorted(asked, key=len)] == [False, True]
    assert str(tmp_path / "reference") not in "".join(asked)  # no place of the aggregator's is told


def cut(gateway: Gateway, site: str) -> None:
    """The link is gone without a word, as when a cable is pulled."""

    def abort() -> None:
        gateway._links[site].socket._req.transport.abort()  # type: ignore[union-attr]

    gateway._loop.call_soon_threadsafe(abort)


def mislead(gateway: Gateway, consortium: Consortium) -> None:
    """The aggregator sends a site what no message may be; the site refuses it, and comes back."""
    begun = consortium.log("site-a").count("connected to")
    head = {"type": "call", "engine": "0" * 16, "number": 1, "kind": "federate", "method": "__init__", "body": {}}
    text = json.dumps({**head, "bytes": []}).encode()
    data = b"FSGW\x01" + len(text).to_bytes(4, "big") + text
    gateway._in_loop(gateway._send(gateway._links["site-a"], (data,)))
    until(lambda: consortium.log("site-a").count("connected to") > begun)
    assert "refused a message of the aggregator: federate has no method '__init__'" in consortium.log("site-a")


def intrude(consortium: Consortium, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Everybody who may not get in tries to, and leaves a line."""
    create_authority(folder / "authority")
    certificates = {}
    for name, authority, days in (
        ("expired", consortium.authority, -1),
        ("forged", folder / "authority", 1),
        ("site-e", consortium.authority, 1),
    ):
        site = name if name == "site-e" else "site-a"
        key, request = create_request(site, folder / name)
        certificate = sign_site(request, site, authority, days)
        certificates[name] = client_context(certificate, key, consortium.authority / "authority.crt")
    nameless = ssl.create_default_context(cafile=str(consortium.authority / "authority.crt"))
    attempts = {
        "none": (nameless, "site-a", "peer did not return a certificate"),
        "expired": (certificates["expired"], "site-a", "certificate has expired"),
        "forged": (certificates["forged"], "site-a", "unable to get local issuer certificate"),
        "another's": (consortium.context("site-b"), "site-a", "it holds the certificate of 'site-b'"),
        "stranger": (certificates["site-e"], "site-e", "it is no site of this run"),
    }
    for name, (context, claimed, complaint) in attempts.items():
        caplog.clear()
        with pytest.raises((aiohttp.ClientError, OSError)):
            asyncio.run(dial(consortium, context, claimed))
        until(lambda: caplog.records)
        told = [record.getMessage() for record in caplog.records]  # a line an attempt: the client makes a second one
        assert all(line.startswith("refused a connection") and complaint in line for line in told), (name, told)


async def dial(consortium: Consortium, context: ssl.SSLContext, site: str, *messages: Any) -> int | None:
    """Dials as a site, sends messages (bytes as pieces, lists as whole messages); how the connection was closed."""
    url = f"wss://127.0.0.1:{consortium.port}/v1/sites/{site}"
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(url, ssl=context, headers={PROCESS_HEADER: "other"}) as socket,
    ):
        for message in messages:
            if isinstance(message, list):
                await send(socket, message)
            elif isinstance(message, str):
                await socket.send_str(message)
            else:
                await socket.send_bytes(message)
        await socket.receive()  # a refused handshake shows here at the latest
        return socket.close_code


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([(1 << 40).to_bytes(8, "big")], r"1099511627776 bytes is over the limit of 1073741824"),
        ([[b"nonsense"]], "cut off"),
        ([[b"nonsense" * 3]], "no message of version 1"),
        (["text"], "is text"),
        ([b"short"], "does not begin with its length"),
        ([(4).to_bytes(8, "big"), b"longer than four"], "longer than it says"),
    ],
)
def test_a_message_that_is_none_ends_the_connection(
    consortium: Consortium, caplog: pytest.LogCaptureFixture, messages: list[Any], complaint: str
) -> None:
    with Gateway(consortium.gateway, SITES):
        assert asyncio.run(dial(consortium, consortium.context("site-a"), "site-a", *messages)) == REFUSED
    refused = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(refused) == 1
    assert refused[0].startswith("refused a message of site site-a: ")
    assert complaint in refused[0]
