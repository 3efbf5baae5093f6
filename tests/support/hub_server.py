"""A small Hub on 127.0.0.1: the part of the Hugging Face Hub's protocol that models need, with real commits and faults.

It stores what a client sends; a commit is a set of files. `Hub.faults` makes requests fail: see `Fault`.
"""
from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_SUFFIXES = ('.safetensors', '.png')


@dataclass
class Fault:
    """What happens to the next `times` requests whose 'METHOD path' matches.

    Kinds: a status ('500', '401', ...), with `wait` in its Retry-After; 'cut': half of the body is sent, then the
    connection closes; 'flip': one bit of the body differs; 'lost': the request is carried out, but never answered.
    """
    pattern: str
    kind: str
    times: int = 1
    wait: int | None = None


@dataclass
class Repo:
    private: bool = False
    gated: bool = False  # only a token that may write can read files
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        content = len(self.commits), sorted((path, blob_id(data)) for path, data in files.items())
        sha = hashlib.sha1(repr(content).encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha


class Hub(ThreadingHTTPServer):
    """`with Hub() as hub:` serves at `hub.url`."""

    daemon_threads = True

    def __init__(self, lfs: bool = True) -> None:
        """Without `lfs`, all files are part of the commit itself, which suits a client with hf_xet."""
        super().__init__(('127.0.0.1', 0), Handler)
        self.large = LFS_SUFFIXES if lfs else ()
        self.url = f'http://127.0.0.1:{self.server_address[1]}'
        self.repos: dict[str, Repo] = {}
        self.tokens = {'writer': True, 'reader': False, 'stranger': True}  # whether a token may write
        self.lfs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.lock = threading.Lock()
        self.between: Callable[[], object] | None = None  # once, before the next commit
        self.after_commit: Callable[[], object] | None = None  # once, after it
        self.after_get: Callable[[], object] | None = None  # once, after the next file was read

    def __enter__(self) -> Hub:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address) -> None:
        """Ignore clients that disconnect."""


def blob_id(content: bytes) -> str:
    """The git object id of a file."""
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True  # head and body are sent apart; the second would wait for 40 ms

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_request()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def handle_request(self) -> None:
        hub: Hub = self.server
        self.body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        if self.headers.get('Transfer-Encoding') == 'chunked':
            self.body = b''
            while size := int(self.rfile.readline(), 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        path = unquote(url.path.replace('%2F', '\0'))  # a slash in a name, as in the branch refs/pr/1
        line = f'{self.command} {path}'
        with hub.lock:
            hub.requests.append(line)
            fault = next((fault for fault in hub.faults if fault.times and re.search(fault.pattern, line)), None)
            if fault:
                fault.times -= 1
        self.fault = fault.kind if fault else ''
        if self.fault.isdecimal():
            return self.answer(int(self.fault), dict(error=f'fault {self.fault}'), headers=(
                {} if fault.wait is None else {'Retry-After': str(fault.wait)}))
        token = (self.headers.get('Authorization') or '').removeprefix('Bearer ')
        if token and token not in hub.tokens:
            error = 'Invalid credentials in Authorization header'
            return self.answer(401, dict(error=error), headers={'X-Error-Message': error})
        self.token = token
        with hub.lock:
            self.route(path)

    def route(self, path: str) -> None:
        if path == '/api/repos/create':
            return self.create()
        if path == '/api/validate-yaml':
            return self.validate()
        if match := re.fullmatch(r'/lfs/([0-9a-f]{64})', path):
            self.server.lfs[match[1]] = self.body
            return self.answer(200, {})
        if path == '/lfs-verify':
            return self.answer(200, {})
        if match := re.fullmatch(r'/([^/]+/[^/]+)\.git/info/lfs/objects/batch', path):
            return self.with_repo(match[1], self.lfs_batch, write=True)
        if match := re.fullmatch(r'/([^/]+/[^/]+)/resolve/([^/]+)/(.+)', path):
            return self.with_repo(match[1], self.resolve, match[2], match[3])
        api = r'/api/models/([^/]+/[^/]+)(?:/(preupload|commit|revision|refs|branch)(?:/([^/]+))?)?/?'
        if match := re.fullmatch(api, path):
            what = match[2] or 'revision'
            return self.with_repo(
                match[1], getattr(self, what), match[3] or 'main', write=what in ('preupload', 'commit', 'branch'))
        self.answer(404, dict(error=f'no such address: {path}'))

    def with_repo(self, name: str, call, *args, write: bool = False) -> None:
        repo = self.server.repos.get(name)
        if repo is None or repo.private and self.token in ('', 'stranger'):
            # the Hub answers alike for a missing repository and for a private one that the token may not see
            return self.answer(404 if self.token else 401, dict(error='Repository not found'), code='RepoNotFound')
        if write and not self.server.tokens.get(self.token):
            return self.answer(403 if self.token else 401, dict(error='You may not write here'))
        self.repo, self.name = repo, name
        call(*(arg.replace('\0', '/') for arg in args))

    # -- answers -------------------------------------------------------------------------------------------------------

    def answer(self, status: int, content, code: str = '', headers: dict | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        if self.fault == 'lost':
            return self.hang_up()
        if self.fault == 'flip' and body:
            body = bytes([body[0] ^ 1]) + body[1:] if len(body) < 100 else body[:-1] + bytes([body[-1] ^ 1])
        self.send_response(status)
        self.send_header('Content-Length', str(len(body)))
        kind = 'octet-stream' if isinstance(content, bytes) else 'json'
        self.send_header('Content-Type', f'application/{kind}')
        if code:
            self.send_header('X-Error-Code', code)
            self.send_header('X-Error-Message', content['error'])
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == 'HEAD':
            return
        if self.fault == 'cut':
            self.wfile.write(body[:len(body) // 2])
            return self.hang_up()
        self.wfile.write(body)

    def hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.close()

    def commit_of(self, revision: str) -> str | None:
        sha = self.repo.branches.get(revision, revision)
        if sha in self.repo.commits:
            return sha
        self.answer(404, dict(error=f'Invalid rev id: {revision}'), code='RevisionNotFound')
        return None

    # -- the protocol --------------------------------------------------------------------------------------------------

    def create(self) -> None:
        data = json.loads(self.body)
        if not self.server.tokens.get(self.token):
            return self.answer(403 if self.token else 401, dict(error='You may not create repositories'))
        name = f'{data["organization"]}/{data["name"]}' if data.get('organization') else data['name']
        address = dict(url=f'{self.server.url}/{name}', name=name)
        if name in self.server.repos:
            return self.answer(409, dict(address, error='You already created this model repo'))
        repo = self.server.repos[name] = Repo(private=bool(data.get('private')) or data.get('visibility') == 'private')
        repo.commit('main', {'.gitattributes': b'*.safetensors filter=lfs diff=lfs merge=lfs -text\n'})
        self.answer(200, address)

    def validate(self) -> None:
        content = json.loads(self.body)['content']
        match = re.match(r'---\n(.*?)\n---\n', content, re.DOTALL)
        metadata = yaml.safe_load(match[1]) if match else None
        errors = []
        if not isinstance(metadata, dict):
            errors.append(dict(message='there is no metadata'))
        else:
            for result in metadata.get('model-index', []):
                for entry in result['results']:
                    if not entry['task']['type'] or not entry['metrics'] or not entry['dataset']['type']:
                        errors.append(dict(message=f'incomplete result {entry}'))
        self.answer(400 if errors else 200, dict(errors=errors, warnings=[]))

    def preupload(self, revision: str) -> None:
        if (sha := self.commit_of(revision)) is None:
            return
        present = self.repo.commits[sha]
        files = []
        for file in json.loads(self.body)['files']:
            path = file['path']
            lfs = path.endswith(self.server.large)
            content = present.get(path)
            oid = None if content is None else hashlib.sha256(content).hexdigest() if lfs else blob_id(content)
            files.append(dict(path=path, uploadMode='lfs' if lfs else 'regular', shouldIgnore=False, oid=oid))
        self.answer(200, dict(files=files))

    def lfs_batch(self) -> None:
        objects = []
        for item in json.loads(self.body)['objects']:
            entry = dict(oid=item['oid'], size=item['size'])
            if item['oid'] not in self.server.lfs:
                entry['actions'] = dict(
                    upload=dict(href=f'{self.server.url}/lfs/{item["oid"]}', header={}),
                    verify=dict(href=f'{self.server.url}/lfs-verify', header={}))
            objects.append(entry)
        self.answer(200, dict(transfer='basic', objects=objects))

    def commit(self, revision: str) -> None:
        if self.server.between:
            self.server.between()
            self.server.between = None
        if (sha := self.commit_of(revision)) is None:
            return
        files = dict(self.repo.commits[sha])
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry['value']
            if entry['key'] == 'header' and value.get('parentCommit', sha) != sha:
                return self.answer(412, dict(error='A commit has happened since. Please refresh and try again.'))
            if entry['key'] == 'file':
                files[value['path']] = base64.b64decode(value['content'])
            elif entry['key'] == 'lfsFile':
                if value['oid'] not in self.server.lfs:
                    return self.answer(400, dict(error=f'LFS pointer to nothing: {value["path"]}'))
                files[value['path']] = self.server.lfs[value['oid']]
            elif entry['key'] == 'deletedFile':
                del files[value['path']]
        pull = bool(self.query.get('create_pr'))
        sha = self.repo.commit('refs/pr/1' if pull else revision, files)
        if self.server.after_commit:
            self.server.after_commit()
            self.server.after_commit = None
        page = f'{self.server.url}/{self.name}'
        answer = dict(success=True, commitOid=sha, commitUrl=f'{page}/commit/{sha}', hookOutput='')
        self.answer(200, dict(answer, pullRequestUrl=f'{page}/discussions/1') if pull else answer)

    def revision(self, revision: str) -> None:
        if (sha := self.commit_of(revision)) is None:
            return
        siblings = []
        for path, content in self.repo.commits[sha].items():
            sibling = dict(rfilename=path)
            if 'blobs' in self.query:
                sibling |= dict(size=len(content), blobId=blob_id(content))
                if path.endswith(self.server.large):
                    sha256 = hashlib.sha256(content).hexdigest()
                    sibling['lfs'] = dict(sha256=sha256, size=len(content), pointerSize=130)
            siblings.append(sibling)
        self.answer(200, dict(
            _id='0', id=self.name, modelId=self.name, sha=sha, private=self.repo.private, tags=[], downloads=0, likes=0,
            siblings=siblings))

    def branch(self, name: str) -> None:
        if name in self.repo.branches:
            return self.answer(409, dict(error=f'Reference already exists: {name}'))
        if name.startswith('refs/'):
            return self.answer(400, dict(error=f'Invalid reference for a branch: {name}'))
        if (sha := self.commit_of(json.loads(self.body).get('startingPoint', 'main'))) is not None:
            self.repo.branches[name] = sha
            self.answer(200, {})

    def refs(self, _: str) -> None:
        self.answer(200, dict(tags=[], converts=[], branches=[
            dict(name=name, ref=f'refs/heads/{name}', targetCommit=sha) for name, sha in self.repo.branches.items()]))

    def resolve(self, revision: str, path: str) -> None:
        if self.repo.gated and not self.server.tokens.get(self.token):
            error = f'Access to model {self.name} is restricted and you are not in the authorized list.'
            return self.answer(403 if self.token else 401, dict(error=error), code='GatedRepo')
        if (sha := self.commit_of(revision)) is None:
            return
        content = self.repo.commits[sha].get(path)
        headers = {'X-Repo-Commit': sha, 'Accept-Ranges': 'bytes'}
        if content is None:
            return self.answer(404, dict(error='Entry not found'), code='EntryNotFound', headers=headers)
        large = path.endswith(self.server.large)
        headers['ETag'] = f'"{hashlib.sha256(content).hexdigest() if large else blob_id(content)}"'
        status = 200
        if match := re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range') or ''):
            headers['Content-Range'] = f'bytes {match[1]}-{len(content) - 1}/{len(content)}'
            status, content = 206, content[int(match[1]):]
        if self.server.after_get and self.command == 'GET':
            self.server.after_get()
            self.server.after_get = None
        self.answer(status, content, headers=headers)
