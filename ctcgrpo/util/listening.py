"""Listening sockets."""

import socket

from ctcgrpo.util.naming import cut


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any free port. Raises OSError, whose text names the address and what to try."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named as TCP, or asyncio leaves Nagle's algorithm on: 40 ms an answer.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except (OSError, UnicodeError) as error:  # UnicodeError: an invalid host name
        listener.close()
        reason = getattr(error, "strerror", error)
        where = f"cannot listen on {cut(host)}:{port} ({reason})"
        raise OSError(f"{where}; expected a free port; try another one, or 0 for any free port") from None
    return listener


def url_of(host: str, listener: socket.socket) -> str:
    """The URL of a listening socket, as a browser on this machine opens it."""
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{listener.getsockname()[1]}"
