"""What may stand in the KubeRay files of cluster_configs/: a shape of the fields that are used, written from the API of ray.io/v1
(KubeRay 1.5.1 and newer) and of pods. It needs no network; `tests/test_cluster_configs.py` compares it with the CRDs themselves
where KUBERAY_CRDS names the folder they lie in.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
FILES = ROOT / "cluster_configs"
DRAIN, DRAIN_DEFAULT = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", 30.0  # Ray's

# A shape: a type; {field: shape}; [shape] a list of these; MAP any names, with texts; (shape, ...) one of these; ONE_OF(...) words.
MAP = {...: str}
TERM = {"matchExpressions": [{"key": str, "operator": {"In", "NotIn", "Exists", "DoesNotExist"}, "values": [str]}]}
POD = {
    "serviceAccountName": str,
    "terminationGracePeriodSeconds": int,
    "nodeSelector": MAP,
    "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [TERM]}}},
    "tolerations": [
        {
            "key": str, "operator": {"Exists", "Equal"}, "value": str,
            "effect": {"NoSchedule", "PreferNoSchedule", "NoExecute"},
        }
    ],
    "containers": [
        {
            "name": str,
            "image": str,
            "env": [
                {"name": str, "value": str, "valueFrom": {"secretKeyRef": {"name": str, "key": str, "optional": bool}}}
            ],
            "resources": {"requests": MAP, "limits": MAP},
            "volumeMounts": [{"name": str, "mountPath": str, "readOnly": bool}],
        }
    ],
    "volumes": [
        {
            "name": str,
            "emptyDir": {"medium": {"Memory"}, "sizeLimit": str},
            "configMap": {"name": str},
            "persistentVolumeClaim": {"claimName": str},
        }
    ],
}  # fmt: skip
TEMPLATE = {"spec": POD}
CLUSTER = {
    "rayVersion": str,
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": {"version": {"v1", "v2"}, "idleTimeoutSeconds": int},
    "authOptions": {"mode": {"token", "disabled"}},
    "headGroupSpec": {"rayStartParams": MAP, "template": TEMPLATE},
    "workerGroupSpecs": [
        {
            "groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int, "rayStartParams": MAP,
            "resources": MAP, "template": TEMPLATE,
        }
    ],
}  # fmt: skip
HEAD = {"apiVersion": {"ray.io/v1"}, "metadata": {"name": str}}
SHAPES: dict[str, Any] = {
    "RayCluster": HEAD | {"kind": {"RayCluster"}, "spec": CLUSTER},
    "RayJob": HEAD
    | {
        "kind": {"RayJob"},
        "spec": {
            "entrypoint": str,
            "submissionMode": {"K8sJobMode"},
            "backoffLimit": int,
            "shutdownAfterJobFinishes": bool,
            "ttlSecondsAfterFinished": int,
            "rayClusterSpec": CLUSTER,
        },
    },
}
NEEDED = {
    "containers",
    "name",
    "image",
    "mountPath",
    "groupName",
    "template",
    "headGroupSpec",
    "rayVersion",
    "entrypoint",
}


def read(name: str) -> dict[str, Any]:
    return YAML(typ="safe").load((FILES / name).read_text())


def mistakes(value: Any, shape: Any, path: str = "") -> list[str]:
    """What of a value is not of a shape, by its path."""
    if isinstance(shape, set):
        return [] if value in shape else [f"{path}: {value!r} is none of {', '.join(sorted(shape))}"]
    if isinstance(shape, list):
        if not isinstance(value, list):
            return [f"{path}: a list is wanted"]
        return [m for i, each in enumerate(value) for m in mistakes(each, shape[0], f"{path}[{i}]")]
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return [f"{path}: a mapping is wanted"]
        if ... in shape:
            return [m for name, each in value.items() for m in mistakes(each, shape[...], f"{path}.{name}")]
        found = [f"{path}.{name}: there is no such field" for name in value if name not in shape]
        found += [f"{path}.{name}: is missing" for name in shape if name in NEEDED and name not in value]
        return found + [
            m for name in value if name in shape for m in mistakes(value[name], shape[name], f"{path}.{name}")
        ]
    # bool is an int in Python, and no int in a manifest
    return [] if type(value) is shape else [f"{path}: {value!r} is no {shape.__name__}"]


def kuberay_mistakes(manifest: dict[str, Any]) -> list[str]:
    """What is wrong with a manifest: its fields, and what KubeRay's operator refuses beyond them."""
    kind = manifest.get("kind")
    if kind not in SHAPES:
        return [f"kind: {kind!r}"]
    if found := mistakes(manifest, SHAPES[kind]):
        return found
    cluster = cluster_spec(manifest)
    for where, pod in pods(cluster):
        for container in pod["containers"]:
            names = {volume["name"] for volume in pod.get("volumes", [])}
            for mount in container.get("volumeMounts", []):
                if mount["name"] not in names:
                    found.append(f"{where}: the volume {mount['name']} is mounted, but not there")
            for variable in container.get("env", []):
                if ("value" in variable) == ("valueFrom" in variable):
                    found.append(f"{where}: {variable['name']} has no value, or two")
            lasts, grace = drains(container), pod.get("terminationGracePeriodSeconds")
            if grace is not None and not 0 < grace - lasts <= 30:  # some seconds to end in
                found.append(f"{where}: Ray drains the node for {lasts:g} s of the {grace} that the pod has")
            asked = container.get("resources", {})
            if asked.get("requests", {}).get("nvidia.com/gpu") != asked.get("limits", {}).get("nvidia.com/gpu"):
                found.append(f"{where}: GPUs that are asked for are those of the limits")
    for group in cluster["workerGroupSpecs"]:
        if not 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            found.append(f"{group['groupName']}: minReplicas <= replicas <= maxReplicas")
    return found


def drains(container: dict[str, Any]) -> float:
    """Seconds for which Ray drains a node whose pod is to end."""
    (given,) = [e.get("value", DRAIN_DEFAULT) for e in container.get("env", []) if e["name"] == DRAIN] or [
        DRAIN_DEFAULT
    ]
    return float(given)


def cluster_spec(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["spec"]["rayClusterSpec"] if manifest["kind"] == "RayJob" else manifest["spec"]


def pods(cluster: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "head", cluster["headGroupSpec"]["template"]["spec"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group["template"]["spec"]


# ------------------------------------------------------------------------------------------------ the CRDs themselves


def crd_schema(folder: Path, kind: str) -> dict[str, Any]:
    """The schema of version v1 in KubeRay's CRD."""
    crd = YAML(typ="safe").load((folder / f"ray.io_{kind.lower()}s.yaml").read_text())
    (schema,) = [v["schema"]["openAPIV3Schema"] for v in crd["spec"]["versions"] if v["name"] == "v1"]
    return strict(schema)


def strict(schema: Any) -> Any:
    """Kubernetes drops fields it does not know; here they are mistakes."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    out = {name: strict(each) for name, each in schema.items()}
    loose = "additionalProperties" in out or out.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(schema.get("properties"), dict) and out.get("type") == "object" and not loose:
        out["additionalProperties"] = False
    return out


def unknown(shape: Any, schema: dict[str, Any], path: str = "") -> list[str]:
    """Fields of a shape that the CRD does not have."""
    if isinstance(shape, list):
        return unknown(shape[0], schema.get("items", {}), f"{path}[]")
    if not isinstance(shape, dict) or ... in shape:
        return []
    known = schema.get("properties", {})
    if not known and path == ".metadata":
        return []
    found = [f"{path}.{name}" for name in shape if name not in known]
    return found + [u for name in shape if name in known for u in unknown(shape[name], known[name], f"{path}.{name}")]
