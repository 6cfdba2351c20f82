"""A study as a team runs it: a Ray cluster of four nodes, S3, an MLflow server, a job; and pictures of what they see.

    python benchmarks/study.py hippocampus --out FOLDER cohort.path=/data/Task04_Hippocampus

All of it is on this machine: a head and three nodes of two CPUs, SeaweedFS and MLflow, started here and ended in the
end. What they hold lies in FOLDER, so the same command goes on where it was stopped: nothing finished is run again. The
study is submitted as a Ray job, its results go to S3, its runs to MLflow, whose artifacts are in S3 too.
FOLDER/report is the report; with Chromium there are FOLDER/report.png and MLflow's pages, mlflow-*.png.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # servers and browser are those of the tests

# Read by Ray and numpy when they are imported.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["OMP_NUM_THREADS"] = "1"

from mlflow.tracking import MlflowClient
from ray.cluster_utils import Cluster
from support.browser import browser, missing
from support.mlflow import mlflow_server
from support.mlflow_pages import compare_url, differences, parallel_coordinates
from support.servers import S3Server, free_ports, seaweed_server

from pipelines.config import inline
from pipelines.study import load_study

REPOSITORY = Path(__file__).parents[1]
NODES, CPUS = 3, 2
ON_S3 = f"s3://{S3Server.bucket}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", help="a study's file, or a committed one's name")
    parser.add_argument("--out", type=Path, required=True, help="what servers hold, logs, report and pictures")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of all trials")
    options = parser.parse_intermixed_args()
    out: Path = options.out.resolve()
    os.environ |= {"AWS_ACCESS_KEY_ID": S3Server.access_key, "AWS_SECRET_ACCESS_KEY": S3Server.secret_key}
    with seaweed_server(out / "s3") as s3:
        os.environ["MLFLOW_S3_ENDPOINT_URL"] = s3.server.endpoint
        served = ["--artifacts", f"{ON_S3}/mlflow", "--s3-endpoint", s3.server.endpoint]
        with mlflow_server(out / "mlflow", free_ports(1)[0], *served) as mlflow, nodes() as jobs:
            print(f"dashboard {jobs}, MLflow {mlflow.uri}, S3 {s3.server.endpoint}", flush=True)
            settings = {
                "work_dir": f"{out / 'work'}",
                "storage.results": f"{ON_S3}/results",
                "storage.s3_endpoint": s3.server.endpoint,
                "tracking.uri": mlflow.uri,
            }
            wanted = [*options.overrides, *(f"{key}={inline(value)}" for key, value in settings.items())]
            fedsam("submit", "ablate", options.study, *wanted, "--address", jobs)
            name = load_study(options.study, options.overrides).name
            place = ["--store", f"{ON_S3}/results", "--s3-endpoint", s3.server.endpoint]
            fedsam("report", name, *place, "--out", str(out / "report"))
            if why := missing():
                print(f"no pictures: {why}")
            else:
                pictures(mlflow.uri, name, out)


@contextmanager
def nodes() -> Iterator[str]:
    """A head that runs jobs and a few nodes for trials; the address of the jobs' API."""
    folder = tempfile.mkdtemp(prefix="f-", dir="/tmp")  # Ray's socket paths lie in here and must be short
    Path("/tmp/ray").mkdir(exist_ok=True)
    dashboard, *agents = free_ports(2 + NODES)

    def own(number: int) -> dict[str, Any]:
        """What nodes on one machine must not share: a node unpacks a job's files anew over those of another."""
        return {"dashboard_agent_listen_port": agents[number], "runtime_env_dir_name": f"runtime_{number}"}

    node = {"object_store_memory": 200 * 2**20, "temp_dir": folder}
    head = {**node, **own(0), "num_cpus": 1, "include_dashboard": True, "dashboard_port": dashboard}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for number in range(1, 1 + NODES):
            cluster.add_node(**node, **own(number), num_cpus=CPUS)
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def fedsam(*arguments: str) -> None:
    """Ends this program with the command's status, where that is not 0."""
    status = subprocess.run([sys.executable, "-m", "pipelines.cli", *arguments], cwd=REPOSITORY).returncode
    if status:
        sys.exit(status)


def pictures(server: str, study: str, out: Path) -> None:
    """The report's first screens, and MLflow's pages of the study's runs."""
    client = MlflowClient(server, server)
    experiment = client.get_experiment_by_name(study)
    if experiment is None:
        raise SystemExit(f"MLflow has no experiment {study}")
    runs = client.search_runs([experiment.experiment_id], "attributes.status = 'FINISHED'", max_results=1000)
    children = [run for run in runs if run.data.tags.get("fedsam.stage") == "federate"]
    children.sort(key=lambda run: (run.data.params["selection"], run.data.params["seed"]))
    names = [str(run.info.run_name) for run in children]
    selections = {run.data.params["selection"] for run in children}
    with browser(free_ports(1)[0]) as page:
        page.open((out / "report" / "index.html").as_uri())
        page.wait_for([study])
        page.save(out / "report.png")
        page.open(compare_url(server, experiment.experiment_id, [str(run.info.run_id) for run in children]))
        parallel_coordinates(page, names, selections, out / "mlflow-parallel-coordinates.png")
        differences(page, out / "mlflow-compare.png")


if __name__ == "__main__":
    main()
