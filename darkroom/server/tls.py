"""TLS of the server's own, for those who have no proxy that does it."""

from __future__ import annotations

import ssl

from darkroom.configs.errors import ConfigError
from darkroom.configs.operations import OperationsConfig


def tls_context(config: OperationsConfig) -> ssl.SSLContext | None:
    """None without a certificate. Raises `ConfigError` for files that cannot be used."""
    if config.ssl_certfile is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    # an encrypted key without its password must be an error, and not a question at the terminal
    password = config.ssl_keyfile_password.get_secret_value() if config.ssl_keyfile_password else ""
    try:
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, password)
    except (OSError, ssl.SSLError) as e:
        files = f"--ssl-certfile {config.ssl_certfile}"
        files += f" --ssl-keyfile {config.ssl_keyfile}" if config.ssl_keyfile else ""
        raise ConfigError(f"{files}: cannot be used: {e.strerror or e}") from None
    if config.ssl_ca_certs:
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(config.ssl_ca_certs)
        except (OSError, ssl.SSLError) as e:
            raise ConfigError(f"--ssl-ca-certs {config.ssl_ca_certs}: cannot be used: {e.strerror or e}") from None
    if config.ssl_ciphers:
        try:
            context.set_ciphers(config.ssl_ciphers)
        except ssl.SSLError:
            raise ConfigError(f"--ssl-ciphers {config.ssl_ciphers}: OpenSSL knows none of these") from None
    return context
