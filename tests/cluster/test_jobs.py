"""Jobs on a local cluster that the code under test starts and stops itself."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import ray
from support.consortium import until
from support.fault_table import SAME_END, Row, note
from support.runs import Runs

from cluster import jobs
from cluster.local import _MARK
from cluster.session import ray_session
from fedsam_core.errors import ClusterError
from pipelines import submit
from pipelines.submit import working_dir


@pytest.fixture(scope="module")
def address():
    with jobs.local_cluster(num_cpus=2, resources={"site_A": 1}, object_store_mb=100) as address:
        yield address


def python(code):
    return f'{sys.executable} -c "{code}"'


def clusters():
    """Marks of our local clusters that have a living process."""
    found = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.add(process.environ().get(_MARK))
    return found - {None}


def test_a_job_runs_in_its_working_dir_and_its_output_and_status_come_back(address, tmp_path, capsys):
    (tmp_path / "hello.py").write_text(
        "import os, time\n"
        "print('in', sorted(os.listdir()), os.environ['COLOR'], flush=True)\n"
        "time.sleep(3)\n"
        "print('pré-last', flush=True)\n"
    )
    (tmp_path / ".rayignore").write_text("big/\n")
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "file").write_bytes(b"x")
    out, times = [], []

    def write(text):
        out.append(text)
        times.append(time.monotonic())

    job = jobs.submit(address, "python hello.py", tmp_path, {"COLOR": "green"})
    assert jobs.follow(address, job, write) == 0
    text = "".join(out)
    assert "in ['.rayignore', 'hello.py'] green" in text
    assert "pré-last" in text
    assert times[-1] - times[0] > 0.5  # as it comes, not at the end
    # Following again tells the same, by default on standard output.
    assert jobs.follow(address, job) == 0
    assert "green" in capsys.readouterr().out


def test_the_project_is_sent_to_the_cluster_and_the_jobs_status_comes_back(address):
    root = Path(jobs.__file__).parents[1]
    code = (
        "import os, ray, cluster; ray.init(); held = ray.cluster_resources(); "
        "print('CPUs', held['CPU'], held['site_A']); "
        "print('ours', cluster.__file__.startswith(os.getcwd()), os.path.exists('tests'), os.path.exists('.venv')); "
        "exit(7)"
    )
    out = []
    assert jobs.follow(address, jobs.submit(address, python(code), root), out.append) == 7
    text = "".join(out)
    assert "CPUs 2.0 1.0" in text
    assert "ours True False False" in text


def test_ctrl_c_while_following_stops_the_job_and_says_so(address, heed_interrupts):
    code = "import time, os; print('pid', os.getpid(), flush=True); time.sleep(300)"
    follower = subprocess.Popen(
        [sys.executable, "-c", FOLLOW, address, python(code)],
        stdout=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
        preexec_fn=heed_interrupts,
    )
    try:
        lines = []
        for line in follower.stdout:
            lines.append(line)
            if line.startswith("pid"):
                follower.send_signal(signal.SIGINT)
        assert follower.wait(60) == jobs.STOPPED
        pid = next(int(line.split()[1]) for line in lines if line.startswith("pid"))
        assert any("stopping job raysubmit_" in line for line in lines)
        assert lines[-1].startswith("job raysubmit_")
        assert lines[-1].endswith("is stopped\n")
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    finally:
        follower.kill()
        follower.wait()
        follower.stdout.close()


FOLLOW = """
import sys
from cluster import jobs
job = jobs.submit(sys.argv[1], sys.argv[2])
sys.exit(jobs.follow(sys.argv[1], job))
"""


def test_a_broken_connection_neither_loses_nor_repeats_lines(address, monkeypatch):
    from ray.job_submission import JobSubmissionClient

    tail, breaks = JobSubmissionClient.tail_job_logs, []

    async def breaking(self, job):
        async for text in tail(self, job):
            yield text
            if "3" in text.split("\n") and not breaks:
                breaks.append(1)
                raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")

    monkeypatch.setattr(JobSubmissionClient, "tail_job_logs", breaking)
    out = []
    code = "import time; [(print(i, flush=True), time.sleep(0.5)) for i in range(8)]"
    assert jobs.follow(address, jobs.submit(address, python(code)), out.append) == 0
    assert breaks
    assert [line for line in "".join(out).splitlines() if line.isdigit()] == [str(i) for i in range(8)]


def test_a_stopped_job_has_its_own_status(address):
    job = jobs.submit(address, python("import time; time.sleep(300)"))
    jobs.stop(address, job)
    assert jobs.follow(address, job) == jobs.STOPPED
    jobs.stop(address, job)


@pytest.mark.faults
def test_a_federation_that_is_stopped_as_a_job_goes_on_as_another(address, tmp_path):
    """`ray job stop` leaves no process of the run, and `fedsam submit resume` brings it to the uninterrupted end."""
    selection = "selection={name: own, lora: {encoder: [q], rank: 1}, local: [encoder.norms]}"
    runs = Runs(tmp_path, selection, "federation.scaffold=true", "federation.rounds=6", "engine.site.cpus=0.3")
    try:
        settings = runs.settings("r", "engine.kind=ray")
        job = jobs.submit(address, shlex.join(["python", "-m", "pipelines.federate", *settings]), working_dir())
        until(lambda: list(runs.path("r").glob("checkpoints/*1.safetensors")), 300)
        assert len(of_run(tmp_path)) >= 5  # the command, the driver, three sites
        begun = time.monotonic()
        jobs.stop(address, job)
        assert jobs.follow(address, job) == jobs.STOPPED
        until(lambda: not of_run(tmp_path))
        seconds = time.monotonic() - begun
        assert runs.in_mlflow("r").info.status == "KILLED"
        with pytest.raises(SystemExit) as ended:
            submit.main(["resume", "r", f"work_dir={tmp_path}", "--address", address])
        assert ended.value.code == 0
        until(lambda: not of_run(tmp_path))
        runs.goes_well("federate", *runs.settings("whole"))
        assert runs.result("r") == runs.result("whole")
        entries = [json.loads(line) for line in (runs.path("r") / "record.jsonl").read_bytes().splitlines()]
        assert [entry["kind"] for entry in entries].count("resumed") == 1
        assert runs.in_mlflow("r").info.status == "FINISHED"
    finally:
        runs.zygote.close()
    note(Row("`ray job stop`, then `fedsam submit resume`", "Ray job", SAME_END, 0, seconds))


def of_run(folder):
    """Ids of the processes of a run on our cluster: its command's, and those of sites and driver."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or [])
        with suppress(psutil.Error, OSError):
            if process.info["status"] == psutil.STATUS_ZOMBIE:
                continue
            if re.match(r"ray::(SiteActor|FederationDriver|site )", line):
                raylet = process.parent()  # others' tests may have sites, too
                if raylet and raylet.environ().get("RAY_AUTH_TOKEN") == os.environ["RAY_AUTH_TOKEN"]:
                    found.append(process.pid)
            elif "-m pipelines." in line and str(folder) in line:
                found.append(process.pid)
    return found


def test_mishaps_are_one_line_with_the_fix(address, free_port, tmp_path, monkeypatch):
    def refused(action, *parts):
        with pytest.raises(ClusterError) as error:
            action()
        assert "\n" not in str(error.value)
        for part in parts:
            assert part in str(error.value)

    away = f"http://127.0.0.1:{free_port}"
    for action in (lambda: jobs.submit(away, "true"), lambda: jobs.follow(away, "x"), lambda: jobs.stop(away, "x")):
        refused(action, f"no Ray cluster answers at {away}", "ray start --head", "--address")
    refused(lambda: jobs.submit("auto", "true"), "auto is no address", "http://127.0.0.1:8265")
    refused(lambda: jobs.follow(address, "raysubmit_none"), "no job raysubmit_none", "ray job list")
    refused(lambda: jobs.stop(address, "raysubmit_none"), "no job raysubmit_none")
    (tmp_path / "file").write_bytes(os.urandom(101 * 2**20))
    refused(lambda: jobs.submit(address, "true", tmp_path), str(tmp_path), "100 MiB", ".rayignore")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", away)
    refused(lambda: jobs.submit(None, "true"), away)


def test_the_cluster_is_closed_to_whoever_lacks_its_token(address, monkeypatch):
    for token in (None, "wrong"):
        if token is None:
            monkeypatch.delenv("RAY_AUTH_TOKEN")
        else:
            monkeypatch.setenv("RAY_AUTH_TOKEN", token)
        with pytest.raises(ClusterError, match=r"wants a token \(40[13]\): set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"):
            jobs.submit(address, "true")


@pytest.mark.parametrize("token", [None, "0" * 64])
def test_a_command_without_the_clusters_token_is_told_at_once(address, monkeypatch, token):
    """Ray itself would knock for 20 s before it says that it failed to connect."""
    monkeypatch.setenv("RAY_ADDRESS", head_of_cluster())
    monkeypatch.setattr(ray, "init", lambda **options: pytest.fail("it was let through to Ray"))
    with pytest.raises(pytest.fail.Exception, match="let through"), ray_session():
        pass
    if token is None:
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/nowhere")
        monkeypatch.delenv("RAY_AUTH_TOKEN")
    else:
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    said = "wants a token" if token is None else "does not take this process's token"
    with (
        pytest.raises(ClusterError, match=f"{said}: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to what"),
        ray_session(),
    ):
        pass


def head_of_cluster():
    """HOST:PORT of the head of the cluster that this process has the token of."""
    for process in psutil.process_iter(["cmdline"]):
        with suppress(psutil.Error, OSError):
            options = dict(part.split("=", 1) for part in process.info["cmdline"] or [] if "=" in part)
            if (
                "--gcs_server_port" in options
                and process.environ().get("RAY_AUTH_TOKEN") == os.environ["RAY_AUTH_TOKEN"]
            ):
                return f"{options['--node-ip-address']}:{options['--gcs_server_port']}"
    raise AssertionError("no head")


def test_nothing_outlives_a_cluster_and_the_neighbor_stays(address):
    neighbors = clusters()
    access = os.environ["RAY_AUTH_TOKEN"]
    with jobs.local_cluster(num_cpus=1, object_store_mb=100) as second:
        assert second != address
        mine = clusters() - neighbors
        assert mine
        job = jobs.submit(second, python("import time; time.sleep(300)"))
        assert job
    assert not mine & clusters()
    assert os.environ["RAY_AUTH_TOKEN"] == access
    jobs.submit(address, "true")


STARTER = """
import time
from cluster import jobs
with jobs.local_cluster(num_cpus=1, object_store_mb=100) as address:
    print(address, flush=True)
    time.sleep(600)
"""


def test_a_cluster_ends_with_its_starter_even_when_that_is_killed(address):
    neighbors = clusters()
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as folder:  # a killed starter cannot clear up
        environment = {**os.environ, "TMPDIR": folder}
        starter = subprocess.Popen([sys.executable, "-c", STARTER], stdout=subprocess.PIPE, text=True, env=environment)
        try:
            assert starter.stdout.readline().startswith("http://127.0.0.1:")
            mine = clusters() - neighbors
            assert mine
        finally:
            starter.kill()
            starter.wait()
            starter.stdout.close()
        end = time.monotonic() + 60
        while mine & clusters() and time.monotonic() < end:
            time.sleep(0.5)
        assert not mine & clusters()


def test_ray_that_does_not_start_says_why():
    with pytest.raises(ClusterError, match="Ray did not start"), jobs.local_cluster(resources={"CPU": 1}):
        pass
