"""Tiny federations as a person runs them, each in a process of its own that can be killed."""

from pathlib import Path
from typing import Any

from mlflow.tracking import MlflowClient

from fedsam_core.federation.state import read_note
from support.zygote import Zygote


class Runs:
    """Tiny runs in one working folder, with settings that all of them have."""

    def __init__(self, folder: Path, *common: str) -> None:
        self.folder, self.common = folder, common
        self.zygote = Zygote(folder / "logs")

    def settings(self, run: str, *more: str) -> list[str]:
        """Of a run; the last of several values of a key counts."""
        return [
            "name=small",
            f"run={run}",
            f"work_dir={self.folder}",
            "cohort.name=small",
            "cohort.source=phantom",
            "cohort.phantom.cases_per_site=3",
            "cohort.phantom.test_per_site=1",
            "cohort.phantom.shape=[8, 32, 32]",
            "model.backbone=vit_t",
            "model.image_size=32",
            "engine.kind=in-process",
            "federation.validate_every=0",
            f"federation.site_dir={self.folder / 'sites'}",
            "learning.local_steps=1",
            "learning.batch_size=2",
            *self.common,
            *more,
        ]

    def path(self, run: str) -> Path:
        """A run's folder."""
        return self.folder / "runs" / run

    def command(self, run: str, *more: str) -> tuple[str, list[str]]:
        """What goes on with a run, or begins it where it was killed before it had begun."""
        if (self.path(run) / "run.json").is_file():
            return "resume", [run, f"work_dir={self.folder}"]
        return "federate", self.settings(run, *more)

    def result(self, run: str) -> dict[str, Any]:
        """Hash of the last global state, and all that the sites keep for themselves."""
        sites = self.folder / "sites" / run
        kept = {str(path.relative_to(sites)): path.read_bytes() for path in sites.rglob("*.safetensors")}
        return {"state": read_note((self.path(run) / "state.safetensors").read_bytes())["state_hash"], **kept}

    def tries(self, module: str, *arguments: str) -> tuple[int, str]:
        """Exit status and output of a command."""
        return self.zygote.run(module, arguments)

    def goes_well(self, module: str, *arguments: str) -> str:
        """The output of a command that must end well."""
        status, said = self.tries(module, *arguments)
        assert status == 0, said
        return said

    def is_refused(self, module: str, *arguments: str) -> str:
        """What a command says that must end with status 2, on one line."""
        status, said = self.tries(module, *arguments)
        assert status == 2, said
        return " ".join(said.split())

    def resumed(self, run: str) -> str:
        """The output of a run that is resumed to its end."""
        return self.goes_well("resume", run, f"work_dir={self.folder}")

    def in_mlflow(self, run: str) -> Any:
        """The one MLflow run of that name."""
        client = MlflowClient(f"sqlite:///{self.folder / 'mlflow.db'}")
        experiment = client.get_experiment_by_name("fedsam")
        assert experiment is not None
        (found,) = client.search_runs([experiment.experiment_id], f"tags.`mlflow.runName` = '{run}'")
        return found
