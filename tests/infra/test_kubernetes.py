"""The KubeRay manifests as kustomize builds them: valid, closed, and with a node for each site."""

import copy
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from support import crds
from support.terraform import ROOT

from cluster.placement import Node, SiteNeeds, plan, preflight

MANIFESTS = ROOT / "cluster" / "kuberay"
OURS = Path(__file__).parent / "crds"
SITES = ("site-a", "site-b", "site-c")
# Maps whose keys are the user's, within a manifest.
FREE = {"clusterSelector", "labels", "limits", "matchLabels", "nodeSelector", "rayStartParams", "requests"}
NO_CRDS = (
    "NOT CHECKED against the operator's own CRDs: FEDSAM_KUBERAY_CRDS names no folder with what "
    "`kubectl get crd rayclusters.ray.io rayjobs.ray.io -o yaml` prints, or `helm show crds kuberay/kuberay-operator`"
)


@pytest.fixture(scope="module")
def built():
    """What `kubectl apply -k` would send."""
    if shutil.which("kubectl") is None:
        pytest.skip("NOT CHECKED: there is no kubectl on this machine")
    done = subprocess.run(
        ["kubectl", "kustomize", MANIFESTS / "three-sites"], capture_output=True, text=True, check=True
    )
    return list(yaml.safe_load_all(done.stdout))


@pytest.fixture(scope="module")
def cluster(built):
    return next(one for one in built if one["kind"] == "RayCluster")


@pytest.fixture(scope="module")
def job():
    return yaml.safe_load((MANIFESTS / "job" / "rayjob.yaml").read_text())


@pytest.fixture(scope="module", params=["ours", "written out", "the operator's"])
def schemas(request, tmp_path_factory):
    """OpenAPI schemas by kind: ours; ours in the operator's form, with Kubernetes' types in full; the operator's."""
    if request.param == "ours":
        return crds.read(OURS)
    if request.param == "the operator's":
        if not (folder := os.environ.get("FEDSAM_KUBERAY_CRDS")):
            pytest.skip(NO_CRDS)
        return crds.read(Path(folder))
    ours, kubernetes, folder = crds.read(OURS), crds.definitions(), tmp_path_factory.mktemp("crds")
    for file in OURS.glob("*.yaml"):
        document = yaml.safe_load(file.read_text())
        schema = crds.written_out(ours[document["spec"]["names"]["kind"]], kubernetes)
        document["spec"]["versions"][0]["schema"]["openAPIV3Schema"] = schema
        kubernetes_validate.validate(document, crds.KUBERNETES, strict=True)
        (folder / file.name).write_text(json.dumps(document))
    return crds.read(folder)


@pytest.fixture(scope="module")
def check(schemas):
    """Raises where Kubernetes, KubeRay's CRD or its operator would refuse a manifest."""
    validators = crds.validators(schemas)

    def check(manifest: dict[str, Any]) -> None:
        if manifest["apiVersion"] == "ray.io/v1":
            validators[manifest["kind"]].validate(manifest)
            if broken := [what for what, kept in operators_rules(manifest).items() if not kept]:
                raise jsonschema.ValidationError("; ".join(broken))
        else:
            kubernetes_validate.validate(manifest, crds.KUBERNETES, strict=True)

    return check


def operators_rules(manifest: dict[str, Any]) -> dict[str, bool]:
    """What KubeRay's CRD leaves open and its operator asks for all the same, of fields that the manifests use."""
    spec = manifest["spec"]
    if manifest["kind"] == "RayJob":
        modes = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
        return {
            "a known way to submit": spec.get("submissionMode", "K8sJobMode") in modes,
            "a cluster by its name": bool(spec.get("clusterSelector", {}).get("ray.io/cluster")),
            "a cluster that is there is made neither again nor in the job's pod": spec.get("backoffLimit", 0) == 0
            and spec.get("submissionMode") != "SidecarMode",
            "a deadline that can be kept": spec.get("activeDeadlineSeconds", 1) > 0,
            "nothing kept for a while that is never deleted": "ttlSecondsAfterFinished" not in spec,
        }
    groups = spec.get("workerGroupSpecs", ())
    return {
        "a name for DNS": bool(re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", manifest["metadata"]["name"])),
        "a known type of service": spec["headGroupSpec"].get("serviceType", "ClusterIP")
        in ("ClusterIP", "NodePort", "LoadBalancer", "ExternalName"),
        "a lower bound below the upper": all(
            0 <= one.get("minReplicas", 0) <= one.get("maxReplicas", 2**31 - 1) for one in groups
        ),
        "resources said in one place": not any("resources" in one for one in (spec["headGroupSpec"], *groups)),
    }


def templates(manifest):
    spec = manifest["spec"]
    if manifest["kind"] == "RayJob":
        return [spec["submitterPodTemplate"]]
    return [spec["headGroupSpec"]["template"], *(group["template"] for group in spec["workerGroupSpecs"])]


def test_every_manifest_is_what_kubernetes_and_kuberay_know(built, job, check):
    kinds = [manifest["kind"] for manifest in [*built, job]]
    assert sorted(kinds) == sorted(
        ["Namespace", "RayCluster", "RayJob", *["PersistentVolumeClaim"] * 4, *["NetworkPolicy"] * 4]
    )
    for manifest in [*built, job]:
        check(manifest)


def test_no_rule_that_only_the_api_server_can_evaluate_asks_anything_of_the_manifests(cluster, job, schemas):
    for manifest in (cluster, job):
        assert list(crds.rules(schemas[manifest["kind"]], manifest)) == []
        managed = {**manifest, "spec": {**manifest["spec"], "managedBy": "ray.io/kuberay-operator"}}
        assert len(list(crds.rules(schemas[manifest["kind"]], managed))) == 2


def container(manifest):
    return templates(manifest)[-1]["spec"]["containers"][0]


REFUSED = (jsonschema.ValidationError, kubernetes_validate.ValidationError)


@pytest.mark.parametrize(
    "plant",
    [
        lambda m: m["spec"].update(workerGroups=m["spec"].pop("workerGroupSpecs")),
        lambda m: m["spec"]["workerGroupSpecs"][0].pop("groupName"),
        lambda m: m["spec"]["workerGroupSpecs"][1].pop("template"),
        lambda m: m["spec"]["workerGroupSpecs"][1].update(replicas="1"),
        lambda m: m["spec"]["workerGroupSpecs"][1].update(replicas=2**31),
        lambda m: m["spec"]["workerGroupSpecs"][1].update(minReplicas=2),
        lambda m: m["spec"]["workerGroupSpecs"][2]["rayStartParams"].update({"num-gpus": 1}),
        lambda m: m["spec"]["workerGroupSpecs"][2].update(resources={"GPU": "1"}),
        lambda m: m["spec"]["headGroupSpec"].update(serviceType="Public"),
        lambda m: m["spec"]["headGroupSpec"]["template"]["metadata"].update(generateName="head-"),
        lambda m: m["spec"].pop("headGroupSpec"),
        lambda m: m["spec"].update(authOptions={"mode": "tokens"}),
        lambda m: m["spec"].update(autoscalerOptions={"env": [{"value": "x"}]}),
        lambda m: m["spec"].update(upgradeStrategy={"type": "Rolling"}),
        lambda m: m["metadata"].update(name="fedsam.cluster"),
        lambda m: templates(m)[0]["spec"].pop("containers"),
        lambda m: container(m).update(imagePullPolicies="Always"),
        lambda m: container(m)["resources"].update(limit={"nvidia.com/gpu": "1"}),
        lambda m: container(m)["env"][1]["valueFrom"]["secretKeyRef"].update(names="x"),
        lambda m: container(m)["livenessProbe"].update(periodSeconds="soon"),
    ],
)
def test_planted_mistakes_in_a_cluster_are_refused(cluster, check, plant):
    wrong = copy.deepcopy(cluster)
    plant(wrong)
    with pytest.raises(REFUSED):
        check(wrong)


@pytest.mark.parametrize(
    "plant",
    [
        lambda m: m["spec"].update(submissionMode="K8sMode"),
        lambda m: m["spec"].update(submissionMode=1),
        lambda m: m["spec"].update(backoffLimit="0"),
        lambda m: m["spec"].update(backoffLimit=1),
        lambda m: m["spec"].update(entryPoint=m["spec"].pop("entrypoint")),
        lambda m: m["spec"].update(entrypoint=["python", "-m", "pipelines.federate"]),
        lambda m: m["spec"].update(entrypointNumCpus="1"),
        lambda m: m["spec"].update(activeDeadlineSeconds=0),
        lambda m: m["spec"].update(preRunningDeadlineSeconds=0),
        lambda m: m["spec"].update(ttlSecondsAfterFinished=60),
        lambda m: m["spec"].update(deletionStrategy={"onSuccess": {"policy": "DeleteAll"}}),
        lambda m: m["spec"].pop("clusterSelector"),
        lambda m: m["spec"]["clusterSelector"].update({"ray.io/cluster": 1}),
        lambda m: m["spec"]["submitterConfig"].update(backoffLimits=0),
        lambda m: m["spec"].update(rayClusterSpec={"rayVersion": "2.60.0"}),
        lambda m: m["spec"]["submitterPodTemplate"]["spec"].update(restart="Never"),
        lambda m: container(m).pop("name"),
        lambda m: m.pop("metadata"),
    ],
)
def test_planted_mistakes_in_a_job_are_refused(job, check, plant):
    wrong = copy.deepcopy(job)
    plant(wrong)
    with pytest.raises(REFUSED):
        check(wrong)


def fields(value: Any, *path: str | int) -> Iterator[tuple[str | int, ...]]:
    """Where each field of a manifest is."""
    for key, one in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if isinstance(value, dict):
            yield (*path, key)
        yield from fields(one, *path, key)


@pytest.mark.parametrize("which", ["cluster", "job"])
def test_each_field_is_known_by_its_name_and_type(which, request, check):
    manifest = request.getfixturevalue(which)
    # `apiVersion` and `kind` choose the schema. Sites have the same fields: one of each is enough.
    within = {key: manifest[key] for key in ("metadata", "spec")}
    places = {tuple(key for key in path if isinstance(key, str)): path for path in fields(within)}
    assert len(places) > 30
    for *path, name in places.values():
        misspelt, mistyped = copy.deepcopy(manifest), copy.deepcopy(manifest)
        if not FREE & set(path[-1:]):
            parent = at(misspelt, path)
            parent[f"{name}Typo"] = parent.pop(name)
            assert refused(check, misspelt), [*path, name]
        parent = at(mistyped, path)
        parent[name] = "text" if isinstance(parent[name], dict | list) else {"no": "such"}
        assert refused(check, mistyped), [*path, name]


def at(value: Any, path: list[str | int]) -> Any:
    for key in path:
        value = value[key]
    return value


def refused(check, manifest: dict[str, Any]) -> bool:
    try:
        check(manifest)
    except REFUSED:
        return True
    return False


def announced(group):
    """A group's node as Ray has it: KubeRay puts the parameters into a shell's `ray start --KEY=VALUE`."""
    (resources,) = shlex.split(group["rayStartParams"].get("resources", "'{}'"))
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    gpus = float(group["rayStartParams"]["num-gpus"])
    assert gpus == float(limits.get("nvidia.com/gpu", 0))
    return Node(group["groupName"], float(limits["cpu"]), gpus, json.loads(resources))


def test_each_site_has_a_node_of_its_own_with_a_gpu(cluster):
    spec = cluster["spec"]
    nodes = [announced({"groupName": "head", **spec["headGroupSpec"]}), *map(announced, spec["workerGroupSpecs"])]
    preflight(SITES, nodes, SiteNeeds())
    for site, options in plan(SITES, nodes, SiteNeeds()).items():
        assert options.gpus == 1
        assert [node.name for node in nodes if set(options.resources) <= set(node.resources)] == [site]
    for group in spec["workerGroupSpecs"]:
        assert group["template"]["spec"]["nodeSelector"] == {"fedsam.io/site": group["groupName"]}
        assert (group["minReplicas"], group["replicas"], group["maxReplicas"]) == (1, 1, 1)
        claims = [v["persistentVolumeClaim"]["claimName"] for v in volumes(group) if "persistentVolumeClaim" in v]
        assert claims == [f"fedsam-{group['groupName']}"]


def volumes(group):
    return group["template"]["spec"]["volumes"]


def test_pods_are_no_root_have_no_rights_take_the_token_from_a_secret_and_are_probed(cluster, job):
    for template in [*templates(cluster), *templates(job)]:
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        (one,) = spec["containers"]
        assert one["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        environment = {entry["name"]: entry for entry in one["env"]}
        assert environment["RAY_AUTH_MODE"]["value"] == "token"
        assert "value" not in environment["RAY_AUTH_TOKEN"]
        assert environment["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]["name"] == "fedsam-token"
        assert {"requests", "limits"} <= set(one["resources"])
    for template in templates(cluster):
        assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(template["spec"]["containers"][0])


def test_nothing_comes_in_but_from_the_cluster_and_who_submits(built, cluster, job):
    policies = {one["metadata"]["name"]: one["spec"] for one in built if one["kind"] == "NetworkPolicy"}
    nothing = policies["fedsam-nothing-else"]
    assert nothing["policyTypes"] == ["Ingress", "Egress"]
    assert not nothing.get("ingress")
    assert not nothing.get("egress")
    for template in templates(cluster):
        assert nothing["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    sources = [source for name in policies for rule in policies[name].get("ingress", ()) for source in rule["from"]]
    assert all("podSelector" in source and "ipBlock" not in source for source in sources)
    submits = templates(job)[0]["metadata"]["labels"]
    assert any(source["podSelector"]["matchLabels"] == submits for source in sources)


def test_manifests_and_image_name_the_pinned_ray(cluster):
    pinned = {
        line.partition("==")[0]: line.partition("==")[2] for line in (ROOT / "constraints.txt").read_text().split()
    }
    assert cluster["spec"]["rayVersion"] == pinned["ray"]
    images = {template["spec"]["containers"][0]["image"] for template in templates(cluster)}
    assert images == {"registry.example/fedsam:0.1.0-cuda"}
