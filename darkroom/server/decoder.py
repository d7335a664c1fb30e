"""Whether a picture is whole: it is decoded in a process of its own, which can be neither large nor slow for long.

A video is made long after it was asked for, so that a file that is broken is to be found at once. What a decoder does
with a hostile file is then nobody's trouble but that process's.
"""

from __future__ import annotations

import asyncio
import resource
import sys

from darkroom.configs.errors import RequestError
from darkroom.configs.pictures import load_picture

_SECONDS = 20
_MEMORY = 2 * 1024**3
"""Bytes of addresses. The largest picture that is let in takes half of them."""
_AT_ONCE = 2


class Decoder:
    def __init__(self) -> None:
        self._places = asyncio.Semaphore(_AT_ONCE)

    async def check_whole(self, data: bytes, param: str) -> None:
        """Raises `RequestError` for a picture that cannot be decoded."""
        async with self._places:
            is_whole = await _can_decode(data)
        if not is_whole:
            raise RequestError(f"'{param}' cannot be decoded: the file is broken.", param=param)


async def _can_decode(data: bytes) -> bool:
    command = (sys.executable, "-P", "-m", "darkroom.server.decoder")  # -P: no code from the current folder
    quiet = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.PIPE, stdout=quiet, stderr=quiet)
    try:
        async with asyncio.timeout(_SECONDS):
            await process.communicate(data)
    except TimeoutError:
        return False
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode == 0


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
    load_picture(sys.stdin.buffer.read())


if __name__ == "__main__":
    main()
