from __future__ import annotations

import socket
import ssl
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import trustme

from darkroom.configs.errors import ConfigError
from darkroom.configs.operations import OperationsConfig
from darkroom.server.tls import tls_context


def test_without_a_certificate_there_is_no_tls() -> None:
    assert tls_context(OperationsConfig()) is None


def test_files_that_can_be_used(tmp_path: Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("localhost")
    chain, key, both, roots = (tmp_path / name for name in ("chain.pem", "key.pem", "both.pem", "roots.pem"))
    chain.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    key.write_bytes(issued.private_key_pem.bytes())
    both.write_bytes(issued.private_key_and_cert_chain_pem.bytes())
    roots.write_bytes(authority.cert_pem.bytes())
    assert tls_context(OperationsConfig(ssl_certfile=both))
    context = tls_context(OperationsConfig(ssl_certfile=chain, ssl_keyfile=key, ssl_ca_certs=roots))
    assert context and context.verify_mode == ssl.CERT_REQUIRED
    context = tls_context(OperationsConfig(ssl_certfile=both, ssl_ciphers="ECDHE-RSA-AES256-GCM-SHA384"))
    assert context and {cipher["protocol"] for cipher in context.get_ciphers()} == {"TLSv1.2", "TLSv1.3"}
    assert [c["name"] for c in context.get_ciphers() if c["protocol"] == "TLSv1.2"] == ["ECDHE-RSA-AES256-GCM-SHA384"]
    with pytest.raises(ConfigError, match=r"^--ssl-ciphers NONE-OF-THEM: OpenSSL knows none"):
        tls_context(OperationsConfig(ssl_certfile=both, ssl_ciphers="NONE-OF-THEM"))


@pytest.mark.parametrize("what", ["missing", "nonsense", "no key", "bad authority"])
def test_files_that_cannot(tmp_path: Path, what: str) -> None:
    issued = trustme.CA().issue_cert("localhost")
    file, bad = tmp_path / "file.pem", tmp_path / "bad.pem"
    file.write_bytes(issued.private_key_and_cert_chain_pem.bytes())
    bad.write_bytes(issued.cert_chain_pems[0].bytes() if what == "no key" else b"nonsense")
    config = {
        "missing": {"ssl_certfile": tmp_path / "none.pem"},
        "nonsense": {"ssl_certfile": bad},
        "no key": {"ssl_certfile": bad},
        "bad authority": {"ssl_certfile": file, "ssl_ca_certs": bad},
    }[what]
    with pytest.raises(ConfigError, match=r"^--ssl-(certfile|ca-certs) .*: cannot be used: "):
        tls_context(OperationsConfig(**config))


def test_an_encrypted_key_without_its_password_is_an_error(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    issued = trustme.CA().issue_cert("localhost")
    key = serialization.load_pem_private_key(issued.private_key_pem.bytes(), None)
    encrypted = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"pw")
    )
    chain, file = tmp_path / "chain.pem", tmp_path / "key.pem"
    chain.write_bytes(issued.cert_chain_pems[0].bytes())
    file.write_bytes(encrypted)
    with pytest.raises(ConfigError, match="cannot be used"):
        tls_context(OperationsConfig(ssl_certfile=chain, ssl_keyfile=file))
    assert tls_context(OperationsConfig(ssl_certfile=chain, ssl_keyfile=file, ssl_keyfile_password="pw"))


@pytest.mark.parametrize("has_certificate", [False, True])
def test_a_client_without_a_certificate_is_turned_away(tmp_path: Path, has_certificate: bool) -> None:
    authority = trustme.CA()
    own, roots = tmp_path / "own.pem", tmp_path / "roots.pem"
    own.write_bytes(authority.issue_cert("localhost").private_key_and_cert_chain_pem.bytes())
    roots.write_bytes(authority.cert_pem.bytes())
    context = tls_context(OperationsConfig(ssl_certfile=own, ssl_ca_certs=roots))
    client = ssl.create_default_context(cafile=str(roots))
    if has_certificate:
        authority.issue_cert("somebody").configure_cert(client)
    near, far = socket.socketpair()
    assert context
    with near, far, ThreadPoolExecutor(1) as pool:
        shaken = pool.submit(context.wrap_socket, near, server_side=True)
        with client.wrap_socket(far, server_hostname="localhost") as wrapped:
            if not has_certificate:
                with pytest.raises(ssl.SSLError, match="PEER_DID_NOT_RETURN_A_CERTIFICATE"):
                    shaken.result(10)
                return
            with shaken.result(10) as server:
                server.sendall(b"x")
                assert wrapped.recv(1) == b"x"
