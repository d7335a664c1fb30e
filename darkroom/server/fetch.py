"""Pictures from other hosts, by https: only from hosts that the operator names, and never from inside this network.

A name is resolved here, every address that it has is checked, and the connection goes to a checked address, so that no
second answer of the name server can lead elsewhere. Each redirect is checked in the same way.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial

import httpx2

from darkroom.configs.errors import RequestError

from .errors import too_many

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolver = Callable[[str, int], Awaitable[Sequence[str]]]
"""(host, port) -> its addresses. Raises OSError."""

_MOST_BYTES = 20 * 1024 * 1024
_MOST_REDIRECTS = 3
_SECONDS = 20.0
"""For all of one picture: names, redirects and bytes. As long it may wait before for a place among those fetched."""
_AT_ONCE = 8
PLACES_OF_ONE = _AT_ONCE // 2
"""How many of one request are to be fetched at a time, so that no request keeps all others waiting."""

_NEVER = [
    ipaddress.ip_network(text)
    for text in (
        "0.0.0.0/8", "100.64.0.0/10", "168.63.129.16/32", "192.0.0.0/24", "192.88.99.0/24", "198.18.0.0/15",
        "::/96", "::ffff:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "100::/64", "2001::/23", "2002::/16", "fec0::/10",
        "3fff::/20", "5f00::/16",
    )
]  # fmt: skip
"""Beside what `ipaddress` knows to be private: carriers' NAT, clouds' metadata, IPv4 inside of IPv6."""


def is_public(address: IPAddress) -> bool:
    if any(address.version == network.version and address in network for network in _NEVER):
        return False
    odd = address.is_multicast or address.is_reserved or address.is_link_local or address.is_loopback
    return address.is_global and not odd


class Fetcher:
    """`hosts` are names, or `*.suffix`, with `:port` where that is not 443. Without any, nothing is fetched."""

    def __init__(
        self,
        hosts: Sequence[str] = (),
        *,
        resolve: Resolver | None = None,
        is_allowed: Callable[[IPAddress], bool] = is_public,
        trust: ssl.SSLContext | None = None,
        seconds: float = _SECONDS,
        most_bytes: int = _MOST_BYTES,
    ) -> None:
        self.hosts = tuple(hosts)
        self.resolve = resolve or self._resolve
        self.is_allowed = is_allowed
        self.seconds = seconds
        self.most_bytes = most_bytes
        self._trust = trust
        self._places = asyncio.Semaphore(_AT_ONCE)
        self._threads = ThreadPoolExecutor(_AT_ONCE, "names")  # a slow name server keeps only its own threads waiting

    async def fetch_picture(self, url: str, *, param: str = "image_url") -> bytes:
        """The bytes at `url`, whatever they are. Raises `RequestError`, which says nothing of what answered.

        Raises `ApiError` 429 where too many are being fetched.
        """
        async with self._place():
            return await self._fetch(url, param)

    @asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self.seconds):
                await self._places.acquire()
        except TimeoutError:
            raise too_many("Too many pictures are being fetched from other hosts.", self.seconds) from None
        try:
            yield
        finally:
            self._places.release()

    async def _fetch(self, url: str, param: str) -> bytes:
        try:
            async with asyncio.timeout(self.seconds):
                return await self._follow(url)
        except _Refused as e:
            raise RequestError(f"'{param}' {e}", param=param) from None
        except TimeoutError:
            raise RequestError(f"'{param}' did not arrive within {self.seconds:g} seconds.", param=param) from None
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, UnicodeError):
            raise RequestError(f"'{param}' cannot be fetched from its host.", param=param) from None

    async def _follow(self, text: str) -> bytes:
        url = self._checked(text)
        if self._trust is None:  # reads hundreds of certificates
            self._trust = await asyncio.to_thread(httpx2.create_ssl_context)
        # no proxy of the environment: it would do the resolving
        async with httpx2.AsyncClient(verify=self._trust, trust_env=False, timeout=self.seconds) as client:
            for _ in range(_MOST_REDIRECTS + 1):
                answer = await self._get(client, url)
                if isinstance(answer, bytes):
                    return answer
                url = self._checked(answer)
        raise _Refused(f"is redirected more than {_MOST_REDIRECTS} times.")

    def _checked(self, text: str) -> httpx2.URL:
        if not self.hosts:
            raise _Refused("may not be an address: this server fetches none; send the picture itself.")
        url = httpx2.URL(text)
        if url.scheme != "https":
            raise _Refused("must be an https address.")
        if url.userinfo:
            raise _Refused("must not hold a name or password.")
        if not any(_fits(url, host) for host in self.hosts):
            raise _Refused(f"must be on a host that this server fetches from: {', '.join(self.hosts)}.")
        return url

    async def _get(self, client: httpx2.AsyncClient, url: httpx2.URL) -> bytes | str:
        """What lies there, or where to go on."""
        host = _host(url)
        for address in (addresses := await self._addresses(host, url.port or 443)):
            headers = {"host": url.netloc.decode("ascii"), "accept": "image/*", "accept-encoding": "identity"}
            pinned = url.copy_with(host=address)
            extensions = {"sni_hostname": host}  # the certificate must be the name's all the same
            try:
                async with client.stream("GET", pinned, headers=headers, extensions=extensions) as response:
                    if response.is_redirect and "location" in response.headers:
                        return str(url.join(response.headers["location"]))
                    return await self._read(response)
            except httpx2.ConnectError:
                if address == addresses[-1]:
                    raise
        raise OSError("no address")

    async def _addresses(self, host: str, port: int) -> list[str]:
        found = [ipaddress.ip_address(address) for address in dict.fromkeys(await self.resolve(host, port))]
        if not all(self.is_allowed(address) for address in found):  # one is enough: the name server may not be honest
            raise _Refused("is on a host whose address is not public.")
        return [str(address) for address in found]

    async def _resolve(self, host: str, port: int) -> list[str]:
        ask = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        found = await asyncio.get_running_loop().run_in_executor(self._threads, ask)
        return [str(sockaddr[0]) for *_, sockaddr in found]

    async def _read(self, response: httpx2.Response) -> bytes:
        if response.status_code != 200 or response.headers.get("content-encoding", "identity") != "identity":
            raise OSError("no picture")
        data = bytearray()
        async for chunk in response.aiter_raw():
            data += chunk
            if len(data) > self.most_bytes:
                raise _Refused(f"is larger than {self.most_bytes} bytes.")
        return bytes(data)


class _Refused(Exception):
    """The end of a sentence that begins with the field's name."""


def _fits(url: httpx2.URL, allowed: str) -> bool:
    name, _, port = allowed.partition(":")
    if (url.port or 443) != int(port or 443):
        return False
    host = _host(url)
    return host.endswith(name[1:]) and len(host) >= len(name) if name.startswith("*.") else host == name


def _host(url: httpx2.URL) -> str:
    """As it is resolved and compared: in lower case, IDNA, without the dot of the root."""
    return url.raw_host.decode("ascii").lower().rstrip(".")
