"""The tenant and the client of a request, for fair shares."""

import ipaddress
from typing import NamedTuple

from fastapi import Request

from neuroada_serve.config import ServerConfig

_HOME_PREFIX = 64  # bits of an IPv6 address that its user does not choose


class Caller(NamedTuple):
    """A tenant and one of its clients; each empty where not told apart."""

    tenant: str = ""
    client: str = ""


def caller_of(http: Request, config: ServerConfig) -> Caller:
    """Return the tenant that a request's header names, if --tenant-header is given, and its client.

    If the request came through a proxy on this machine, or one named in the environment's
    FORWARDED_ALLOW_IPS, uvicorn has replaced the proxy's address by the client's, from
    X-Forwarded-For. Others are not believed: a client could pose as any number of clients.
    """
    tenant = http.headers.get(config.tenant_header, "") if config.tenant_header else ""
    return Caller(tenant, client_at(http.client.host if http.client else ""))


def client_at(host: str) -> str:
    """Return the client at an address; one for a whole IPv6 /64, since one host may use all of it.
    Empty if `host` is not an address."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return ""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is None:
            return str(ipaddress.ip_network((address.packed, _HOME_PREFIX), strict=False))
        address = address.ipv4_mapped
    return str(address)
