"""The KubeRay manifests as kustomize builds them: valid, closed, and with a node for each site."""

import copy
import json
import shlex
import shutil
import subprocess
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from support.terraform import ROOT

from cluster.placement import Node, SiteNeeds, plan, preflight

MANIFESTS = ROOT / "cluster" / "kuberay"
SCHEMA = json.loads((Path(__file__).parent / "crds" / "ray.json").read_text())
KUBERNETES = "1.32"
SITES = ("site-a", "site-b", "site-c")


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


def check(manifest):
    """Raises where Kubernetes or KubeRay would refuse the manifest."""
    if manifest["apiVersion"] != "ray.io/v1":
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        return
    kind = {"$ref": f"#/$defs/{manifest['kind']}", "$defs": SCHEMA["$defs"]}
    jsonschema.Draft202012Validator(kind).validate(manifest)
    for template in templates(manifest):  # a pod of it
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": template["metadata"], "spec": template["spec"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def templates(manifest):
    spec = manifest["spec"]
    if manifest["kind"] == "RayJob":
        return [spec["submitterPodTemplate"]]
    return [spec["headGroupSpec"]["template"], *(group["template"] for group in spec["workerGroupSpecs"])]


def test_every_manifest_is_what_kubernetes_and_kuberay_know(built, job):
    kinds = [manifest["kind"] for manifest in [*built, job]]
    assert sorted(kinds) == sorted(
        ["Namespace", "RayCluster", "RayJob", *["PersistentVolumeClaim"] * 4, *["NetworkPolicy"] * 4]
    )
    for manifest in [*built, job]:
        check(manifest)


def container(manifest):
    return templates(manifest)[-1]["spec"]["containers"][0]


@pytest.mark.parametrize(
    "plant",
    [
        lambda m: m["spec"].update(workerGroups=m["spec"].pop("workerGroupSpecs")),
        lambda m: m["spec"]["workerGroupSpecs"][0].pop("groupName"),
        lambda m: m["spec"]["workerGroupSpecs"][1].update(replicas="1"),
        lambda m: m["spec"]["workerGroupSpecs"][2]["rayStartParams"].update({"num-gpus": 1}),
        lambda m: m["spec"]["headGroupSpec"].update(serviceType="Public"),
        lambda m: m["spec"].pop("headGroupSpec"),
        lambda m: container(m).update(imagePullPolicies="Always"),
        lambda m: container(m)["resources"].update(limit={"nvidia.com/gpu": "1"}),
        lambda m: container(m)["env"][1]["valueFrom"]["secretKeyRef"].update(names="x"),
        lambda m: container(m)["livenessProbe"].update(periodSeconds="soon"),
    ],
)
def test_planted_mistakes_are_refused(cluster, plant):
    wrong = copy.deepcopy(cluster)
    plant(wrong)
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(wrong)


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
