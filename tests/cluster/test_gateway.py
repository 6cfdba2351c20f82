"""Hospitals as processes of their own, with keys of their own, over mutual TLS on the loopback."""

import asyncio
import json
import logging
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from support.consortium import Consortium, until
from support.federations import small_federation, small_specs

from cluster.gateway.aggregator import Gateway
from cluster.gateway.certificates import create_authority, create_request, sign_site
from cluster.gateway.hospital import (
    Hospital,
    agreed_spec,
    asked_hash,
    federate_beginning,
    on_own_cluster,
    prepare_beginning,
    read_hospital,
)
from cluster.gateway.messages import Begin, Message, decode, encode, line
from cluster.gateway.transport import PROCESS_HEADER, RECEIVED_HEADER, REFUSED, REPLACED, client_context, receive, send
from cluster.placement import SiteNeeds
from fedsam_core.data.cohort import CohortConfig
from fedsam_core.data.preprocess import PreparedCohort, PreprocessConfig
from fedsam_core.data.slices import SliceConfig
from fedsam_core.data.sources.phantom import PhantomConfig
from fedsam_core.errors import FedsamError
from fedsam_core.federation.config import FederationConfig
from fedsam_core.federation.engine import Engine, InProcessEngine, in_process
from fedsam_core.federation.preparation import CohortSite, CohortSpec, prepare_shares
from fedsam_core.federation.rounds import run_rounds
from fedsam_core.federation.site import FederatedSite, SiteSpec
from fedsam_core.federation.tasks import Task
from fedsam_core.learning.config import LearningConfig
from fedsam_core.sam.backbones import ModelConfig
from fedsam_core.secagg.refusals import MalformedMessage
from fedsam_core.selection import preset
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
        self.poll, self.silent, self.restart = engine.poll, engine.silent, engine.restart

    def call(self, method: str, args: Mapping[str, Mapping[str, Any]], deadline: float, *rest: Any) -> Any:
        self._seen += method == "fit"
        self._at(method, self._seen)
        return self._engine.call(method, args, deadline, *rest)


class Reference(InProcessEngine):
    """The same sites in one process, of which one is gone at the second round's fit, and is then another object."""

    def __init__(self, specs: list[SiteSpec]) -> None:
        super().__init__({spec.site: FederatedSite(spec) for spec in specs})
        self._specs, self._fits = specs, 0

    def call(self, method: str, args: Mapping[str, Mapping[str, Any]], deadline: float, *rest: Any) -> Any:
        self._fits += method == "fit"
        if method == "fit" and self._fits == 2:
            left = {site: keywords for site, keywords in args.items() if site != "site-d"}
            self._sites["site-d"] = FederatedSite(self._specs[3])
            replies, lost = super().call(method, left, deadline, *rest)
            return replies, {**lost, "site-d": "its process was restarted"}
        return super().call(method, args, deadline, *rest)


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


async def link_up(consortium: Consortium, session: aiohttp.ClientSession, process: str, received: str = "") -> Any:
    """A connection as site-a, made by hand."""
    url = f"wss://127.0.0.1:{consortium.port}/v1/sites/site-a"
    headers = {PROCESS_HEADER: process, RECEIVED_HEADER: received}
    return await session.ws_connect(url, ssl=consortium.context("site-a"), headers=headers)


def reply(call: Message, body: Mapping[str, Any]) -> tuple[bytes, ...]:
    return encode(Message("reply", *call.id, call.kind, call.method, body))


def test_a_call_outlives_its_link_but_not_its_process(consortium: Consortium) -> None:
    """What is asked of a process is sent again when the link is back, and only as far as it was lost."""

    async def site() -> list[tuple[str, str]]:
        seen = []
        async with aiohttp.ClientSession() as session:
            first = await link_up(consortium, session, "one")
            begin = decode(await receive(first, 1 << 20))
            await first.close()  # lost on its way: sent again, in full
            second = await link_up(consortium, session, "one")
            seen.append(decode(await receive(second, 1 << 20)))
            assert seen[-1] == begin
            newest = await link_up(consortium, session, "one", "{}:{}".format(*begin.id))  # this time it was received
            seen.append(decode(await receive(newest, 1 << 20)))
            closed = await second.receive()  # of two connections the newest counts
            assert (closed.type, closed.data) == (aiohttp.WSMsgType.CLOSE, REPLACED)
            for _ in range(2):  # the second copy is nobody's
                await send(newest, reply(begin, {}))
            share = decode(await receive(newest, 1 << 22))
            await send(newest, reply(share, {"value": b"a reply"}))
            seen.append(share)
            seen.append(decode(await receive(newest, 1 << 22)))
            other = await link_up(consortium, session, "two")  # a call to a process ends with it
            seen.append(decode(await receive(other, 1 << 22)))
            await send(other, encode(Message("failure", *seen[-1].id, "federate", "begin", {"reason": "no\nthanks"})))
            seen.append(decode(await receive(other, 1 << 22)))
            await send(other, reply(seen[-1], {}))
            seen.append(decode(await receive(other, 1 << 22)))
            await send(other, [b"".join(reply(seen[-1], {"value": b""}))[:-1]])
            await other.receive()
        return [(message.type, message.method) for message in seen]

    spec = small_spec(consortium)
    with Gateway(consortium.gateway, SITES) as gateway, ThreadPoolExecutor(1) as pool:
        running = pool.submit(asyncio.run, site())
        engine = gateway.engine("federate", {"site-a": federate_beginning(spec, SHARE)})
        until(gateway._links["site-a"].connected.is_set)
        asked = {"site-a": {"advertised": b"x" * 3_000_000}}  # more than a piece
        told = [engine.call("share", asked, 60) for _ in range(4)]
        seen = running.result()
    assert told == [
        ({"site-a": b"a reply"}, {}),
        ({}, {"site-a": "its process was restarted"}),
        ({}, {"site-a": "no thanks"}),
        ({}, {"site-a": "MalformedMessage: the head of a message is cut off"}),
    ]
    begin, share = ("call", "begin"), ("call", "share")
    assert seen == [begin, ("again", "begin"), share, share, begin, begin, share]


def test_a_site_does_once_what_it_is_asked_twice(consortium: Consortium, tmp_path: Path) -> None:
    """The link is cut while it works, and again when it has answered."""
    begun, go_on, calls = threading.Event(), threading.Event(), []

    class Slow:
        def call(self, method: str, args: Mapping[str, Mapping[str, Any]], deadline: float) -> Any:
            calls.append(args["site-a"]["asked"])
            begun.set()
            assert go_on.wait(60)
            return {"site-a": b"done"}, {}

        def close(self) -> None:
            pass

    own = read_hospital(consortium.file("site-a"))
    said: list[str] = []
    with Gateway(consortium.gateway, SITES) as gateway, ThreadPoolExecutor(1) as pool:
        loop = asyncio.new_event_loop()
        serving = loop.create_task(Hospital(own, lambda spec: Slow(), said.append).serve())
        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        link = gateway._links["site-a"]
        until(link.connected.is_set)
        engine = gateway.engine("federate", {"site-a": federate_beginning(small_spec(consortium), SHARE)})
        answer = pool.submit(engine.call, "weigh", {"site-a": {"delivered": b""}}, 60)
        assert begun.wait(60)
        for connections in (2, 3):
            cut(gateway, "site-a")
            until(lambda count=connections: said.count(f"connected to {own.aggregator}") == count)
            until(link.connected.is_set)
        go_on.set()
        assert answer.result() == ({"site-a": b"done"}, {})
        loop.call_soon_threadsafe(serving.cancel)
        until(serving.done)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
    assert calls == ["weigh"]


def small_spec(consortium: Consortium, **federation: Any) -> SiteSpec:
    """Of a run that never begins."""
    return SiteSpec(
        run="run-1",
        site="site-a",
        sites=SITES,
        seed=1,
        config_hash="c" * 64,
        cohort="/aggregator/place",
        model=ModelConfig(backbone="vit_t", image_size=32),
        selection=preset("flap", 4),
        slices=SliceConfig(),
        learning=LearningConfig(),
        federation=FederationConfig(roster=consortium.roster, **federation),
        inference_batch=4,
    )


@pytest.mark.parametrize(
    ("federation", "own", "complaint"),
    [
        ({"secure_sum": "plain"}, {}, "AgainstPolicy: this site takes part in masked sums only"),
        ({}, {"policy": {"min_contributors": 4}}, "AgainstPolicy: this site wants at least 4 sites in a sum"),
        ({"rounds": 11}, {"policy": {"max_rounds": 10}}, "AgainstPolicy: this site takes part in at most 10 rounds"),
        (
            {},
            {"policy": {"noise_multiplier": 1.0}},
            "AgainstPolicy: this site wants differential privacy",
        ),
        ({}, {"accepts": ["0" * 64]}, "AgainstPolicy: nobody at this site has agreed to these settings"),
        ({"sites": ["site-b", "site-c", "site-d"]}, {}, "AgainstPolicy: site site-a is not among the sites"),
        ({"bits": 7}, {}, "MalformedMessage: these are no settings of this version: federation.bits: literal_error"),
        ({"checkpoint": True}, {}, "ConfigError: the run begins with SAM's weights"),
    ],
)
def test_a_site_agrees_to_nothing_weaker_than_its_own_file(
    consortium: Consortium, federation: dict[str, Any], own: dict[str, Any], complaint: str
) -> None:
    begin = federate_beginning(small_spec(consortium), SHARE)
    settings = begin["settings"]
    for key, value in federation.items():
        {"sites": settings, "checkpoint": begin}.get(key, settings["federation"])[key] = value
    hospital = read_hospital(consortium.file("site-a", **own))
    with pytest.raises(FedsamError) as refused:
        agreed_spec(hospital, Begin(kind="federate", **begin))
    assert f"{type(refused.value).__name__}: {refused.value}".startswith(complaint)


def test_places_keys_and_disclosures_are_the_sites_own(consortium: Consortium) -> None:
    asked = small_spec(consortium, share_site_scores=True, share_pictures=True, key_dir=Path("/aggregator/keys"))
    begin = Begin(kind="federate", **federate_beginning(asked, SHARE))
    assert "/aggregator" not in json.dumps(begin.settings)
    assert str(consortium.folder) not in json.dumps(begin.settings)
    hospital = read_hospital(consortium.file("site-a", accepts=[asked_hash(begin)]))
    spec = agreed_spec(hospital, begin)
    assert isinstance(spec, SiteSpec)
    own = consortium.folder / "site-a"
    assert spec.cohort == str(own / "prepared" / SHARE / "site-a")
    assert (spec.federation.key_dir, spec.federation.site_dir) == (own / "keys", own / "own")
    assert (spec.federation.share_site_scores, spec.federation.share_pictures) == (False, False)
    assert spec.settings_hash("f", "r") == asked.settings_hash("f", "r")  # and all sites still sign the same
    other_run = asked.model_copy(update={"run": "run-2", "config_hash": "d" * 64})
    assert asked_hash(Begin(kind="federate", **federate_beginning(other_run, SHARE))) == asked_hash(begin)
    longer = small_spec(consortium, rounds=11)
    assert asked_hash(Begin(kind="federate", **federate_beginning(longer, SHARE))) != asked_hash(begin)
    for share in ("../other", "a/b", ".", ""):
        with pytest.raises(ValidationError, match="share"):
            Begin(kind="federate", **{**federate_beginning(asked, SHARE), "share": share})


def call(method: str, body: dict[str, Any], kind: Any = "federate") -> Message:
    return Message("call", "0" * 16, 1, kind, method, body)


def altered(body: Any = None, **head: Any) -> bytes:
    """A message whose head is as given."""
    own = {"type": "call", "engine": "0" * 16, "number": 1, "kind": "federate", "method": "share", "body": body or {}}
    text = json.dumps({**own, "bytes": [["advertised", 3]], **head}).encode()
    return b"FSGW\x01" + len(text).to_bytes(4, "big") + text + b"abc"


def nested(levels: int) -> Any:
    return [nested(levels - 1)] if levels else 0


def test_messages_arrive_as_they_were_sent() -> None:
    histogram = np.arange(4096)
    for message in (
        call("fit", {"delivered": b"\0" * 9, "state": None, "step": b""}),
        call("advertise", {"attempt": b"{}", "task": Task(purpose="scores", split="val").model_dump()}),
        call("prepare", {"config": PreprocessConfig().model_dump(mode="json")}, "prepare"),
        Message("reply", "f" * 16, 7, "federate", "disclose", {"summary": {"dice": 0.5}, "picture": b"PNG"}),
        Message("reply", "f" * 16, 7, "prepare", "tell", {"planes": histogram[:3], "histogram": histogram}),
    ):
        got = decode(b"".join(encode(message)))
        assert (got.type, got.id, got.method, set(got.body)) == (
            message.type,
            message.id,
            message.method,
            {*message.body},
        )
        for name, value in message.body.items():
            np.testing.assert_equal(got.body[name], value)
    assert decode(altered()).body == {"advertised": b"abc"}


@pytest.mark.parametrize(
    "data",
    [
        altered(method="__init__"),
        altered(method="survey"),  # of the other kind
        altered(method="_begin"),
        altered(kind="execute"),
        altered(type="order"),
        altered(engine="../x"),
        altered(number=0),
        altered(number=1.5),
        altered(number=True),
        altered(more=1),
        altered(body={"more": 1}),
        altered(body={"advertised": "abc"}),
        altered(bytes=[["advertised", 2]]),
        altered(bytes=[["advertised", 4]]),
        altered(bytes=[["advertised", -1]]),
        altered(bytes=[["advertised", 2], ["advertised", 1]]),
        altered(bytes=[["advertised", True]]),
        altered(bytes={"advertised": 3}),
        altered(bytes=None),
        altered(body={"x": nested(20)}),
        altered(type="failure", body={"reason": "x" * 501}, bytes=[]),
        b"FSGW\x01" + (20).to_bytes(4, "big") + b'{"a":' * 4,
        b"FSGW\x01" + (200_000).to_bytes(4, "big") + b"[" * 200_000,
        b"FSGW\x01" + (4).to_bytes(4, "big") + b"null",
        b"FSGW\x01" + (1 << 31).to_bytes(4, "big"),
        b"FSGW\x02" + altered()[5:],
        b"\x80\x04cos\nsystem\n(S'true'\ntR.",  # a pickle
        b"",
    ],
)
def test_what_is_no_message_is_refused(data: bytes) -> None:
    with pytest.raises(MalformedMessage):
        decode(data)


@given(st.data())
def test_no_bytes_do_anything_else_than_decode_or_be_refused(data: st.DataObject) -> None:
    whole = bytearray(altered())
    for _ in range(data.draw(st.integers(0, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        message = decode(bytes(whole[: data.draw(st.integers(0, len(whole)))]))
    except MalformedMessage:
        return
    assert set(message.body) == {"advertised"}


@pytest.mark.parametrize(
    ("method", "body"),
    [
        ("fit", {"delivered": "text", "state": None}),
        ("enroll", {"roster": {"a": object()}}),
        ("exec", {}),
        ("share", {}),
    ],
)
def test_what_the_other_side_would_refuse_is_not_sent(method: str, body: dict[str, Any]) -> None:
    with pytest.raises(MalformedMessage):
        encode(call(method, body))


def test_a_reason_is_a_line() -> None:
    assert line("a\nb\x1b[31m\t c" + "x" * 999)[:12] == "a b?[31m cxx"
    assert len(line("x" * 999)) == 500


def test_a_site_may_be_an_actor_of_its_hospitals_own_cluster(
    ray_cluster: tuple[str, ...], consortium: Consortium, tmp_path: Path
) -> None:
    """What is wrong there is told without the names of files."""
    spec = small_spec(consortium, key_dir=consortium.folder / "site-a" / "keys")
    engine = on_own_cluster(SiteNeeds(cpus=0), spec.model_copy(update={"cohort": str(tmp_path / "DOE")}))
    try:
        told = [
            engine.call("ask", {"site-a": {"asked": method, "keywords": keywords}}, 60)
            for method, keywords in (("enroll", {"roster": {}}), ("share", {"advertised": b""}), ("open", {}))
        ]
    finally:
        engine.close()
    assert told[1:] == [
        ({}, {"site-a": "site site-a has no sum under way (it may have been restarted)"}),
        ({}, {"site-a": "DataError: the log of site site-a says what it is"}),
    ]
    assert told[0][1]["site-a"].startswith("UnknownSite: site site-a was told other keys than those of")
