"""Pipelines that no family is written for: one process is the stock call, and every layout of ranks is one process."""

from __future__ import annotations

import io
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any
from unittest.mock import patch

import av
import diffusers
import msgspec
import numpy as np
import pytest
import torch
from diffusers import AuraFlowPipeline, Flux2KleinPipeline, FluxPipeline, PixArtSigmaPipeline, SanaPipeline

from darkroom.configs import ConfigError, ParallelConfig, Request, RequestError, SamplingParams
from darkroom.engine.messages import Decode, Drop, Prepare, Step
from darkroom.models.any_diffusers import CallSample
from darkroom.models.checkpoint import Checkpoint
from darkroom.offline import Darkroom
from darkroom.parallel import guidance
from darkroom.server.fields import GenerationRequest
from darkroom.server.uploads import Pictures
from tests import tiny, tiny_video
from tests.golden import TOLERANCE, difference, generate, picture_file, request, stock_pipeline, worker
from tests.matrix import TEXT_TO_IMAGE, Cell, refusal, run_cells
from tests.ranks import RankError, run_ranks
from tests.subjects import MASK, WIDE, opened, run_other, short

STOCK = {
    "flux": FluxPipeline,
    "flux2_klein": Flux2KleinPipeline,
    "aura_flow": AuraFlowPipeline,
    "pixart_sigma": PixArtSigmaPipeline,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("any")
    return {name: getattr(tiny, name)(root / name) for name in STOCK}


def test_guidance_as_an_input_is_told_from_the_other_kind(folders: dict[str, Path]) -> None:
    params = SamplingParams(width=64, height=64, num_inference_steps=2, seed=0, max_sequence_length=32)
    stock = stock_pipeline(FluxPipeline, folders["flux"])
    pictures = []
    with worker(folders["flux"], ParallelConfig()) as one:
        for values in ({}, {"guidance_scale": 9.0}, {"guidance_scale": 9.0, "true_cfg_scale": 2.0}):
            wanted = one.model.capabilities.resolve("a cat", replace(params, **values))
            pictures.append(generate(one, [wanted])["0"][1])
            assert torch.equal(pictures[-1], run_other(stock, wanted, "pt"))
    assert not any(torch.equal(a, b) for a, b in combinations(pictures, 2))


EDIT = request("a cat in blue", task="edit", images=(picture_file(80, 96),), num_inference_steps=2)
"""Its condition is encoded by the VAE, and attended to behind the picture's own tokens."""


def test_a_picture_is_edited(folders: dict[str, Path]) -> None:
    with worker(folders["flux2_klein"], ParallelConfig()) as one:
        edited = generate(one, [EDIT])["0"][1]
    stock = stock_pipeline(Flux2KleinPipeline, folders["flux2_klein"])
    assert edited is not None and torch.equal(edited, run_other(stock, EDIT, "pt"))


def test_a_shape_of_its_own_is_not_taken_instead(tmp_path: Path) -> None:
    """HunyuanDiT's call draws in one of nine, as it stands, and does not scale it back."""
    folder = tiny.hunyuan_dit(tmp_path / "model")
    size: dict[str, Any] = {"width": 96, "height": 64, "num_inference_steps": 2}
    with worker(folder, ParallelConfig()) as one:
        wanted = one.model.options.resolve("a cat", SamplingParams(**size, seed=1))
        drawn = generate(one, [wanted])["0"][1]
    theirs = stock_pipeline(diffusers.HunyuanDiTPipeline, folder)(
        prompt="a cat",
        **size,
        guidance_scale=wanted.guidance_scale,
        generator=torch.Generator().manual_seed(1),
        output_type="pt",
        use_resolution_binning=False,
    ).images
    assert drawn is not None and drawn.shape == (1, 3, 64, 96) and torch.equal(drawn, theirs)


@pytest.mark.parametrize(
    "name",
    [
        "FluxImg2ImgPipeline",
        "FluxInpaintPipeline",
        pytest.param("FluxKontextPipeline", marks=pytest.mark.matrix),  # makes a megapixel of any picture
    ],
)
def test_other_pipelines_of_the_same_parts_draw_over_a_picture(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """What a request brings is given to the call by its own names."""
    folder = Path(shutil.copytree(folders["flux"], tmp_path / "model"))
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": name}))
    given: dict[str, Any] = {"strength": 0.6} if "Kontext" not in name else {}
    masked = {"mask": MASK} if "Inpaint" in name else {}
    size: dict[str, Any] = {"width": 112, "height": 80, "num_inference_steps": 5, "max_sequence_length": 32}
    params = SamplingParams(**size, **given, **masked, images=(WIDE,), seed=1)
    with worker(folder, ParallelConfig()) as one:
        wanted = one.model.options.resolve("a cat", params)
        drawn = generate(one, [wanted])["0"][1]
    stock = stock_pipeline(getattr(diffusers, name), folder)
    extra = {"max_area": 112 * 80} if "Kontext" in name else given
    theirs = stock(
        prompt="a cat",
        image=opened(WIDE),
        **size,
        **extra,
        **({"mask_image": opened(MASK)} if masked else {}),
        guidance_scale=wanted.embedded_guidance,
        generator=torch.Generator().manual_seed(1),
        output_type="pt",
    ).images
    assert drawn is not None and torch.equal(drawn, theirs)


@pytest.mark.matrix
def test_a_picture_is_edited_on_ranks(folders: dict[str, Path]) -> None:
    with worker(folders["flux2_klein"], ParallelConfig()) as one:
        wanted = generate(one, [EDIT])
    for cell in ({"cfg": 2, "vae-pp": 2}, {"usp": 2}):
        outputs = run_ranks(one_request, 2, folders["flux2_klein"], cell, EDIT)
        assert difference(outputs[0], wanted) <= TOLERANCE
        assert outputs[1]["0"][1] is None
        assert float((outputs[1]["0"][0] - wanted["0"][0]).abs().max()) <= TOLERANCE


def one_request(rank: int, size: int, folder: Path, cell: Cell, wanted: Request) -> Any:
    with worker(folder, ParallelConfig.model_validate(cell), rank) as one:
        return generate(one, [wanted])


# ---- videos ----------------------------------------------------------------------------------------------------------


Build = Callable[[Path], Path]
FROM_PICTURE = {"images": (WIDE,)}
VIDEOS: dict[str, tuple[Build, dict[str, Any]]] = {
    "cogvideox": (tiny_video.cogvideox, {}),
    "cogvideox, picture": (lambda folder: tiny_video.cogvideox(folder, begins=True), FROM_PICTURE),
    "hunyuan": (tiny_video.hunyuan_video, {"num_frames": 5, "embedded_guidance": 6.0}),
    "kandinsky": (tiny_video.kandinsky5, {"num_frames": 5}),
    "kandinsky, picture": (
        lambda folder: tiny_video.kandinsky5(folder, begins=True),
        {"num_frames": 21, **FROM_PICTURE},  # of less than 6 frames of latents it makes no numbers
    ),
    "latte": (tiny_video.latte, {"num_frames": 4}),
    "ltx, picture": (tiny_video.ltx_image_to_video, FROM_PICTURE),
    "ltx condition": (tiny_video.ltx_condition, {}),
    "ltx condition, picture": (tiny_video.ltx_condition, FROM_PICTURE),
    "mochi": (tiny_video.mochi, {"num_frames": 7}),
    "motif": (tiny_video.motif_video, {"num_frames": 5, "guidance_scale": 1.0}),
    "sana, picture": (lambda folder: tiny_video.sana_video(folder, begins=True), {"num_frames": 5, **FROM_PICTURE}),
}


def of_video(given: dict[str, Any]) -> Request:
    task = "image-to-video" if "images" in given else "text-to-video"
    return short(negative_prompt="red", max_sequence_length=16, task=task, **given)


@pytest.mark.filterwarnings("ignore:In CPU autocast")
@pytest.mark.parametrize("name", VIDEOS)
def test_videos_are_the_stock_pipelines(name: str, tmp_path: Path) -> None:
    """Frame by frame, to the bit."""
    build, given = VIDEOS[name]
    folder, wanted = build(tmp_path / "model"), of_video(given)
    with worker(folder, ParallelConfig()) as one:
        made = generate(one, [wanted])["0"][1]
        assert made is not None and made.shape == (1, 3, wanted.num_frames, 64, 64)
        assert len(one.model.pictures(made)) == wanted.num_frames
        cls = getattr(diffusers, one.model.pipelines[0])
        processors = one.model.processors(folder)
    theirs = run_other(stock_pipeline(cls, folder, **processors), wanted, "pt")
    assert torch.equal(made.transpose(1, 2), theirs)


@pytest.mark.matrix
@pytest.mark.filterwarnings("ignore:In CPU autocast")
def test_guidance_of_videos_is_spread(tmp_path: Path) -> None:
    """Of all that have two branches, in one group of ranks."""
    spread = {name: parts for name, parts in VIDEOS.items() if name != "motif"}
    folders = {name: build((tmp_path / name) / "model") for name, (build, _) in spread.items()}
    requests = {name: of_video(given) for name, (_, given) in spread.items()}
    outputs = run_ranks(with_two_branches, 2, folders, requests)
    for name, folder in folders.items():
        with worker(folder, ParallelConfig()) as one:
            alone = generate(one, [requests[name]])
        assert difference(outputs[0][name], alone) <= TOLERANCE, name
        assert outputs[1][name]["0"][1] is None


def with_two_branches(rank: int, size: int, folders: dict[str, Path], requests: dict[str, Request]) -> Any:
    return {name: one_request(rank, size, folder, {"cfg": 2}, requests[name]) for name, folder in folders.items()}


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|video_pad|>", "&lt;|image_pad|&gt;", "&amp;lt;|video_pad|>"])
def test_a_text_that_stands_for_a_picture_is_refused(token: str, tmp_path: Path) -> None:
    """By the prompts that the pipeline cleans, in which escaped tokens are whole again."""
    with worker(tiny_video.kandinsky5(tmp_path / "kandinsky"), ParallelConfig()) as one:
        for param in ("prompt", "negative_prompt"):
            wanted = msgspec.structs.replace(of_video({"num_frames": 5}), **{param: f"a {token} cat"})
            with pytest.raises(RequestError, match="which stands for a picture") as caught:
                one.execute(Prepare(ids=("a",), requests=(wanted,)))
            assert caught.value.param == param
    assert calls_in_flight() == []


def test_what_guides_by_past_predictions_is_each_requests_own(tmp_path: Path) -> None:
    given = {"num_frames": 1, "guidance_scale": 1.0, "num_inference_steps": 3}
    requests = [short("a cat", **given), short("a dog", seed=1, **given)]
    with worker(tiny_video.motif_video(tmp_path / "motif"), ParallelConfig()) as one:
        together = generate(one, requests)
        alone = {str(i): generate(one, [each])["0"] for i, each in enumerate(requests)}
    assert difference(together, alone) == 0


def test_tokens_of_a_video_are_those_of_its_latent_frames(tmp_path: Path) -> None:
    with worker(tiny_video.ltx(tmp_path / "ltx"), ParallelConfig()) as one:
        [prepared] = one.execute(Prepare(ids=("a",), requests=(short(num_frames=17),)))
        one.execute(Drop(ids=("a",)))
    assert prepared.image_tokens == 3 * 2 * 2


@pytest.mark.filterwarnings("ignore:std")
def test_a_video_of_no_numbers_is_no_answer(tmp_path: Path) -> None:
    """And no rank's failure: this pipeline fits its first four frames of latents to those behind them, and here there
    are none. Told where it is encoded, which is that request's failure alone."""
    with worker(tiny_video.kandinsky5(tmp_path / "kandinsky", begins=True), ParallelConfig()) as one:
        made = generate(one, [of_video({"num_frames": 9, **FROM_PICTURE})])["0"][1]
        assert made is not None and made.isnan().any()
        others = [torch.full((1, 3, 1, 8, 8), 0.5) for _ in range(3)]
        assert len(one.model.pictures(others.pop())) == 1
        for video, number in zip(others, (float("inf"), -float("inf")), strict=True):
            video[0, 1, 0, 3, 2] = number
        for video in (made, *others):
            with pytest.raises(RuntimeError, match="the pipeline made frames that are no numbers"):
                one.model.pictures(video)


def test_what_is_made_is_held_once(folders: dict[str, Path]) -> None:
    """A video may be large, and the sample is dropped only after it is encoded."""
    kept: list[int] = []
    with worker(folders["flux"], ParallelConfig()) as one:
        decode = one.model.pipe.image_processor.postprocess

        def spy(*args: Any, **kwargs: Any) -> Any:
            picture = decode(*args, **kwargs)
            kept.append(picture.data_ptr())
            return picture

        with patch.object(one.model.pipe.image_processor, "postprocess", spy):
            made = generate(one, [request()])["0"][1]
        sample = one.samples["0"]
        assert isinstance(sample, CallSample) and sample.call and sample.call.result is None
    assert made is not None and [made.data_ptr()] == kept


def test_the_whole_engine_makes_a_video(tmp_path: Path) -> None:
    params = SamplingParams(width=64, height=64, num_frames=17, fps=12, num_inference_steps=2, seed=3)
    with Darkroom(str(tiny_video.ltx(tmp_path / "ltx")), device="cpu", dtype="float32") as darkroom:
        file = darkroom.generate_video("a cat", params)
    with av.open(io.BytesIO(file)) as played:
        assert played.streams.video[0].average_rate == 12
        assert [(frame.width, frame.height) for frame in played.decode(video=0)] == [(64, 64)] * 17


def calls_in_flight() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "call"]


@pytest.mark.parametrize("name", STOCK)
def test_interleaved_is_one_by_one(name: str, folders: dict[str, Path]) -> None:
    requests = [request("a cat", guidance_scale=4.0), request("a dog", seed=1, guidance_scale=1.0, width=64)]
    requests += [request("two blue stars", seed=2, guidance_scale=2.0, num_inference_steps=5)]
    with worker(folders[name], ParallelConfig()) as one:
        together = generate(one, requests)
        alone = {str(i): generate(one, [each])["0"] for i, each in enumerate(requests)}
    assert difference(together, alone) == 0


def test_a_dropped_call_leaves_nothing(folders: dict[str, Path]) -> None:
    with worker(folders["flux"], ParallelConfig()) as one:
        one.execute(Prepare(ids=("a", "b"), requests=(request(), request("a dog", seed=3))))
        one.execute(Step(ids=("a",)))
        one.execute(Step(ids=("b",)))
        assert len(calls_in_flight()) == 2
        one.execute(Drop(ids=("a",)))
        assert len(calls_in_flight()) == 1 and list(one.samples) == ["b"]
        one.execute(Step(ids=("b",)))
        one.execute(Step(ids=("b",)))
        rest = one.decode(Decode(ids=("b",)))
        one.execute(Drop(ids=("b",)))
        assert calls_in_flight() == [] and one.samples == {}
        assert rest is not None and torch.equal(rest, generate(one, [request("a dog", seed=3)])["0"][1])


def test_errors_inside_the_call_are_the_commands(folders: dict[str, Path]) -> None:
    with worker(folders["flux"], ParallelConfig()) as one:
        with pytest.raises(ValueError, match="max_sequence_length"):
            one.execute(Prepare(ids=("a",), requests=(request(max_sequence_length=5000),)))
        one.execute(Prepare(ids=("b", "c"), requests=(request(), request(seed=1))))
        with (
            patch.object(one.model.pipe.transformer, "forward", side_effect=MemoryError("no room")),
            pytest.raises(MemoryError, match="no room"),
        ):
            one.execute(Step(ids=("b",)))
        one.execute(Drop(ids=("b",)))
        one.execute(Step(ids=("c",)))  # the other goes on
        one.execute(Drop(ids=("c",)))
    assert calls_in_flight() == []


@pytest.mark.matrix
def test_calls_are_all_finished_on_every_rank(folders: dict[str, Path]) -> None:
    assert run_ranks(count_calls, 3, folders["flux2_klein"]) == [0, 0, 0]


def count_calls(rank: int, size: int, folder: Path) -> int:
    with worker(folder, ParallelConfig.model_validate({"usp": 3, "vae-pp": 2}), rank) as one:
        one.execute(Prepare(ids=("a", "b"), requests=(request(), request(seed=1, num_inference_steps=1))))
        one.execute(Step(ids=("b",)))
        one.decode(Decode(ids=("b",)))
        one.execute(Drop(ids=("a", "b")))
        return len(calls_in_flight())


# ---- faults ----------------------------------------------------------------------------------------------------------


@contextmanager
def branches_are_not_exchanged() -> Iterator[None]:
    def forget(self: guidance.BranchCalls) -> None:
        self._calls.clear()

    with patch.object(guidance.BranchCalls, "_exchange", forget):
        yield


@pytest.mark.parametrize("name", ["flux", "flux2_klein"])
def test_a_placeholder_that_is_not_filled_is_told(name: str, folders: dict[str, Path]) -> None:
    with pytest.raises(RankError, match="used a guidance branch before it asked for the other"):
        run_ranks(run_cells, 2, {name: folders[name]}, [{"cfg": 2}], branches_are_not_exchanged, TEXT_TO_IMAGE)


# ---- at the start ----------------------------------------------------------------------------------------------------


def test_a_kernel_is_used_or_refused(folders: dict[str, Path]) -> None:
    """With a sequence plan and without."""
    for name in ("flux", "flux2_klein"):
        with worker(folders[name], ParallelConfig(), attention_backend="_native_math") as one:
            modules = one.model.pipe.transformer.modules()
            assert {x.processor._attention_backend for x in modules if hasattr(x, "processor")} == {"_native_math"}
    for name in ("aura_flow", "pixart_sigma"):
        with (
            pytest.raises(ConfigError, match=r"_native_math: \w+ attends with a kernel of its own; leave it at auto"),
            worker(folders[name], ParallelConfig(), attention_backend="_native_math"),
        ):
            pass


def test_a_vae_without_a_plan_decodes_on_one_rank(tmp_path: Path) -> None:
    folder = tiny.sana(tmp_path / "sana")
    assert "has no plan for vae parallelism; it has: cfg" in refusal({"cfg": 2, "vae-pp": 2}, folder)
    with (
        pytest.raises(ConfigError, match="the tiles of AutoencoderDC are not known"),
        worker(folder, ParallelConfig(vae_use_tiling=True)),
    ):
        pass
    wanted = request("a cat", width=128, height=96, num_inference_steps=2)
    with worker(folder, ParallelConfig()) as one:
        whole = generate(one, [wanted])
    picture = whole["0"][1]
    assert picture is not None and torch.equal(picture, run_other(stock_pipeline(SanaPipeline, folder), wanted, "pt"))
    outputs = run_ranks(one_request, 2, folder, {"cfg": 2}, wanted)
    assert difference(outputs[0], whole) <= TOLERANCE and outputs[1]["0"][1] is None


def test_variants_of_weights_are_loaded(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tiny.renamed(folders["flux"], tmp_path / "x", "FluxPipeline")
    files = [*folder.glob("*/model.safetensors"), *folder.glob("*/diffusion_pytorch_model.safetensors")]
    for file in files:
        file.rename(file.with_suffix(".fp16.safetensors"))
    assert len(files) == 4
    with worker(folder, ParallelConfig()) as variant, worker(folders["flux"], ParallelConfig()) as plain:
        assert difference(generate(variant, [request()]), generate(plain, [request()])) == 0


def test_a_vae_may_be_asked_to_compute_in_another_dtype(folders: dict[str, Path]) -> None:
    """AuraFlow decodes in float32 whatever it computes in."""
    with worker(folders["aura_flow"], ParallelConfig()) as one:
        assert one.model.pipe.vae.to(torch.float64) is one.model.pipe.vae
        assert one.model.pipe.vae.dtype == torch.float64


def test_what_shows_no_previews_is_not_asked_for_them(folders: dict[str, Path]) -> None:
    capabilities = Checkpoint.open(str(folders["aura_flow"])).capabilities
    with pytest.raises(RequestError, match="AuraFlowPipeline shows no previews"):
        GenerationRequest.read({"prompt": "a cat", "stream": True, "partial_images": 1}).resolve(
            capabilities, Pictures()
        )
    with worker(folders["aura_flow"], ParallelConfig()) as one:
        one.execute(Prepare(ids=("a",), requests=(request(),)))
        with pytest.raises(RuntimeError, match="there are no previews"):
            one.decode(Decode(ids=("a",), preview=0))
        one.execute(Drop(ids=("a",)))


def test_the_whole_engine_runs_one(folders: dict[str, Path]) -> None:
    params = SamplingParams(width=64, height=48, num_inference_steps=2, seed=3, guidance_scale=2.0)
    with Darkroom(str(folders["flux2_klein"]), device="cpu", dtype="float32") as darkroom:
        [picture] = darkroom.generate("a cat", params)
    wanted = request("a cat", width=64, height=48, num_inference_steps=2, seed=3, guidance_scale=2.0)
    wanted = Request(**{**{f: getattr(wanted, f) for f in wanted.__struct_fields__}, "max_sequence_length": 512})
    stock = stock_pipeline(Flux2KleinPipeline, folders["flux2_klein"])
    assert np.array_equal(np.asarray(picture), np.asarray(run_other(stock, wanted, "pil")[0]))
