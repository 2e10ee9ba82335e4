"""The OpenAPI document: a change of it is a change for callers, so it must be meant."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from retrieval.service.app import document
from retrieval.service.refusals import Code
from tests.service.server import Server

SNAPSHOT = Path(__file__).parent / "openapi.json"
_ROOT = Path(__file__).parents[2]
_METHODS = ("get", "post", "put", "delete")


def operations(described: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [
        (method, path, described["paths"][path][method])
        for path in described["paths"]
        for method in _METHODS
        if method in described["paths"][path]
    ]


def contract(described: dict[str, Any]) -> Any:
    """What callers rely on, without what the version of the framework adds to the texts and statuses."""
    shown: dict[str, Any] = {}
    for method, path, operation in operations(described):
        content = operation.get("requestBody", {}).get("content", {})
        shown[f"{method.upper()} {path}"] = {
            "parameters": {
                one["name"]: [one["in"], one["required"]] for one in operation.get("parameters", [])
            },
            "body": sorted(content),
            "statuses": sorted(operation["responses"]),
        }
    schemas = {
        name: {"properties": sorted(schema["properties"]), "required": sorted(schema.get("required", []))}
        for name, schema in described["components"]["schemas"].items()
        if "properties" in schema
    }
    return {"operations": shown, "schemas": schemas, "codes": sorted(Code)}


def test_the_contract_is_the_snapshot() -> None:
    """After a change that is meant: FACEPRINT_SNAPSHOT=1 pytest tests/service/test_openapi.py"""
    found = json.dumps(contract(document()), indent=1) + "\n"
    if os.environ.get("FACEPRINT_SNAPSHOT"):
        SNAPSHOT.write_text(found)
    assert found == SNAPSHOT.read_text()


def test_the_server_sends_the_document_and_every_reference_in_it_leads_somewhere(served: Server) -> None:
    sent = served.client.get("/openapi.json")
    assert sent.json() == json.loads(json.dumps(document()))
    for part in sent.text.split('"$ref":"')[1:]:
        name = part.partition('"')[0].removeprefix("#/components/schemas/")
        assert name in sent.json()["components"]["schemas"]


def test_every_operation_says_what_it_does_and_has_the_form_of_errors() -> None:
    described = document()
    for method, path, operation in operations(described):
        assert operation["description"], (method, path)
        refused = operation["responses"]["400"]["content"]["application/json"]["schema"]
        assert refused == {"$ref": "#/components/schemas/ErrorBody"}, (method, path)


@pytest.mark.parametrize("code", list(Code))
def test_every_code_is_documented(code: Code) -> None:
    assert f"`{code}`" in (_ROOT / "docs" / "service.md").read_text()


def test_every_address_is_documented() -> None:
    page = (_ROOT / "docs" / "service.md").read_text()
    for _, path, _ in operations(document()):
        assert re.sub(r"{(person|face|job|merge|doubt)}", "{id}", path) in page, path
