from __future__ import annotations

import httpx

from .conftest import serving


def test_two_apps_share_nothing(engine):
    with serving(engine, name="a") as one, serving(engine, name="b") as two:
        assert httpx.post(f"{one.url}/v1/images/generations", json={"prompt": "x", "model": "a"}).status_code == 200
        assert httpx.post(f"{two.url}/v1/images/generations", json={"prompt": "x", "model": "a"}).status_code == 404
        assert "darkroom_pictures_total 1.0" in httpx.get(f"{one.url}/metrics").text
        assert "darkroom_pictures_total 0.0" in httpx.get(f"{two.url}/metrics").text
