"""Models by their ids, against a stand-in for the hub's HTTP interface on this machine."""

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scale.data.tokenizer import train_tokenizer
from scale.io import hub, model_folder
from scale.io.huggingface import export
from scale.model.config import ModelConfig
from scale.model.transformer import Transformer

CONFIG = ModelConfig(
    270, 1, 16, 2, 8, 16, num_kv_heads=1, block="sequential", norm="rms", scaled_logits=False
)
COMMITS = {"main": "a" * 40, "v1": "b" * 40}


class Hub(BaseHTTPRequestHandler):
    """Two revisions of `org/tiny`, which asks for a token, and the requests for them."""

    folders: dict[str, Path]
    asked: list[str]

    def do_HEAD(self):
        self.respond(head=True)

    def do_GET(self):
        self.respond(head=False)

    def respond(self, head):
        self.asked.append(f"{self.command} {self.path}")
        _, *parts = self.path.split("?")[0].split("/")
        if self.headers.get("Authorization") != "Bearer secret":
            return self.reply(401, b"{}", {"X-Error-Message": "Access denied. Log in."}, head)
        if parts[:4] == ["api", "models", "org", "tiny"] and parts[4] in ("revision", "tree"):
            commit = COMMITS.get(parts[5], parts[5])
            if commit not in self.folders:
                return self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, head)
            names = sorted(path.name for path in self.folders[commit].iterdir())
            files = [self.file(commit, name) for name in names]
            info = {"id": "org/tiny", "sha": commit, "siblings": [{"rfilename": n} for n in names]}
            return self.reply(200, json.dumps(info if parts[4] == "revision" else files).encode())
        if parts[:3] == ["org", "tiny", "resolve"]:
            data = (self.folders[parts[3]] / parts[4]).read_bytes()
            etag = f'"{hashlib.sha1(data).hexdigest()}"'
            return self.reply(200, data, {"ETag": etag, "X-Repo-Commit": parts[3]}, head)
        return self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"}, head)

    def file(self, commit, name):
        data = (self.folders[commit] / name).read_bytes()
        oid = hashlib.sha1(data).hexdigest()
        return {"type": "file", "path": name, "size": len(data), "oid": oid}

    def reply(self, status, data, headers=None, head=False):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not head:
            self.wfile.write(data)

    def log_message(self, *_):
        """Nothing."""


@contextmanager
def serving(handler):
    """The address of a server on this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The address of the hub, the models of its revisions and the requests so far."""
    tokenizer, folders, models = train_tokenizer(["the cat"], 270), {}, {}
    for seed, (revision, commit) in enumerate(COMMITS.items()):
        models[revision] = Transformer(CONFIG, jax.random.key(seed))
        folders[commit] = tmp_path_factory.mktemp("hub") / revision
        export(folders[commit], models[revision], tokenizer)
        (folders[commit] / "pytorch_model.bin").write_bytes(b"\x80")
    handler = type("Tiny", (Hub,), {"folders": folders, "asked": []})
    with serving(handler) as address:
        yield address, models, handler.asked


def run(paths, home, address, token="secret", **environment):
    """For each path the sum of the model's weights, or one line of error."""
    code = f"""if True:
        from pathlib import Path
        import numpy as np
        from scale.errors import InputError
        from scale.io.model_folder import load_policy
        for path in {paths!r}:
            try:
                print("sum", float(np.abs(load_policy(Path(path)).model.embedding).sum()))
            except InputError as error:
                print("error:", error)
    """
    return printed(code, home, address, HF_TOKEN=token, **environment)


def printed(code, home, address, **environment):
    """The lines that a program prints, for which the hub is at an address."""
    environment = os.environ | {
        "HF_ENDPOINT": address, "HF_HOME": str(home), "JAX_PLATFORMS": "cpu",
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]), **environment,
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True,
                          text=True, check=True, cwd=home)  # fmt: skip
    return done.stdout.splitlines()


def weight_sum(model):
    return f"sum {float(np.abs(np.asarray(model.embedding)).sum())}"


def error(path):
    return f"error: {path}: no such file or folder, and not a model of the hub: "


def test_an_id_and_its_revision_are_downloaded_and_are_there_offline(served, tmp_path):
    address, models, asked = served
    paths = ["org/tiny", "org/tiny@v1", "org/tiny@v2", "org/other"]
    main, v1, v2, other = run(paths, tmp_path, address)
    assert (main, v1) == (weight_sum(models["main"]), weight_sum(models["v1"]))
    assert v2.startswith(error("org/tiny@v2")) and other.startswith(error("org/other"))
    assert not any("pytorch_model.bin" in request for request in asked)
    count = len(asked)
    main, other = run(["org/tiny", "org/other"], tmp_path, address, HF_HUB_OFFLINE="1")
    assert main == weight_sum(models["main"]) and other.startswith(error("org/other"))
    assert len(asked) == count


@pytest.mark.parametrize("environment", [{"token": "wrong"}, {"address": "http://127.0.0.1:9"}])
def test_what_the_hub_does_not_give_is_an_error_of_one_line(served, tmp_path, environment):
    [printed] = run(["org/tiny"], tmp_path, **{"address": served[0]} | environment)
    assert printed.startswith(error("org/tiny"))


def test_a_path_into_a_folder_that_exists_is_no_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    files = ("scored/rows.parquet", "data/a.jsonl.gz", "m/a.gguf")
    for path in (*files, "runs/sft", "sft", "/runs/sft", "a/b/c", "./runs", "../a"):
        assert hub.downloaded(Path(path)) is None
    assert model_folder.located(Path("runs/sft")) == Path("runs/sft")


# ---- data sets


ROWS = {"prompt": ["p", "q"], "chosen": ["a", "b"], "rejected": ["c", "d"]}


class DataHub(Hub):
    """A data set `org/prefs` with the splits `train` and `test`."""

    files: dict[str, bytes]

    def respond(self, head):
        self.asked.append(f"{self.command} {self.path}")
        path, commit = self.path.split("?")[0].removeprefix("/"), COMMITS["main"]
        info = {"id": "org/prefs", "sha": commit}
        if path in ("api/datasets/org/prefs", f"api/datasets/org/prefs/revision/{commit}"):
            return self.reply(200, json.dumps(info).encode())
        if path == f"api/datasets/org/prefs/tree/{commit}":
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": self.tag(data)}
                for name, data in self.files.items()
            ]
            return self.reply(200, json.dumps(tree).encode())
        name = path.rpartition("/")[2]
        if path.startswith("datasets/org/prefs/resolve/") and name in self.files:
            data = self.files[name]
            headers = {"ETag": f'"{self.tag(data)}"', "X-Repo-Commit": commit}
            return self.reply(200, data, headers, head)
        exists = path.startswith(("datasets/org/prefs", "api/datasets/org/prefs"))
        code = "EntryNotFound" if exists else "RepoNotFound"
        return self.reply(404, b"{}", {"X-Error-Code": code}, head)

    def tag(self, data):
        return hashlib.sha1(data).hexdigest()


@pytest.fixture(scope="module")
def data_hub():
    file = io.BytesIO()
    pq.write_table(pa.table(ROWS), file)
    files = {"train.parquet": file.getvalue(), "test.parquet": file.getvalue()}
    handler = type("Prefs", (DataHub,), {"files": files, "asked": []})
    with serving(handler) as address:
        yield address, handler.asked


def rows_of(paths, home, address, **environment):
    """For each path its rows, or one line of error."""
    code = f"""if True:
        from pathlib import Path
        from scale.data.rows import read
        from scale.errors import InputError
        for path in {paths!r}:
            try:
                print("rows", read(Path(path)))
            except InputError as error:
                print("error:", error)
    """
    return printed(code, home, address, **environment)


def test_a_data_set_by_its_id(data_hub, tmp_path):
    """Downloaded once; then it is there offline; what the hub has not is an error of one line."""
    pytest.importorskip("datasets", reason="the package that reads them")
    address, asked = data_hub
    expected = [dict(zip(ROWS, values, strict=True)) for values in zip(*ROWS.values(), strict=True)]
    test, none = rows_of(["org/prefs:test", "org/none"], tmp_path, address)
    assert test == f"rows {expected}"
    assert none.startswith("error: org/none: no such file or folder, and not a data set of the hub")
    count = len(asked)
    assert rows_of(["org/prefs:test"], tmp_path, address, HF_HUB_OFFLINE="1") == [test]
    assert len(asked) == count
