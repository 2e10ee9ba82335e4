"""The benchmark of ten million faces, with thousands: it goes on where it was, and finds what is nearest."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import ten_million


def test_a_gallery_grows_is_measured_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "people.npy", rng.standard_normal((300, 24)).astype(np.float32))
    np.save(tmp_path / "strangers.npy", rng.standard_normal((40, 24)).astype(np.float32))
    monkeypatch.setattr(ten_million, "BLOCK", 512)
    monkeypatch.setattr(ten_million, "SINGLES", 3)
    monkeypatch.setattr(ten_million, "CALLS", {1: 2, 16: 1})
    for rows, added in ((1500, 1500), (2000, 500)):
        given = {"--vectors": "people.npy", "--strangers": "strangers.npy", "--folder": "."}
        arguments = [part for option, name in given.items() for part in (option, str(tmp_path / name))]
        monkeypatch.setattr(sys, "argv", ["ten_million", *arguments, "--rows", str(rows)])
        ten_million.main()
        found = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (found["rows"], found["enrolled in this run"], found["dimension"]) == (rows, added, 24)
        assert (found["ids compared"], found["ids other than those of a brute force"]) == (160, 0)
        assert found["strangers: 16 together, ms per query"] > 0
