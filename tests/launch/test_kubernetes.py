"""`headway launch kubernetes`: what the schemas of Kubernetes say of it, and what its containers do."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.cli import main
from tests.launch.hosts import INTERFACE, ROOT, Host, Started, wait_until
from tests.trainer.runs import status, write_config, write_tokens
from trainer.metrics import read_metrics

VERSIONS = ("1.29", "1.37")
SECONDS_TO_START = 120
SECONDS_TO_END = 90
NODE_RANK_OF_THE_JOB = "metadata.annotations['batch.kubernetes.io/job-completion-index']"


def manifest(folder: Path, config: Path, *settings: str) -> dict[str, dict[str, Any]]:
    """The documents of a written manifest, by kind."""
    argv = [str(config), "--image", "registry/headway:1", "--claim", "shared", "--out", "job.yaml", *settings]
    with contextlib.chdir(folder):
        assert main(["launch", "kubernetes", *argv]) == 0
    return {found["kind"]: found for found in yaml.safe_load_all((folder / "job.yaml").read_text())}


@pytest.mark.parametrize("device", ["gpu", "cpu"])
def test_the_schemas_of_kubernetes_accept_it(device: str, tmp_path: Path) -> None:
    import kubernetes_validate

    config = ROOT / "configs" / "quickstart.toml"
    found = manifest(
        tmp_path, config, "--nodes", "2", "--processes", "4", "--device", device, "--model.tie_embeddings=true"
    )
    assert list(found) == ["ConfigMap", "Service", "Job"]
    for document in found.values():
        for version in VERSIONS:
            kubernetes_validate.validate(document, version, strict=True)
    assert found["ConfigMap"]["data"]["config.toml"] == config.read_text()

    job = found["Job"]["spec"]
    assert (job["completions"], job["parallelism"], job["completionMode"]) == (2, 2, "Indexed")
    limits = job["template"]["spec"]["containers"][0]["resources"].get("limits")
    assert limits == ({"nvidia.com/gpu": "4"} if device == "gpu" else None)
    # A number where the schema wants a text is what hands get wrong.
    job["template"]["spec"]["containers"][0]["env"][0]["value"] = 2
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(found["Job"], VERSIONS[-1], strict=True)


def test_names_that_have_to_agree_do(tmp_path: Path) -> None:
    """Nothing but the cluster itself would find a pod whose volume, service or rule is called otherwise."""
    found = manifest(
        tmp_path, ROOT / "configs" / "quickstart.toml", "--nodes", "4", "--processes", "4", "--name", "first"
    )
    pod = found["Job"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes.keys() == {mount["name"] for mount in container["volumeMounts"]}
    assert volumes["config"]["configMap"]["name"] == found["ConfigMap"]["metadata"]["name"] == "first"
    assert pod["subdomain"] == found["Service"]["metadata"]["name"] == found["Job"]["metadata"]["name"]
    assert found["Service"]["spec"]["selector"] == {"batch.kubernetes.io/job-name": "first"}
    environment = {entry["name"]: entry for entry in container["env"]}
    assert environment["MASTER_ADDR"]["value"] == "first-0.first"
    rules = [rule for rule in found["Job"]["spec"]["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    assert {rule["onExitCodes"]["containerName"] for rule in rules} == {container["name"]}
    decided = {code: rule["action"] for rule in rules for code in rule["onExitCodes"]["values"]}
    assert decided == {2: "FailJob", int(environment["PREEMPTED"]["value"]): "Ignore"}
    assert pod["restartPolicy"] == "Never", "or the kubelet would decide, and a policy for failures is not allowed"


def start_pods(hosts: list[Host], folder: Path, found: dict[str, dict[str, Any]], label: str) -> list[Started]:
    """The containers' own command on both hosts, with the variables that Kubernetes would set.

    Instead of the cluster, this says which pod has which index, where a name leads, and what is mounted where.
    """
    (container,) = found["Job"]["spec"]["template"]["spec"]["containers"]
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    (folder / "config.toml").write_text(found["ConfigMap"]["data"]["config.toml"])

    def value(entry: dict[str, Any], index: int) -> str:
        if "value" in entry:
            return hosts[0].address if entry["name"] == "MASTER_ADDR" else entry["value"]
        assert entry["valueFrom"]["fieldRef"]["fieldPath"] == NODE_RANK_OF_THE_JOB
        return str(index)

    command = [*container["command"], *(word.replace(mounted["config"], str(folder)) for word in container["args"])]
    return [
        host.start(
            f"{label}-{index}",
            *command,
            cwd=Path(container["workingDir"]),
            PYTHONPATH=str(ROOT),
            INTERFACE=INTERFACE,
            **{entry["name"]: value(entry, index) for entry in container["env"]},
        )
        for index, host in enumerate(hosts)
    ]


@pytest.mark.cluster
def test_pods_that_are_evicted_go_on(two_hosts: list[Host], tmp_path: Path) -> None:
    """Both end with the code that a Job does not count, though only one was told; new ones finish with 0."""
    claim = tmp_path / "claim"
    claim.mkdir()
    config = write_config(tmp_path, write_tokens(claim / "walk"), schedule={"steps": 300})
    places = ("--mount", str(claim), "--checkout", str(ROOT), "--run.dir", "runs/pods")
    found = manifest(tmp_path, config, "--nodes", "2", "--processes", "2", "--device", "cpu", *places)
    run_dir = claim / "runs" / "pods"
    (tmp_path / "mounted").mkdir()

    pods = start_pods(two_hosts, tmp_path / "mounted", found, "first")
    wait_until(lambda: len(read_metrics(run_dir)) >= 5, SECONDS_TO_START, "five steps")
    pods[1].process.terminate()
    assert [pod.ends_within(SECONDS_TO_END) for pod in pods] == [75, 75], pods[0].said + pods[1].said
    assert status(run_dir)["state"] == "preempted"

    pods = start_pods(two_hosts, tmp_path / "mounted", found, "again")
    assert [pod.ends_within(SECONDS_TO_START + SECONDS_TO_END) for pod in pods] == [0, 0], pods[0].said + pods[1].said
    print(pods[0].said[-1500:])
    assert status(run_dir)["state"] == "finished"
    assert [record["step"] for record in read_metrics(run_dir)] == list(range(1, 301))


@pytest.mark.cluster
def test_a_refused_pod_ends_with_the_code_that_fails_the_job(two_hosts: list[Host], tmp_path: Path) -> None:
    config = write_config(tmp_path, str(tmp_path / "none"))
    places = ("--mount", str(tmp_path), "--checkout", str(ROOT), "--run.dir", "runs/pods")
    found = manifest(tmp_path, config, "--nodes", "2", "--processes", "1", "--device", "cpu", *places)
    (tmp_path / "mounted").mkdir()
    pods = start_pods(two_hosts, tmp_path / "mounted", found, "refused")
    assert 2 in [pod.ends_within(SECONDS_TO_START) for pod in pods], json.dumps([pod.said for pod in pods])
