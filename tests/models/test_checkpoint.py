"""MODEL as a folder. The hub itself is tests/models/test_hub.py's."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from darkroom.configs import ConfigError, EngineConfig, ParallelConfig
from darkroom.models import FAMILIES, MODELS, QwenImage
from darkroom.models.checkpoint import DEMO, Checkpoint, open_checkpoint
from tests import tiny
from tests.golden import worker
from tests.matrix import refusal
from tests.ranks import run_ranks
from tests.subjects import SUBJECTS


def config(model: Path | str = "demo", **values: Any) -> EngineConfig:
    return EngineConfig.check({"model": str(model), **values})


def error(model: Path | str = "demo", **values: Any) -> str:
    """What the operator is told: one line."""
    with pytest.raises(ConfigError) as caught:
        open_checkpoint(config(model, **values)).footprint(config(model, **values), "float32")
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def folder(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    """A tiny checkpoint to spoil."""
    return Path(shutil.copytree(checkpoints["qwen_image_4_heads"], tmp_path / "model"))


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**(json.loads(file.read_text()) if file.exists() else {}), **values}))


# ---- which folder --------------------------------------------------------------------------------------------------


def test_the_demo_is_shipped() -> None:
    checkpoint = Checkpoint.open("demo")
    assert (checkpoint.folder, checkpoint.family) == (DEMO, QwenImage)
    assert checkpoint.capabilities.default_size == (128, 128)


def test_a_folder_in_the_diffusers_layout(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Checkpoint.open(str(folder)).capabilities == QwenImage.capabilities
    monkeypatch.chdir(folder.parent)
    assert Checkpoint.open("model").folder == Checkpoint.open("./model/").folder == Path("model")
    monkeypatch.setenv("HOME", str(folder.parent))
    assert Checkpoint.open("~/model").folder == folder


def test_the_engine_is_given_the_folder_that_was_checked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    pinned = open_checkpoint(config("model", usp=2)).pin(config("model", usp=2, revision="main"))
    assert pinned == config(folder, usp=2)


@pytest.mark.parametrize("model", ["nothing", "./nothing", "/nothing/here", "a/b/c", "~nobody/model", "x" * 5000, "\0"])
def test_an_unknown_folder(model: str) -> None:
    assert "is no folder, and no hub id such as Qwen/Qwen-Image; 'demo' always works" in error(model)


def test_a_file_is_no_folder(folder: Path) -> None:
    assert "is no folder" in error(folder / "model_index.json")


@pytest.mark.parametrize("model", ["a b/c", "-a/b", "a/" + "b" * 200])
def test_what_cannot_be_a_hub_id(model: str) -> None:
    assert f"'{model}' is no folder here, and the hub did not give it: Repo id must" in error(model)


# ---- what is in it -------------------------------------------------------------------------------------------------


def without(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return spoil


def with_text(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def with_values(name: str, **values: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / name, **values)


TRANSFORMER = "transformer/config.json"
KNOWN = ", ".join(sorted(MODELS))


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (without("model_index.json"), "is no diffusers pipeline: model/model_index.json is missing"),
        (with_text("model_index.json", "{"), "model/model_index.json is not JSON: "),
        (with_text("model_index.json", "[]"), "model/model_index.json holds no JSON object"),
        (with_text("model_index.json", "{}"), "is a None, which no model family runs, and it does not run as any"),
        (with_text("model_index.json", "{}"), f"does: it is no pipeline of diffusers; families: {KNOWN}"),
        (with_values("model_index.json", _class_name="DiTPipeline"), "is a DiTPipeline, which no model family runs"),
        (with_values("model_index.json", _class_name=["a"]), "which no model family runs"),
        (with_values("model_index.json", extra=["diffusers", "X"]), "is incomplete: the folder extra/ is missing"),
        (without("transformer"), "is incomplete: the folder transformer/ is missing"),
        (without("vae"), "is incomplete: the folder vae/ is missing"),
        (without("text_encoder"), "is incomplete: the folder text_encoder/ is missing"),
        (without("tokenizer"), "is incomplete: the folder tokenizer/ is missing"),
        (without("scheduler"), "is incomplete: the folder scheduler/ is missing"),
        (without("scheduler/scheduler_config.json"), "is incomplete: scheduler/scheduler_config.json is missing"),
        (without("tokenizer/tokenizer.json"), "is incomplete: tokenizer/tokenizer.json is missing"),
        (without(TRANSFORMER), "'model' is incomplete: transformer/config.json is missing"),
        (without("vae/config.json"), "'model' is incomplete: vae/config.json is missing"),
        (with_text(TRANSFORMER, "?"), "transformer/config.json is not JSON: "),
        (with_text(TRANSFORMER, "{}"), "transformer/config.json has no number 'num_attention_heads'"),
        (with_values(TRANSFORMER, num_attention_heads="four"), "has no number 'num_attention_heads'"),
        (with_values(TRANSFORMER, num_attention_heads=0), "has no number 'num_attention_heads'"),
        (with_values("text_encoder/config.json", text_config={}), "text_encoder/config.json has no number"),
        (without("transformer/diffusion_pytorch_model.safetensors"), "'transformer' holds no safetensors file"),
        (with_text("vae/diffusion_pytorch_model.safetensors", "no header"), "vae/diffusion_pytorch_model.safetensors"),
    ],
)
def test_what_is_wrong_with_a_folder_is_named(spoil: Callable[[Path], None], expected: str, folder: Path) -> None:
    spoil(folder)
    assert expected in error(folder)


def test_an_optional_component_may_be_left_out(folder: Path) -> None:
    edit(folder / "model_index.json", image_encoder=[None, None], requires_safety_checker=False)
    open_checkpoint(config(folder))


def test_a_part_that_a_family_may_do_without(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints["wan_2_2"], tmp_path / "model"))
    whole = Checkpoint.open(str(folder))
    [everything] = whole.footprint(ParallelConfig(), "float32")
    assert not whole.absent and everything.keys() == whole.family.components.keys()
    (folder / "transformer_2").rename(tmp_path / "elsewhere")
    assert error(folder) == f"'{folder}' is incomplete: the folder transformer_2/ is missing"
    edit(folder / "model_index.json", transformer_2=[None, None])
    assert error(folder) == "model_index.json names no transformer_2, and its boundary_ratio of 0.875 needs one"
    edit(folder / "model_index.json", boundary_ratio=None)
    less = Checkpoint.open(str(folder))
    assert less.absent == {"transformer_2"}
    assert less.footprint(ParallelConfig(), "float32") == [
        {k: v for k, v in everything.items() if k != "transformer_2"}
    ]


def test_heads_of_every_transformer_are_counted(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints["wan_2_2"], tmp_path / "model"))
    edit(folder / "transformer_2" / "config.json", num_attention_heads=2)
    assert "and the transformer_2 has 2; use a product of at most 2" in error(folder, usp=4)


# ---- darkroom.json -------------------------------------------------------------------------------------------------


def test_capabilities_may_be_overridden(folder: Path) -> None:
    edit(folder / "darkroom.json", family="Mine", default_size=[512, 256], num_inference_steps=8)
    capabilities = Checkpoint.open(str(folder)).capabilities
    assert (capabilities.family, capabilities.default_size, capabilities.num_inference_steps) == ("Mine", (512, 256), 8)
    assert capabilities.max_pixels == QwenImage.capabilities.max_pixels


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"nope": 1}', "darkroom.json: 'nope': Extra inputs are not permitted"),
        ('{"default_size": [1]}', "darkroom.json: 'default_size': "),
        ('{"max_pixels": "many"}', "darkroom.json: 'max_pixels': Input should be a valid integer"),
        ("[]", "darkroom.json holds no JSON object"),
        ("{", "darkroom.json is not JSON"),
        ('{"family": "\xff', "darkroom.json is not JSON"),
    ],
)
def test_a_bad_override_is_named(text: str, expected: str, folder: Path) -> None:
    (folder / "darkroom.json").write_bytes(text.encode("latin-1"))
    assert expected in error(folder)


# ---- how it can be spread ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [{"tp": 4}, {"usp": 4}, {"usp": 2, "tp": 2, "ring": 3}, {"tp": 3}, {"cfg": 2, "ring": 8}, {"vae-pp": 64}],
)
def test_degrees_that_fit(values: dict[str, int], checkpoints: dict[str, Path]) -> None:
    open_checkpoint(config(checkpoints["qwen_image_4_heads"], **values))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"tp": 5}, "--tp 5 --usp 1: 5 ranks share the heads, and the transformer has 4; use a product of at most 4"),
        ({"usp": 8}, "--tp 1 --usp 8: 8 ranks share the heads"),
        ({"usp": 2, "tp": 3}, "--tp 3 --usp 2: 6 ranks share the heads"),
        ({"cfg": 3}, "--cfg 3: Qwen-Image has 2 guidance branches; use --cfg 1 or --cfg 2"),
        ({"ring": 2, "attention_backend": "native"}, "--attention-backend native with --ring 2"),
    ],
)
def test_degrees_that_do_not_fit(values: dict[str, Any], expected: str, checkpoints: dict[str, Path]) -> None:
    assert expected in error(checkpoints["qwen_image_4_heads"], **values)


@pytest.mark.parametrize("values", [{"ring": 2}, {"vae-pp": 2}, {"usp": 2}])
def test_an_axis_without_a_plan(values: dict[str, int], folder: Path) -> None:
    edit(folder / "darkroom.json", axes=["cfg", "tp"])
    assert "Qwen-Image has no plan for" in error(folder, **values)
    assert "it has: cfg, tp" in error(folder, **values)
    open_checkpoint(config(folder, tp=2, cfg=2))


# ---- what each rank holds ------------------------------------------------------------------------------------------

LAYOUTS: dict[int, list[dict[str, int]]] = {
    1: [{}],
    2: [{"tp": 2}, {"usp": 2, "vae-pp": 2}],
    4: [{"tp": 4}, {"tp": 2, "cfg": 2, "vae-pp": 3}],
}


def held(rank: int, size: int, folders: list[Path]) -> list[dict[str, int]]:
    """Bytes of weights of every component that this rank has loaded, for each checkpoint and layout."""
    results = []
    for folder, layouts in folders:
        for layout in layouts:
            with worker(folder, ParallelConfig.model_validate(layout), rank) as one:
                modules = {name: getattr(one.model.pipe, name) for name in one.model.components}
                modules["vae"] = one.model.vae
                results.append({name: size_of(module) for name, module in modules.items() if module is not None})
    return results


def size_of(module: torch.nn.Module) -> int:
    tensors = {x.data_ptr(): x for x in module.state_dict().values() if not x.is_meta}  # tied ones have two names
    return sum(x.numel() * (x.element_size() if x.is_floating_point() else 4) for x in tensors.values())  # or a counter


@pytest.mark.parametrize(
    "size", [pytest.param(size, marks=[pytest.mark.matrix] if size > 2 else []) for size in LAYOUTS]
)
def test_the_footprint_is_what_each_rank_holds(size: int, checkpoints: dict[str, Path], whole_matrix: bool) -> None:
    """Of each family, and in the whole matrix of all variants."""
    firsts = [f"{name}_{next(iter(one.variants))}" for name, one in SUBJECTS.items()]
    chosen = [checkpoints[name] for name in (checkpoints if whole_matrix else firsts)]
    folders = [(folder, [layout for layout in LAYOUTS[size] if not refusal(layout, folder)]) for folder in chosen]
    expected = [
        Checkpoint.open(str(folder)).footprint(ParallelConfig.model_validate(layout), "float32")
        for folder, layouts in folders
        for layout in layouts
    ]
    for rank, cases in enumerate(run_ranks(held, size, folders)):
        assert cases == [ranks[rank] for ranks in expected]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["wan_2_1_4_heads", "sd3_4_heads"])
def test_the_footprint_counts_what_stays_in_fp32(name: str, dtype: str, checkpoints: dict[str, Path]) -> None:
    [expected] = Checkpoint.open(str(checkpoints[name])).footprint(ParallelConfig(), dtype)
    with worker(checkpoints[name], ParallelConfig(), dtype=dtype) as one:
        modules = {name: getattr(one.model.pipe, name) for name in expected} | {"vae": one.model.vae}
        assert {name: size_of(module) for name, module in modules.items()} == expected


def test_families_name_what_their_classes_keep_in_fp32() -> None:
    for component in {id(x): x for family in FAMILIES for x in family.components.values()}.values():
        cls = getattr(importlib.import_module(component.module), component.name)
        assert tuple(cls._keep_in_fp32_modules or ()) == component.exact


def test_the_footprint_follows_the_dtype() -> None:
    checkpoint = Checkpoint.open("demo")
    [full], [half] = (checkpoint.footprint(ParallelConfig(), dtype) for dtype in ("float32", "bfloat16"))
    assert {name: size // 2 for name, size in full.items()} == half


# ---- sharded files -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.qwen_image(tmp_path_factory.mktemp("sharded") / "model", shard_size="200KB")


def test_a_sharded_checkpoint_is_the_same_model(sharded: Path, checkpoints: dict[str, Path]) -> None:
    assert len(list((sharded / "transformer").glob("*.safetensors"))) > 2
    one, other = Checkpoint.open(str(sharded)), Checkpoint.open(str(checkpoints["qwen_image_4_heads"]))
    layout = ParallelConfig(tensor_parallel_size=2)
    assert one.footprint(layout, "float32") == other.footprint(layout, "float32")
    with worker(sharded, ParallelConfig()) as a, worker(checkpoints["qwen_image_4_heads"], ParallelConfig()) as b:
        for name in a.model.components:
            states = [getattr(w.model.pipe, name).state_dict() for w in (a, b)]
            assert states[0].keys() == states[1].keys()
            assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_missing_shard_is_named(sharded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "model"))
    shard = sorted((folder / "transformer").glob("*.safetensors"))[1]
    shard.unlink()
    assert f"'transformer' lacks {shard.name}, which its index names" in error(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 1}'])
def test_an_index_that_is_none_is_named(text: str, sharded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "model"))
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(text)
    assert f"transformer/{index.name} is no index of weights" in error(folder)


# ---- the hub's cache, without the hub ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two commits of one repository, as huggingface_hub lays them out."""
    cache = tmp_path_factory.mktemp("hub")
    repository = cache / "models--someone--tiny"
    for branch, heads, commit in (
        ("main", "qwen_image_4_heads", "a" * 40),
        ("five", "qwen_image_5_heads", "b" * 40),
    ):
        shutil.copytree(checkpoints[heads], repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
    return cache


def check(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "darkroom", "check", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("revision", "heads"),
    [([], 4), (["--revision", "main"], 4), (["--revision", "five"], 5), (["--revision", "b" * 40], 5)],
)
def test_a_hub_id_is_found_in_the_cache(revision: list[str], heads: int, cache: Path) -> None:
    checked = check(cache, "someone/tiny", *revision, "--tp", str(heads + 1))
    assert checked.returncode == 2
    assert f"the transformer has {heads}" in checked.stderr


@pytest.mark.parametrize("arguments", [("someone/other",), ("someone/tiny", "--revision", "six")])
def test_what_is_not_in_the_cache_gets_one_line(arguments: tuple[str, ...], cache: Path) -> None:
    checked = check(cache, *arguments)
    assert checked.returncode == 2
    assert f"'{arguments[0]}' is no folder here, and the hub did not give it" in checked.stderr
    assert checked.stderr.count("\n") == 1


def test_a_corrupt_file_of_a_snapshot_is_told_and_not_read_from_the_hub_instead(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(DEMO, tmp_path / ("0" * 40)))
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    snapshot = replace(Checkpoint.open(str(folder)), repository="someone/tiny")
    with pytest.raises(ConfigError, match=r"diffusion_pytorch_model\.safetensors"):
        snapshot.tensors("vae")
