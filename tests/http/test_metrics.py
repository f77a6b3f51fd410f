"""What Prometheus is told."""

from __future__ import annotations

import httpx
import pytest

from api.parts import Parts
from tests.conftest import bearer, sign_in


async def test_answers_are_counted_by_rule(client: httpx.AsyncClient) -> None:
    """No client can make up a label: neither a path nor a method of its own is in the numbers."""
    await client.get("/protected")
    await client.get("/made-up-by-a-client")
    await client.request("MADEUP", "/protected")
    told = await client.get("/metrics")
    assert told.status_code == 200
    assert told.headers["Content-Type"].startswith("text/plain")
    lines = told.text.splitlines()
    wanted = 'rolecall_requests_total{method="GET",route="/protected",status="401"} '
    assert any(line.startswith(wanted) for line in lines)
    assert any('method="other"' in line for line in lines)
    assert "rolecall_request_seconds_bucket{" in told.text
    assert "made-up-by-a-client" not in told.text
    assert "MADEUP" not in told.text


def number(told: str, line: str) -> float:
    """Return the value of one line, 0 where it is not there."""
    found = [row for row in told.splitlines() if row.startswith(f"{line} ")]
    return float(found[0].rpartition(" ")[2]) if found else 0.0


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_refusals_and_lookups_are_counted(client: httpx.AsyncClient, parts: Parts) -> None:
    """By code, also RFC 6749's; and whether Redis or the database answered for the blocklist."""
    token = bearer((await sign_in(client, transport="json"))["access_token"])
    before = (await client.get("/metrics")).text
    await client.get("/protected", headers=bearer("x.y.z"))
    await client.post("/oauth/token", data={"grant_type": "x"})
    await client.get("/protected", headers=token)
    await parts.blocklist._index.forget()
    parts.blocklist._index.close("test")
    await client.get("/protected", headers=token)
    after = (await client.get("/metrics")).text
    for line in (
        'rolecall_refusals_total{code="invalid_token"}',
        'rolecall_refusals_total{code="invalid_client"}',
        'rolecall_blocklist_checks_total{by="redis"}',
        'rolecall_blocklist_checks_total{by="database"}',
    ):
        assert number(after, line) == number(before, line) + 1, line
