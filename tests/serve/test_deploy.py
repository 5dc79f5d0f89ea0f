"""The files of a deployment name flags, paths, ports and folders that exist. No cluster and no Docker."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import yaml
from starlette.testclient import TestClient

import idlm_jax
from serve.__main__ import serve
from serve.device import Draws
from serve.engine import Engine
from serve.http.app import HttpConfig, make_app
from tests.serve.http_server import CONFIG, MODEL

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "serve" / "deploy"


@pytest.fixture(scope="module")
def manifests() -> dict[str, Any]:
    documents = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    return {document["kind"]: document for document in documents}


@pytest.fixture(scope="module")
def pod(manifests) -> dict[str, Any]:
    return manifests["Deployment"]["spec"]["template"]["spec"]


@pytest.fixture(scope="module")
def container(pod) -> dict[str, Any]:
    (container,) = pod["containers"]
    return container


@pytest.fixture(scope="module")
def dockerfile() -> list[tuple[str, str]]:
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line and not line.startswith("#")]  # type: ignore[misc]


def command() -> Any:
    """The command line as `python -m serve` has it."""
    app = typer.Typer()
    app.command()(serve)
    return typer.main.get_command(app)


@pytest.fixture(scope="module")
def flags(container) -> dict[str, Any]:
    """What the command line makes of the container's arguments; a flag that it does not know is an error."""
    return command().make_context("serve", list(container["args"])).params


class Idle:
    """A device for an engine that is asked for nothing."""

    def decode(self, words: np.ndarray, draws: Draws, masks: np.ndarray | None = None, choice: int = 0) -> Any:
        raise AssertionError("nobody asked")

    def prefill(self, words: np.ndarray, masks: np.ndarray | None = None, choice: int = 0) -> Any:
        raise AssertionError("nobody asked")

    def reset(self) -> None:
        raise AssertionError("nothing broke")


@pytest.fixture(scope="module")
def guarded() -> Iterator[TestClient]:
    """A client without a key of a server that wants one."""
    lm = idlm_jax.load(MODEL, dtype="float32")
    config = HttpConfig(model="tiny", model_path=str(MODEL), api_keys=("a key",))
    with TestClient(make_app(Engine(lm, CONFIG, device=Idle()), lm, CONFIG, config)) as client:
        yield client


def test_probes_ask_paths_that_answer_without_a_key(container, guarded, manifests):
    annotations = manifests["Deployment"]["spec"]["template"]["metadata"]["annotations"]
    paths = {container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")}
    assert {path: guarded.get(path).status_code for path in paths} == {"/health": 200}
    assert guarded.get(annotations["prometheus.io/path"]).status_code == 200
    assert guarded.get("/v1/models").status_code == 401


def test_every_port_is_the_one_that_the_server_listens_on(container, manifests, flags, dockerfile):
    (port,) = container["ports"]
    (service,) = manifests["Service"]["spec"]["ports"]
    template = manifests["Deployment"]["spec"]["template"]
    probed = {container[f"{kind}Probe"]["httpGet"]["port"] for kind in ("startup", "readiness", "liveness")}
    assert probed == {service["targetPort"]} == {port["name"]}
    default = next(each for each in command().params if each.name == "port").default
    exposed = int(dict(dockerfile)["EXPOSE"])
    annotated = int(template["metadata"]["annotations"]["prometheus.io/port"])
    assert flags["port"] == port["containerPort"] == annotated == exposed == default
    assert flags["host"] == "0.0.0.0"
    # The Service finds the pods.
    assert manifests["Service"]["spec"]["selector"] == template["metadata"]["labels"]


def test_a_pod_outlives_its_drain_and_starts_with_patience(pod, container, flags):
    name, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert name == "sleep"
    assert pod["terminationGracePeriodSeconds"] > int(seconds) + flags["shutdown_timeout"]
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 1800
    patience = {kind: container[f"{kind}Probe"] for kind in ("readiness", "liveness")}
    wait = {kind: probe["periodSeconds"] * probe.get("failureThreshold", 3) for kind, probe in patience.items()}
    assert wait["readiness"] < wait["liveness"]


def test_there_is_a_gpu_for_every_part_of_the_model(container, flags):
    assert container["resources"]["limits"]["nvidia.com/gpu"] == flags["tp_size"]


def test_volumes_are_mounted_where_the_flags_look(pod, container, manifests, flags):
    mounted = {each["name"]: Path(each["mountPath"]) for each in container["volumeMounts"]}
    assert set(mounted) == {volume["name"] for volume in pod["volumes"]}
    assert flags["compilation_cache_dir"] == mounted["compiled"]
    assert Path(flags["model_path"]).is_relative_to(mounted["models"])
    claims = {volume["name"]: volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"]}
    assert claims["compiled"] == manifests["PersistentVolumeClaim"]["metadata"]["name"]


def test_environment_variables_are_read_by_a_flag(container, dockerfile):
    known = {each.envvar for each in command().params}
    (variable,) = container["env"]
    assert variable["name"] in known
    assert dict(dockerfile)["ENV"].partition("=")[0] in known


def test_the_image_is_made_of_what_exists(dockerfile):
    sources = [source for word, rest in dockerfile if word == "COPY" for source in rest.split()[:-1]]
    assert sources and [source for source in sources if not (ROOT / source).exists()] == []
    # Whatever `serve` imports of this project is in the image.
    imported = re.compile(r"^\s*(?:from|import) (idlm_jax|pallas_kernels|serve|train|benchmarks|tests)\b", re.MULTILINE)
    packages = {"idlm_jax", "pallas_kernels", "serve"}
    found = {
        name
        for package in packages
        for file in (ROOT / package).rglob("*.py")
        for name in imported.findall(file.read_text())
    }
    assert found <= set(sources)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = dict(dockerfile)["ARG"].removeprefix("EXTRAS=").split(",")
    assert set(extras) <= set(project["optional-dependencies"])


def test_the_user_and_the_cache_are_those_of_the_pod(dockerfile, pod, container):
    image = dict(dockerfile)
    assert int(image["USER"]) == pod["securityContext"]["runAsUser"]
    mounted = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    assert image["VOLUME"] == mounted["compiled"] == image["ENV"].partition("=")[2]


def test_the_image_starts_the_server_without_a_shell(dockerfile):
    entry = dict(dockerfile)["ENTRYPOINT"]
    assert yaml.safe_load(entry) == ["python", "-m", "serve"]


def test_the_examples_of_the_page_parse():
    """Commands in docs/deploying.md that start the server name flags that exist."""
    text = (ROOT / "docs" / "deploying.md").read_text()
    lines = re.findall(r"^python -m serve (.*)$", text.replace("\\\n", " "), re.MULTILINE)
    assert lines
    for line in lines:
        command().make_context("serve", shlex.split(line))


def test_the_metrics_of_the_page_exist(guarded):
    named = set(re.findall(r"idlm:\w+", (ROOT / "docs" / "deploying.md").read_text()))
    # prometheus_client leaves `_total` to the samples.
    shown = set(re.findall(r"^# HELP (idlm:\w+)", guarded.get("/metrics").text, re.MULTILINE))
    assert named and named <= shown
