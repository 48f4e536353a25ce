"""The files of cluster/: valid for the tools that read them, on spot only where they may be, and without secrets."""

import copy
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.specifiers import SpecifierSet
from ray._private import ray_constants
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import drain_node, start
from ray.scripts.symmetric_run import curate_and_validate_ray_start_args

from sermll.cli import _parser

DRAIN_S = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
FILES = sorted(path for path in CLUSTER.rglob("*") if path.is_file() and path.name not in (".env", ".gitignore"))
LAUNCHER = ("aws", "gcp")
SPOT = {
    "cloud.google.com/gke-spot": "true",
    "eks.amazonaws.com/capacityType": "SPOT",
    "karpenter.sh/capacity-type": "spot",
    "kubernetes.azure.com/scalesetpriority": "spot",
}
"""What nodes say of themselves if they may be taken away at any time."""


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTER / name).read_text(encoding="utf-8")))


def packaged(package: str, path: str) -> Path:
    """A file of a package that need not be installed; the test is skipped if it is not."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        pytest.skip(f"{package} is not installed")
    return Path(found.origin).parent / path


def assert_runs(command: list[str]) -> None:
    """It is a command of sermll, on files that exist."""
    assert command[:3] == ["python", "-m", "sermll"]
    options = _parser().parse_args(command[3:])
    assert (ROOT / str(options.experiment).removeprefix("/home/sermll/")).exists()


def assert_starts(command: list[str]) -> None:
    """`ray start` knows all that it is told."""
    assert command[:2] == ["ray", "start"]
    assert start.make_context("start", command[2:]).args == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file_says_what_it_is_and_names_what_exists(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert all(line.startswith("#") for line in lines[: 1 if path.name.endswith("ignore") else 3])
    assert "\t" not in text
    assert not [line for line in lines if line != line.rstrip() or len(line) > 120]
    for named in re.findall(r"\b(?:cluster|experiments)/[\w./-]*\w", text):
        assert named == "cluster/.env" or (ROOT / named).exists(), named


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_holds_a_secret(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"AKIA[0-9A-Z]{16}|-----BEGIN|[0-9a-fA-F]{32}|kind: Secret\b", text)
    for key, value in re.findall(r"(\w*(?:PASSWORD|TOKEN|SECRET)\w*)\s*[:=]\s*(\S+)", text):
        assert value.startswith(("$", "postgresql+psycopg2://mlflow@")), f"{key} is given as {value}"


# Slurm


def slurm(folder: Path, srun: str, *arguments: str) -> subprocess.Popen[str]:
    """Start the script on a Slurm of two nodes in which `srun` writes down its arguments and does what it is told."""
    tools = {
        "hostname": "echo 10.0.0.7 172.17.0.1",
        "ray": ": > token-$RAY_AUTH_MODE",
        "scontrol": 'echo "$@" > scontrol.txt',
        "srun": f'printf "%s\\n" "$@" > srun.txt; {srun}',
    }
    (folder / "bin").mkdir()
    for name, does in tools.items():
        tool = folder / "bin" / name
        tool.write_text(f"#!/bin/bash\n{does}\n", encoding="utf-8")
        tool.chmod(0o755)
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").touch()
    given = {"SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_ID": "7"}
    given |= {"SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "16", "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    script = ["bash", str(CLUSTER / "slurm.sh"), *arguments]
    return subprocess.Popen(script, cwd="/", env=given, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_the_slurm_script_is_bash() -> None:
    checked = subprocess.run(["bash", "-n", CLUSTER / "slurm.sh"], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_a_slurm_job_starts_ray_on_every_node_and_sermll_on_that_ray(tmp_path: Path) -> None:
    job = slurm(tmp_path, "exit 3", "train", "experiments/ravdess.yaml", "data.path=/shared/a b")
    said, _ = job.communicate(timeout=20)
    assert (job.returncode, said) == (3, "")
    assert (tmp_path / "token-token").exists()
    told = (tmp_path / "srun.txt").read_text(encoding="utf-8").splitlines()
    ray = told.index("ray")
    assert told[:ray] == ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=16"]
    dash = told.index("--")
    assert told[ray + 1 : ray + 6] == ["symmetric-run", "--address", "10.0.0.7:6379", "--min-nodes", "2"]
    assert_starts(["ray", "start", *curate_and_validate_ray_start_args(told[ray + 2 : dash])])
    assert told[dash + 1 : dash + 3] == ["env", "RAY_ADDRESS=10.0.0.7:6379"]
    assert_runs(told[dash + 3 :])
    assert told[-1] == "data.path=/shared/a b"


def test_a_slurm_job_whose_time_is_nearly_up_goes_back_to_the_queue(tmp_path: Path) -> None:
    job = slurm(tmp_path, "echo begun; exec sleep 20 > /dev/null 2>&1", "train", "experiments/ravdess.yaml")
    assert job.stdout is not None
    assert job.stdout.readline() == "begun\n"
    job.send_signal(signal.SIGUSR1)
    job.communicate(timeout=20)
    assert (tmp_path / "scontrol.txt").read_text(encoding="utf-8") == "requeue 7\n"
    asked = (CLUSTER / "slurm.sh").read_text(encoding="utf-8")
    assert "#SBATCH --requeue" in asked
    assert re.search(r"#SBATCH --signal=B:USR1@\d+", asked)


def test_the_examples_of_the_slurm_script_are_commands_of_sermll() -> None:
    examples = re.findall(r"^#   sbatch .*cluster/slurm.sh (.*)$", (CLUSTER / "slurm.sh").read_text(), re.MULTILINE)
    assert examples
    for example in examples:
        options = _parser().parse_args(shlex.split(example))
        assert (ROOT / (options.experiment if options.verb == "train" else options.campaign)).exists()


# Clouds


@pytest.mark.parametrize("cloud", LAUNCHER)
def test_the_cluster_launcher_takes_the_file(cloud: str) -> None:
    (config,) = documents(f"{cloud}.yaml")
    whole = prepare_config(copy.deepcopy(config))
    validate_config(whole)
    assert whole["provider"]["type"] == cloud
    assert whole["worker_setup_commands"] == []  # not the default's, which installs another Ray
    for command in (*whole["head_start_ray_commands"], *whole["worker_start_ray_commands"]):
        if "ray start" in command:
            assert_starts(shlex.split(command.split("; ")[-1]))
    (head,) = [command for command in whole["head_start_ray_commands"] if "--head" in command]
    assert "--dashboard-host=127.0.0.1" in head


@pytest.mark.parametrize("cloud", LAUNCHER)
def test_in_a_cloud_workers_are_on_spot_and_come_and_go_while_the_head_stays(cloud: str) -> None:
    (config,) = documents(f"{cloud}.yaml")
    head, worker = (config["available_node_types"][name] for name in (config["head_node_type"], "spot_gpu"))
    assert {"InstanceMarketOptions", "scheduling"}.isdisjoint(head["node_config"])
    if cloud == "aws":
        assert worker["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    else:
        assert worker["node_config"]["scheduling"]["provisioningModel"] == "SPOT"
    assert head["resources"]["CPU"] == 0
    assert worker["min_workers"] == 0 < worker["max_workers"] <= config["max_workers"]
    assert worker["resources"]["GPU"] == 1
    assert 0 < config["idle_timeout_minutes"] <= 60


@pytest.mark.parametrize("cloud", LAUNCHER)
def test_in_a_cloud_all_machines_have_the_token_and_the_shared_folder(cloud: str) -> None:
    (config,) = documents(f"{cloud}.yaml")
    assert "~/.ray/auth_token" in config["file_mounts"]
    assert "--volume=/shared:/shared" in config["docker"]["run_options"]
    assert any("mount -t nfs" in command for command in config["initialization_commands"])
    shell = "\n".join(config["initialization_commands"])
    assert subprocess.run(["bash", "-n"], input=shell, text=True, check=False).returncode == 0


@pytest.mark.parametrize("cloud", LAUNCHER)
def test_in_a_cloud_workers_wait_for_the_notice(cloud: str) -> None:
    (config,) = documents(f"{cloud}.yaml")
    assert (ROOT / config["file_mounts"]["~/spot.py"]).samefile(CLUSTER / "spot.py")
    *_, begun, waits = config["worker_start_ray_commands"]
    assert "ray start" in begun and f"spot.py {cloud} $RAY_HEAD_IP:6379" in waits and waits.endswith("&")
    assert subprocess.run(["bash", "-n"], input=f"({waits})", text=True, check=False).returncode == 0


@pytest.mark.parametrize("cloud", LAUNCHER)
def test_the_notice_of_a_cloud_is_passed_on_to_ray(cloud: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("spot", CLUSTER / "spot.py")
    assert spec is not None and spec.loader is not None
    spot = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(spot)
    asked: list[str] = []

    class Metadata(BaseHTTPRequestHandler):
        def answer(self) -> None:
            asked.append(self.path)
            said = {"/latest/api/token": "session", "/computeMetadata/v1/instance/preempted": "FALSE"}.get(self.path)
            if len(asked) > 4:
                said = {"aws": "action", "gcp": "TRUE"}[cloud]
            elif self.path.endswith("instance-action"):
                assert self.headers["X-aws-ec2-metadata-token"] == "session"
            self.send_response(200 if said else 404)
            self.end_headers()
            self.wfile.write((said or "").encode())

        do_GET = do_PUT = answer  # noqa: N815 - names of the standard library

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    told: list[list[str]] = []
    monkeypatch.setattr(spot, "METADATA", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(spot, "POLL_S", 0.01)
    monkeypatch.setattr(spot, "node", lambda: "0a1b")
    monkeypatch.setattr(subprocess, "run", lambda command, check: told.append(command))
    spot.main(cloud, "10.0.0.1:6379")
    server.shutdown()
    server.server_close()
    ((*ray, address, node, reason, _, left),) = told
    assert (ray, address, node) == (["ray", "drain-node"], "--address=10.0.0.1:6379", "--node-id=0a1b")
    assert reason == "--reason=DRAIN_NODE_REASON_PREEMPTION" and int(left.partition("=")[2]) in (25, 110)
    assert drain_node.make_context("drain-node", told[0][2:]).args == []


# Kubernetes


def pods() -> dict[str, dict[str, Any]]:
    """The pod templates of the Ray cluster by group; the head's is `head`."""
    _, cluster = documents("kuberay/raycluster.yaml")
    workers = {group["groupName"]: group["template"]["spec"] for group in cluster["spec"]["workerGroupSpecs"]}
    return {"head": cluster["spec"]["headGroupSpec"]["template"]["spec"], **workers}


def node_terms(pod: dict[str, Any]) -> list[list[dict[str, Any]]]:
    wanted = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    return [term["matchExpressions"] for term in wanted["nodeSelectorTerms"]]


def closed(schema: Any) -> Any:
    """A schema that refuses what it does not name, as the API server does when it is asked to be strict."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: closed(value) for key, value in schema.items()}
    # `properties` may be the name of a property as well; then it is no table of schemas beside a type
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        inner.setdefault("additionalProperties", schema.get("x-kubernetes-preserve-unknown-fields", False))
    return inner


def exactly(*required: str, **fields: Any) -> dict[str, Any]:
    """A schema of these fields and no others; those that `required` does not name may be missing."""
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


TEXT, SWITCH, COUNT, SOME = (
    {"type": "string"},
    {"type": "boolean"},
    {"type": "integer", "minimum": 0},
    {"type": "object"},
)
WORDS = {"type": "object", "additionalProperties": TEXT}
KUBERAY = {
    "RayCluster": exactly(
        "rayVersion",
        "headGroupSpec",
        "workerGroupSpecs",
        rayVersion=TEXT,
        authOptions=exactly("mode", mode={"enum": ["token", "disabled"]}, secretName=TEXT),
        enableInTreeAutoscaling=SWITCH,
        autoscalerOptions=exactly(version={"enum": ["v1", "v2"]}, idleTimeoutSeconds=COUNT),
        headGroupSpec=exactly("rayStartParams", "template", rayStartParams=WORDS, template=exactly("spec", spec=SOME)),
        workerGroupSpecs={
            "type": "array",
            "items": exactly(
                "groupName",
                "rayStartParams",
                "template",
                groupName=TEXT,
                replicas=COUNT,
                minReplicas=COUNT,
                maxReplicas=COUNT,
                rayStartParams=WORDS,
                template=exactly("spec", spec=SOME),
            ),
        },
    ),
    "RayJob": exactly(
        "entrypoint",
        clusterSelector=WORDS,
        submitterConfig=exactly(backoffLimit=COUNT),
        entrypoint=TEXT,
    ),
}
"""The fields that we use, by KubeRay's reference: what it calls them, and of what type they are."""


def definitions() -> Iterator[dict[str, Any]]:
    """The custom resources of KubeRay, from the file that SERMLL_RAYCLUSTER_CRD names."""
    for document in yaml.safe_load_all(Path(os.environ["SERMLL_RAYCLUSTER_CRD"]).read_text(encoding="utf-8")):
        yield from document.get("items", [document])


@pytest.mark.parametrize(("name", "kind"), [("raycluster", "RayCluster"), ("rayjob", "RayJob")])
def test_kuberay_takes_the_file(name: str, kind: str) -> None:
    document = documents(f"kuberay/{name}.yaml")[-1]
    assert (document["apiVersion"], document["kind"]) == ("ray.io/v1", kind)
    jsonschema.validate(document["spec"], KUBERAY[kind])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document["spec"] | {"rayversion": "2"}, KUBERAY[kind])


@pytest.mark.parametrize(("name", "kind"), [("raycluster", "RayCluster"), ("rayjob", "RayJob")])
def test_the_definition_of_kuberay_takes_the_file(name: str, kind: str) -> None:
    document = documents(f"kuberay/{name}.yaml")[-1]
    if "SERMLL_RAYCLUSTER_CRD" not in os.environ:
        pytest.skip("SERMLL_RAYCLUSTER_CRD names no file: kubectl get crd {rayclusters,rayjobs}.ray.io -o yaml > FILE")
    found = [item["spec"] for item in definitions() if item["spec"]["names"]["kind"] == kind]
    if not found:
        pytest.skip(f"the file of SERMLL_RAYCLUSTER_CRD does not define {kind}")
    (schema,) = [version["schema"]["openAPIV3Schema"] for version in found[0]["versions"] if version["name"] == "v1"]
    spec = closed(schema["properties"]["spec"])
    jsonschema.validate(document["spec"], spec)


@pytest.mark.parametrize("group", pods())
def test_kubernetes_takes_the_pods(group: str) -> None:
    kubernetes = pytest.importorskip("kubernetes_validate")
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": group}, "spec": pods()[group]}
    kubernetes.validate(pod, kubernetes.latest_version(), strict=True)


def test_on_kubernetes_the_head_is_never_on_spot_and_the_workers_are_nowhere_else() -> None:
    (head, *workers) = pods().values()
    (never,) = node_terms(head)
    assert {rule["key"]: rule["values"] for rule in never if rule["operator"] == "NotIn"} == {
        label: [value] for label, value in SPOT.items()
    }
    assert "tolerations" not in head
    assert workers
    for worker in workers:
        rules = [rule for term in node_terms(worker) for rule in term]
        assert {rule["key"]: rule["values"] for rule in rules if rule["operator"] == "In"} == {
            label: [value] for label, value in SPOT.items()
        }


def test_on_kubernetes_workers_come_and_go() -> None:
    _, cluster = documents("kuberay/raycluster.yaml")
    assert cluster["spec"]["enableInTreeAutoscaling"] is True
    assert cluster["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in cluster["spec"]["workerGroupSpecs"]:
        assert group["minReplicas"] == group["replicas"] == 0 < group["maxReplicas"]


def test_on_kubernetes_ray_hears_that_a_pod_is_to_go_and_has_time_to_say_so() -> None:
    _, *workers = pods().values()
    for pod in workers:
        (container,) = pod["containers"]
        assert "lifecycle" not in container  # a preStop hook comes before the signal that Ray waits for
        environment = {variable["name"]: variable["value"] for variable in container["env"]}
        assert pod["terminationGracePeriodSeconds"] == 60
        assert 30 <= int(environment[DRAIN_S]) < 60 and hasattr(ray_constants, DRAIN_S)


def test_on_kubernetes_all_pods_share_a_volume_and_claim_what_they_use() -> None:
    claim, cluster = documents("kuberay/raycluster.yaml")
    assert (claim["kind"], claim["spec"]["accessModes"]) == ("PersistentVolumeClaim", ["ReadWriteMany"])
    for pod in pods().values():
        (volume,) = pod["volumes"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        (container,) = pod["containers"]
        assert {"name": volume["name"], "mountPath": "/shared"} in container["volumeMounts"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert pod["securityContext"]["runAsNonRoot"] is True
    assert cluster["spec"]["authOptions"] == {"mode": "token", "secretName": "sermll-token"}
    assert "ray==" + cluster["spec"]["rayVersion"] in (ROOT / "constraints.txt").read_text().splitlines()


def test_the_job_for_kubernetes_is_a_command_of_sermll_on_that_cluster() -> None:
    _, cluster = documents("kuberay/raycluster.yaml")
    (job,) = documents("kuberay/rayjob.yaml")
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    command = shlex.split(job["spec"]["entrypoint"])
    assert_runs(command)
    assert {"data.path=/shared/data/ravdess", "tracking.runs=/shared/runs"} <= set(command)


# Compose


def services() -> dict[str, dict[str, Any]]:
    return documents("compose.yaml")[0]["services"]


def test_docker_takes_the_compose_file() -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("docker compose is not installed")
    given = {**os.environ, "POSTGRES_PASSWORD": "a", "RAY_AUTH_TOKEN": "b"}
    command = [docker, "compose", "--file", str(CLUSTER / "compose.yaml"), "config", "--quiet"]
    checked = subprocess.run(command, env=given, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


def test_the_compose_file_is_of_the_specification() -> None:
    schema = json.loads(packaged("check_jsonschema", "builtin_schemas/vendor/compose-spec.json").read_text("utf-8"))
    jsonschema.validate(documents("compose.yaml")[0], schema)


def test_compose_publishes_ports_to_this_machine_alone() -> None:
    published = [port for service in services().values() for port in service.get("ports", [])]
    assert len(published) == 2
    assert all(re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port) for port in published)


def test_compose_takes_passwords_from_the_environment_and_insists_on_them() -> None:
    given = {key: value for service in services().values() for key, value in service["environment"].items()}
    assert given["POSTGRES_PASSWORD"] == given["PGPASSWORD"] == "${POSTGRES_PASSWORD:?}"
    assert given["RAY_AUTH_TOKEN"] == "${RAY_AUTH_TOKEN:?}"
    assert "@" not in given["MLFLOW_BACKEND_STORE_URI"].split("://")[1].split("@", 1)[1]
    assert ":" not in given["MLFLOW_BACKEND_STORE_URI"].split("://")[1]  # no password in it


def test_compose_waits_until_what_a_service_needs_is_healthy() -> None:
    for service in services().values():
        assert service["healthcheck"]["test"][0] == "CMD"
        for needed, when in service.get("depends_on", {}).items():
            assert when == {"condition": "service_healthy"}
            assert needed in services()
    for name in ("head", "worker"):
        assert_starts(services()[name]["command"])
        assert services()[name]["volumes"] == ["shared:/shared"]


def test_compose_builds_what_the_dockerfile_has() -> None:
    stages = re.findall(r"^FROM \S+ AS (\w+)$", (CLUSTER / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    for service in services().values():
        if "build" in service:
            assert (CLUSTER / service["build"]["context"]).resolve() == ROOT
            assert (ROOT / service["build"]["dockerfile"]).samefile(CLUSTER / "Dockerfile")
            assert service["build"].get("target", stages[-1]) in stages


# Docker


def test_the_image_has_a_python_that_sermll_takes_and_no_root() -> None:
    text = (CLUSTER / "Dockerfile").read_text(encoding="utf-8")
    python = re.search(r"^ARG BASE=python:([\d.]+)", text, re.MULTILINE)
    assert python is not None
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert SpecifierSet(project["requires-python"]).contains(python[1])
    for stage in re.split(r"^FROM ", text, flags=re.MULTILINE)[2:]:
        assert re.findall(r"^USER (\S+)$", stage, re.MULTILINE) == ["1000"]
    assert len(re.findall(r"pip install(?! --no-deps)", text)) == len(
        re.findall(r"pip install -c constraints.txt", text)
    )


def test_what_the_image_copies_exists_and_docker_may_see_it() -> None:
    text = (CLUSTER / "Dockerfile").read_text(encoding="utf-8")
    copied = {source for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE) for source in line.split()[:-1]}
    shown = {line[1:] for line in (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"}
    assert copied
    assert {source.split("/")[0] for source in copied} == shown
    assert all((ROOT / source).exists() for source in copied)
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {build["readme"], *build["license-files"]} <= copied
