"""The image's sources and Ray's own launcher's file, by linters and schemas: no Docker engine is asked."""

import copy
import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from contextlib import suppress
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


def entrypoint(tmp_path, program, arguments, **settings):
    """What a stand-in for `program` says when the image's entrypoint has become it."""
    (tmp_path / program).write_text('#!/bin/sh\nprintf "%s\\n" "$@"; env; cat "$PGPASSFILE" 2>/dev/null; true\n')
    (tmp_path / program).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}", **settings}
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(
            [SHELL[0], *arguments], env=environment, stdout=said, stderr=said, start_new_session=True
        )
        try:
            status = process.wait(60)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it left in the background, as a container's end does
    return status, (tmp_path / "said").read_text()


def test_mlflow_reads_the_databases_password_from_a_file_and_has_it_on_no_command_line(aws, tmp_path):
    word = json.dumps({"username": "mlflow", "password": "a:b\\c"})
    secret = aws.client("secretsmanager").create_secret(Name="rds", SecretString=word)["ARN"]
    (tmp_path / "mlflow-password").write_text("of-the-admin\n")
    settings = {
        **aws.environment,
        "SECRETS": str(tmp_path),
        "DATA_DIR": "/data",
        "DATABASE": "postgresql://mlflow@db.example:5432/mlflow",
        "DATABASE_SECRET": secret,
        "ARTIFACTS": "s3://bucket/mlflow",
        "ALLOWED_HOSTS": "10.20.0.11:5000",
        "PGPASSFILE": str(tmp_path / "pgpass"),
    }
    status, said = entrypoint(tmp_path, "fedsam", ["tracking"], **settings)
    assert status == 0
    command = said.splitlines()[: said.splitlines().index("10.20.0.11:5000") + 1]
    assert command[:4] == ["track", "serve", "--folder", "/data/fedsam/mlflow"]
    assert command[command.index("--backend") + 1] == settings["DATABASE"]
    assert {"--auth", "s3://bucket/mlflow", "0.0.0.0"} <= set(command)
    assert {"PGSSLMODE=require", "MLFLOW_AUTH_ADMIN_PASSWORD=of-the-admin"} <= set(said.splitlines())
    assert said.count("a\\:b\\\\c") == 1  # libpq's escapes; in the file alone
    assert (tmp_path / "pgpass").stat().st_mode & 0o077 == 0
    status, said = entrypoint(tmp_path, "fedsam", ["tracking"], **{**settings, "DATABASE_SECRET": "gone"})
    assert status == 1
    assert "fedsam: the password of the database cannot be read from Secrets Manager" in said


def test_a_laboratorys_head_is_the_node_of_all_its_sites(tmp_path):
    (tmp_path / "ray-token").write_text("word")
    status, said = entrypoint(
        tmp_path, "ray", ["head"], SECRETS=str(tmp_path), NODE_IP="10.0.0.1", SITES="A,site-b", GPUS="2"
    )
    assert status == 0
    options = dict(line[2:].partition("=")[::2] for line in said.splitlines() if line.startswith("--"))
    assert json.loads(options["resources"]) == {"site_A": 1, "site_site-b": 1}
    assert options["labels"] == "fedsam.io/role=head"  # of no single site
    assert (options["num-gpus"], options["dashboard-host"], options["port"]) == ("2", "127.0.0.1", "6379")
    told = dict(line.partition("=")[::2] for line in said.splitlines())
    assert told["RAY_AUTH_MODE"] == "token"
    assert told["RAY_AUTH_TOKEN_PATH"] == str(tmp_path / "ray-token")


def test_the_entrypoint_runs_commands_as_they_stand_and_says_what_it_lacks(tmp_path):
    assert entrypoint(tmp_path, "hello", ["hello", "a b"])[1].startswith("a b\n")
    status, said = entrypoint(tmp_path, "ray", [])
    assert (status, said) == (1, "fedsam: say what to be: head, site, tracking, or a command\n")
    status, said = entrypoint(tmp_path, "ray", ["head"], SECRETS=str(tmp_path))
    assert (status, said) == (1, f"fedsam: no secret at {tmp_path}/ray-token\n")


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
