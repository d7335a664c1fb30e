"""Golden equality for Stable Diffusion 3: one process is the stock pipeline, and every layout is one process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

from darkroom.configs import ConfigError, ParallelConfig, Request
from darkroom.models.checkpoint import Checkpoint
from darkroom.models.sd3 import TRANSFORMER
from darkroom.parallel import loading, sequence
from darkroom.parallel.attention import sdpa
from darkroom.parallel.mesh import Axis
from darkroom.parallel.plan import HeadBias
from darkroom.parallel.tensor import shard
from tests import faults, tiny
from tests.golden import TOLERANCE, difference, generate, request, stock_pipeline, worker
from tests.matrix import CELLS, Cell, Expected, Fault, differences, one_process, run_cells
from tests.ranks import RankError, run_ranks

SUBSET = ("sd3_4_heads", "sd3_5_heads_large")
"""What is tried in every layout, unless pytest is given `--matrix`."""
NAMES = (*SUBSET, "sd3_5_heads", "sd3_4_heads_large")


@pytest.fixture(scope="module")
def folders(checkpoints: dict[str, Path]) -> dict[str, Path]:
    return {name: checkpoints[name] for name in NAMES}


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.fixture(scope="module")
def without_t5(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd3") / "without_t5"
    shutil.copytree(folders["sd3_4_heads"], folder, ignore=shutil.ignore_patterns("*_3"))
    edit(folder / "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])
    return folder


def run_stock(pipe: StableDiffusion3Pipeline, request: Request, output_type: str) -> Any:
    return pipe(
        request.prompt,
        negative_prompt=request.negative_prompt,
        guidance_scale=request.guidance_scale,
        width=request.width,
        height=request.height,
        num_inference_steps=request.num_inference_steps,
        max_sequence_length=request.max_sequence_length,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        output_type=output_type,
    ).images


def compare_to_stock(folder: Path, wanted: Request, **parts: Any) -> None:
    """Bit for bit without guidance; the stock pipeline batches the two branches, which rounds otherwise."""
    pipe = stock_pipeline(StableDiffusion3Pipeline, folder, **parts)
    with worker(folder, ParallelConfig()) as one:
        [(latents, decoded)] = generate(one, [wanted]).values()
        assert decoded is not None
        [picture] = one.model.pictures(decoded)
    off = float((latents - run_stock(pipe, wanted, "latent")).abs().max())
    assert off <= (TOLERANCE if wanted.guidance_scale > 1 else 0.0)
    levels = np.abs(np.asarray(picture).astype(int) - np.asarray(run_stock(pipe, wanted, "pil")[0]).astype(int))
    assert levels.max() <= (1 if wanted.guidance_scale > 1 else 0)


LONG = "three tiny yellow stars and a very large orange house " * 4  # longer than CLIP's 77 tokens
REQUESTS = {
    "square": request("a green star on a white background", guidance_scale=1.0, width=128, height=128, seed=7),
    "uneven": request("a red cat", guidance_scale=0.0, max_sequence_length=256),
    "one step": request("a cat", guidance_scale=1.0, num_inference_steps=1, max_sequence_length=512),
    "long prompt": request(LONG, guidance_scale=1.0),
    "long prompt, short window": request(LONG, guidance_scale=1.0, max_sequence_length=9),
    "guidance": request("two small blue cats", negative_prompt="red, blurry", num_inference_steps=5),
    "no negative prompt": request("a house", negative_prompt="", guidance_scale=2.5),
}


@pytest.mark.parametrize("name", ["sd3_4_heads", "sd3_4_heads_large"])
@pytest.mark.parametrize("case", REQUESTS)
def test_one_process_is_the_stock_pipeline(case: str, name: str, folders: dict[str, Path]) -> None:
    compare_to_stock(folders[name], REQUESTS[case])


@pytest.mark.parametrize("case", ["square", "guidance"])
def test_one_process_without_t5_is_the_stock_pipeline(case: str, without_t5: Path) -> None:
    checkpoint = Checkpoint.open(str(without_t5))
    assert checkpoint.absent == {"text_encoder_3", "tokenizer_3"}
    assert "text_encoder_3" not in checkpoint.footprint(ParallelConfig(), "float32")[0]
    compare_to_stock(without_t5, REQUESTS[case], text_encoder_3=None, tokenizer_3=None)


def test_what_the_index_names_must_be_there(without_t5: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(without_t5, tmp_path / "model"))
    edit(folder / "model_index.json", text_encoder_3=["transformers", "T5EncoderModel"])
    with pytest.raises(ConfigError, match="incomplete: the folder text_encoder_3/ is missing"):
        Checkpoint.open(str(folder))
    shutil.copytree(folders["sd3_4_heads"] / "text_encoder_3", folder / "text_encoder_3")
    Checkpoint.open(str(folder))
    edit(folder / "model_index.json", tokenizer_3=["transformers", "T5TokenizerFast"])
    (folder / "tokenizer_3").mkdir()
    with pytest.raises(ConfigError, match=r"incomplete: tokenizer_3/tokenizer\.json is missing"):
        Checkpoint.open(str(folder))
    edit(folder / "model_index.json", text_encoder_2=[None, None])  # no part that a checkpoint may do without
    (folder / "text_encoder_2").rename(folder / "elsewhere")
    with pytest.raises(ConfigError, match="incomplete: the folder text_encoder_2/ is missing"):
        Checkpoint.open(str(folder))


def test_one_process_without_norms_is_the_stock_pipeline(tmp_path: Path) -> None:
    compare_to_stock(tiny.sd3(tmp_path / "sd3", dual=False, qk_norm=None), REQUESTS["square"])


def test_sigmas_are_shifted_by_size_where_the_scheduler_says_so(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["sd3_4_heads"], tmp_path / "model"))
    edit(folder / "scheduler" / "scheduler_config.json", use_dynamic_shifting=True)
    compare_to_stock(folder, REQUESTS["square"])


def test_tokens_are_counted_as_the_larger_window_sees_them(folders: dict[str, Path], without_t5: Path) -> None:
    counts = []
    for folder in (folders["sd3_4_heads"], without_t5):
        with worker(folder, ParallelConfig()) as one:
            counts += [
                one.model.prepare(request(prompt, max_sequence_length=window)).text_tokens
                for prompt, window in (("red cat", 61), (LONG, 61), (LONG, 512))
            ]
    assert counts == [3, 61, 217, 4, 77, 77]  # with an end, and CLIP's with a start too


def test_a_batch_of_unequal_prompts_is_each_alone(folders: dict[str, Path]) -> None:
    both = [request("a cat"), request(LONG, seed=1), request(LONG, seed=2, max_sequence_length=9)]
    with worker(folders["sd3_4_heads"], ParallelConfig()) as one:
        assert difference(generate(one, both[:2], batched=True), generate(one, both[:2])) <= TOLERANCE
        assert difference(generate(one, both, batched=True), generate(one, both)) <= TOLERANCE


def test_a_kernel_may_be_chosen_by_name(folders: dict[str, Path]) -> None:
    """The model's own processor takes none."""
    with worker(folders["sd3_4_heads"], ParallelConfig()) as one:
        chosen = generate(one, [request()])
        transformer = one.model.pipe.transformer
        transformer.set_attention_backend("_native_math")
        assert difference(generate(one, [request()]), chosen) <= TOLERANCE
        assert len(transformer.attn_processors) == 3 + 2
        assert {processor._attention_backend for processor in transformer.attn_processors.values()} == {"_native_math"}


@pytest.mark.parametrize(
    ("values", "heads"),
    [
        ({"num_layers": 24, "num_attention_heads": 24, "dual_attention_layers": tuple(range(13))}, 6),
        ({"num_layers": 38, "num_attention_heads": 38}, 10),  # 40, two of them of zeros
    ],
)
def test_the_published_sizes_are_cut_over_four_ranks(values: dict[str, Any], heads: int) -> None:
    """3.5 medium and 3.5 large."""
    with torch.device("meta"):
        module = SD3Transformer2DModel(pooled_projection_dim=2048, qk_norm="rms_norm", **values)
    whole = sum(parameter.numel() for parameter in module.parameters())
    shard(module, TRANSFORMER, dict(module.config), Axis("tp", 4, 3))
    assert sum(parameter.numel() for parameter in module.parameters()) <= 0.28 * whole
    attending = [child for name, child in module.named_modules() if name.endswith((".attn", ".attn2"))]
    assert len(attending) == values["num_layers"] + len(values.get("dual_attention_layers", ()))
    assert all(attn.heads == heads and attn.to_q.weight.shape[0] == heads * 64 for attn in attending)


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> Expected:
    return one_process(folders)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", CELLS)
def test_every_layout_is_one_process(
    size: int, name: str, folders: dict[str, Path], expected: Expected, layouts: dict[int, list[Cell]]
) -> None:
    if size not in layouts or (layouts is not CELLS and name not in SUBSET):
        pytest.skip("in the whole matrix only: --matrix")
    worst = differences(run_ranks(run_cells, size, {name: folders[name]}, layouts[size]), expected)
    assert len(worst) >= size * len(layouts[size]) * 3
    assert {cell: value for cell, value in worst.items() if value > TOLERANCE} == {}


def test_ranks_without_t5_are_one_process(without_t5: Path) -> None:
    folders = {"without_t5": without_t5}
    worst = differences(run_ranks(run_cells, 2, folders, [{"tp": 2}]), one_process(folders))
    assert max(worst.values()) <= TOLERANCE


@contextmanager
def the_second_attention_stays_local() -> Iterator[None]:
    def attend(_self: Any, q: Any, k: Any, v: Any, *_: Any) -> torch.Tensor:
        return sdpa(q, k, v)

    with patch.object(sequence._SomeStreams, "attend", attend):
        yield


@contextmanager
def the_second_attention_joins_both_streams() -> Iterator[None]:
    with patch.object(sequence, "_streams_of", lambda *_: {}):
        yield


@contextmanager
def biases_are_those_of_the_first_heads() -> Iterator[None]:
    inner = loading.cut_parameter

    def cut(style: Any, name: str, shape: Any, config: Any, size: int, rank: int) -> Any:
        return inner(style, name, shape, config, size, 0 if isinstance(style, HeadBias) else rank)

    with patch.object(loading, "cut_parameter", cut):
        yield


EVERY = {"interleaved", "batched", "one branch"}


@pytest.mark.parametrize(
    ("fault", "cell", "kinds"),
    [
        (faults.ring_skips_a_hop, {"ring": 2}, EVERY),
        (faults.heads_come_back_in_another_order, {"usp": 2}, EVERY),
        (faults.partial_sums_are_not_reduced, {"tp": 2}, EVERY),
        (faults.branches_are_swapped, {"cfg": 2}, {"interleaved", "batched"}),
        (the_second_attention_stays_local, {"usp": 2}, EVERY),
        (the_second_attention_stays_local, {"ring": 2}, EVERY),
        (biases_are_those_of_the_first_heads, {"tp": 2}, EVERY),
    ],
)
def test_a_fault_is_seen(
    fault: Fault, cell: Cell, kinds: set[str], folders: dict[str, Path], expected: Expected
) -> None:
    one = {"sd3_4_heads": folders["sd3_4_heads"]}
    worst = differences(run_ranks(run_cells, 2, one, [cell], fault), expected)
    assert {kind for (*_, kind), value in worst.items() if value > 10 * TOLERANCE} == kinds


def test_a_second_attention_over_both_streams_is_refused(folders: dict[str, Path]) -> None:
    one = {"sd3_4_heads": folders["sd3_4_heads"]}
    with pytest.raises(RankError, match="the plan lacks a stream, or covers a module that it should not"):
        run_ranks(run_cells, 2, one, [{"usp": 2}], the_second_attention_joins_both_streams)
