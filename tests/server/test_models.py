from __future__ import annotations

import time

import httpx
import openai
import pytest

from tests.golden import picture_file

from .conftest import CAPABILITIES, NAME, VIDEO_CAPABILITIES, serving
from .engine import ScriptedEngine


def test_the_list_holds_the_one_model(http):
    answer = http.get("/v1/models").json()
    assert answer["object"] == "list"
    (model,) = answer["data"]
    assert time.time() - 3600 < model.pop("created") <= time.time()
    assert model == {
        "id": NAME,
        "object": "model",
        "owned_by": "darkroom",
        "capabilities": CAPABILITIES.model_dump(mode="json"),
    }


@pytest.mark.parametrize("spelling", ["darkroom/demo", "darkroom%2Fdemo", "darkroom%2fdemo"])
def test_a_name_with_a_slash_in_both_spellings(http, spelling):
    assert http.get(f"/v1/models/{spelling}").json() == http.get("/v1/models").json()["data"][0]


def test_the_sdk_reads_both(sdk):
    assert [model.id for model in sdk.models.list()] == [NAME]
    assert sdk.models.retrieve(NAME).id == NAME


@pytest.mark.parametrize("name", ["gpt-image-1", "darkroom", "darkroom/demo/", "", "%00", "../demo", "x" * 30_000])
def test_an_unknown_model_is_404(http, name):
    response = http.get(f"/v1/models/{name}")
    assert response.status_code == 404
    if "../" not in name:  # which httpx resolves to another route
        assert response.json()["error"]["code"] == "model_not_found"
    assert len(response.text) < 1000


def test_models_cannot_be_deleted(sdk):
    with pytest.raises(openai.APIStatusError) as caught:
        sdk.models.delete(NAME)
    assert (caught.value.status_code, caught.value.code) == (405, "method_not_supported")


def test_a_folder_as_a_name(engine):
    with serving(engine, name="/models/demo") as other, openai.OpenAI(base_url=f"{other.url}/v1", api_key="x") as sdk:
        assert sdk.models.retrieve("/models/demo").id == "/models/demo"


def test_a_model_that_makes_pictures_makes_no_videos(http):
    for response in (http.post("/v1/videos", json={"prompt": "x"}), http.get("/v1/videos"), http.get("/v1/videos/x")):
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, "model") and "text-to-image" in error["message"]


@pytest.mark.parametrize("task", ["text-to-video", "image-to-video"])
def test_a_model_with_one_of_the_tasks_of_videos(tmp_path, task):
    capabilities = VIDEO_CAPABILITIES.override({"tasks": (task,)})
    with (
        ScriptedEngine() as engine,
        serving(engine, capabilities=capabilities, folder=tmp_path) as server,
        httpx.Client(base_url=server.url) as http,
    ):
        files = {"input_reference": picture_file(64, 48)}
        with_picture = http.post("/v1/videos", data={"prompt": "x"}, files=files)
        without = http.post("/v1/videos", json={"prompt": "x"})
        good, bad = (without, with_picture) if task == "text-to-video" else (with_picture, without)
        assert good.status_code == 200
        assert (bad.status_code, bad.json()["error"]["param"]) == (400, "input_reference")
