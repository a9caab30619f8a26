"""Uploading: against a hub of our own, at the HTTP boundary."""

import ast
import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from helpers import gpt2, plain_convert, t5
from huggingface_hub import ModelCard, constants
from transformers import AutoModel, Trainer, TrainingArguments

from sqa_convert import push_to_hub
from sqa_convert.cli.convert import main as convert
from sqa_convert.cli.uptrain import main as uptrain
from sqa_convert.conversion.write import MODELS
from sqa_convert.errors import OutputError
from sqa_convert.families import FAMILIES
from sqa_convert.report.card import model_card
from sqa_convert.report.report_json import read_report

TOKEN = "hf_" + "secret" * 6
LARGE = 10_000  # bytes from which a file goes to the large file storage


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload talks to. What it holds hangs on the server."""

    def answer(self, content=None, status=200):
        body = json.dumps({} if content is None else content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self):
        return self.rfile.read(int(self.headers["Content-Length"]))

    def do_GET(self):
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "who are you"}, 401)
        if self.path == "/api/whoami-v2":
            return self.answer({"type": "user", "name": "me", "auth": {}})
        if "/tree/main" in self.path:
            return self.answer([{"type": "file", "path": p, "size": 1, "oid": "0" * 40} for p in self.server.files])
        return self.answer({"id": "me/model", "sha": "0" * 40, "siblings": [], "tags": []})

    def do_HEAD(self):
        self.send_response(404)  # of a file, for instance a card: there is none
        self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()

    def do_PUT(self):
        content = self.body()
        self.server.puts.append(hashlib.sha256(content).hexdigest())
        self.server.large[hashlib.sha256(content).hexdigest()] = content
        self.answer()

    def do_POST(self):
        server, path, content = self.server, self.path, self.body()
        server.requests.append((path, content))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "who are you"}, 401)
        if path in server.fails:
            return self.answer({"error": "not today"}, server.fails[path])
        if path == "/api/repos/create":
            return self.answer({"url": f"{server.url}/me/model"})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in path:
            files = [
                {"path": f["path"], "uploadMode": "lfs" if f["size"] > LARGE else "regular", "shouldIgnore": False}
                for f in json.loads(content)["files"]
            ]
            return self.answer({"files": files})
        if path.endswith("/objects/batch"):
            objects = []
            for wanted in json.loads(content)["objects"]:
                new = {"upload": {"href": f"{server.url}/storage/{wanted['oid']}"}}
                objects.append(wanted | ({} if wanted["oid"] in server.large else {"actions": new}))
            return self.answer({"transfer": "basic", "objects": objects})
        if "/commit/main" in path:
            for line in content.decode().splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    server.files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    server.files[value["path"]] = server.large[value["oid"]]
                elif entry["key"] == "deletedFile":
                    del server.files[value["path"]]
            return self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": f"{server.url}/me/model/commit/0"})
        return self.answer({"error": path}, 404)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.files, server.large, server.puts, server.requests, server.fails = {}, {}, [], [], {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # it remembers the first hub it spoke to
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{server.url}/{{repo_id}}/{{revision}}/{{filename}}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(monkeypatch, called, tmp_path):
    monkeypatch.chdir(tmp_path)

    def run(command, *arguments):
        code, out, err = called(command, *arguments)
        assert TOKEN not in out + err
        return code, out, err

    return run


@pytest.fixture
def folder(tmp_path):
    gpt2().save_pretrained(tmp_path / "source")
    return plain_convert(tmp_path / "source", 8, 4, output=tmp_path / "out").output


def created(hub):
    return next(json.loads(content) for path, content in hub.requests if path == "/api/repos/create")


def is_private(hub):
    asked = created(hub)  # of huggingface_hub 2 and 1
    return asked["visibility"] == "private" if "visibility" in asked else asked["private"]


CONVERT = ["sample:gpt2", "--variant", "sqa", "--method", "mean", "--no-evaluate", "-o", "out"]


def test_a_conversion_arrives_whole_and_private(run, hub):
    code, out, err = run(convert, *CONVERT, "--push-to-hub", "me/model")
    assert code == 0, err
    assert f"pushed: {hub.url}/me/model" in out
    assert hub.files.keys() == {path.name for path in Path("out").iterdir()}
    assert all(hub.files[path.name] == path.read_bytes() for path in Path("out").iterdir() if path.name != "README.md")
    assert 'AutoModelForCausalLM.from_pretrained("me/model"' in hub.files["README.md"].decode()
    assert created(hub)["name"] == "model" and is_private(hub)


def test_a_folder_that_was_renamed_is_loaded_from_the_hub_too(hub, folder):
    renamed = folder.rename(folder.parent / "renamed")
    push_to_hub(renamed, "me/model")
    assert 'AutoModelForCausalLM.from_pretrained("me/model"' in hub.files["README.md"].decode()


@pytest.mark.parametrize("name", ["plain", 'a"b', "a\\b", "a\nb"])
def test_the_program_in_the_card_can_be_run(name, folder):
    report = read_report(folder) | {"output": f"/models/{name}"}
    program = model_card(report, folder).partition("```python\n")[2].partition("```")[0]
    assert f"from_pretrained({name!r}" in ast.unparse(ast.parse(program))


def test_public_is_public(run, hub):
    assert run(convert, *CONVERT, "--push-to-hub", "me/model", "--public")[0] == 0
    assert not is_private(hub)


def test_an_uptrained_model_replaces_the_weights_there(run, hub):
    hub.files |= {"model-00001-of-00002.safetensors": b"old", "notes.txt": b"mine"}
    assert run(convert, *CONVERT)[0] == 0
    tokens = ["--tokens", 4096, "--no-evaluate", "-q"]
    code, _, err = run(uptrain, "out", *tokens, "--push-to-hub", "me/model")
    assert code == 0, err
    assert "model-00001-of-00002.safetensors" not in hub.files and hub.files["notes.txt"] == b"mine"
    assert hub.files["model.safetensors"] == Path("out/model.safetensors").read_bytes()


def test_what_is_there_is_not_sent_again(hub, folder):
    hub.fails["/api/models/me/model/commit/main"] = 400
    with pytest.raises(OutputError, match=r"is complete, but not on the hub .*; try again$"):
        push_to_hub(folder, "me/model")
    sent = list(hub.puts)
    hub.fails.clear()
    push_to_hub(folder, "me/model")
    assert sent and hub.puts == sent and hub.files["model.safetensors"]


def test_without_a_token_nothing_is_begun(run, hub, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    code, _, err = run(convert, *CONVERT, "--push-to-hub", "me/model")
    assert code == 2 and "hf auth login" in err and len(err.splitlines()) == 1 and not Path("out").exists()


@pytest.mark.parametrize(
    ("repo", "says"), [("a/b/c", "OWNER/NAME"), ("me/mo del", "OWNER/NAME"), ("me/model", "HF_HUB_OFFLINE")]
)
def test_what_cannot_be_pushed_is_known_first(run, hub, monkeypatch, repo, says):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, _, err = run(convert, *CONVERT, "--push-to-hub", repo)
    assert code == 2 and says in err and len(err.splitlines()) == 1 and not Path("out").exists()


def test_a_token_that_may_not_write_is_named(run, hub):
    hub.fails["/api/models/me/model/preupload/main"] = 403
    code, out, err = run(convert, *CONVERT, "--push-to-hub", "me/model")
    assert code == 2 and "not allowed there (403)" in err and "hf upload" in err
    assert "pushed" not in out and Path("out/model.safetensors").exists()


def test_only_our_own_folders_are_pushed(tmp_path, hub):
    with pytest.raises(OutputError, match=r"holds no report\.json.*only what sqa-convert made"):
        push_to_hub(tmp_path, "me/model")
    assert hub.requests == []


def test_the_card_is_the_hubs(folder):
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers" and card.data.base_model is None
    assert {"sqa", "sparse-query-attention"} <= set(card.data.tags)
    for words in ("AutoModelForCausalLM", "## Limits", "trust_remote_code"):
        assert words in card.text


def test_the_licence_of_the_source_is_taken_over(tmp_path):
    gpt2().save_pretrained(tmp_path / "source")
    (tmp_path / "source/README.md").write_text("---\nlicense: mit\nlanguage: [en]\ntags: [x]\n---\n# Theirs\n")
    card = ModelCard.load(plain_convert(tmp_path / "source", 8, 4, output=tmp_path / "out").output / "README.md")
    assert (card.data.license, card.data.language) == ("mit", ["en"]) and "x" not in card.data.tags
    assert "# Theirs" not in card.text


@pytest.mark.parametrize(
    "text", ["no front matter", "---\nlicense: [\n---\n", "---\n- a\n---\n", "\ufffe", "---\nlicense: {of: mine}\n---"]
)
def test_a_card_that_cannot_be_read_stops_nothing(tmp_path, text):
    gpt2().save_pretrained(tmp_path / "source")
    (tmp_path / "source/README.md").write_text(text)
    card = ModelCard.load(plain_convert(tmp_path / "source", 8, 4, output=tmp_path / "out").output / "README.md")
    assert card.data.license is None


def trained_further(model):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    return model.merge_and_unload()


def by_the_trainer(model, place):
    Trainer(model, TrainingArguments(output_dir=place, hub_model_id="me/model", use_cpu=True)).push_to_hub()


PUSHES = {
    "model": lambda model, place: model.push_to_hub("me/model"),
    "body": lambda model, place: AutoModel.from_pretrained(place).push_to_hub("me/model"),
    "merged": lambda model, place: trained_further(model).push_to_hub("me/model"),
    "save": lambda model, place: model.save_pretrained(place, push_to_hub=True, repo_id="me/model"),
    "trainer": by_the_trainer,
}


@pytest.mark.parametrize("push", PUSHES)
@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_what_transformers_pushes_holds_the_code(hub, name, push, tmp_path):
    model = plain_convert({"gpt2": gpt2, "t5": t5}[name](), 8, 4).model
    model.save_pretrained(tmp_path / "out")
    PUSHES[push](model, tmp_path / "out")
    assert json.loads(hub.files["config.json"])["auto_map"] == FAMILIES[name].auto_map
    for file in FAMILIES[name].model_files:
        assert hub.files[file] == (MODELS / file).read_bytes()
    assert "model.safetensors" in hub.files
