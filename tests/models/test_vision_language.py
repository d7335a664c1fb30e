"""Qwen2.5-VL's processor and its picture positions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import Qwen2VLProcessor

from darkroom.configs import ParallelConfig
from darkroom.configs.pictures import load_picture
from darkroom.models.vision_language import load_processor
from tests.golden import picture_file, worker


@pytest.fixture(scope="module")
def folder(checkpoints: dict[str, Path]) -> Path:
    return checkpoints["qwen_image_edit_4_heads"]


@pytest.mark.parametrize("kind", ["Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast"])
def test_a_processor_is_loaded_whichever_class_is_named(kind: str, folder: Path, tmp_path: Path) -> None:
    """There is no torchvision here, which transformers' own loading needs."""
    copied = Path(shutil.copytree(folder / "processor", tmp_path / "processor"))
    config = json.loads((copied / "preprocessor_config.json").read_text())
    (copied / "preprocessor_config.json").write_text(json.dumps({**config, "image_processor_type": kind}))
    processor = load_processor(copied)
    assert isinstance(processor, Qwen2VLProcessor)
    picture = load_picture(picture_file(112, 84))
    text = "a <|vision_start|><|image_pad|><|vision_end|> b"
    inputs = processor(text=[text], images=[picture], return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 6, 8]]
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == 6 * 8 // 4


def test_a_processor_of_transformers_5_is_loaded(folder: Path, tmp_path: Path) -> None:
    load_processor(folder / "processor").save_pretrained(tmp_path / "processor")
    assert (tmp_path / "processor" / "processor_config.json").is_file()
    assert not (tmp_path / "processor" / "preprocessor_config.json").is_file()
    size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 64}
    assert dict(load_processor(tmp_path / "processor").image_processor.size) == size


def test_pictures_have_rows_and_columns_as_positions(folder: Path) -> None:
    """What transformers computes when it is told which tokens are pictures, and not what it does else."""
    with worker(folder, ParallelConfig()) as one:
        pipe = one.model.pipe
        picture = load_picture(picture_file(112, 84))
        text = "a <|vision_start|><|image_pad|><|vision_end|> b"
        inputs = pipe.processor(text=[text], images=[picture], return_tensors="pt")
        kinds = inputs.pop("mm_token_type_ids", None)
        marked = pipe.text_encoder(**inputs).last_hidden_state
        pictures = (inputs["input_ids"] == pipe.processor.image_token_id).int()
        assert kinds is None or torch.equal(kinds.int(), pictures)
        assert torch.equal(pipe.text_encoder(**inputs, mm_token_type_ids=pictures).last_hidden_state, marked)
        pipe.text_encoder._forward_pre_hooks.clear()
        assert not torch.allclose(pipe.text_encoder(**inputs).last_hidden_state, marked, atol=1e-3)
