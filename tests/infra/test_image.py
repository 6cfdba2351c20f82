"""The image's sources and Ray's own launcher's file, by linters and schemas: no Docker engine is asked."""

import copy
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml
from support.terraform import ROOT, SCRIPTS

from cluster.placement import Node, SiteNeeds, plan, preflight

SHELL = [ROOT / "infra/image/entrypoint.sh", ROOT / "infra/terraform/modules/machine/scripts/boot.sh"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_scripts_pass_shellcheck(script):
    done = subprocess.run([SCRIPTS / "shellcheck", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_shellcheck_is_one_that_finds_things(tmp_path):
    (tmp_path / "wrong.sh").write_text("#!/bin/bash\nrm -rf $1/*\n")
    assert subprocess.run([SCRIPTS / "shellcheck", tmp_path / "wrong.sh"], capture_output=True).returncode == 1


def test_the_dockerfile_passes_hadolint_and_a_wrong_one_does_not(tmp_path):
    done = subprocess.run([SCRIPTS / "hadolint", ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    (tmp_path / "Dockerfile").write_text(
        DOCKERFILE.replace("-slim-bookworm AS build", " AS build\nRUN cd /tmp\nUSER root")
    )
    assert subprocess.run([SCRIPTS / "hadolint", tmp_path / "Dockerfile"], capture_output=True).returncode == 1


def test_the_image_is_no_root_and_installs_what_is_pinned_and_nothing_when_it_runs():
    final = DOCKERFILE[DOCKERFILE.index("AS cpu") :]
    assert re.findall(r"^USER (.*)$", DOCKERFILE, re.M) == ["10001:10001"]
    assert not re.search(r"pip|apt-get|curl|wget", final)
    installs = re.findall(r"pip install (.*)", DOCKERFILE)
    assert len(installs) == 3
    assert all("-c constraints.txt" in one for one in installs)
    assert re.findall(r"^FROM (?:python:\$\{PYTHON\}-slim-bookworm|cpu|\$\{VARIANT\})", DOCKERFILE, re.M)
    assert re.findall(r"^FROM \S+ AS (\S+)", DOCKERFILE, re.M) == ["build", "cpu", "cuda"]


def test_what_the_image_copies_is_there_and_let_in_by_dockerignore():
    copied = re.findall(r"^COPY (?!--from)(?:--\S+ )*(.*) \S+$", DOCKERFILE, re.M)
    sources = [source for line in copied for source in line.split()]
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert {"fedsam_core", "cluster", "pipelines", "constraints.txt"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists()
        assert {source, f"{source}/**", f"{Path(source).parent}/**"} & let_in


def test_the_images_requirements_are_the_projects_and_each_is_pinned():
    script = ROOT / "infra/image/requirements.py"
    done = subprocess.run(
        [sys.executable, script, ROOT / "pyproject.toml", "tracking"], capture_output=True, text=True, check=True
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert done.stdout.splitlines() == [*project["dependencies"], "psycopg[binary]"]
    plain = lambda name: re.split(r"[\[><=;]", name)[0].lower().replace("_", "-")  # noqa: E731
    pinned = {plain(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert {plain(line) for line in done.stdout.splitlines()} <= pinned


@pytest.fixture(scope="module")
def launcher():
    return yaml.safe_load((ROOT / "cluster/ray-aws.yaml").read_text())


@pytest.fixture(scope="module")
def schema():
    return json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())


def test_rays_launcher_knows_every_key(launcher, schema):
    jsonschema.validate(launcher, schema)


@pytest.mark.parametrize(
    "plant",
    [
        lambda c: c.update(max_worker=3),
        lambda c: c.pop("provider"),
        lambda c: c["docker"].update(image=3),
        lambda c: c["available_node_types"]["site-a"].update(min_workers="1"),
        lambda c: c["available_node_types"]["site-b"].update(resource={"GPU": 1}),
    ],
)
def test_rays_launcher_refuses_planted_mistakes(launcher, schema, plant):
    wrong = copy.deepcopy(launcher)
    plant(wrong)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema)


def test_rays_launcher_makes_a_node_for_each_site(launcher):
    kinds = launcher["available_node_types"]
    nodes = [Node(n, k["resources"]["CPU"], k["resources"].get("GPU", 0), k["resources"]) for n, k in kinds.items()]
    sites = [name for name in kinds if name != launcher["head_node_type"]]
    preflight(sites, nodes, SiteNeeds())
    assert {site: options.gpus for site, options in plan(sites, nodes, SiteNeeds()).items()} == dict.fromkeys(sites, 1)
    assert all(kinds[site]["min_workers"] == kinds[site]["max_workers"] == 1 for site in sites)
    assert launcher["max_workers"] == len(sites)
