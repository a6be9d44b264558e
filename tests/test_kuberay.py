"""deploy/kuberay: manifests that KubeRay's own schema takes, whose command is one of ours."""

import copy
import os
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from tune_topkd.cli.app import app

ROOT = Path(__file__).parents[1]
MANIFESTS = {"rayjob.yaml": "rayjobs", "raycluster.yaml": "rayclusters"}
KUBERAY = os.environ.get("KUBERAY", "")
"""A checkout of KubeRay, for its CRDs: they are too large to be copied here."""


def manifest(name):
    return yaml.safe_load((ROOT / "deploy" / "kuberay" / name).read_text())


def pods(content):
    """The specs of all pods of a manifest."""
    spec = content["spec"].get("rayClusterSpec", content["spec"])
    return [spec["headGroupSpec"]["template"]["spec"], *(g["template"]["spec"] for g in spec["workerGroupSpecs"])]


def strict(schema):
    """A CRD's schema in which an unknown key is an error, as `kubectl apply --validate=strict` has it."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: strict(value) for key, value in schema.items()}
    is_open = "additionalProperties" in found or found.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(found.get("properties"), dict) and "type" in found and not is_open:
        found["additionalProperties"] = False
    if found.get("x-kubernetes-int-or-string"):
        found.pop("pattern", None)  # for texts alone
        found.pop("anyOf", None)
        found["type"] = ["integer", "string"]
    return found


def problems(name, content):
    """What KubeRay's schema has against a manifest."""
    import jsonschema

    path = Path(KUBERAY) / "helm-chart" / "kuberay-operator" / "crds" / f"ray.io_{MANIFESTS[name]}.yaml"
    versions = yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]["versions"]
    schema = next(v["schema"]["openAPIV3Schema"] for v in versions if f"ray.io/{v['name']}" == content["apiVersion"])
    schema["properties"]["metadata"] = {"type": "object"}
    schema["properties"].pop("status", None)
    found = jsonschema.Draft202012Validator(strict(schema)).iter_errors(content)
    return [".".join(map(str, error.absolute_path)) + ": " + error.message for error in found]


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_pods_mounts_are_its_volumes_and_all_have_one_image(name):
    content = manifest(name)
    images = set()
    for pod in pods(content):
        (container,) = pod["containers"]
        images.add(container["image"])
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        assert {"/runs", "/data"} <= {mount["mountPath"] for mount in container["volumeMounts"]}
    assert len(images) == 1
    spec = content["spec"].get("rayClusterSpec", content["spec"])
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0", "no trial runs on the head"
    assert spec["authOptions"] == {"mode": "token"}
    assert all(g["minReplicas"] == g["replicas"] == g["maxReplicas"] for g in spec["workerGroupSpecs"])


def test_the_jobs_command_is_one_of_ours_and_may_be_begun_again():
    content = manifest("rayjob.yaml")["spec"]
    python, m, package, name, *words = shlex.split(content["entrypoint"])
    assert (python, m, package, name) == ("python", "-m", "tune_topkd", "run")
    command = typer.main.get_command(app).commands["run"]
    context = command.make_context("run", words)
    assert context.params["or_resume"] is True
    assert str(context.params["runs_dir"]) == "/runs"
    assert yaml.safe_load(content["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "60"
    assert content["backoffLimit"] > 0


@pytest.mark.skipif(not KUBERAY, reason="needs KubeRay's CRDs: KUBERAY=its checkout")
@pytest.mark.parametrize("name", MANIFESTS)
def test_kuberays_schema_takes_the_manifest_and_finds_planted_errors(name):
    content = manifest(name)
    assert problems(name, content) == []

    def planted(change):
        wrong = copy.deepcopy(content)
        change(wrong, wrong["spec"].get("rayClusterSpec", wrong["spec"]))
        return problems(name, wrong)

    for change in (
        lambda whole, cluster: whole["spec"].update(entrypont="python"),
        lambda whole, cluster: cluster["authOptions"].update(mode="tokens"),
        lambda whole, cluster: cluster["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
        lambda whole, cluster: cluster["workerGroupSpecs"][0].update(maxReplicas="2"),
        lambda whole, cluster: cluster["headGroupSpec"].pop("template"),
        lambda whole, cluster: cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"][0].update(images="x"),
    ):
        assert planted(change), change
