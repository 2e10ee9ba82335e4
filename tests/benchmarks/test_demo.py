"""benchmarks.demo: that it runs whole at toy size."""

import pytest

from benchmarks import demo
from retrieval.cli.walkthrough import Plan


def test_a_run_says_its_seed_its_figures_and_its_time(capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan(
        identities=3,
        photos=4,
        strangers=10,
        stranger_photos=2,
        visitors=2,
        seed=7,
        size=32,
        epochs=1,
        architecture="resnet14-narrow",
    )
    run = demo.measured(plan)
    assert run["seed"] == 7
    assert run["named"] + run["misnamed"] + run["unknown"] == 3
    assert run["strangers_unknown"] + run["strangers_named"] == 2
    assert run["cpu_seconds"] > 0
    line = capsys.readouterr().out.split()
    assert line[0] == "7"
    assert float(line[1]) == pytest.approx(run["validation_accuracy"], abs=0.001)
