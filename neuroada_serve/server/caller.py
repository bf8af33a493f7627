"""Whose a request is, for fair shares."""

import ipaddress
from typing import NamedTuple

from fastapi import Request

from neuroada_serve.config import ServerConfig

_HOME_PREFIX = 64  # bits of an IPv6 address that its user does not choose


class Caller(NamedTuple):
    """A tenant, and a client of it; empty where they are not told apart."""

    tenant: str = ""
    client: str = ""


def caller_of(http: Request, config: ServerConfig) -> Caller:
    """Who sent a request: the tenant that its header names, if that counts, and its address.

    Of a request that came through a proxy on this machine, or one that the environment's
    FORWARDED_ALLOW_IPS names, uvicorn has put the address that the proxy saw (X-Forwarded-For) in
    place of the proxy's. Nobody else is believed: clients could be as many as they like.
    """
    tenant = http.headers.get(config.tenant_header, "") if config.tenant_header else ""
    return Caller(tenant, client_at(http.client.host if http.client else ""))


def client_at(host: str) -> str:
    """The client at an address; all of one IPv6 /64 are one, since any host there may have them
    all. What is no address is nobody in particular."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return ""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is None:
            return str(ipaddress.ip_network((address.packed, _HOME_PREFIX), strict=False))
        address = address.ipv4_mapped
    return str(address)
