"""Requests made from the OpenAPI document: what it allows never fails the service, nor what it forbids."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode, SerializationContext

from retrieval import verify
from retrieval.service.app import document
from retrieval.service.routes.bulk import LINES
from retrieval.service.schemas import ErrorBody
from tests.service.server import Server
from tests.service.test_openapi import operations

# The greatest id in a request: the gallery has 36 faces and 6 people.
_MAX_ID = 40


def _narrowed() -> dict[str, Any]:
    """Returns the document with ids and sources that are there: else few requests change a thing."""
    described = document()
    for _, _, operation in operations(described):
        for one in operation.get("parameters", []):
            if one["in"] == "path" and one["schema"].get("type") == "integer":
                one["schema"]["maximum"] = _MAX_ID
    schemas = described["components"]["schemas"]
    schemas["Merging"]["properties"]["into"]["maximum"] = _MAX_ID
    schemas["IngestJob"]["properties"]["sources"]["items"] = {"enum": [".", "Adi", "../Adi"]}
    return described


_DOCUMENT = _narrowed()
# What takes people and faces away comes last.
_OPERATIONS = sorted(
    ((method.upper(), path) for method, path, _ in operations(_DOCUMENT)), key=lambda one: one[0] == "DELETE"
)

# Requests to each operation; half of them break its schema.
_EXAMPLES = 10


@schemathesis.serializer(LINES)
def lines(_context: SerializationContext, value: object) -> bytes:
    """The text of a bulk search, which is mostly none."""
    return str(value).encode("utf-8", "surrogatepass")


@pytest.fixture(scope="module")
def asked(enrolled: Path, faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a copy of the gallery, which requests may change and empty."""
    folder = tmp_path_factory.mktemp("asked")
    shutil.copytree(enrolled, folder / "g")
    with Server(folder / "g", folder / "log", "--sources", faces) as server:
        yield server
    log = server.log.read_text()
    assert "Traceback" not in log
    assert not verify(folder / "g").findings


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    with requests.Session() as session:
        session.trust_env = False
        yield session


@pytest.mark.parametrize(("method", "path"), _OPERATIONS, ids=[" ".join(one) for one in _OPERATIONS])
def test_no_request_is_a_failure_of_the_service(
    method: str, path: str, asked: Server, session: requests.Session
) -> None:
    """It is answered, or refused in the form that the document states."""
    operation = schemathesis.openapi.from_dict(_DOCUMENT)[path][method]
    cases = st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in GenerationMode))

    @settings(max_examples=_EXAMPLES, suppress_health_check=list(HealthCheck))
    @given(cases)
    def ask(case: Case) -> None:
        response = case.call(base_url=asked.url, session=session, timeout=60)
        assert response.status_code < 500, response.content
        if response.status_code >= 400:
            ErrorBody.model_validate_json(response.content)

    ask()
