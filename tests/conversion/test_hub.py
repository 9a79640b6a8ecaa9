"""Download from the Hub and upload to it, against a local server for the parts of its protocol that are used."""

import base64
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Repositories by name, and the requests received."""

    repositories: dict[str, dict[str, bytes]]
    requests: list[str] = field(default_factory=list)
    private: set[str] = field(default_factory=set)
    address: str = ""


def make_handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_) -> None:
            pass

        def answer(self, content: bytes, code: int = 200, **headers: str) -> None:
            self.send_response(code)
            for name, value in ({"Content-Length": str(len(content))} | headers).items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def answer_json(self, content, code: int = 200) -> None:
            self.answer(json.dumps(content).encode(), code, Content_Type="application/json")

        def not_found(self, what: str) -> None:
            self.answer(b"", 404, X_Error_Code=what, X_Error_Message=f"{what}: {self.path}")

        def do_GET(self) -> None:
            path = self.path.partition("?")[0].strip("/")
            hub.requests.append(f"{self.command} {path}")
            if path.startswith("api/models/"):
                owner, name, *rest = path.removeprefix("api/models/").split("/")
                files = hub.repositories.get(f"{owner}/{name}")
                if files is None:
                    self.not_found("RepoNotFound")
                elif rest[:1] == ["tree"]:
                    self.answer_json([tree_entry(name, content) for name, content in files.items()])
                elif rest[:1] in ([], ["revision"]) and rest[1:] in ([], ["main"], ["v1"], [COMMIT]):
                    siblings = [{"rfilename": file} for file in files]
                    self.answer_json({"id": f"{owner}/{name}", "sha": COMMIT, "siblings": siblings, "private": False})
                else:
                    self.not_found("RevisionNotFound")
                return
            owner, name, _, _, file = path.split("/", 4)
            content = hub.repositories.get(f"{owner}/{name}", {}).get(file)
            if content is None:
                self.not_found("EntryNotFound")
            else:
                self.answer(content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=COMMIT)

        do_HEAD = do_GET  # noqa: N815

        def do_POST(self) -> None:
            path = self.path.partition("?")[0].strip("/")
            hub.requests.append(f"POST {path}")
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers["Authorization"] != "Bearer hf_stand_in":
                self.answer(b"", 401, X_Error_Message="Invalid token")
            elif path == "api/repos/create":
                wish = json.loads(body)
                name = f"{wish['organization']}/{wish['name']}"
                hub.repositories.setdefault(name, {})
                if wish.get("private") or wish.get("visibility") == "private":
                    hub.private.add(name)
                self.answer_json({"url": f"{hub.address}/{name}", "name": name, "id": name})
            elif path == "api/validate-yaml":
                self.answer_json({"errors": [], "warnings": []})
            elif "/preupload/" in path:
                files = [file["path"] for file in json.loads(body)["files"]]
                answers = [
                    {"path": file, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for file in files
                ]
                self.answer_json({"files": answers})
            elif "/commit/" in path:
                owner, name = path.removeprefix("api/models/").split("/")[:2]
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        content = base64.b64decode(line["value"]["content"])
                        hub.repositories[f"{owner}/{name}"][line["value"]["path"]] = content
                self.answer_json({"commitUrl": f"{hub.address}/{owner}/{name}/commit/{COMMIT}", "commitOid": COMMIT})
            else:
                self.not_found("Unknown")

    return Handler


def tree_entry(path: str, content: bytes) -> dict:
    return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


@pytest.fixture
def hub(golden_dir: Path) -> Iterator[Hub]:
    def files(folder: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (golden_dir / folder).iterdir()}

    hub = Hub(
        {
            "them/fine-tuned": files("hub_finetuned")
            | {
                "modeling_eat.py": b"raise SystemExit('a stranger\\'s code ran')",
                "pytorch_model.bin": b"the same weights again",
                "checkpoint-10/model.safetensors": b"not these",
                "README.md": b"---\nlicense: mit\n---\n",
            },
            "them/fairseq": {"sslam.pt": (golden_dir / "sslam_pretrained.pt").read_bytes()},
            "them/code": {"README.md": b"# Nothing but code"},
        }
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), make_handler(hub))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def command(hub: Hub, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "hf_stand_in",
        "NO_PROXY": "127.0.0.1",
    }

    def run(*arguments: object, **changes: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=Path(__file__).parents[2],
            env=environment | changes,
            capture_output=True,
            text=True,
        )

    return run


def test_download_and_upload(hub, command, converted, tmp_path):
    result = command(
        "-m",
        "conversion",
        "them/fine-tuned",
        tmp_path / "out",
        "--revision",
        "v1",
        "--push-to-hub",
        "me/copy",
        "--private",
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0].startswith(f"them/fine-tuned (revision {COMMIT}): Hub (EATModel)")
    assert result.stdout.splitlines()[-1] == f"uploaded: {hub.address}/me/copy"

    fetched = {request.rpartition("/")[2] for request in hub.requests if "/resolve/" in request}
    assert fetched == {"config.json", "model.safetensors", "README.md"}
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        converted("hub_finetuned") / "model.safetensors"
    ).read_bytes()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: mit" in card
    assert f"them/fine-tuned (revision {COMMIT})" in card

    uploaded = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert hub.repositories["me/copy"] == uploaded
    assert hub.private == {"me/copy"}


SOURCES = {
    "them/fairseq": None,
    "them/nothing": "cannot be downloaded from the Hub",
    "them/fine-tuned --revision v9": "cannot be downloaded from the Hub",
    "them/code": "holds no weights",
}


def test_repositories_of_other_content(command, tmp_path):
    # One process for all, since importing torch takes most of the time.
    lines = [[*line.split(), str(tmp_path / f"out{i}"), "--quiet"] for i, line in enumerate(SOURCES)]
    result = command("-c", f"from conversion.__main__ import main; print([main(line) for line in {lines}])")
    assert result.stdout == "[0, 1, 1, 1]\n", result.stderr
    assert [path.name for path in tmp_path.glob("out*")] == ["out0"]
    reasons = [reason for reason in SOURCES.values() if reason]
    for error, reason in zip(result.stderr.splitlines(), reasons, strict=True):
        assert error.startswith("error: ")
        assert reason in error


def test_refused_upload_keeps_the_folder(golden_dir, command, tmp_path):
    result = command(
        "-m",
        "conversion",
        golden_dir / "hub_pretrained",
        tmp_path / "out",
        "--push-to-hub",
        "me/copy",
        HF_TOKEN="hf_wrong",
    )
    assert result.returncode == 1
    assert "is written, but was not uploaded to me/copy" in result.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_unreachable_hub_is_an_error(command, tmp_path):
    result = command("-m", "conversion", "them/fine-tuned", tmp_path / "out", HF_ENDPOINT="http://127.0.0.1:9")
    assert result.returncode == 1
    assert "is not a local path and cannot be downloaded from the Hub" in result.stderr
    assert result.stderr.count("\n") == 1
