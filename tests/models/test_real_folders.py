"""Folders as the hubs hold them: other names, other formats, older configs. Each must load to the same model."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from darkroom.configs import ConfigError, EngineConfig, ParallelConfig
from darkroom.models.checkpoint import open_checkpoint
from tests.golden import generate, worker
from tests.subjects import SUBJECTS

Change = Callable[[Path], None]
"""Turns a tiny checkpoint into another layout of the same model."""

FAMILIES = ("qwen_image", "z_image")
"""Tried in all changes."""
OTHERS = ("sd3", "wan", "wan_image_to_video", "longcat_image_edit")
"""Those with other tokenizers and encoders: tried in the changes of these."""


def latents(folder: Path, name: str) -> torch.Tensor:
    with worker(folder, ParallelConfig()) as one:
        return generate(one, SUBJECTS[name].kinds["one branch"].requests)["0"][0]


@pytest.fixture(scope="module")
def expected(checkpoints: dict[str, Path]) -> dict[str, torch.Tensor]:
    return {name: latents(first(name, checkpoints), name) for name in (*FAMILIES, *OTHERS)}


def first(name: str, checkpoints: dict[str, Path]) -> Path:
    return checkpoints[f"{name}_{next(iter(SUBJECTS[name].variants))}"]


def copy(name: str, checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(first(name, checkpoints), tmp_path / "model"))


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.safetensors"))


# ---- tokenizers ------------------------------------------------------------------------------------------------------


def fast_names(folder: Path) -> None:
    """And names that are not fast, where those are."""
    index = json.loads((folder / "model_index.json").read_text())
    for tokenizer in folder.glob("tokenizer*"):
        name = index[tokenizer.name][1]
        other = name.removesuffix("Fast") if name.endswith("Fast") else f"{name}Fast"
        edit(folder / "model_index.json", **{tokenizer.name: ["transformers", other]})
        edit(tokenizer / "tokenizer_config.json", tokenizer_class=other)


def saved_anew(folder: Path) -> None:
    """By transformers 5, in one file."""
    for tokenizer in folder.glob("tokenizer*"):
        loaded = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
        shutil.rmtree(tokenizer)
        loaded.save_pretrained(tokenizer)
        assert (tokenizer / "tokenizer.json").is_file()


def vocabulary_and_merges(folder: Path) -> None:
    """As transformers 4 wrote tokenizers that are not fast ones."""
    for name in ("tokenizer", "text_processor"):
        if (folder / name).is_dir():
            take_apart(folder / name)


def take_apart(tokenizer: Path) -> None:
    saved = json.loads((tokenizer / "tokenizer.json").read_text())
    (tokenizer / "tokenizer.json").unlink()
    (tokenizer / "vocab.json").write_text(json.dumps(saved["model"]["vocab"]))
    merges = [" ".join(merge) for merge in saved["model"]["merges"]]
    (tokenizer / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    config["additional_special_tokens"] = config.pop("extra_special_tokens")
    config["added_tokens_decoder"] = {str(token.pop("id")): token for token in saved["added_tokens"]}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({**config, "backend": None}))


# ---- weights ---------------------------------------------------------------------------------------------------------


def variants(folder: Path) -> None:
    for file in weights(folder):
        file.rename(file.with_suffix(".fp16.safetensors"))


def two_variants(folder: Path) -> None:
    for file in weights(folder):
        spoiled(file, file.with_suffix(".fp16.safetensors"))
        file.rename(file.with_suffix(".bf16.safetensors"))


def spoiled(file: Path, copy: Path) -> None:
    """Of the right shapes, and no right numbers."""
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, copy)


def plain_and_variant(folder: Path) -> None:
    for file in weights(folder):
        spoiled(file, file.with_suffix(".fp16.safetensors"))


def shards(pattern: str, index: str) -> Change:
    """Files in three, by names such as `{stem}-{shard}.safetensors`."""

    def change(folder: Path) -> None:
        for file in weights(folder):
            split(file, pattern, index)
            file.unlink()

    return change


def split(file: Path, pattern: str, index: str) -> None:
    tensors, total = load_file(file), 3
    names = sorted(tensors)
    where = {}
    for i in range(total):
        part = pattern.format(stem=file.stem, shard=f"{i + 1:05}-of-{total:05}")
        where.update(dict.fromkeys(names[i::total], part))
        save_file({name: tensors[name] for name in names[i::total]}, file.with_name(part))
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": where})
    file.with_name(index.format(stem=file.stem)).write_text(text)


def plain_and_sharded_variant(folder: Path) -> None:
    for file in weights(folder):
        whole = load_file(file)
        spoiled(file, file)
        split(file, "{stem}.fp16-{shard}.safetensors", "{stem}.safetensors.index.fp16.json")
        save_file(whole, file)


def sharded_and_variant(folder: Path) -> None:
    for file in weights(folder):
        split(file, "{stem}-{shard}.safetensors", "{stem}.safetensors.index.json")
        spoiled(file, file.with_suffix(".fp16.safetensors"))
        file.unlink()


# ---- configs ---------------------------------------------------------------------------------------------------------


def as_transformers_4(folder: Path) -> None:
    """Encoders as transformers 4 wrote them."""
    for encoder in folder.glob("*_encoder*"):
        is_decoder = "rope_theta" in (encoder / "config.json").read_text()
        (as_older_decoder if is_decoder else as_older_encoder)(encoder)


def as_older_encoder(encoder: Path) -> None:
    """T5's and CLIP's: what is counted is stored, a table has two names, and pictures' layers a model of their own."""
    config = json.loads((encoder / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    (encoder / "config.json").write_text(json.dumps({**config, "transformers_version": "4.30.0"}))
    file = encoder / "model.safetensors"
    tensors = load_file(file)
    match config["model_type"]:
        case "clip_vision_model":
            tensors = {f"vision_model.{key.removeprefix('vision_model.')}": x for key, x in tensors.items()}
            tensors["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
        case "clip_text_model":
            tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        case _:
            tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
    save_file(tensors, file)


def as_older_decoder(encoder: Path) -> None:
    """The class with logits, a flat config, positions by older names."""
    config = json.loads((encoder / "config.json").read_text())
    text = config.pop("text_config", {})
    rope = (text or config).pop("rope_parameters")
    for key in ("dtype", "layer_types", "transformers_version"):
        text.pop(key, None), config.pop(key, None)
    flat = {**text, **config, "rope_theta": rope["rope_theta"], "torch_dtype": "bfloat16"}
    flat["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]} if text else None
    flat["transformers_version"] = "4.41.2"
    (encoder / "config.json").write_text(json.dumps(flat))
    file = encoder / "model.safetensors"
    save_file({older(key): tensor for key, tensor in load_file(file).items()}, file)


def older(key: str) -> str:
    key = key.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
    return key if key.startswith(("model.", "visual.", "lm_head.")) else f"model.{key}"


def other_keys(folder: Path) -> None:
    """What other versions of diffusers wrote, or people did."""
    for part in ("transformer", "vae"):
        edit(folder / part / "config.json", _name_or_path="../x", _diffusers_version="0.35.0.dev0", not_any_more=[1])
    edit(folder / "scheduler" / "scheduler_config.json", not_any_more=True, _diffusers_version="0.30.0")
    edit(folder / "model_index.json", _diffusers_version="0.30.0", _name_or_path="x/y", image_encoder=[None, None])


def computed_tensors(folder: Path) -> None:
    """Which older versions saved with the weights."""
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    prefix = next(key for key in tensors if "layers.0." in key).partition("layers.0.")[0]
    tensors[f"{prefix}rotary_emb.inv_freq"] = torch.ones(8)
    tensors[f"{prefix}layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tensors[f"{prefix}embeddings.position_ids"] = torch.arange(8)
    save_file(tensors, file)


CHANGES = {
    "fast names": fast_names,
    "saved anew": saved_anew,
    "vocabulary and merges": vocabulary_and_merges,
    "variants": variants,
    "two variants": two_variants,
    "plain and variant": plain_and_variant,
    "shards": shards("{stem}-{shard}.safetensors", "{stem}.safetensors.index.json"),
    "sharded variant": shards("{stem}.fp16-{shard}.safetensors", "{stem}.safetensors.index.fp16.json"),
    "older sharded variant": shards("{stem}-{shard}.fp16.safetensors", "{stem}.safetensors.index.fp16.json"),
    "plain and sharded variant": plain_and_sharded_variant,
    "sharded and variant": sharded_and_variant,
    "transformers 4": as_transformers_4,
    "other keys": other_keys,
    "computed tensors": computed_tensors,
}


OF_ENCODERS = ("fast names", "saved anew", "vocabulary and merges", "sharded variant", "transformers 4")


def has(change: str, name: str) -> bool:
    """Only tokenizers of Qwen2's kind are taken apart: CLIP's lie so from the start, and T5's are of another kind."""
    return change != "vocabulary and merges" or name == "longcat_image_edit"


@pytest.mark.parametrize(
    ("change", "name"),
    [
        *((change, name) for change in CHANGES for name in FAMILIES),
        *((change, name) for change in OF_ENCODERS for name in OTHERS if has(change, name)),
    ],
)
def test_a_folder_loads_to_the_same_model(
    change: str, name: str, checkpoints: dict[str, Path], expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    folder = copy(name, checkpoints, tmp_path)
    CHANGES[change](folder)
    assert torch.equal(latents(folder, name), expected[name])


def test_other_weights_are_seen(
    checkpoints: dict[str, Path], expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    folder = copy("z_image", checkpoints, tmp_path)
    spoiled(folder / "transformer" / "diffusion_pytorch_model.safetensors", folder / "other.safetensors")
    (folder / "other.safetensors").replace(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert not torch.equal(latents(folder, "z_image"), expected["z_image"])


# ---- weights of another model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "values", "told"),
    [
        (
            "transformer",
            {"num_layers": 1},
            r"QwenImageTransformer2DModel has no 'transformer_blocks\.1\..+ \(\d\d such\)",
        ),
        ("text_encoder", {"num_hidden_layers": 1}, r"Qwen2_5_VLTextModel has no 'layers\.1\..+ \(24 such\)"),
        ("transformer", {"num_layers": 3}, r"the checkpoint has no 'transformer_blocks\.2\."),
    ],
)
def test_a_config_that_is_not_of_the_weights_is_refused(
    part: str, values: dict[str, int], told: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = copy("qwen_image", checkpoints, tmp_path)
    file = folder / part / "config.json"
    config = json.loads(file.read_text())
    config.get("text_config", config).update(values)
    config.get("text_config", config).pop("layer_types", None)
    file.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=told):
        latents(folder, "qwen_image")


# ---- the hub's cache -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two commits of one repository, as the hub's client lays them out: links to blobs that commits share."""
    cache = tmp_path_factory.mktemp("hub")
    repository = cache / "models--someone--tiny"
    for branch, commit, name in (("main", "a" * 40, "qwen_image"), ("other", "b" * 40, "z_image")):
        lay_out(checkpoints[f"{name}_4_heads"], repository, commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
    return cache


def lay_out(folder: Path, repository: Path, commit: str) -> None:
    (repository / "blobs").mkdir(parents=True, exist_ok=True)
    for file in (path for path in folder.rglob("*") if path.is_file()):
        data = file.read_bytes()
        blob = repository / "blobs" / sha256(data).hexdigest()
        blob.write_bytes(data)
        link = repository / "snapshots" / commit / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path("../" * (len(link.relative_to(repository).parts) - 1)) / "blobs" / blob.name)


@pytest.mark.parametrize(
    ("revision", "name"),
    [
        (None, "qwen_image"),
        ("main", "qwen_image"),
        ("other", "z_image"),
        ("a" * 40, "qwen_image"),
        ("b" * 40, "z_image"),
    ],
)
def test_the_cache_serves_a_hub_id_without_a_network(
    revision: str | None, name: str, cache: Path, expected: dict[str, torch.Tensor]
) -> None:
    assert constants.HF_HUB_OFFLINE
    config = EngineConfig.check({"model": "someone/tiny", "revision": revision})
    with patch.object(constants, "HF_HUB_CACHE", str(cache)):
        pinned = open_checkpoint(config).pin(config)
        assert re.fullmatch("[ab]{40}", Path(pinned.model).name)
        assert torch.equal(latents(Path(pinned.model), name), expected[name])
