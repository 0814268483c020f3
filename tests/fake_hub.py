"""The Hub as tests see it: data sets with commits and branches, over loopback, by the routes that huggingface_hub asks for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import unquote

from aiohttp import web

from tests.loopback import serving


@dataclass
class FakeHub:
    """`commits`: of each data set (OWNER/NAME) the files by commit, in order; `refs`: its branches and tags. `requests` holds the
    path of every request. Data sets in `gated` are refused as the Hub refuses them."""

    commits: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    refs: dict[str, dict[str, str]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)
    url: str = ""

    def push(self, name: str, files: Mapping[str, bytes], branch: str = "main") -> str:
        """A new commit with these files on a branch; its 40 digits."""
        commit = hashlib.sha1(repr((name, branch, sorted(files.items()), len(self.commits.get(name, {})))).encode()).hexdigest()
        self.commits.setdefault(name, {})[commit] = dict(files)
        self.refs.setdefault(name, {})[branch] = commit
        return commit

    async def handle(self, request: web.Request) -> web.StreamResponse:
        path = unquote(request.raw_path.partition("?")[0])
        self.requests.append(f"{request.method} {path}")
        kind, _, rest = path.removeprefix("/api").removeprefix("/datasets/").partition("/resolve/")
        if rest:  # /datasets/OWNER/NAME/resolve/COMMIT/FILE
            commit, _, file = rest.partition("/")
            content = self.commits[kind][commit].get(file)
            if content is None:
                return web.Response(status=404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "none"}
            return web.Response(body=content, headers=headers)
        for word in ("/revision/", "/tree/"):
            name, found, revision = kind.partition(word)
            if found:
                break
        else:
            name, revision = kind, "main"
        if name in self.gated:
            return web.json_response({"error": "gated"}, status=403, headers={"X-Error-Code": "GatedRepo"})
        if name not in self.commits:
            return web.json_response({"error": "Repository not found"}, status=404, headers={"X-Error-Code": "RepoNotFound"})
        commit = self.refs[name].get(revision, revision)
        if commit not in self.commits[name]:
            return web.json_response({"error": "Invalid rev"}, status=404, headers={"X-Error-Code": "RevisionNotFound"})
        files = self.commits[name][commit]
        if found == "/tree/":
            oids = {path: hashlib.sha1(content).hexdigest() for path, content in files.items()}
            return web.json_response([{"type": "file", "oid": oids[p], "size": len(files[p]), "path": p} for p in files])
        return web.json_response({"id": name, "sha": commit, "siblings": [{"rfilename": path} for path in files], "tags": []})

    @contextmanager
    def serving(self) -> Iterator[FakeHub]:
        """In a thread of this process, at `url`."""
        app = web.Application()
        app.router.add_get("/{path:.*}", self.handle)
        with serving(app) as url:
            self.url = url
            yield self
