"""Which pipelines run without a family file, which do not and why."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny
from tests.matrix import refusal


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.flux(tmp_path_factory.mktemp("stock") / "flux")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("NoPipeline", "is no pipeline of diffusers"),
        ("StableDiffusionPipeline", "it has no transformer"),
        ("DiTPipeline", "its call takes no prompt and no height and no width"),
        ("LTX2Pipeline", "it makes sound with its videos ('audio_vae'), which no answer has a place for"),
        ("FluxControlPipeline", "it draws by a 'control_image', which no request brings"),
        ("JoyImageEditPlusPipeline", "its call takes 'images', and it is not known what it does without"),
        ("BriaFibo2Pipeline", "its call takes 'fonts'"),
        ("FluxControlNetPipeline", "it draws by a 'control_guidance_start', which no request brings"),
        ("HunyuanDiTControlNetPipeline", "it draws by a 'control_image', which no request brings"),
        ("Cosmos2TextToImagePipeline", "it needs a 'safety_checker', which comes with no checkpoint"),
        ("HiDreamImagePipeline", "its pictures have sizes of their own"),
        ("JoyImageEditPipeline", "its pictures have sizes of their own"),
        ("Kandinsky5T2IPipeline", "its pictures have sizes of their own"),
        ("Kandinsky5I2IPipeline", "its pictures have sizes of their own"),
        ("QwenImageEditInpaintPipeline", "its pictures have sizes of their own"),
        ("FluxKontextInpaintPipeline", "its pictures have sizes of their own"),
        ("Flux2KleinInpaintPipeline", "its pictures have sizes of their own"),
    ],
)
def test_what_cannot_run_is_refused(name: str, reason: str, flux: Path, tmp_path: Path) -> None:
    assert reason in refusal({}, tiny.renamed(flux, tmp_path / "x", name))


def test_a_config_that_is_no_json_is_named(flux: Path, tmp_path: Path) -> None:
    folder = tiny.renamed(flux, tmp_path / "x", "FluxPipeline")
    (folder / "vae" / "config.json").write_text("{")
    assert "vae/config.json is not JSON" in refusal({}, folder)


def test_foreign_code_is_refused(flux: Path, tmp_path: Path) -> None:
    folder = tiny.renamed(flux, tmp_path / "x", "FluxPipeline", vae=["pipeline_mine", "MyVae"])
    assert "takes 'vae' from pipeline_mine" in refusal({}, folder)


def test_what_is_derived_needs_no_torch(flux: Path) -> None:
    code = (
        "import sys; from darkroom.models.checkpoint import Checkpoint; "
        f"Checkpoint.open({str(flux)!r}); print(sorted({{'torch', 'diffusers'}} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
