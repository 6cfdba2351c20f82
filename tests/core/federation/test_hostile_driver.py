"""A driver that asks sites for what it should not get; rounds that are tried again; what narrow rings do to a sum."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import federations
from support.federations import flat_mean, put_back, small_cohort, small_federation, small_specs

from fedsam_core.data.preprocess import PreparedCohort
from fedsam_core.errors import FedsamError, RoundError, SecureSumError
from fedsam_core.federation import site as site_module
from fedsam_core.federation.engine import InProcessEngine, in_process
from fedsam_core.federation.groups import tensor_groups
from fedsam_core.federation.lanes import layout_of
from fedsam_core.federation.rounds import Federation, State
from fedsam_core.federation.site import FederatedSite
from fedsam_core.federation.state import pack_global, pack_state, state_hash
from fedsam_core.federation.summation import Contribution
from fedsam_core.federation.tasks import Task, attempt_from_json, sum_hash
from fedsam_core.hashing import derive_seed
from fedsam_core.learning.learner import Assignment, Fit, Learner
from fedsam_core.sam.adapters import load_shared_state, shared_state
from fedsam_core.secagg import refusals
from fedsam_core.secagg.keyfiles import create_identity
from fedsam_core.secagg.messages import Advertise, Advertised, Survivors, decode, encode_broadcast
from fedsam_core.secagg.refusals import (
    BareLane,
    ForgedKeys,
    OpenedBefore,
    OtherAttempt,
    OtherModel,
    OutOfTurn,
    UnfitValues,
    UnknownSite,
)
from fedsam_core.selection import LayerSelection

NORMS = LayerSelection(name="norms", train=("decoder.norms", "mask_tokens"))
"""Few parameters, of two groups."""
FOUR = ("site-a", "site-b", "site-c", "site-d")
NAMED = tuple(one for one in vars(refusals).values() if isinstance(one, type) and one.__module__ == refusals.__name__)


class Driver:
    """An engine between a federation and its sites, for a driver that does not keep to the protocol.

    `twist` may change what a site is asked, `silence` says whether the call is lost ("before" the site hears it) or its
    reply is ("after"). Every reply that reached the driver is kept.
    """

    def __init__(self, inner: InProcessEngine) -> None:
        self._inner = inner
        self.twist: Callable[[str, str, dict[str, Any]], None] = lambda method, site, keywords: None
        self.silence: Callable[[str, str], str | None] = lambda method, site: None
        self.replies: list[tuple[str, str, Any]] = []
        self.asked: list[tuple[str, str, dict[str, Any]]] = []
        self.attempt = -1
        """Number of the attempt that was announced last."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __getitem__(self, site: str) -> FederatedSite:
        return self._inner._sites[site]

    def call(self, method: str, args: Mapping[str, Mapping[str, Any]], deadline: float, *rest: Any) -> Any:
        if method == "advertise":
            self.attempt = json.loads(next(iter(args.values()))["attempt"])["attempt"]
        heard, lost = {}, {}
        for site, keywords in args.items():
            if self.silence(method, site) == "before":
                lost[site] = "gave no answer in time"
                continue
            heard[site] = json.loads(json.dumps(keywords)) if method in ("enroll",) else dict(keywords)
            self.twist(method, site, heard[site])
        self.asked += [(method, site, keywords) for site, keywords in heard.items()]
        replies, missing = self._inner.call(method, heard, deadline, *rest)
        for site in [site for site in replies if self.silence(method, site) == "after"]:
            del replies[site]
            lost[site] = "gave no answer in time"
        self.replies += [(method, site, reply) for site, reply in replies.items()]
        return replies, lost | missing

    def told(self, method: str, site: str) -> list[dict[str, Any]]:
        """What a site was asked with, each time."""
        return [keywords for one, who, keywords in self.asked if (one, who) == (method, site)]

    def heard(self, site: str) -> list[str]:
        """The methods that a site answered."""
        return [method for method, who, _ in self.replies if who == site]


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> PreparedCohort:
    return small_cohort(tmp_path_factory.mktemp("four"), sites=4)


@pytest.fixture(scope="module", autouse=True)
def one_model() -> Iterator[None]:
    """All sites of this file share one model in memory, which each loads the global state into before it uses it."""
    models: dict[tuple[Any, ...], Any] = {}
    manifests: dict[int, Any] = {}
    hashes: dict[int, str] = {}
    build, adapt, frozen = site_module.build_segmenter, site_module.adapt, site_module.weights_hash

    def build_once(model: Any, classes: int, selection: LayerSelection, seed: int) -> Any:
        key = (model.model_dump_json(), classes, selection.hash, seed)
        if key not in models:
            segmenter = build(model, classes, selection, seed=seed)
            manifest = adapt(segmenter, selection)
            manifests[id(segmenter)] = manifest
            hashes[id(segmenter)] = frozen(segmenter, manifest)
            models[key] = segmenter, shared_state(segmenter, manifest)
        segmenter, first = models[key]
        load_shared_state(segmenter, manifests[id(segmenter)], first)
        return segmenter

    with pytest.MonkeyPatch.context() as patch:
        for module in (site_module, federations):
            patch.setattr(module, "build_segmenter", build_once)
            patch.setattr(module, "adapt", lambda segmenter, selection: manifests[id(segmenter)])
            patch.setattr(module, "weights_hash", lambda segmenter, manifest: hashes[id(segmenter)])
        yield


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDSAM_KEY_PASSPHRASE", raising=False)
    monkeypatch.delenv("FEDSAM_SITE_POLICY", raising=False)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Every training, by site and round; its update is drawn by chance from both, with a few large values."""
    calls: list[tuple[str, int]] = []

    def fit(self: Learner, state: State, round_number: int, rounds: int, seed: int, assignment: Assignment) -> Fit:
        calls.append((self.site, round_number))
        draws = np.random.default_rng(derive_seed(seed, self.site, round_number))
        update = 1e-3 * draws.standard_t(4, self.manifest.shared_size)
        overlap = draws.random((2, self.segmenter.classes))
        return Fit(update.astype(np.float32), len(self.dataset), draws.random(), overlap.min(0), overlap.max(0))

    monkeypatch.setattr(Learner, "fit", fit)
    return calls


def trained_once(federation: Federation, number: int, slices: float) -> Any:
    """The global state after a round, and its last sum."""
    step, totals = federation.train(number, slices)
    return step.state, totals[-1]


def small_run(prepared: PreparedCohort, selection: LayerSelection | None = NORMS, **federation: Any) -> Any:
    """A federation with open sites, the state it starts from, and the driver between them."""
    specs = small_specs(prepared, selection, **{"attempts": 1, "validate_every": 0, **federation})
    driver = Driver(in_process(specs, FederatedSite))
    return *small_federation(driver, specs[0]), driver


def refused(caplog: pytest.LogCaptureFixture, site: str, what: str, name: type[SecureSumError]) -> bool:
    """Whether the site's own log says so, by name."""
    lines = [one.getMessage() for one in caplog.records if one.name == "fedsam_core.federation.summing"]
    return any(line.startswith(f"site {site} refused {what} (") and f"): {name.__name__}: " in line for line in lines)


# The same again


@pytest.mark.parametrize("which", ["the same", "an older one"])
def test_an_attempt_is_answered_once(four: PreparedCohort, caplog: pytest.LogCaptureFixture, which: str) -> None:
    federation, _state, driver = small_run(four)
    federation.total_weight()
    federation.score("val", 0)
    first, second = driver.told("advertise", "site-b")
    site = driver["site-b"]
    with pytest.raises(OutOfTurn, match="was entered before"):
        site.advertise(**(second if which == "the same" else first))
    assert refused(caplog, "site-b", "advertise", OutOfTurn)
    assert federation.score("test", 0).by_site.keys() == set(FOUR)  # it takes part in the next


def test_asking_again_while_a_sum_is_under_way_does_not_end_it(
    four: PreparedCohort, caplog: pytest.LogCaptureFixture, trained: list[Any]
) -> None:
    federation, _state, driver = small_run(four)
    slices = federation.total_weight()

    def again(method: str, site: str, keywords: dict[str, Any]) -> None:
        if (method, site) == ("fit", "site-b"):
            with pytest.raises(OutOfTurn):
                driver[site].advertise(**driver.told("advertise", site)[-1])

    driver.twist = again
    assert federation.train(1, slices)[1][-1].contributors == FOUR
    assert refused(caplog, "site-b", "advertise", OutOfTurn)


@pytest.fixture
def pinned(prepared: PreparedCohort, tmp_path: Path) -> dict[str, Path]:
    """Settings of a consortium of three with a roster, every site's key in one folder."""
    public = [create_identity(site, tmp_path / "keys", None)[1] for site in prepared.cohort.sites]
    roster = tmp_path / "roster.txt"
    roster.write_text("".join(path.read_text() for path in public))
    return {"roster": roster, "key_dir": tmp_path / "keys"}


@pytest.mark.parametrize("which", ["the same", "an older one"])
def test_an_attempt_is_answered_once_even_by_a_site_that_was_restarted_in_it(
    prepared: PreparedCohort, pinned: dict[str, Path], caplog: pytest.LogCaptureFixture, which: str
) -> None:
    federation, _state, driver = small_run(prepared, **pinned)
    federation.total_weight()
    driver.silence = lambda method, site: "before" if method == "share" else None  # the driver takes what it has, and
    with pytest.raises(RoundError, match="only 0 of the 3"):  # says that the attempt failed
        federation.score("val", 0)
    driver.silence = lambda method, site: None
    first, second = driver.told("advertise", "site-b")
    restarted = FederatedSite(driver["site-b"].spec)
    restarted.open()
    with pytest.raises(OutOfTurn, match="was entered before"):
        restarted.advertise(**(second if which == "the same" else first))
    assert refused(caplog, "site-b", "advertise", OutOfTurn)
    driver._inner._sites["site-b"] = restarted
    assert federation.score("val", 0).by_site.keys() == set(prepared.cohort.sites)


def test_a_sum_that_was_opened_for_all_is_confirmed_for_no_fewer(
    four: PreparedCohort, caplog: pytest.LogCaptureFixture, trained: list[Any]
) -> None:
    federation, state, driver = small_run(four)
    slices = federation.total_weight()
    federation.train(1, slices)
    put_back(federation, state)
    driver.silence = lambda method, site: "before" if (method, site) == ("fit", "site-d") else None
    driver.replies.clear()
    with pytest.raises(RoundError, match="OpenedBefore"):
        federation.train(1, slices)
    for site in FOUR[:3]:
        assert refused(caplog, site, "confirm", OpenedBefore)
        assert driver.heard(site) == ["advertise", "share", "fit"]


@pytest.mark.parametrize("how", ["updates of a split", "slices of a split", "slices of another state"])
def test_no_sum_is_opened_for_fewer_sites_under_another_name(
    four: PreparedCohort, trained: list[Any], how: str
) -> None:
    """Or the difference to the sum over all would be the one site's values, exactly."""
    federation, _state, driver = small_run(four)
    slices = federation.total_weight()
    if how == "updates of a split":
        federation.train(1, slices)
    method = "fit" if how == "updates of a split" else "weigh"
    task = Task(purpose="update", total=slices) if method == "fit" else Task(purpose="weights")
    renamed = task if how == "slices of another state" else task.model_copy(update={"split": "val"})
    given = () if how == "slices of a split" else ("state", pack_global(federation.server.state))
    driver.silence = lambda one, site: "before" if (one, site) == (method, "site-d") else None
    driver.twist = lambda one, site, keywords: keywords.pop("state", None) if one == "weigh" else None
    with pytest.raises(RoundError, match=r"MalformedMessage|OtherAttempt"):
        federation._sum(renamed, 1, Contribution(method, *given))


# Announcements


def other_layout(federation: Federation, fields: dict[str, Any], task: dict[str, Any]) -> None:
    """The layout hash of the task as it is told: the site finds nothing wrong with it."""
    told = Task.model_validate(task)
    layout = layout_of(told, federation._round(1))
    fields["layout_hash"] = sum_hash(federation.manifest, layout, told)


def other_clips(federation: Federation) -> dict[str, float]:
    return dict.fromkeys(tensor_groups(federation.manifest), 0.25)


LIES: dict[str, Callable[[Federation, dict[str, Any], dict[str, Any]], None]] = {
    "fewer sites": lambda _, fields, task: fields.update(sites=[*FOUR[:3]], threshold=3),
    "more sites": lambda _, fields, task: fields.update(sites=[*FOUR, "site-e"], threshold=4),
    "other sites": lambda _, fields, task: fields.update(sites=[*FOUR[:3], "site-x"]),
    "a lower threshold": lambda _, fields, task: fields.update(threshold=2),
    "a higher threshold": lambda _, fields, task: fields.update(threshold=4),
    "another run": lambda _, fields, task: fields.update(run="another"),
    "another configuration": lambda _, fields, task: fields.update(config_hash="0" * 64),
    "another layout": lambda _, fields, task: fields.update(layout_hash="0" * 64),
    "a round beyond the last": lambda _, fields, task: fields.update(round=99),
    "other clips": lambda federation, fields, task: task.update(clips=other_clips(federation)),
    "another total": lambda _, fields, task: task.update(total=1e15),
    "another question": lambda _, fields, task: task.update(purpose="scores", split="val", total=None),
    "other clips, and their layout": lambda federation, fields, task: (
        task.update(clips=other_clips(federation)),
        other_layout(federation, fields, task),
    ),
    "another total, and its layout": lambda federation, fields, task: (
        task.update(total=1e15),
        other_layout(federation, fields, task),
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_site_that_is_told_another_sum_than_the_rest_sends_no_vector(
    four: PreparedCohort, caplog: pytest.LogCaptureFixture, trained: list[Any], lie: str
) -> None:
    federation, _state, driver = small_run(four)
    slices = federation.total_weight()
    driver.replies.clear()

    def tell(method: str, site: str, keywords: dict[str, Any]) -> None:
        if (method, site) == ("advertise", "site-b"):
            fields = json.loads(keywords["attempt"])
            LIES[lie](federation, fields, task := dict(keywords["task"]))
            keywords |= {"attempt": json.dumps(fields).encode(), "task": task}

    driver.twist = tell
    total = federation.train(1, slices)[1][-1]
    assert total.contributors == ("site-a", "site-c", "site-d")
    assert total.lost["site-b"].startswith("OtherAttempt: ")
    assert ("site-b", 1) not in trained
    if lie.endswith("layout") and lie != "another layout":
        # Nothing that the site could know: the aggregator refuses its message, and so would every peer (below).
        assert driver.heard("site-b") == ["advertise"]
    else:
        assert driver.heard("site-b") == []
        assert refused(caplog, "site-b", "advertise", OtherAttempt)
    driver.twist = lambda *_: None
    assert federation.train(2, slices)[1][-1].contributors == FOUR  # it is back when it is told the truth


def test_sites_that_are_all_told_of_fewer_sites_all_refuse(four: PreparedCohort, trained: list[Any]) -> None:
    federation, _state, driver = small_run(four)
    slices = federation.total_weight()

    def tell(method: str, site: str, keywords: dict[str, Any]) -> None:
        if method == "advertise":
            fields = json.loads(keywords["attempt"]) | {"sites": [*FOUR[:3]]}
            keywords["attempt"] = json.dumps(fields).encode()

    driver.twist = tell
    with pytest.raises(RoundError, match=r"only 0 of the 3 .*(lost site-.: OtherAttempt: .* its sites is .*){4}"):
        federation.train(1, slices)
    assert trained == []


@pytest.mark.parametrize(
    "change",
    [
        {"attempt": float("nan")},
        {"attempt": 2.5},
        {"attempt": True},
        {"attempt": -1},
        {"round": float("inf")},
        {"round": -1},
        {"sites": ["site-b", "site-a"]},
        {"sites": 5},
        {"sites": []},
        {"threshold": 0},
        {"threshold": 9},
        {"threshold": "3"},
        {"more": 1},
        None,
    ],
    ids=str,
)
def test_a_malformed_announcement_is_refused_by_name(
    four: PreparedCohort, caplog: pytest.LogCaptureFixture, change: dict[str, Any] | None
) -> None:
    federation, _, driver = small_run(four)
    federation.total_weight()
    told, site = driver.told("advertise", "site-b")[0], driver["site-b"]
    fields = json.loads(told["attempt"]) | {"attempt": 7}
    data = b"\xff" if change is None else json.dumps(fields | change).encode()
    with pytest.raises(NAMED) as caught:
        site.advertise(data, told["task"])
    assert refused(caplog, "site-b", "advertise", caught.type)
    # It has not made the site forget what it answered.
    with pytest.raises(OutOfTurn):
        site.advertise(**told)
    assert federation.total_weight() > 0


@pytest.mark.parametrize(
    "task", [{}, {"purpose": "all"}, {"purpose": "update", "total": -1.0}, {"purpose": "weights", "more": 1}]
)
def test_a_malformed_task_is_refused_by_name(
    four: PreparedCohort, caplog: pytest.LogCaptureFixture, task: dict[str, Any]
) -> None:
    federation, _, driver = small_run(four)
    federation.total_weight()
    told = driver.told("advertise", "site-b")[0]
    fields = json.loads(told["attempt"]) | {"attempt": 7}
    with pytest.raises(NAMED) as caught:
        driver["site-b"].advertise(json.dumps(fields).encode(), task)
    assert refused(caplog, "site-b", "advertise", caught.type)


# Global models


def shifted(federation: Federation, state: State) -> State:
    return federation.manifest.unflatten(federation.manifest.flatten(state) + np.float32(0.5))


def test_a_site_that_is_sent_another_model_than_announced_sends_no_vector_and_gets_no_second_try(
    four: PreparedCohort, caplog: pytest.LogCaptureFixture, trained: list[Any]
) -> None:
    federation, state, driver = small_run(four)
    slices = federation.total_weight()
    good = pack_state(federation.manifest, state)

    def send(method: str, site: str, keywords: dict[str, Any]) -> None:
        if (method, site) == ("fit", "site-b"):
            keywords["state"] = pack_state(federation.manifest, shifted(federation, state))

    driver.twist = send
    driver.replies.clear()
    total = federation.train(1, slices)[1][-1]
    assert total.contributors == ("site-a", "site-c", "site-d")
    assert total.lost["site-b"].startswith("OtherModel: ")
    assert refused(caplog, "site-b", "fit", OtherModel)
    assert driver.heard("site-b") == ["advertise", "share"]
    assert ("site-b", 1) not in trained
    given = driver.told("fit", "site-b")[0]
    with pytest.raises(FedsamError, match="no sum under way"):
        driver["site-b"].fit(given["delivered"], good)


def test_a_site_that_holds_an_old_model_does_not_train_it_for_the_new_one(
    four: PreparedCohort, caplog: pytest.LogCaptureFixture, trained: list[Any]
) -> None:
    federation, _state, driver = small_run(four)
    slices = federation.total_weight()
    federation.train(1, slices)

    def send(method: str, site: str, keywords: dict[str, Any]) -> None:
        if (method, site) == ("fit", "site-b"):
            keywords |= {"state": None, "step": None}  # as if it held it

    driver.twist = send
    total = federation.train(2, slices)[1][-1]
    assert total.lost.keys() == {"site-b"}
    assert total.lost["site-b"].startswith("OtherModel: ")
    assert refused(caplog, "site-b", "fit", OtherModel)
    assert ("site-b", 2) not in trained


def test_sites_that_are_told_of_different_models_refuse_each_other(
    four: PreparedCohort, caplog: pytest.LogCaptureFixture, trained: list[Any]
) -> None:
    """Two sites are told of one model, two of another; the driver then shows all of them each other's keys."""
    federation, state, driver = small_run(four)
    slices = federation.total_weight()
    other = state_hash(federation.manifest, shifted(federation, state))

    def announce(method: str, site: str, keywords: dict[str, Any]) -> None:
        if method == "advertise" and site in ("site-c", "site-d"):
            keywords["attempt"] = json.dumps(json.loads(keywords["attempt"]) | {"model_hash": other}).encode()

    driver.twist = announce
    driver.replies.clear()
    with pytest.raises(RoundError, match=r"only 2 of the 3 sites .* lost site-c: OtherAttempt: .* or model: refused"):
        federation.train(1, slices)
    adverts = [reply for method, _, reply in driver.replies if method == "advertise"]
    assert len(adverts) == 4
    for site in FOUR:
        told = attempt_from_json(driver.told("advertise", site)[-1]["attempt"])
        with pytest.raises(OtherAttempt, match="or model: refused"):
            driver[site].share(encode_broadcast(Advertised(tuple(adverts)), told.digest()))
        assert refused(caplog, site, "share", OtherAttempt)
        assert driver[site]._session is None
    assert trained == []


# Keys


@pytest.mark.parametrize("how", ["another key", "a stranger", "no key at all"])
def test_a_site_with_a_roster_takes_no_other_keys_from_the_driver(
    prepared: PreparedCohort, pinned: dict[str, Path], caplog: pytest.LogCaptureFixture, how: str
) -> None:
    specs = small_specs(prepared, NORMS, **pinned)
    driver = Driver(in_process(specs, FederatedSite))

    def enroll(method: str, site: str, keywords: dict[str, Any]) -> None:
        if (method, site) == ("enroll", "site-b"):
            whose = "site-x" if how == "a stranger" else "site-c"
            keywords["roster"][whose] = "junk" if how == "no key at all" else "11" * 32

    driver.twist = enroll
    with pytest.raises(RoundError, match="site site-b refuses the roster: "):
        small_federation(driver, specs[0])
    site, given = driver["site-b"], driver.told("enroll", "site-b")[0]
    pins = dict(site._roster.keys)
    with pytest.raises(NAMED) as caught:
        site.enroll(**given)
    assert how == "no key at all" or caught.type is UnknownSite
    assert refused(caplog, "site-b", "enroll", caught.type)
    assert site._roster.keys == pins


def test_a_site_with_a_roster_takes_no_keys_before_it_has_read_it(
    prepared: PreparedCohort, pinned: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    site = FederatedSite(small_specs(prepared, NORMS, **pinned)[1])
    with pytest.raises(NAMED) as caught:
        site.enroll({one: f"{number:02x}" * 32 for number, one in enumerate(prepared.cohort.sites, start=0x11)})
    assert refused(caplog, "site-b", "enroll", caught.type)
    assert site._roster is None


def test_keys_that_are_none_are_refused_by_name_without_a_roster_too(
    prepared: PreparedCohort, caplog: pytest.LogCaptureFixture
) -> None:
    site = FederatedSite(small_specs(prepared, NORMS)[1])
    for key in ("junk", "11", "00" * 32):
        with pytest.raises(SecureSumError):
            site.enroll({"site-a": key})
    assert site._roster is None


@pytest.mark.parametrize("how", ["another key", "no key", "not in the roster"])
def test_a_site_whose_key_the_roster_does_not_pin_cannot_open(
    prepared: PreparedCohort, pinned: dict[str, Path], tmp_path: Path, how: str
) -> None:
    specs = small_specs(prepared, NORMS, **pinned)
    key = pinned["key_dir"] / "site-b.key"
    if how == "another key":
        create_identity("site-b", tmp_path / "new", None)[0].replace(key)
    elif how == "no key":
        key.unlink()
    else:
        lines = pinned["roster"].read_text().splitlines(keepends=True)
        pinned["roster"].write_text("".join(line for line in lines if not line.startswith("site-b")))
    names = {"another key": ForgedKeys, "not in the roster": UnknownSite}
    with pytest.raises(names.get(how, SecureSumError)):
        FederatedSite(specs[1]).open()
    with pytest.raises(RoundError, match="site site-b cannot take part: ") as failed:
        small_federation(in_process(specs, FederatedSite), specs[0])
    assert how not in names or names[how].__name__ in str(failed.value)
    for method in ("weigh", "share", "confirm", "unmask"):
        with pytest.raises(RoundError):
            getattr(FederatedSite(specs[1]), method)(b"")


@pytest.mark.parametrize("how", ["another key", "not in the roster"])
def test_why_a_site_cannot_open_is_in_its_log(
    prepared: PreparedCohort, pinned: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    spec = small_specs(prepared, NORMS, **pinned)[1]
    if how == "another key":
        create_identity("site-b", tmp_path / "new", None)[0].replace(pinned["key_dir"] / "site-b.key")
    else:
        pinned["roster"].write_text("".join(pinned["roster"].read_text().splitlines(keepends=True)[::2]))
    with pytest.raises(NAMED) as caught:
        FederatedSite(spec).open()
    assert refused(caplog, "site-b", "open", caught.type)


# Out of turn


@pytest.mark.parametrize(
    ("due", "asked"),
    [
        ("share", "fit"),
        ("share", "confirm"),
        ("share", "unmask"),
        ("fit", "share"),
        ("fit", "score"),
        ("fit", "confirm"),
        ("fit", "unmask"),
        ("confirm", "share"),
        ("confirm", "fit"),
        ("confirm", "score"),
        ("confirm", "unmask"),
        ("unmask", "share"),
        ("unmask", "fit"),
        ("unmask", "confirm"),
        ("score", "fit"),
        ("score", "share"),
    ],
)
def test_a_site_that_is_asked_out_of_turn_refuses_and_goes_on(
    four: PreparedCohort, caplog: pytest.LogCaptureFixture, trained: list[Any], due: str, asked: str
) -> None:
    """Right before the due call another one comes, with whatever a site was given before or would be given later."""
    federation, state, driver = small_run(four)
    slices = federation.total_weight()
    packed = pack_state(federation.manifest, state)
    asking: list[str] = []

    def ask(method: str, site: str, keywords: dict[str, Any]) -> None:
        if (method, site) == (due, "site-b"):
            asking.append(asked)
            broadcast = next(iter(keywords.values()))
            with pytest.raises(OutOfTurn):
                getattr(driver[site], asked)(*([broadcast, packed] if asked in ("fit", "score") else [broadcast]))

    driver.twist = ask
    driver.replies.clear()
    if due == "score":
        federation.score("val", 0)
    else:
        federation.train(1, slices)
    assert asking == [asked]
    assert refused(caplog, "site-b", asked, OutOfTurn)
    contribution = "score" if due == "score" else "fit"
    assert driver.heard("site-b")[:5] == ["advertise", "share", contribution, "confirm", "unmask"]
    assert trained.count(("site-b", 1)) == (due != "score")


def test_the_contribution_to_another_sum_is_refused(
    four: PreparedCohort, caplog: pytest.LogCaptureFixture, trained: list[Any]
) -> None:
    """The number of slices, alone, in a sum of updates."""
    federation, _state, driver = small_run(four)
    slices = federation.total_weight()

    def weigh(method: str, site: str, keywords: dict[str, Any]) -> None:
        if (method, site) == ("fit", "site-b"):
            with pytest.raises((UnfitValues, OutOfTurn)) as caught:
                driver[site].weigh(keywords["delivered"])
            assert refused(caplog, "site-b", "weigh", caught.type)

    driver.twist = weigh
    federation.train(1, slices)
    assert driver.heard("site-b").count("weigh") == 1  # of the sum before


@pytest.mark.parametrize(
    ("method", "keywords"),
    [
        ("advertise", {"attempt": None, "task": {"purpose": "weights"}}),
        ("share", {"advertised": b""}),
        ("weigh", {"delivered": b""}),
        ("fit", {"delivered": b"", "state": b""}),
        ("score", {"delivered": b"", "state": None}),
        ("confirm", {"survivors": b""}),
        ("unmask", {"confirmations": b""}),
    ],
)
def test_a_site_answers_nothing_before_it_is_open(four: PreparedCohort, method: str, keywords: dict[str, Any]) -> None:
    federation, _, driver = small_run(four)
    federation.total_weight()
    if method == "advertise":
        keywords = driver.told("advertise", "site-b")[0]
    driver._inner._sites["site-b"] = FederatedSite(driver["site-b"].spec)
    replies, lost = driver.call(method, {"site-b": keywords}, 1.0)
    assert replies == {}
    assert any(word in lost["site-b"] for word in ("is not open", "no sum under way", "OutOfTurn"))


# Rounds that are tried again


def undisturbed(prepared: PreparedCohort) -> list[str]:
    federation, state, _ = small_run(prepared)
    hashes = []
    slices = federation.total_weight()
    for number in (1, 2):
        state = federation.train(number, slices)[0].state
        hashes.append(state.hash)
    return hashes


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("stage", ["advertise", "share", "fit", "confirm", "unmask"])
@pytest.mark.parametrize("sites", [3, 4])
def test_a_round_that_fails_is_tried_again_with_fresh_keys_and_gives_the_same_bits(
    prepared: PreparedCohort, four: PreparedCohort, trained: list[Any], sites: int, stage: str, when: str
) -> None:
    cohort, vanish = (prepared, ["site-b"]) if sites == 3 else (four, ["site-b", "site-d"])
    expected = undisturbed(cohort)
    trained.clear()
    federation, state, driver = small_run(cohort, attempts=2)
    slices = federation.total_weight()
    failing = driver.attempt + 1
    driver.silence = lambda method, site: (
        when if (driver.attempt, method) == (failing, stage) and site in vanish else None
    )
    driver.replies.clear()
    hashes = []
    for number in (1, 2):
        state, total = trained_once(federation, number, slices)
        hashes.append(state.hash)
        assert total.contributors == cohort.cohort.sites
        assert len(federation.failed) == (number == 1)
    assert hashes == expected
    assert sorted(trained) == [(site, number) for site in cohort.cohort.sites for number in (1, 2)]
    keys: list[bytes] = []
    for method, _, reply in driver.replies:
        if method == "advertise":
            body = decode(reply).body
            assert isinstance(body, Advertise)
            keys += [body.mask_key, body.channel_key, body.seed_commitment]
    assert len(keys) >= 3 * (2 * sites + (sites - len(vanish)))
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("stage", ["share", "fit", "confirm", "unmask"])
def test_a_round_in_which_a_site_was_restarted_gives_the_same_bits_in_the_next_attempt(
    prepared: PreparedCohort, trained: list[Any], stage: str
) -> None:
    expected = undisturbed(prepared)
    trained.clear()
    federation, state, driver = small_run(prepared, attempts=2)
    slices = federation.total_weight()
    failing = driver.attempt + 1

    def crash(method: str, site: str, keywords: dict[str, Any]) -> None:
        if (driver.attempt, method, site) == (failing, stage, "site-b"):
            driver._inner._sites[site] = FederatedSite(driver[site].spec)  # its memory is gone

    driver.twist = crash
    hashes = []
    for number in (1, 2):
        state = federation.train(number, slices)[0].state
        hashes.append(state.hash)
        assert len(federation.failed) == (number == 1)
    assert hashes == expected
    again = stage in ("confirm", "unmask")  # what it had trained is gone too; the others train once
    assert sorted(trained) == sorted(
        [(site, number) for site in prepared.cohort.sites for number in (1, 2)] + [("site-b", 1)] * again
    )


def test_a_site_that_misses_the_roster_of_a_repetition_is_lost_alone(
    four: PreparedCohort, tmp_path: Path, trained: list[Any]
) -> None:
    """Two sites vanish and are opened again; a third does not answer in time when keys are told anew."""
    public = [create_identity(site, tmp_path / "keys", None)[1] for site in FOUR]
    (tmp_path / "roster.txt").write_text("".join(path.read_text() for path in public))
    settings = {"roster": tmp_path / "roster.txt", "key_dir": tmp_path / "keys"}
    federation, _state, driver = small_run(four, attempts=2, **settings)
    slices = federation.total_weight()
    failing = driver.attempt + 1
    silent = {("share", "site-a"), ("share", "site-b"), ("enroll", "site-d")}
    driver.silence = lambda method, site: "before" if driver.attempt == failing and (method, site) in silent else None
    total = federation.train(1, slices)[1][-1]
    assert len(federation.failed) == 1
    assert {"site-a", "site-b", "site-c"} <= set(total.contributors)


def test_what_was_trained_counts_for_the_state_that_it_started_from_alone(
    prepared: PreparedCohort, trained: list[Any]
) -> None:
    federation, state, _ = small_run(prepared)
    slices = federation.total_weight()
    for start in (state, state, shifted(federation, state)):
        put_back(federation, start)
        federation.train(1, slices)
    assert sorted(trained) == [(site, 1) for site in prepared.cohort.sites for _ in range(2)]


def test_a_round_that_may_not_be_tried_again_names_the_lost_sites_and_why(
    four: PreparedCohort, trained: list[Any]
) -> None:
    federation, state, driver = small_run(four, attempts=1)
    slices = federation.total_weight()
    bad = pack_state(federation.manifest, shifted(federation, state))

    def send(method: str, site: str, keywords: dict[str, Any]) -> None:
        if (method, site) == ("fit", "site-d"):
            keywords["state"] = bad

    driver.twist = send
    driver.silence = lambda method, site: "before" if (method, site) == ("fit", "site-b") else None
    with pytest.raises(RoundError) as failed:
        federation.train(1, slices)
    message = str(failed.value)
    assert "round 1 failed: only 2 of the 3 sites that are needed are left after stage 'masked input'" in message
    assert "lost site-b: gave no answer in time" in message
    assert "lost site-d: OtherModel: site site-d refuses round 1" in message
    assert "site-a:" not in message
    assert len(federation.failed) == 1


def test_no_sum_of_fewer_sites_than_the_run_asks_for(
    four: PreparedCohort, caplog: pytest.LogCaptureFixture, trained: list[Any]
) -> None:
    federation, _state, driver = small_run(four, min_contributors=4)
    slices = federation.total_weight()
    driver.silence = lambda method, site: "before" if (method, site) == ("fit", "site-d") else None
    with pytest.raises(
        RoundError, match=r"only 3 of the 4 sites that it needs are left after fit.* lost site-d: gave no answer"
    ):
        federation.train(1, slices)
    assert "confirm" not in [method for method, _, _ in driver.replies[-8:]]
    # Nor would the sites help a driver that has fewer in mind.
    driver.silence = lambda method, site: None

    def tell(method: str, site: str, keywords: dict[str, Any]) -> None:
        if method == "confirm":
            told = attempt_from_json(driver.told("advertise", site)[-1]["attempt"])
            keywords["survivors"] = encode_broadcast(Survivors((0, 1, 2)), told.digest())

    driver.twist = tell
    with pytest.raises(RoundError, match=r"lost site-a: BareLane: lane .* would be the sum of 3 sites"):
        federation.train(1, slices)
    assert refused(caplog, "site-a", "confirm", BareLane)


# Narrow rings


def weighted_mean(fits: dict[str, Fit], values: Callable[[Fit], np.ndarray] = lambda fit: fit.update) -> np.ndarray:
    weights = np.array([fit.slices for fit in fits.values()], np.float64)
    return (weights[:, None] * np.stack([values(fit).astype(np.float64) for fit in fits.values()])).sum(
        0
    ) / weights.sum()


def test_a_run_in_a_narrow_ring_stays_within_its_stated_bound(prepared: PreparedCohort, fits: dict[str, Fit]) -> None:
    federation, _, _ = small_run(prepared, None, rounds=3, bits=20)
    slices = federation.total_weight()
    for number in (1, 2, 3):
        step, totals = federation.train(number, slices)
        update, expected, mean = step.update, weighted_mean(fits), flat_mean(federation, step.update)
        assert update.precision.cut == 0
        assert np.abs(mean - expected).max() <= update.precision.bound * (1 + 1e-6)
        assert np.abs(mean - expected).max() <= update.precision.largest * 1.001 + 1e-12
        assert update.precision.rms < update.precision.largest < update.precision.bound
        assert np.abs(expected).max() > 100 * update.precision.bound  # and that says something
        assert [total.layout.lanes[0].name for total in totals[:-1]] == ["magnitudes"] * (number == 1)
        lanes = totals[-1].layout.lanes
        assert {lane.bits for lane in lanes if lane.name.startswith("update/")} == {20}
        assert {lane.bits for lane in lanes if not lane.name.startswith("update/")} == {32}
        sent = federation.ledger.total("up", number)
        assert sent / (3 * federation.manifest.shared_size * 20 / 8) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_in_the_narrowest_rings_updates_are_rotated_and_the_error_is_as_sites_measured(
    prepared: PreparedCohort, fits: dict[str, Fit], bits: int
) -> None:
    federation, _, _ = small_run(prepared, None, bits=bits)
    slices = federation.total_weight()
    for number in (1, 2):
        step, totals = federation.train(number, slices)
        off = flat_mean(federation, step.update) - weighted_mean(fits)
        precision = step.precision
        cut = precision.cut > 0  # its share of the error is not in what rounding did
        assert np.sqrt(np.mean(off**2)) == pytest.approx(precision.rms, rel=0.5 if cut else 0.1)
        assert cut or np.abs(off).max() <= precision.largest
        assert {lane.bits for lane in totals[-1].layout.lanes if lane.name.startswith("update/")} == {bits}
        spread = np.sqrt(np.mean(weighted_mean(fits) ** 2))
        assert precision.rms < {8: 0.3, 12: 0.02, 16: 0.002}[bits] * spread


def test_values_beyond_the_clip_are_cut_and_counted(
    prepared: PreparedCohort, trained: list[Any], fits: dict[str, Fit]
) -> None:
    federation, _, _ = small_run(prepared, bits=20, clip_headroom=1.0, clip_quantile=0.9)
    slices = federation.total_weight()
    first = federation.train(1, slices)[0].update
    step, (total,) = federation.train(2, slices)
    update, mean = step.update, flat_mean(federation, step.update)
    limits = np.empty(federation.manifest.shared_size, np.float32)
    for name, group in tensor_groups(federation.manifest).items():
        limits[group.index] = first.clips[name]
    weights = {site: np.float32(fit.slices / slices) for site, fit in fits.items()}
    beyond = [np.abs(fit.update * weights[site]) > limits for site, fit in fits.items()]
    assert 0.01 < np.mean(beyond) < 0.1  # a half octave above the quantile at most
    assert update.precision.cut == pytest.approx(np.mean(beyond), rel=1e-4)
    cut = {site: np.clip(fit.update * weights[site], -limits, limits).astype(np.float64) for site, fit in fits.items()}
    expected = sum(cut.values()) / sum(fit.slices / slices for fit in fits.values())
    assert np.abs(mean - expected).max() <= update.precision.bound * (1 + 1e-6)
    assert np.abs(mean - weighted_mean(fits)).max() > 100 * update.precision.bound
    assert total.contributors == prepared.cohort.sites


def test_masked_and_plain_runs_in_a_narrow_ring_give_the_same_states(
    prepared: PreparedCohort, trained: list[Any]
) -> None:
    hashes: dict[str, list[str]] = {"masked": [], "plain": []}
    for kind, states in hashes.items():
        federation, state, _ = small_run(prepared, secure_sum=kind, bits=20, rounds=3)
        slices = federation.total_weight()
        for number in (1, 2, 3):
            state, total = trained_once(federation, number, slices)
            states.append(state.hash)
        assert {lane.bits for lane in total.layout.lanes if lane.name.startswith("update/")} == {20}
    assert hashes["masked"] == hashes["plain"]
    assert len(set(hashes["masked"])) == 3
