"""The machines' first boot as Terraform rendered it, run up to a Ray cluster that takes the printed submit line.

Amazon's and NVIDIA's programs and Docker are small stand-ins (fakes/); Ray, token, ports, resources and labels are
real. The network is one of the test's own, where the cluster's addresses and port 8265 are free.
"""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient
from support.terraform import BUCKET, ROOT, SCRIPTS

from cluster.placement import Node, SiteNeeds, plan, preflight

FAKES = Path(__file__).parent / "fakes"
PATH = f"{FAKES}:{SCRIPTS}:{os.environ['PATH']}"
SITES = ("site-a", "site-b", "site-c")
GPUS = {"kidneys": {"head": 0, "site-site-a": 1, "site-site-b": 1, "site-site-c": 4}, "lab": {"head": 1}}
only_the_consortium = pytest.mark.parametrize("booted", ["consortium"], indirect=True)
only_the_lab = pytest.mark.parametrize("booted", ["lab"], indirect=True)


@pytest.fixture(scope="module")
def own_network(infra_check):
    """A network namespace of the test's own."""
    if os.environ.get("FEDSAM_OWN_NETWORK") != "1":
        pytest.skip("NOT CHECKED: no network of the test's own: `make infra-check` makes one where unshare(1) may")


class Booted:
    """Machines that ran their first boot: their processes, to be ended by id."""

    def __init__(self, aws, cluster, folder):
        self._aws, self.cluster, self.folder = aws, cluster, folder
        self.gpus = GPUS[cluster.name]
        self.found = aws.machines(cluster.name)

    def boot(self, name, gpus=None, first_port=20000, **settings):
        """Runs a machine's user data; returns what it printed."""
        machine = self.found[name]
        run = self.folder / name
        run.mkdir(exist_ok=True)
        (run / "user-data").write_text(self._aws.user_data(machine))
        arguments = ["--num-cpus=2", f"--object-store-memory={100 * 2**20}", f"--temp-dir={self.folder}/ray"]
        environment = {
            **os.environ,
            **self._aws.environment,
            "PATH": PATH,
            "FAKE_RUN": str(run),
            "FAKE_IP": machine["PrivateIpAddress"],
            "FAKE_TYPE": machine["InstanceType"],
            "FAKE_GPUS": str(self.gpus[name] if gpus is None else gpus),
            "FAKE_ENTRYPOINT": str(ROOT / "infra" / "image" / "entrypoint.sh"),
            "FAKE_ENVIRONMENT": json.dumps({"PORTS": str(first_port)}),
            # A node that is not the head finds Ray's folder by the head.
            "FAKE_ARGUMENTS": json.dumps(arguments if name == "head" else arguments[:2]),
            "CONTAINER_UID": str(os.getuid()),
            "CRON_DIR": str(run),
            "BOOT_TRIES": "1",
            **settings,
        }
        return subprocess.run(
            ["bash", run / "user-data"], env=environment, capture_output=True, text=True, cwd=run, timeout=120
        )

    def wait_until_up(self, name):
        """One after the other: nodes that begin at once on one machine take each other's sockets."""
        end = time.monotonic() + 240
        while "Ray runtime started" not in self.log(name):
            assert time.monotonic() < end, self.log(name)[-3000:]
            time.sleep(0.5)

    def log(self, name):
        return (self.folder / name / "fedsam.log").read_text()

    def end(self):
        started = []
        for note in self.folder.glob("*/*.pid"):
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(int(note.read_text()))
                started += [process, *process.children(recursive=True)]
        for process in started:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(started, timeout=15)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.fixture(scope="module", params=["consortium", "lab"])
def booted(own_network, request, aws, objects):
    """A cluster's machines, booted, each at its own address: the head and three sites, or the one of the laboratory.

    MLflow's machine is left out where it is one of its own: there is no PostgreSQL here.
    """
    cluster = request.getfixturevalue(request.param)
    folder = Path(cluster.given["data_dir"]) / "m"
    folder.mkdir()
    objects.put_object(Bucket=BUCKET, Key="hospitals/c/scans/one/image.nii.gz", Body=b"voxels")
    objects.put_object(Bucket=BUCKET, Key="sites/site-a/scans/two/image.nii.gz", Body=b"others")
    all_machines = Booted(aws, cluster, folder)
    for machine in all_machines.found.values():
        subprocess.run(["ip", "address", "add", f"{machine['PrivateIpAddress']}/32", "dev", "lo"], check=True)
    try:
        for number, name in enumerate(all_machines.gpus):
            done = all_machines.boot(name, first_port=20000 + 1000 * number)
            assert done.returncode == 0, done.stderr
            assert done.stdout.endswith(f"fedsam: started {name.partition('-')[0]}\n")
            all_machines.wait_until_up(name)
        yield all_machines
    finally:
        all_machines.end()


NODES = """
import json, ray, sys
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
nodes = [node for node in ray.nodes() if node["Alive"]]
print("NODES", json.dumps([[n["NodeManagerAddress"], n["Resources"], n["Labels"]] for n in nodes]))
"""


@pytest.fixture(scope="module")
def nodes(booted):
    """The nodes that the head knows, by address: (resources, labels)."""
    token = Path(booted.cluster.given["data_dir"]) / "secrets" / "ray-token"
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    command = [sys.executable, "-c", NODES, f"{booted.found['head']['PrivateIpAddress']}:6379"]
    end = time.monotonic() + 120
    while True:
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        told = [line.removeprefix("NODES ") for line in done.stdout.splitlines() if line.startswith("NODES")]
        found = {address: (resources, labels) for address, resources, labels in json.loads(told[0])} if told else {}
        if len(found) == len(booted.gpus):
            return found
        assert time.monotonic() < end, [done.stderr[-2000:], *(booted.log(name)[-2000:] for name in booted.gpus)]
        time.sleep(1)


def places(nodes):
    """What each site is given, by the placement of a run."""
    known = [Node(address, r.get("CPU", 0), r.get("GPU", 0), r) for address, (r, _) in nodes.items()]
    preflight(SITES, known, SiteNeeds())
    return plan(SITES, known, SiteNeeds())


@only_the_consortium
def test_nodes_announce_their_site_their_gpus_and_what_they_are(booted, nodes):
    resources, labels = nodes["10.20.0.10"]
    assert labels["fedsam.io/role"] == "head"
    assert "GPU" not in resources
    for site in SITES:
        machine = booted.found[f"site-{site}"]
        resources, labels = nodes[machine["PrivateIpAddress"]]
        assert {name: n for name, n in resources.items() if name.startswith("site_")} == {f"site_{site}": 1}
        assert resources["GPU"] == booted.gpus[f"site-{site}"]
        assert {key: value for key, value in labels.items() if key.startswith("fedsam.io/")} == {
            "fedsam.io/role": "site",
            "fedsam.io/site": site,
            "fedsam.io/market": "spot" if site == "site-b" else "on-demand",
            "fedsam.io/instance-type": machine["InstanceType"],
        }
    assert {site: options.gpus for site, options in places(nodes).items()} == dict.fromkeys(SITES, 1)


@only_the_lab
def test_a_laboratorys_sites_share_the_gpu_of_its_only_node(booted, nodes):
    ((address, (resources, labels)),) = nodes.items()
    assert address == "10.30.0.10"
    assert {name: n for name, n in resources.items() if name.startswith("site_")} == {f"site_{s}": 1 for s in SITES}
    assert (resources["GPU"], labels["fedsam.io/role"]) == (1, "head")
    shares = {site: (options.gpus, dict(options.resources)) for site, options in places(nodes).items()}
    assert shares == {site: (0.3333, {f"site_{site}": 0.001}) for site in SITES}


def test_a_site_listens_on_the_ports_that_the_firewall_knows_and_the_dashboard_on_the_loopback(booted, nodes):
    for number, name in enumerate(booted.gpus):
        pid = int((booted.folder / name / "fedsam.pid").read_text())
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        ports = set()
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                ports |= {(c.laddr.ip, c.laddr.port) for c in process.net_connections("tcp") if c.status == "LISTEN"}
        first = 20000 + 1000 * number
        open_to_others = {port for address, port in ports if not address.startswith("127.") and address != "::1"}
        assert open_to_others
        strays = {port for port in open_to_others if not first <= port < first + 1000}
        # Ray's client server and the head's own metrics, for which the firewall has no rule.
        assert strays == ({6379, 10001, 44217, 44227} if name == "head" else set())
        assert name != "head" or ("127.0.0.1", 8265) in ports


def test_containers_have_the_gpus_restart_and_are_told_no_secret(booted):
    token = (Path(booted.cluster.given["data_dir"]) / "secrets" / "ray-token").read_text().strip()
    assert len(token) == 48
    for name, gpus in booted.gpus.items():
        asked = json.loads((booted.folder / name / "fedsam.json").read_text())
        assert asked["options"].get("--gpus") == ("all" if gpus else None)
        assert (asked["options"]["--restart"], asked["options"]["--network"]) == ("unless-stopped", "host")
        assert asked["image"] == booted.cluster.given["image"]
        assert token not in json.dumps(asked) + booted.log(name)
    settings = Path(booted.cluster.given["data_dir"]) / "secrets" / "settings"
    assert token not in settings.read_text()
    for secret in settings.parent.iterdir():
        assert secret == settings or secret.stat().st_mode & 0o077 == 0


@only_the_consortium
def test_a_sites_own_scans_are_fetched_and_later_ones_too(booted, consortium, aws, objects):
    scans = Path(consortium.given["data_dir"]) / "scans"
    assert (scans / "one" / "image.nii.gz").read_bytes() == b"voxels"
    variable, line = (booted.folder / "site-site-c" / "fedsam-scans").read_text().splitlines()
    assert line.startswith("*/10 * * * * root aws s3 sync")
    objects.put_object(Bucket=BUCKET, Key="hospitals/c/scans/later.nii.gz", Body=b"more")
    objects.put_object(Bucket=BUCKET, Key="sites/site-a/scans/others.nii.gz", Body=b"not c's")
    environment = {**aws.environment, "PYTHONPATH": "", variable.partition("=")[0]: variable.partition("=")[2]}
    command = line.partition(" root ")[2]
    assert subprocess.run(["sh", "-c", command], env=environment, capture_output=True).returncode == 0
    assert (scans / "later.nii.gz").read_bytes() == b"more"
    assert not (scans / "others.nii.gz").exists()
    assert not (booted.folder / "head" / "fedsam-scans").exists()


def test_the_printed_submit_line_runs_a_federation(booted, nodes, aws, objects):
    line = booted.cluster.outputs["submit"]
    assert "--address http://127.0.0.1:8265 " in line
    for one in objects.list_objects_v2(Bucket=BUCKET)["Contents"]:  # another cluster's
        if one["Key"].startswith(("cohorts/", "results/")):
            objects.delete_object(Bucket=BUCKET, Key=one["Key"])
    if booted.cluster.name == "lab":
        wait_for_mlflow(booted)
    environment = {**os.environ, **aws.environment, "PATH": PATH}
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS"):
        environment.pop(name, None)
    done = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    keys = [one["Key"] for one in objects.list_objects_v2(Bucket=BUCKET)["Contents"]]
    assert [key for key in keys if key.startswith("results/") and key.endswith("/rounds/000001/commit.json")]
    for site in SITES:
        assert [key for key in keys if key.startswith("cohorts/") and f"/{site}/cases/" in key]
    assert not [key for key in keys if key.partition("/")[0] not in ("cohorts", "results", "sites", "hospitals")]
    if booted.cluster.name == "lab":
        client = MlflowClient("http://127.0.0.1:5000")
        known = [one.experiment_id for one in client.search_experiments()]
        assert [one.info.status for one in client.search_runs(known)] == ["FINISHED"]
    without = subprocess.run(
        ["bash", "-c", line.replace("/ray-token", "/mlflow-password")], env=environment, capture_output=True, text=True
    )
    assert without.returncode == 2
    assert "wants a token" in without.stderr


def wait_for_mlflow(booted):
    """The laboratory's, on its own machine."""
    end = time.monotonic() + 240
    while True:
        with suppress(OSError):
            return urllib.request.urlopen("http://127.0.0.1:5000/health", timeout=2).close()
        assert time.monotonic() < end, (booted.folder / "head" / "fedsam-tracking.log").read_text()[-3000:]
        time.sleep(0.5)


def test_a_machine_without_the_gpus_that_it_is_to_have_does_not_join(own_network, consortium, aws, tmp_path):
    done = Booted(aws, consortium, tmp_path).boot("site-site-c", gpus=1)
    assert done.returncode == 1
    assert "is to have 4 GPU(s), nvidia-smi lists 1: choose another instance_type, or lower gpus" in done.stderr
    assert not list(tmp_path.glob("*/*.pid"))


def test_without_its_secret_a_machine_gives_up_and_says_which(own_network, consortium, aws, tmp_path):
    done = Booted(aws, consortium, tmp_path).boot("site-site-a", AWS_ENDPOINT_URL="http://127.0.0.1:1")
    assert done.returncode == 1
    assert "gave up: parameter arn:aws:ssm:" in done.stderr
    assert not list(tmp_path.glob("*/*.pid"))
