"""Stable Diffusion 3 beyond what test_matrix compares: its optional parts, its published sizes, its attention."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_dispatch import attention_backend

from darkroom.configs import ConfigError, ParallelConfig, Request, RequestError, SamplingParams
from darkroom.models.checkpoint import Checkpoint
from darkroom.models.sd3 import TRANSFORMER
from darkroom.parallel import sequence
from darkroom.parallel.mesh import Axis
from darkroom.parallel.tensor import shard
from tests import tiny
from tests.golden import TOLERANCE, difference, from_stock, generate, request, stock_pipeline, worker
from tests.matrix import OneProcess, differences, run_cells
from tests.ranks import RankError, run_ranks
from tests.subjects import LONG, SD3


@pytest.fixture(scope="module")
def folders(checkpoints: dict[str, Path]) -> dict[str, Path]:
    return {variant: checkpoints[f"sd3_{variant}"] for variant in SD3.variants}


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.fixture(scope="module")
def without_t5(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd3") / "without_t5"
    shutil.copytree(folders["4_heads"], folder, ignore=shutil.ignore_patterns("*_3"))
    edit(folder / "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])
    return folder


def compare_to_stock(folder: Path, wanted: Request, **parts: Any) -> None:
    latents, levels = from_stock(folder, wanted, stock_pipeline(SD3.pipeline, folder, **parts), SD3.run_stock)
    allowed = SD3.allowed(wanted)
    assert latents <= allowed[0] and levels <= allowed[1]


@pytest.mark.parametrize("case", SD3.requests)
def test_one_process_without_dual_attention_is_the_stock_pipeline(case: str, folders: dict[str, Path]) -> None:
    compare_to_stock(folders["4_heads_large"], SD3.requests[case])


@pytest.mark.parametrize("case", ["square", "guidance"])
def test_one_process_without_t5_is_the_stock_pipeline(case: str, without_t5: Path) -> None:
    checkpoint = Checkpoint.open(str(without_t5))
    assert checkpoint.absent == {"text_encoder_3", "tokenizer_3"}
    assert "text_encoder_3" not in checkpoint.footprint(ParallelConfig(), "float32")[0]
    compare_to_stock(without_t5, SD3.requests[case], text_encoder_3=None, tokenizer_3=None)


def test_what_the_index_names_must_be_there(without_t5: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(without_t5, tmp_path / "model"))
    edit(folder / "model_index.json", text_encoder_3=["transformers", "T5EncoderModel"])
    with pytest.raises(ConfigError, match="incomplete: the folder text_encoder_3/ is missing"):
        Checkpoint.open(str(folder))
    shutil.copytree(folders["4_heads"] / "text_encoder_3", folder / "text_encoder_3")
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
    compare_to_stock(tiny.sd3(tmp_path / "sd3", dual=False, qk_norm=None), SD3.requests["square"])


def test_sigmas_are_shifted_by_size_where_the_scheduler_says_so(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["4_heads"], tmp_path / "model"))
    edit(folder / "scheduler" / "scheduler_config.json", use_dynamic_shifting=True)
    compare_to_stock(folder, SD3.requests["square"])


def test_tokens_are_counted_as_the_larger_window_sees_them(folders: dict[str, Path], without_t5: Path) -> None:
    counts = []
    for folder in (folders["4_heads"], without_t5):
        with worker(folder, ParallelConfig()) as one:
            counts += [
                one.model.prepare(request(prompt, max_sequence_length=window)).text_tokens
                for prompt, window in (("red cat", 61), (LONG, 61), (LONG, 512))
            ]
    assert counts == [3, 61, 217, 4, 77, 77]  # with an end, and CLIP's with a start too


def test_the_longest_edge_is_that_of_the_table_of_positions(folders: dict[str, Path]) -> None:
    capabilities = Checkpoint.open(str(next(iter(folders.values())))).capabilities
    assert capabilities.max_edge == 24 * 2 * 8
    with pytest.raises(RequestError, match="at most 384"):
        capabilities.resolve("a cat", SamplingParams(width=400, height=64))


def test_a_batch_of_unequal_prompts_is_each_alone(folders: dict[str, Path]) -> None:
    both = [request("a cat"), request(LONG, seed=1), request(LONG, seed=2, max_sequence_length=9)]
    with worker(folders["4_heads"], ParallelConfig()) as one:
        assert difference(generate(one, both[:2], batched=True), generate(one, both[:2])) <= TOLERANCE
        assert difference(generate(one, both, batched=True), generate(one, both)) <= TOLERANCE


def test_a_kernel_may_be_chosen_by_name(folders: dict[str, Path]) -> None:
    """The model's own processor takes none."""
    with worker(folders["4_heads"], ParallelConfig()) as one:
        chosen = generate(one, [request()])
        transformer = one.model.pipe.transformer
        with attention_backend("native"):  # it is set for every model in the process; this sets it back
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


def test_ranks_without_t5_are_one_process(without_t5: Path) -> None:
    folders = {"without_t5": without_t5}
    worst = differences(run_ranks(run_cells, 2, folders, [{"tp": 2}]), OneProcess(folders))
    assert max(worst.values()) <= TOLERANCE


@contextmanager
def the_second_attention_joins_both_streams() -> Iterator[None]:
    with patch.object(sequence, "_streams_of", lambda *_: {}):
        yield


def test_a_second_attention_over_both_streams_is_refused(folders: dict[str, Path]) -> None:
    one = {"4_heads": folders["4_heads"]}
    with pytest.raises(RankError, match="the plan lacks a stream, or covers a module that it should not"):
        run_ranks(run_cells, 2, one, [{"usp": 2}], the_second_attention_joins_both_streams)
