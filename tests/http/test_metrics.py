"""What Prometheus is told."""

from __future__ import annotations

import httpx


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
