"""CRDs as JSON Schema, closed as `kubectl apply --validate=strict` closes them."""

import json
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from referencing import Registry, Resource

KUBERNETES = "1.32"
_STRICT = f"kubernetes-json-schema/v{KUBERNETES}.0-local-strict/_definitions.json"
_BITS = {"int32": 31, "int64": 63}
_INT_OR_STRING = {"anyOf": [{"type": "integer"}, {"type": "string"}], "x-kubernetes-int-or-string": True}

Schema = dict[str, Any]


def definitions() -> Schema:
    """Kubernetes' own types, by name, none of them open to unknown fields."""
    return json.loads((files("kubernetes_validate") / _STRICT).read_text())


def read(folder: Path) -> dict[str, Schema]:
    """The OpenAPI schemas of ray.io/v1 in a folder's YAML files, by kind, as KubeRay's operator installs them."""
    found = {}
    # The operator's own files have a megabyte.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for file in sorted(folder.glob("*.yaml")):
        for document in yaml.load_all(file.read_text(), loader):
            for one in (document or {}).get("items", [document]):
                if one and one["kind"] == "CustomResourceDefinition" and one["spec"]["group"] == "ray.io":
                    for version in one["spec"]["versions"]:
                        if version["name"] == "v1":
                            found[one["spec"]["names"]["kind"]] = version["schema"]["openAPIV3Schema"]
    assert {"RayCluster", "RayJob"} <= set(found), f"{folder} has no CRD of RayCluster and RayJob"
    job = found["RayJob"]["properties"]["spec"]["properties"]
    if job["rayClusterSpec"].get("x-embedded") == "RayClusterSpec":
        job["rayClusterSpec"] = found["RayCluster"]["properties"]["spec"]
    return found


def validators(schemas: dict[str, Schema]) -> dict[str, jsonschema.Draft202012Validator]:
    kubernetes = definitions()
    registry = Resource.from_contents(kubernetes) @ Registry()
    made = {}
    for kind, schema in schemas.items():
        closed = _closed(schema, kubernetes["$id"])
        closed["properties"] |= {  # the API server looks at these before the CRD does
            "apiVersion": {"const": "ray.io/v1"},
            "kind": {"const": kind},
            "metadata": {"$ref": f"{kubernetes['$id']}#/$defs/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"},
        }
        closed["required"] = ["apiVersion", "kind", "metadata", *closed.get("required", ())]
        made[kind] = jsonschema.Draft202012Validator(closed, registry=registry)
    return made


def _closed(schema: Schema, kubernetes: str) -> Schema:
    """JSON Schema that says of a manifest what the API server says by the OpenAPI schema."""
    if "x-embedded" in schema:
        return {"$ref": f"{kubernetes}#/$defs/{schema['x-embedded']}"}
    made = _within(schema, lambda one: _closed(one, kubernetes))
    if made.get("type") == "object" and not made.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    if "required" in made:  # defaults are filled in first
        fields = made.get("properties", {})
        made["required"] = [name for name in made["required"] if "default" not in fields.get(name, {})]
    if bits := _BITS.get(made.get("format", "")):
        made["minimum"] = max(made.get("minimum", -(2**bits)), -(2**bits))
        made["maximum"] = min(made.get("maximum", 2**bits - 1), 2**bits - 1)
    if made.get("x-kubernetes-int-or-string"):
        made["type"] = ["integer", "string"]
    return {"anyOf": [{"type": "null"}, made]} if made.get("nullable") else made


def _within(schema: Schema, change: Callable[[Schema], Schema]) -> Schema:
    """A copy with its subschemas changed. A field may be called `items` or `properties`, so no blind walk will do."""
    copy = dict(schema)
    if "properties" in copy:
        copy["properties"] = {name: change(one) for name, one in copy["properties"].items()}
    for key in ("items", "additionalProperties"):
        if isinstance(copy.get(key), dict):
            copy[key] = change(copy[key])
    return copy


def rules(schema: Schema, value: Any) -> Iterator[str]:
    """The rules (CEL) that the API server would ask of the value; nothing here evaluates them."""
    yield from (one["rule"] for one in schema.get("x-kubernetes-validations", ()))
    if isinstance(value, dict):
        for name, one in value.items():
            field = schema.get("properties", {}).get(name, schema.get("additionalProperties"))
            if isinstance(field, dict):
                yield from rules(field, one)
    elif isinstance(value, list):
        for one in value:
            yield from rules(schema.get("items", {}), one)


def written_out(schema: Schema, kubernetes: Schema) -> Schema:
    """The schema as an operator's CRD has it: Kubernetes' types in full, nothing closed."""
    if "x-embedded" in schema:
        return written_out(kubernetes["$defs"][schema["x-embedded"]], kubernetes)
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        if name.endswith((".Quantity", ".IntOrString")):
            return _INT_OR_STRING
        return written_out(kubernetes["$defs"][name], kubernetes)
    made = _within(schema, lambda one: written_out(one, kubernetes))
    for key in ("description", "x-kubernetes-patch-merge-key", "x-kubernetes-patch-strategy", "x-kubernetes-unions"):
        made.pop(key, None)
    if made.get("additionalProperties") is False:
        del made["additionalProperties"]
    if isinstance(made.get("type"), list):
        made["type"] = next(one for one in made["type"] if one != "null")
    return made
