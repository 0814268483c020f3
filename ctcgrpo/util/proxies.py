"""Proxies of the environment (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY), read alike by every HTTP client of this process.

Loopback is never asked through a proxy. ALL_PROXY counts where the scheme has no proxy of its own. aiohttp and urllib get them with
`proxy_of`; libraries that read the environment themselves (requests in TRL, httpx in Inspect) find it put right by
`settle_environment`.
"""

import ipaddress
import os
import urllib.request
from typing import Any
from urllib.parse import urlsplit

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_SCHEMES = ("http", "https")


def proxy_of(url: str) -> str | None:
    """The proxy of requests to `url`; None: they go directly. A SOCKS proxy counts as none: no client here speaks it."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if is_loopback(host) or urllib.request.proxy_bypass(host):
        return None
    proxies = urllib.request.getproxies()
    found = proxies.get(parts.scheme) or proxies.get("all") or ""
    if "://" not in found and found:
        found = f"http://{found}"
    return found if found.startswith("http") else None


def through_proxy(url: str) -> str:
    """For the message of a failed request: which proxy it went through; empty for none."""
    proxy = proxy_of(url)
    return "" if proxy is None else f" (through the proxy {proxy.rpartition('@')[2].removeprefix('http://')})"


def open_url(request: urllib.request.Request | str, *, timeout: float) -> Any:
    """urllib's urlopen by these rules."""
    url = request if isinstance(request, str) else request.full_url
    proxy = proxy_of(url)
    handler = urllib.request.ProxyHandler({} if proxy is None else dict.fromkeys(_SCHEMES, proxy))
    return urllib.request.build_opener(handler).open(request, timeout=timeout)


def is_loopback(host: str) -> bool:
    """Whether a host name or address (without brackets) is this machine's loopback interface."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost"


def settle_environment(*urls: str) -> None:
    """Make the environment say what `proxy_of` does, for libraries that read it; `urls` may name further loopback hosts. Changes
    nothing where no proxy is set."""
    everything = _variable("all")
    own = {scheme: _variable(scheme) for scheme in _SCHEMES}
    if not (everything or any(own.values())):
        return
    for scheme, proxy in own.items():
        if not proxy and everything.startswith("http"):
            os.environ[f"{scheme}_proxy"] = everything
    if all(map(_variable, _SCHEMES)):  # then it says nothing more, and httpx refuses to start with one of SOCKS
        for name in ("all_proxy", "ALL_PROXY"):
            os.environ.pop(name, None)
    further = [host for url in urls if (host := urlsplit(url).hostname) and is_loopback(host)]
    listed = [part.strip() for name in ("no_proxy", "NO_PROXY") for part in os.environ.get(name, "").split(",")]
    direct = ",".join(dict.fromkeys(part for part in (*listed, *_LOOPBACK, *further) if part))
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = "*" if "*" in listed else direct


def _variable(scheme: str) -> str:
    return os.environ.get(f"{scheme}_proxy") or os.environ.get(f"{scheme.upper()}_PROXY") or ""
