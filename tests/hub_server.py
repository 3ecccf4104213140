"""A small Hugging Face Hub on a free port of 127.0.0.1, for tests with the real client over real HTTP.

It keeps repositories in memory and speaks what `huggingface_hub` 2.4 asks for models, data sets and Spaces:
creation, card validation, LFS uploads checked by size and sha256, atomic commits, branches and tags, listings,
downloads with ranges and redirects to another host, private repositories and tokens. `Hub.fail` makes any request
fail or break off.
"""

import asyncio
import atexit
import base64
import functools
import hashlib
import json
import multiprocessing
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import uvicorn
import yaml
from huggingface_hub.repocard_data import model_index_to_eval_results
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

LFS_SUFFIXES = (".safetensors", ".parquet", ".arrow", ".bin", ".npz", ".zip")
LFS_SIZE = 10 * 2**20
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
YAML_BLOCK = re.compile(r"\A---\r?\n(.*?)\r?\n---(\r?\n|\Z)", re.DOTALL)


class RefusalError(Exception):
    """An answer with an error status, and the headers from which the client tells what is wrong."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | (headers or {})


@dataclass(frozen=True)
class Account:
    """Who a token belongs to, and the namespaces it may write to; empty = a read-only token."""

    name: str
    reads: frozenset[str]
    writes: frozenset[str]


@dataclass(frozen=True)
class File:
    """A file of a commit."""

    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def blob(self) -> bytes:
        """What git holds: the content, or the pointer of an LFS file."""
        if not self.lfs:
            return self.content
        size = len(self.content)
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {size}\n".encode()

    @property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.blob) + self.blob).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid

    def describe(self, path: str) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": len(self.content), "oid": self.git_oid}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": len(self.blob)}
        return entry


@dataclass
class Repo:
    """A repository: every commit is a complete set of files."""

    kind: str
    id: str
    private: bool
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    titles: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, File], title: str, branch: str = "main") -> str:
        listing = "".join(f"{path} {file.git_oid}\n" for path, file in sorted(files.items()))
        oid = hashlib.sha1(f"{self.refs.get(branch)} {len(self.commits)} {title}\n{listing}".encode()).hexdigest()
        self.commits[oid] = files
        self.refs[branch] = oid
        self.titles.append(title)
        return oid

    def resolve(self, revision: str) -> str:
        oid = (self.refs | self.tags).get(revision, revision)
        if oid not in self.commits:
            raise RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid

    @property
    def files(self) -> dict[str, bytes]:
        """Contents at the head of main."""
        return {path: file.content for path, file in self.commits[self.refs["main"]].items()}


@dataclass
class Fault:
    """What happens to matching requests instead of, or after, the right answer."""

    method: str
    path: str  # regular expression, searched in the path
    status: int | None = None
    times: int = 1
    skip: int = 0
    cut: int | None = None  # break the connection off when so many bytes have passed: sent of a GET, else received
    after: bool = False  # with `cut`: carry the request out first, then break off before the answer
    headers: dict[str, str] = field(default_factory=dict)


class Hub:
    """The state, and the ASGI application around it."""

    def __init__(self):
        self.accounts = {
            "hf_writer": Account("ada", frozenset({"ada", "org"}), frozenset({"ada", "org"})),
            "hf_reader": Account("ada", frozenset({"ada", "org"}), frozenset()),
            "hf_stranger": Account("bob", frozenset({"bob"}), frozenset({"bob"})),
        }
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.announced: dict[str, int] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, str]] = []  # method, path, token
        self.url = ""
        self._app = Starlette(routes=self._routes(), exception_handlers={RefusalError: _refuse})

    def repo(self, id: str, kind: str = "model") -> Repo:
        return self.repos[kind, id]

    def fail(self, method: str, path: str, **fault: Any) -> None:
        """Let the next matching requests fail; see `Fault`."""
        self.faults.append(Fault(method, path, **fault))

    def seen(self, method: str, path: str = "") -> list[str]:
        return [p for m, p, _ in list(self.requests) if m == method and re.search(path, p)]

    def forget(self) -> None:
        """Drop the record of requests and the faults that did not come up."""
        self.requests.clear()
        self.faults.clear()

    # Faults live below the framework, where connections can be broken off.

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        token = headers.get("authorization", "").removeprefix("Bearer ")
        self.requests.append((scope["method"], scope["path"], token))
        fault = self._due(scope["method"], scope["path"])
        if fault is None:
            return await self._app(scope, receive, send)
        if fault.status is not None:
            await _drain(receive)
            answer = JSONResponse({"error": "on purpose"}, fault.status, headers=fault.headers)
            return await answer(scope, receive, send)
        return await self._break_off(fault, scope, receive, send)

    def _due(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.method == method and re.search(fault.path, path):
                if fault.skip:
                    fault.skip -= 1
                    continue
                fault.times -= 1
                if fault.times == 0:
                    self.faults.remove(fault)
                return fault
        return None

    async def _break_off(self, fault: Fault, scope, receive, send) -> None:
        transport = send.__self__.transport
        if scope["method"] == "GET":
            await self._app(scope, receive, _limited(send, fault.cut))
            await asyncio.sleep(0.05)  # let the first part go out
            transport.close()
        elif fault.after:
            await self._app(scope, receive, _unsent)
            transport.close()
        else:
            received = 0
            while received < fault.cut:
                message = await receive()
                received += len(message.get("body", b""))
                if not message.get("more_body"):
                    break
            transport.abort()

    # Endpoints

    def _routes(self) -> list[Route]:
        api, repo = "/api/{kinds}/{owner}/{name}", "/{owner}/{name}"
        routes = [
            Route("/api/whoami-v2", self.whoami),
            Route("/api/repos/create", self.create, methods=["POST"]),
            Route("/api/validate-yaml", self.validate_yaml, methods=["POST"]),
            Route(api, self.info),
            Route(f"{api}/revision/{{revision}}", self.info),
            Route(f"{api}/refs", self.list_refs),
            Route(f"{api}/commits/{{revision}}", self.list_commits),
            Route(f"{api}/tree/{{revision}}", self.tree),
            Route(f"{api}/tree/{{revision}}/{{path:path}}", self.tree),
            Route(f"{api}/paths-info/{{revision}}", self.paths_info, methods=["POST"]),
            Route(f"{api}/preupload/{{revision}}", self.preupload, methods=["POST"]),
            Route(f"{api}/commit/{{revision}}", self.commit, methods=["POST"]),
            Route(f"{api}/tag/{{revision}}", self.tag, methods=["POST"]),
            Route(f"{api}/branch/{{branch}}", self.branch, methods=["POST"]),
            Route("/lfs/{oid}", self.lfs_put, methods=["PUT"]),
            Route("/cdn/{oid}", self.lfs_get, methods=["GET", "HEAD"]),
        ]
        for prefix in ("/{kinds}", ""):
            routes.append(Route(f"{prefix}{repo}.git/info/lfs/objects/batch", self.lfs_batch, methods=["POST"]))
            routes.append(Route(f"{prefix}{repo}/resolve/{{revision}}/{{path:path}}", self.file))
        return routes

    def _account(self, request: Request) -> Account | None:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme != "Bearer":
            return None
        if token not in self.accounts:
            raise RefusalError(401, "Invalid credentials in Authorization header")
        return self.accounts[token]

    def _open(self, request: Request, *, write: bool = False) -> Repo:
        """The repository of a request, if its token may see it."""
        place = request.path_params
        account = self._account(request)
        kind = place.get("kinds", "models").removesuffix("s")
        found = self.repos.get((kind, f"{place['owner']}/{place['name']}"))
        if found is None or (found.private and (account is None or place["owner"] not in account.reads)):
            # A stranger must not learn what exists.
            raise RefusalError(404 if account else 401, "Repository not found", "RepoNotFound")
        if write:
            self._check_write(account, place["owner"])
        return found

    def _check_write(self, account: Account | None, namespace: str) -> None:
        if account is None:
            raise RefusalError(401, "Invalid username or password.")
        if namespace not in account.writes:
            raise RefusalError(403, f'You don\'t have the rights to write under the namespace "{namespace}"')

    async def whoami(self, request: Request):
        account = self._account(request)
        if account is None:
            raise RefusalError(401, "Invalid username or password.")
        role = "write" if account.writes else "read"
        orgs = [{"name": name} for name in sorted(account.reads - {account.name})]
        token = {"accessToken": {"displayName": "test", "role": role}}
        return JSONResponse({"type": "user", "name": account.name, "orgs": orgs, "auth": token})

    async def create(self, request: Request):
        wanted = await request.json()
        account = self._account(request)
        namespace = wanted.get("organization") or (account.name if account else "")
        self._check_write(account, namespace)
        kind, repo_id = wanted.get("type", "model"), f"{namespace}/{wanted['name']}"
        answer = {"url": f"{self.url}/{'' if kind == 'model' else kind + 's/'}{repo_id}", "name": repo_id}
        if (kind, repo_id) in self.repos:
            return JSONResponse({**answer, "error": "You already created this repository"}, 409)
        repo = Repo(kind, repo_id, private=wanted.get("visibility") == "private" or wanted.get("private", False))
        repo.commit({".gitattributes": File(GIT_ATTRIBUTES, lfs=False)}, "initial commit")
        self.repos[kind, repo_id] = repo
        return JSONResponse(answer)

    async def validate_yaml(self, request: Request):
        sent = await request.json()
        errors, warnings = card_problems(sent["content"], sent["repoType"])
        body = {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warnings]}
        return JSONResponse(body, 400 if errors else 200)

    async def info(self, request: Request):
        repo = self._open(request)
        oid = repo.resolve(request.path_params.get("revision", "main"))
        files = repo.commits[oid]
        match = YAML_BLOCK.match(files["README.md"].content.decode()) if "README.md" in files else None
        data = yaml.safe_load(match[1]) if match else {}
        answer = {
            "id": repo.id,
            "modelId": repo.id,
            "author": repo.id.split("/")[0],
            "sha": oid,
            "private": repo.private,
            "gated": False,
            "disabled": False,
            "lastModified": "2026-01-01T00:00:00.000Z",
            "tags": data.get("tags", []),
            "cardData": data,
            "pipeline_tag": data.get("pipeline_tag"),
            "library_name": data.get("library_name"),
            "siblings": [{"rfilename": path} for path in sorted(files)],
        }
        return JSONResponse(answer)

    async def list_refs(self, request: Request):
        repo = self._open(request)
        branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": oid} for n, oid in repo.refs.items()]
        tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": oid} for n, oid in repo.tags.items()]
        return JSONResponse({"branches": branches, "converts": [], "tags": tags})

    async def list_commits(self, request: Request):
        repo = self._open(request)
        day = {"date": "2026-01-01T00:00:00.000Z", "authors": [{"user": "ada"}], "message": ""}
        pairs = zip(reversed(repo.commits), reversed(repo.titles), strict=True)
        return JSONResponse([{"id": oid, "title": title} | day for oid, title in pairs])

    async def tree(self, request: Request):
        repo = self._open(request)
        files = repo.commits[repo.resolve(request.path_params["revision"])]
        prefix = request.path_params.get("path", "").strip("/")
        inside = {path: file for path, file in files.items() if not prefix or path.startswith(f"{prefix}/")}
        if prefix and not inside:
            raise RefusalError(404, f"{prefix} does not exist", "EntryNotFound")
        deep = request.query_params.get("recursive", "").lower() in ("true", "1")
        entries, cut = {}, len(prefix) + 1 if prefix else 0
        for path, file in sorted(inside.items()):
            parts = path[cut:].split("/")
            for depth in range(1, len(parts) if deep else min(len(parts), 2)):
                folder = path[:cut] + "/".join(parts[:depth])
                entries[folder] = _describe_folder(folder)
            if deep or len(parts) == 1:
                entries[path] = file.describe(path)
        return JSONResponse(list(entries.values()))

    async def paths_info(self, request: Request):
        repo = self._open(request)
        files = repo.commits[repo.resolve(request.path_params["revision"])]
        sent = await request.form()
        entries = []
        for path in sent.getlist("paths"):
            if path in files:
                entries.append(files[path].describe(path))
            elif any(name.startswith(f"{path.strip('/')}/") for name in files):
                entries.append(_describe_folder(path))
        return JSONResponse(entries)

    async def preupload(self, request: Request):
        repo = self._open(request, write=True)
        files = repo.commits[repo.resolve(request.path_params["revision"])]
        answer = []
        for item in (await request.json())["files"]:
            path = item["path"]
            lfs = path.endswith(LFS_SUFFIXES) or item["size"] > LFS_SIZE
            entry = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            answer.append(entry | ({"oid": files[path].etag} if path in files else {}))
        return JSONResponse({"files": answer})

    async def lfs_batch(self, request: Request):
        self._open(request, write=True)
        objects = []
        for item in (await request.json())["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.objects:
                self.announced[item["oid"]] = item["size"]
                entry["actions"] = {"upload": {"href": f"{self.url}/lfs/{item['oid']}"}}
            objects.append(entry)
        return JSONResponse({"transfer": "basic", "objects": objects})

    async def lfs_put(self, request: Request):
        oid = request.path_params["oid"]
        content = await request.body()
        if self.announced.get(oid) != len(content) or hashlib.sha256(content).hexdigest() != oid:
            raise RefusalError(400, f"{oid}: size or sha256 differ from what was announced")
        self.objects[oid] = content
        return Response()

    async def lfs_get(self, request: Request):
        content = self.objects.get(request.path_params["oid"])
        if content is None:
            raise RefusalError(404, "no such object", "EntryNotFound")
        return _ranged(content, request, {"ETag": f'"{request.path_params["oid"]}"'})

    async def commit(self, request: Request):
        repo = self._open(request, write=True)
        branch = request.path_params["revision"]
        head = repo.resolve(branch)
        lines = [json.loads(line) for line in (await request.body()).splitlines() if line.strip()]
        header, *operations = lines
        parent = header["value"].get("parentCommit")
        if parent is not None and not head.startswith(parent):
            raise RefusalError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[head])
        for operation in operations:
            self._apply(files, operation["key"], operation["value"])
        oid = repo.commit(files, header["value"]["summary"], branch)
        return JSONResponse({"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{repo.id}/commit/{oid}"})

    def _apply(self, files: dict[str, File], key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if key == "file":
            files[path] = File(base64.b64decode(value["content"]), lfs=False)
        elif key == "lfsFile":
            content = self.objects.get(value["oid"])
            if content is None or len(content) != value.get("size", len(content)):
                raise RefusalError(400, f"LFS object {value['oid']} of {path} was not uploaded")
            files[path] = File(content, lfs=True)
        elif key == "deletedFile" and path in files:
            del files[path]
        elif key == "deletedFolder":
            for name in [name for name in files if name.startswith(f"{path.rstrip('/')}/")]:
                del files[name]
        else:
            raise RefusalError(400, f"cannot apply {key} to {path}")

    async def tag(self, request: Request):
        repo = self._open(request, write=True)
        name = (await request.json())["tag"]
        if name in repo.tags:
            raise RefusalError(409, f"Tag {name} exists")
        repo.tags[name] = repo.resolve(request.path_params["revision"])
        return JSONResponse({})

    async def branch(self, request: Request):
        repo = self._open(request, write=True)
        name = request.path_params["branch"]
        if name in repo.refs:
            raise RefusalError(409, f"Branch {name} exists")
        repo.refs[name] = repo.resolve((await request.json()).get("startingPoint", "main"))
        return JSONResponse({})

    async def file(self, request: Request):
        repo = self._open(request)
        oid = repo.resolve(request.path_params["revision"])
        path = request.path_params["path"]
        commit = {"X-Repo-Commit": oid}
        file = repo.commits[oid].get(path)
        if file is None:
            raise RefusalError(404, f"{path} does not exist", "EntryNotFound", commit)
        if not file.lfs:
            return _ranged(file.content, request, commit | {"ETag": f'"{file.etag}"'})
        # Large files come from another host, which must not see the token.
        linked = commit | {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.content))}
        cdn = self.url.replace("127.0.0.1", "localhost")
        return RedirectResponse(f"{cdn}/cdn/{file.sha256}", 302, headers=linked)


def card_problems(content: str, repo_type: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about the metadata of a card, after the Hub's published specification."""
    match = YAML_BLOCK.match(content)
    if match is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"invalid YAML: {error}"], []
    if not isinstance(data, dict):
        return ["metadata must be a mapping"], []
    texts = ("license", "license_name", "license_link", "library_name", "pipeline_tag", "sdk", "sdk_version")
    lists = ("tags", "datasets", "metrics", "base_model", "language")
    errors = [f'"{key}" must be a string' for key in texts if not isinstance(data.get(key, ""), str)]
    for key in lists:
        values = data.get(key, [])
        values = values if isinstance(values, list) else [values]
        if not all(isinstance(value, str) and value for value in values):
            errors.append(f'"{key}" must be a string or a list of strings')
    base = data.get("base_model")
    if isinstance(base, str) and not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
        errors.append(f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.')
    if repo_type == "model" and "model-index" in data:
        try:
            _, results = model_index_to_eval_results(data["model-index"])
        except (KeyError, TypeError, ValueError) as error:
            return [*errors, f'"model-index" is not valid: {error!r}'], []
        bad = [r.metric_type for r in results if not isinstance(r.metric_value, int | float)]
        errors += [f'"model-index[0].results[0].metrics" {name}: "value" must be a number' for name in bad]
    return errors, [] if "license" in data else ["no license"]


def _describe_folder(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0}


def _ranged(content: bytes, request: Request, headers: dict[str, str]) -> Response:
    """The content, or the part that a Range header asks for."""
    headers = headers | {"Accept-Ranges": "bytes"}
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
    if match is None:
        return Response(content, headers=headers, media_type="application/octet-stream")
    first, last = match.groups()
    start = int(first) if first else max(0, len(content) - int(last))
    stop = int(last) + 1 if first and last else len(content)
    if start >= len(content):
        raise RefusalError(416, "range beyond the end", headers={"Content-Range": f"bytes */{len(content)}"})
    part = content[start:stop]
    headers["Content-Range"] = f"bytes {start}-{start + len(part) - 1}/{len(content)}"
    return Response(part, 206, headers=headers, media_type="application/octet-stream")


async def _refuse(request: Request, refusal: RefusalError) -> Response:
    return JSONResponse({"error": refusal.message}, refusal.status, headers=refusal.headers)


async def _drain(receive) -> None:
    while (await receive()).get("more_body"):
        pass


async def _unsent(message) -> None:
    """Swallows an answer."""


def _limited(send, limit: int):
    """Lets `limit` bytes of a body through, and does not end it."""
    left = limit

    async def limited(message):
        nonlocal left
        if message["type"] == "http.response.body":
            body, left = message.get("body", b"")[:left], max(0, left - len(message.get("body", b"")))
            message = {"type": "http.response.body", "body": body, "more_body": True}
        await send(message)

    return limited


class Client:
    """A process of its own with the real client, its own cache, and this Hub as `HF_ENDPOINT`.

    One process serves many calls, so that its imports are paid for once.
    """

    def __init__(self, hub: Hub):
        self.home = tempfile.TemporaryDirectory(prefix="lymph-hub-client-")
        self.environment = client_environment(hub, self.home.name)
        before = os.environ.copy()
        try:
            os.environ.clear()
            os.environ.update(self.environment)
            self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
            self._pool.submit(os.getpid).result()
        finally:
            os.environ.clear()
            os.environ.update(before)

    def call(self, function: Callable, *arguments: Any, **options: Any) -> Any:
        """Run a module-level function there; its exception is raised here."""
        return self._pool.submit(function, *arguments, **options).result()

    def close(self) -> None:
        self._pool.shutdown()
        self.home.cleanup()


def client_environment(hub: Hub, home: str) -> dict[str, str]:
    """Environment in which the client of huggingface_hub talks to this Hub and to nothing else."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE"))}
    return kept | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": home,
        "HF_HUB_DISABLE_XET": "1",  # with xet the client has no fallback to LFS
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DISABLE_SAFETENSORS_CONVERSION": "1",  # transformers would ask a public service
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }


@functools.cache
def running_hub() -> Hub:
    """The Hub of this test process, started at the first call."""
    hub = Hub()
    server = uvicorn.Server(uvicorn.Config(hub, host="127.0.0.1", port=0, http="h11", log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    hub.url = f"http://127.0.0.1:{port}"
    atexit.register(lambda: setattr(server, "should_exit", True))
    return hub


@functools.cache
def running_client() -> Client:
    """A client process of that Hub, shared by the tests of this process."""
    client = Client(running_hub())
    atexit.register(client.close)
    return client
