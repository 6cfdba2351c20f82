"""Names that people give end up in paths, object keys, shell commands and logs: what is accepted does no harm there."""

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cluster.certificates import _file_name
from cluster.placement import site_resource
from cluster.tracking import TrackingConfig
from fedsam_core.data.cohort import CohortConfig
from fedsam_core.data.sources.tables import is_name
from fedsam_core.errors import FedsamError
from fedsam_core.federation.config import FederationConfig
from fedsam_core.federation.summing import SumSpec
from fedsam_core.secagg.keyfiles import format_roster
from fedsam_core.secagg.keys import Identity, Roster
from fedsam_core.selection import LayerSelection
from fedsam_core.store import LocalStore, safe_key
from pipelines.commits import fetch_run
from pipelines.config import Config, load_config
from pipelines.study import Study
from pipelines.submit import stage_command

BASE = {"cohort": {"name": "c", "source": "phantom"}}
KEY = Identity.generate().public
FORBIDDEN = set("/\\;|&$`<>()*?[]{}~!#%='\"^")

NAMES: dict[str, Callable[[str], object]] = {
    "run": lambda name: Config.model_validate({**BASE, "name": name}),
    "cohort": lambda name: CohortConfig(name=name, source="phantom"),
    "own site": lambda name: CohortConfig(name="c", sites={name: Path("/data")}),
    "listed site": lambda name: None if is_name(name) else refuse(),
    "key": lambda name: format_roster(Roster({name: KEY})),
    "run at a site": lambda name: SumSpec(run=name, site="a", sites=("a",), seed=0, federation=FederationConfig()),
    "resource": site_resource,
    "certificate": _file_name,
    "study": lambda name: Study.model_validate({"name": name, "config": "demo", "selections": ["flap"]}),
    "selection": lambda name: LayerSelection(name=name, train=("head",)),
    "model": lambda name: TrackingConfig(register_as=name),
}


def refuse() -> None:
    raise FedsamError("no name")


def accepted(check: Callable[[str], object], name: str) -> bool:
    try:
        check(name)
    except (FedsamError, ValidationError, ValueError):
        return False
    return True


pieces = st.sampled_from(
    [
        *("../", "..", ".", "/", "/etc/passwd", "\\", "\0", "\n", "\r", " ", "~", "%2e%2e%2f"),
        *(";rm -rf x", "$(id)", "`id`", "|", "&", "-", "--x", "'"),
        *("．．／", "\u2024\u2024\u2215", "\u202egpj", "\u200b", "\ufeff", "é", "e\u0301", "北", "a", "B7", "_"),
    ]
)
FEW = settings(max_examples=40, deadline=None)
nasty = st.one_of(st.text(max_size=12), st.lists(pieces, max_size=5).map("".join), st.from_regex(r"\w[\w.-]*"))


@pytest.mark.parametrize("kind", NAMES)
@FEW
@given(name=nasty)
@example(name="a\n")
@example(name="..")
@example(name="-rf")
@example(name="a/../../b")
def test_an_accepted_name_is_one_harmless_part_of_a_path(kind: str, name: str) -> None:
    if not accepted(NAMES[kind], name):
        return
    root = Path("/root/folder")
    assert (root / name).parent == root
    assert (root / name).resolve().parent == root.resolve()
    assert not set(name) & FORBIDDEN
    assert name.isprintable()
    assert not any(character.isspace() for character in name)
    assert name[0] not in "-."


@pytest.mark.parametrize("kind", NAMES)
def test_ordinary_names_are_accepted(kind: str) -> None:
    assert accepted(NAMES[kind], "north-2")


@FEW
@given(key=nasty)
def test_an_accepted_key_stays_in_its_store(key: str) -> None:
    try:
        safe_key(key)
    except FedsamError:
        return
    root = Path("/root/store")
    assert (root / key).resolve().is_relative_to(root)
    assert not key.startswith("/")
    assert "\0" not in key
    assert "\n" not in key


@pytest.mark.parametrize("run", ["../x", "/etc", "a/../../b", "a\0b", "a\nb", ""])
def test_a_run_that_leads_out_of_the_store_is_not_fetched(run: str, tmp_path: Path) -> None:
    (tmp_path / "x" / "rounds" / "000000").mkdir(parents=True)
    (tmp_path / "x" / "rounds" / "000000" / "commit.json").write_text("{}")
    with pytest.raises(FedsamError, match="not a plain relative path"):
        fetch_run(LocalStore(tmp_path / "store"), run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@FEW
@given(text=st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=30))
@example(text="x'; rm -rf ~ #")
@example(text='$(id) `id` \\ "\n')
def test_a_jobs_command_line_gives_the_same_configuration(text: str) -> None:
    config = load_config("demo", ["seed=3"]).model_copy(update={"tracking": TrackingConfig(experiment=text)})
    words = shlex.split(shlex.join(stage_command("federate", config)))  # what the shell of the job makes of it
    assert words[:3] == ["python", "-m", "pipelines.federate"]
    assert load_config(None, words[3:]).tracking.experiment == config.tracking.experiment
