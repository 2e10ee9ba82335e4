"""The files for operators in deploy/: they are well-formed, and name options and metrics that exist."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from prometheus_client.parser import text_string_to_metric_families

from retrieval import Gallery
from retrieval.cli.app import app
from retrieval.service.metrics import AGE, Metrics

DEPLOY = Path(__file__).parents[2] / "deploy"
UNIT = DEPLOY / "faceprint.service"


def parsed(command: str, *arguments: str) -> dict[str, object]:
    """Returns the parameters that a command understands arguments as, without running it."""
    group = typer.main.get_command(app)
    with group.make_context("faceprint", [command, *arguments], resilient_parsing=True) as context:
        found = group.get_command(context, command)  # type: ignore[attr-defined]
        return dict(found.make_context(command, list(arguments)).params)


def test_the_unit_starts_the_service_with_options_that_exist() -> None:
    (command,) = re.findall(r"^ExecStart=(.*)$", UNIT.read_text(), re.MULTILINE)
    program, *arguments = shlex.split(command)
    assert Path(program).name == "faceprint"
    assert parsed(*arguments)["port"] == 8000


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_finds_no_fault_in_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    # The program is elsewhere here.
    unit.write_text(UNIT.read_text().replace("/opt/faceprint/bin/faceprint", sys.executable))
    ended = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, check=False
    )
    ours = [line for line in ended.stderr.splitlines() if UNIT.name in line]
    assert ours == []


def test_the_container_starts_the_service_with_options_that_exist() -> None:
    text = (DEPLOY / "Containerfile").read_text()
    (entry,), (command,) = (
        re.findall(rf"^{word} (\[.*\])$", text, re.MULTILINE) for word in ("ENTRYPOINT", "CMD")
    )
    program, *arguments = json.loads(entry) + json.loads(command)
    assert Path(program).name == "faceprint"
    assert parsed(*arguments)["host"] == "0.0.0.0"


def test_hadolint_finds_no_fault_in_the_containerfile() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    if not linter.exists():
        pytest.skip("hadolint is not installed")
    ended = subprocess.run([linter, DEPLOY / "Containerfile"], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "")


def test_the_dashboard_shows_metrics_that_the_service_has(gallery: Gallery) -> None:
    metrics = Metrics(gallery)
    metrics.requests.labels("/v1/search", "POST", 200).inc()
    metrics.observe_batch("search", 1, 0.1)
    metrics.seconds.labels("/v1/search").observe(0.1)
    known = {
        sample.name
        for one in text_string_to_metric_families(metrics.text().decode())
        for sample in one.samples
    }
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    shown = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"faceprint_\w+", target["expr"])
    }
    assert AGE in shown
    assert shown <= known | {AGE}
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"]} == {"${source}"}
