from __future__ import annotations

from darkroom.engine.messages import Finished, Progress
from darkroom.server.trail import Trail, stages


def test_pictures_are_remembered_without_their_bytes() -> None:
    trail = Trail("req_1")
    trail.add(Progress(id="a", step=1, num_steps=2, seconds=1.0, batch_size=1))
    for id in "ab":
        trail.add(
            Finished(
                id=id, files=(b"x" * 1000,), seed=1, text_tokens=2, image_tokens=3, stages={"queue": 1, "decode": 2}
            )
        )
    assert [(picture.id, picture.files, picture.image_tokens) for _, picture in trail.made] == [
        ("a", (), 3),
        ("b", (), 3),
    ]
    assert stages(trail.made) == {"queue": 2, "decode": 4}
