"""Whether a picture is whole: it is decoded in a process of its own, which can be neither large nor slow for long.

A video is made long after it was asked for, so that a file that is broken is to be found at once. What a decoder does
with a hostile file is then nobody's trouble but that process's.
"""

from __future__ import annotations

import asyncio
import resource
import signal
import sys
import tempfile

from darkroom.configs.errors import RequestError
from darkroom.configs.pictures import load_picture

from .errors import ApiError

_SECONDS = 30.0
"""In which any file has used up its time of a processor, unless the machine is busy with other things."""
_CPU_SECONDS = 10
"""The largest pictures take two."""
_MEMORY = 2 * 1024**3
"""Bytes of addresses. The largest picture that is let in takes half of them."""
_AT_ONCE = 2
_SAID = 64 * 1024
"""Bytes that the process may write to standard error."""

_BROKEN, _TOO_LARGE = 64, 65
"""Exit codes that Python does not use itself."""
_FAULTS = {
    _BROKEN: "cannot be decoded: the file is broken",
    _TOO_LARGE: "cannot be decoded: it needs too much memory",
    -signal.SIGXCPU: "cannot be decoded: it takes too long",
}
"""The file's own, by how the process ended. Another end is the machine's fault or ours."""


class Decoder:
    def __init__(self, *, seconds: float = _SECONDS, cpu_seconds: int = _CPU_SECONDS, memory: int = _MEMORY) -> None:
        self._places = asyncio.Semaphore(_AT_ONCE)
        self._seconds = seconds
        self._limits = (str(cpu_seconds), str(memory))

    async def check_whole(self, data: bytes, param: str) -> None:
        """Raises `RequestError` for a picture that cannot be decoded, `ApiError` 503 where that cannot be told now."""
        async with self._places:
            code, said = await self._decode(data)
        if code in _FAULTS:
            raise RequestError(f"'{param}' {_FAULTS[code]}.", param=param)
        if code != 0:
            raise RuntimeError(f"the decoder's process ended with {code}: {said}")

    async def _decode(self, data: bytes) -> tuple[int, str]:
        """How the process ended, and the end of what it said."""
        command = (sys.executable, "-P", "-m", __name__, *self._limits)  # -P: no code from the current folder
        with tempfile.TemporaryFile() as said:  # a pipe would take without end what a hostile file makes it say
            process = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL, stderr=said
            )
            try:
                async with asyncio.timeout(self._seconds):
                    await process.communicate(data)
            except TimeoutError:
                message = "The server is too busy to decode the picture; try again in a few seconds."
                raise ApiError(503, message, headers={"Retry-After": "10"}) from None
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
            said.seek(0)
            return await process.wait(), said.read()[-2000:].decode(errors="replace").strip()


def main(cpu_seconds: int, memory: int) -> int:
    """In the process: the exit code."""
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1))  # the second one would be SIGKILL
    resource.setrlimit(resource.RLIMIT_FSIZE, (_SAID, _SAID))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # SIGXCPU leaves one, with the client's picture in it
    try:
        load_picture(sys.stdin.buffer.read())
    except RequestError:
        return _BROKEN
    except MemoryError:
        return _TOO_LARGE
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
