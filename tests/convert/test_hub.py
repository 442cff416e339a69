"""Uploads to the Hub: the real client, against a server on this machine."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import HfApi, constants

import mtt_convert
from mtt_convert import execute
from mtt_convert.cli import main
from mtt_convert.errors import HubError, TargetError, UsageError
from mtt_convert.hub import HubPlace, parse_place
from tests.convert.surgery import edited, model_of
from tests.hub_server import TOKEN, HubServer

SAMPLE = Path(__file__).parents[2] / "convert" / "sample"
SHARDS = ("--max-shard-size", "200KB")
BIAS = "decoder.layers.0.mlp.linear_fc2.bias"
WEIGHTS = [f"model-0000{number}-of-00005.safetensors" for number in range(1, 6)]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the same conversion writes to a folder."""
    folder = tmp_path_factory.mktemp("local") / "out"
    mtt_convert.convert(SAMPLE, folder, max_shard_size="200KB")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def steps(tmp_path: Path) -> Path:
    """A root with the iterations 1000 and 2000."""
    root = tmp_path / "steps"
    shutil.copytree(SAMPLE, root, ignore=shutil.ignore_patterns("*.py", "*.md", "*.npz"))
    add_step(root, 2000)
    return root


def add_step(root: Path, iteration: int) -> None:
    """Another iteration, with the weights of the first."""
    folder = root / f"iter_{iteration:07d}"
    shutil.copytree(root / "iter_0001000", folder)
    for path in folder.glob("*/*.pt"):
        with edited(path) as content:
            content["iteration"] = iteration


def run(*words: object) -> int:
    return main([str(word) for word in words])


def waiting(tmp_path: Path) -> list[str]:
    """Files that are on their way, under $HF_HOME."""
    folder = tmp_path / "home" / "mtt" / "uploads"
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def visible(hub: HubServer, repo_id: str = "me/model", revision: str = "main") -> dict[str, bytes]:
    """The files of a branch that the client put there."""
    files = dict(hub.files(repo_id, revision))
    del files[".gitattributes"]
    return files


def differing(found: dict[str, bytes], expected: dict[str, bytes]) -> list[str]:
    """Names of files that are not alike: pytest would compare the bytes for minutes to show how."""
    return sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))


@pytest.mark.parametrize("part_size", (0, 50_000))
def test_the_hub_gets_what_a_folder_would(
    hub: HubServer, local: dict[str, bytes], tmp_path: Path, part_size: int
) -> None:
    hub.part_size = part_size
    assert run("convert", SAMPLE, "hf://me/model", *SHARDS) == 0
    assert differing(visible(hub), local) == []
    titles = [commit.title for commit in hub.repos["me/model"].branches["main"]]
    assert titles == ["initial commit", "Upload iter_0001000, mtt 0.1.0"]
    assert waiting(tmp_path) == []


LOAD = """
import sys, numpy as np, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
path, revision, reference, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(path, revision=revision, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=True)
with torch.no_grad():
    logits = model(torch.tensor(np.load(reference)["input_ids"])).logits
np.save(output, logits.numpy())
print(tokenizer.decode(tokenizer("A Megatron checkpoint").input_ids))
"""


def test_from_pretrained_loads_it_back(hub: HubServer, tmp_path: Path) -> None:
    """By the code that travels with the weights; logits are those of a folder, bit for bit."""
    assert run("convert", SAMPLE, "hf://me/back@v1", *SHARDS) == 0
    assert run("convert", SAMPLE, tmp_path / "out", *SHARDS) == 0
    reference, logits = SAMPLE / "reference.npz", []
    for path, revision in (("me/back", "v1"), (str(tmp_path / "out"), "main")):
        output = tmp_path / f"{revision}.npy"
        words = [sys.executable, "-c", LOAD, path, revision, str(reference), str(output)]
        result = subprocess.run(words, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        assert result.stdout == "A Megatron checkpoint\n"
        logits.append(np.load(output))
    assert np.array_equal(*logits)
    expected = np.load(reference)["logits"][..., : logits[0].shape[-1]]
    assert np.abs(logits[0] - expected).max() < 1e-4


@pytest.fixture
def killed(hub: HubServer, local: dict[str, bytes], tmp_path: Path) -> list[str]:
    """An upload that SIGKILL ended while the fourth shard was sent; the hashes sent before it."""
    arrived, sent, most = threading.Event(), [], []

    def before(method: str, path: str) -> None:
        if method == "PUT":
            sent.append(path)
            names = [name for name in waiting(tmp_path) if "safetensors" in name]
            most.append(len({name.removesuffix(".part") for name in names}))
            if len(sent) == 4:
                arrived.set()
                threading.Event().wait(300)

    hub.before = before
    words = [sys.executable, "-m", "mtt_convert", "convert", str(SAMPLE), "hf://me/model", *SHARDS]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert arrived.wait(200)
        process.send_signal(signal.SIGKILL)
        process.wait(300)
    assert process.returncode == -signal.SIGKILL
    assert max(most) <= 2
    hub.before = lambda method, path: None
    assert visible(hub) == {}, "a half upload is visible"
    return sorted(hub.blobs)


def test_ctrl_c_ends_it_in_the_middle_of_a_shard(
    hub: HubServer, local: dict[str, bytes], tmp_path: Path
) -> None:
    """Without waiting for the upload; what was sent before counts when it goes on."""
    arrived = threading.Event()

    def before(method: str, path: str) -> None:
        if method == "PUT" and len(hub.puts()) == 3:
            arrived.set()
            threading.Event().wait(300)

    hub.before = before
    words = [sys.executable, "-m", "mtt_convert", "convert", str(SAMPLE), "hf://me/model", *SHARDS]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert arrived.wait(200)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=100)
    assert process.returncode == 130
    assert error.endswith("200KB --resume\n")
    assert waiting(tmp_path) == ["state.json"]
    hub.before = lambda method, path: None
    hub.requests.clear()
    assert run("convert", SAMPLE, "hf://me/model", *SHARDS, "--resume") == 0
    assert len(hub.puts()) == 3
    assert differing(visible(hub), local) == []


def read_tensors(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets the size of every tensor that is read from now on."""
    sizes: list[int] = []
    stream = execute.stream

    def counting(source: mtt_convert.tensors.LazyTensor, reader: object) -> object:
        sizes.append(source.num_bytes)
        return stream(source, reader)

    monkeypatch.setattr(execute, "stream", counting)
    return sizes


def test_a_killed_upload_goes_on(
    hub: HubServer,
    killed: list[str],
    local: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert len(killed) == 3
    assert any(name.startswith("model-00004") for name in waiting(tmp_path))
    (state,) = (tmp_path / "home" / "mtt" / "uploads").rglob("state.json")
    for name, facts in json.loads(state.read_text())["files"].items():
        assert facts["sha256"] == hashlib.sha256(local[name]).hexdigest()
        assert facts["size"] == len(local[name])
        assert base64.b64decode(facts["sample"]) == local[name][:512]
    hub.requests.clear()
    sizes = read_tensors(monkeypatch)
    assert run("convert", SAMPLE, "hf://me/model", *SHARDS, "--resume") == 0
    assert len(hub.puts()) == 2
    assert not set(hub.puts()) & set(killed)
    headers = sum(8 + int.from_bytes(local[name][:8], "little") for name in WEIGHTS[3:])
    assert sum(sizes) == sum(len(local[name]) for name in WEIGHTS[3:]) - headers
    assert differing(visible(hub), local) == []
    assert waiting(tmp_path) == []


def test_what_the_hub_forgot_is_converted_again(
    hub: HubServer, killed: list[str], local: dict[str, bytes]
) -> None:
    del hub.blobs[killed[0]]
    hub.requests.clear()
    assert run("convert", SAMPLE, "hf://me/model", *SHARDS, "--resume") == 0
    assert len(hub.puts()) == 3
    assert differing(visible(hub), local) == []


def test_without_resume_it_begins_again(
    hub: HubServer, killed: list[str], local: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = read_tensors(monkeypatch)
    assert run("convert", SAMPLE, "hf://me/model", *SHARDS) == 0
    assert len(sizes) == 68
    assert differing(visible(hub), local) == []


def test_another_upload_is_not_resumed(
    hub: HubServer, steps: Path, capsys: pytest.CaptureFixture
) -> None:
    hub.before = lambda method, path: 403 if path.endswith("/commit/main") else None
    words = ("convert", steps, "hf://me/model", *SHARDS)
    assert run(*words) == 5
    hub.before = lambda method, path: None
    assert run(*words[:3], "--resume") == 2
    assert "another source, other options" in capsys.readouterr().err
    shard = steps / "iter_0001000" / "mp_rank_00_000" / "model_optim_rng.pt"
    os.utime(shard, (1, 1))
    assert run(*words, "--resume") == 2
    assert "the upload to resume is not this one" in capsys.readouterr().err
    assert visible(hub) == {}


def test_never_more_than_two_shards_are_on_the_disk(hub: HubServer, tmp_path: Path) -> None:
    """With many workers and uploads that are slower than the conversion."""
    most, peaks, done = [0], [0], threading.Event()
    uploads = tmp_path / "home" / "mtt" / "uploads"

    def watch() -> None:
        while not done.wait(0.0005):
            with contextlib.suppress(FileNotFoundError):
                names = [name for name in waiting(tmp_path) if "safetensors" in name]
                most.append(len({name.removesuffix(".part") for name in names}))
                paths = [path for path in uploads.rglob("*safetensors*") if path.is_file()]
                peaks.append(sum(path.stat().st_size for path in paths))

    def slow(method: str, path: str) -> None:
        if method == "PUT":
            time.sleep(0.03)

    hub.before = slow
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    code = run("convert", SAMPLE, "hf://me/model", "--max-shard-size", "100KB", "--workers", 8)
    done.set()
    watcher.join()
    assert code == 0
    sizes = [len(data) for name, data in visible(hub).items() if name.endswith(".safetensors")]
    assert len(sizes) > 8
    assert max(most) == 2
    assert max(sizes) < max(peaks) <= sum(sorted(sizes)[-2:])


def test_the_same_conversion_is_left_alone(
    hub: HubServer, steps: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ("convert", steps, "hf://me/model")
    assert run(*words) == 0
    head = hub.repos["me/model"].branches["main"][-1].sha
    hub.requests.clear()
    capsys.readouterr()
    assert run(*words, "--json") == 0
    assert json.loads(capsys.readouterr().out)["status"] == "unchanged"
    assert hub.repos["me/model"].branches["main"][-1].sha == head
    assert {method for method, _ in hub.requests} == {"GET", "HEAD", "POST"}
    assert not [path for _, path in hub.requests if "/commit/" in path]


def test_other_weights_of_the_same_name_are_not_taken_for_it(
    hub: HubServer, steps: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run("convert", steps, "hf://me/model", *SHARDS) == 0
    first = visible(hub)
    for path in (steps / "iter_0001000").glob("mp_rank_*_000/*.pt"):
        with edited(path) as content:
            model_of(content, BIAS)[BIAS] += 1
    assert run("convert", steps, "hf://me/model", *SHARDS) == 4
    error = capsys.readouterr().err
    assert "me/model holds something else; nothing was uploaded" in error
    assert differing(visible(hub), first) == []


def test_overwrite_replaces_a_model_and_all_its_files(
    hub: HubServer, local: dict[str, bytes]
) -> None:
    assert run("convert", SAMPLE, "hf://me/model", *SHARDS) == 0
    assert run("convert", SAMPLE, "hf://me/model", "--dtype", "bfloat16") == 4
    assert differing(visible(hub), local) == []
    assert run("convert", SAMPLE, "hf://me/model", "--dtype", "bfloat16", "--overwrite") == 0
    names = set(local) - set(WEIGHTS) - {"model.safetensors.index.json"} | {"model.safetensors"}
    assert set(visible(hub)) == names
    assert hub.repos["me/model"].branches["main"][1].files.keys() >= set(WEIGHTS)


def test_a_card_that_is_there_stays(hub: HubServer, local: dict[str, bytes]) -> None:
    HfApi().create_repo("me/model")
    card = b"---\nlicense: mit\n---\nMine.\n"
    hub.repos["me/model"].add("main", "by hand", {**hub.files("me/model"), "README.md": card})
    assert run("convert", SAMPLE, "hf://me/model", *SHARDS) == 0
    assert visible(hub)["README.md"] == card
    assert "README.md" not in json.loads(visible(hub)["mtt_manifest.json"])["documents"]
    assert run("convert", SAMPLE, "hf://me/model", *SHARDS, "--json") == 0
    assert len(hub.repos["me/model"].branches["main"]) == 3


def test_a_megatron_checkpoint_can_be_the_target(hub: HubServer, tmp_path: Path) -> None:
    words = ("--to", "torch", "--tp", 2)
    assert run("convert", SAMPLE, "hf://me/megatron", *words) == 0
    assert run("convert", SAMPLE, tmp_path / "new", *words) == 0
    written = {
        str(path.relative_to(tmp_path / "new")): path.read_bytes()
        for path in (tmp_path / "new").rglob("*")
        if path.is_file()
    }
    assert differing(visible(hub, "me/megatron"), written) == []
    assert "iter_0001000/mp_rank_01/model_optim_rng.pt" in written


def test_all_iterations_have_branches_that_begin_empty(
    hub: HubServer, steps: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run("convert", steps, "hf://me/model", *SHARDS) == 0  # main has files of its own
    words = ("convert", steps, "hf://me/model", "--all-iterations")
    assert run(*words) == 0
    for step in (1000, 2000):
        files = visible(hub, revision=f"step{step}")
        assert "model.safetensors" in files
        assert WEIGHTS[0] not in files
        assert json.loads(files["mtt_manifest.json"])["source"]["iteration"] == step
    add_step(steps, 3000)
    hub.requests.clear()
    capsys.readouterr()
    assert run(*words, "--json") == 0
    body = json.loads(capsys.readouterr().out)
    assert [(each["iteration"], each["status"]) for each in body["iterations"]] == [
        (1000, "unchanged"),
        (2000, "unchanged"),
        (3000, "ok"),
    ]
    commits = [path for _, path in hub.requests if "/commit/" in path]
    assert commits == ["/api/models/me/model/commit/step3000"]


def test_all_iterations_to_folders(
    steps: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    assert run("convert", steps, out, "--all-iterations") == 0
    assert sorted(path.name for path in out.iterdir()) == ["iter_0001000", "iter_0002000"]
    assert run("verify", out / "iter_0002000") == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    shutil.rmtree(out / "iter_0001000")
    capsys.readouterr()
    assert run("convert", steps, out, "--all-iterations") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("969.16 KB")
    assert lines[1].endswith("969.16 KB  there already")
    kept = out / "iter_0002000" / "model.safetensors"
    assert kept.stat().st_mtime_ns == before[kept]
    assert run("verify", out / "iter_0001000") == 0
    (out / "iter_0002000" / "config.json").unlink()  # no longer whole: not taken for the same
    assert run("convert", steps, out, "--all-iterations") == 4


def test_push_makes_one_commit_of_a_folder(
    hub: HubServer, local: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    assert run("convert", SAMPLE, out, *SHARDS) == 0
    (out / "LICENSE").write_text("by whoever publishes it")
    (out / ".git").mkdir()
    (out / ".git" / "config").write_text("secret")
    assert run("push", out, "me/model", "--private", "--revision", "first") == 0
    expected = {**local, "LICENSE": b"by whoever publishes it"}
    assert differing(visible(hub, revision="first"), expected) == []
    assert visible(hub) == {}
    assert hub.repos["me/model"].private
    card = (out / "README.md").read_bytes() + b"\nMore.\n"
    (out / "README.md").write_bytes(card)
    hub.requests.clear()
    assert run("push", out, "me/model", "--revision", "first") == 0
    assert hub.puts() == []
    assert visible(hub, revision="first")["README.md"] == card
    capsys.readouterr()
    assert run("push", out, "hf://me/model@first", "--json") == 0
    assert json.loads(capsys.readouterr().out)["status"] == "unchanged"
    assert len(hub.repos["me/model"].branches["first"]) == 3


def test_push_opens_a_pull_request(hub: HubServer, tmp_path: Path, capsys) -> None:
    assert run("convert", SAMPLE, tmp_path / "out") == 0
    capsys.readouterr()
    assert run("push", tmp_path / "out", "me/model", "--create-pr") == 0
    assert capsys.readouterr().out.splitlines()[0] == f"{hub.url}/me/model/discussions/1"
    assert visible(hub) == {}
    assert "model.safetensors" in visible(hub, revision="refs/pr/1")


def test_push_goes_on_without_reading_again(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mtt_convert.uploading._SMALL", 100_000)
    out = tmp_path / "out"
    assert run("convert", SAMPLE, out, *SHARDS) == 0
    hub.before = lambda method, path: 403 if len(hub.puts()) == 3 and method == "PUT" else None
    assert run("push", out, "me/model") == 5
    hub.before = lambda method, path: None
    assert visible(hub) == {}
    hub.requests.clear()
    opened: list[str] = []
    monkeypatch.setattr("mtt_convert.uploading.Branch.upload", recording(opened))
    assert run("push", out, "me/model", "--resume") == 0
    assert len(opened) == len(hub.puts()) == 3
    assert {path.name for path in out.iterdir()} == set(visible(hub))


def recording(names: list[str]) -> Callable[..., object]:
    """`Branch.upload`, with the names it is called with."""
    from mtt_convert.hub import Branch

    upload = Branch.upload

    def record(self: Branch, name: str, *rest: object) -> object:
        names.append(name)
        return upload(self, name, *rest)

    return record


def test_push_wants_a_whole_folder(
    steps: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    assert run("push", steps, "me/model") == 3
    assert "iter_0002000" in capsys.readouterr().err
    assert run("convert", SAMPLE, out) == 0
    (out / "vocab.json").unlink()
    capsys.readouterr()
    assert run("push", out, "me/model") == 3
    assert "vocab.json is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "fix"),
    (
        (401, "log in with hf auth login, or set HF_TOKEN"),
        (403, "use a token that may write to me"),
        (404, "check the name me/model"),
    ),
)
def test_refusals_of_the_hub(
    hub: HubServer, capsys: pytest.CaptureFixture, status: int, fix: str
) -> None:
    hub.before = lambda method, path: status if "/revision/" in path else None
    assert run("convert", SAMPLE, "hf://me/model") == 5
    error = capsys.readouterr().err
    assert error.startswith("error: me/model cannot be opened\n  found:    ")
    assert str(status) in error
    assert fix in error


def test_tokens_and_signed_addresses_are_not_printed(
    hub: HubServer, capsys: pytest.CaptureFixture
) -> None:
    hub.part_size = 50_000
    hub.before = lambda method, path: 403 if method == "PUT" else None
    assert run("convert", SAMPLE, "hf://me/model", "--debug") == 5
    captured = capsys.readouterr()
    error = captured.err.partition("error: ")[2]
    assert "model.safetensors was not uploaded to me/model" in error
    assert "secret" not in error
    assert TOKEN not in captured.err + captured.out


def test_a_commit_in_between_is_not_overwritten(
    hub: HubServer, capsys: pytest.CaptureFixture
) -> None:
    def before(method: str, path: str) -> None:
        if path.endswith("/commit/main"):
            repo = hub.repos["me/model"]
            repo.add("main", "somebody else's", {**hub.files("me/model"), "notes.txt": b"1"})

    hub.before = before
    assert run("convert", SAMPLE, "hf://me/model") == 5
    assert "the branch changed meanwhile" in capsys.readouterr().err
    assert set(visible(hub)) == {"notes.txt"}


def test_nobody_answers(hub: HubServer, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert run("convert", SAMPLE, "hf://me/model", "--json") == 5
    body = json.loads(capsys.readouterr().out)
    assert (body["code"], body["message"]) == ("hub", "me/model cannot be opened")
    assert "check the network" in body["fix"]


def test_offline_is_said(hub: HubServer, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-m", "mtt_convert", "convert", str(SAMPLE), "hf://me/model"]
    result = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert result.returncode == 5
    assert "unset HF_HUB_OFFLINE" in result.stderr
    assert hub.requests == []


def test_a_home_that_cannot_be_written(
    hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "home").write_text("a file")
    assert run("convert", SAMPLE, "hf://me/model") == 4
    assert "set HF_HOME to a folder that you may write to" in capsys.readouterr().err
    assert hub.requests == []


def test_dry_run_asks_nobody(hub: HubServer) -> None:
    assert run("convert", SAMPLE, "hf://me/model", "--dry-run") == 0
    assert hub.requests == []


def test_an_interruption_names_the_command_that_goes_on(
    hub: HubServer, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mtt_convert.hub_target.HubSink.finish", interrupt)
    assert run("convert", SAMPLE, "hf://me/model") == 130
    assert "hf://me/model --resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    (
        (("hf://model",), "no repository on the Hub"),
        (("hf://me/model/sub",), "no repository on the Hub"),
        (("s3://bucket/model",), "mtt cannot write there"),
        (("out", "--private"), "--private: only for a target on the Hub"),
        (("out", "--private", "--create-pr"), "--private, --create-pr: only for a target"),
        (("hf://me/model@x", "--all-iterations"), "every iteration has a branch of its own"),
        (("out", "--all-iterations", "--iteration", "1000"), "--all-iterations stands alone"),
        (("out", "--all-iterations", "--to", "torch"), "only to Hugging Face folders"),
    ),
)
def test_usage(words: tuple[str, ...], message: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("convert", SAMPLE, *words) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_places_are_parsed() -> None:
    assert parse_place("hf://a/b") == parse_place("a/b") == HubPlace("a/b", "main")
    assert parse_place("hf://a/b@refs/pr/1") == HubPlace("a/b", "refs/pr/1")
    assert parse_place("a/b", "dev") == HubPlace("a/b", "dev")
    for text in ("a/b@../c", "a/b..c", "a/b--c", "a/b.", "a/b-", "a/b.git"):
        with pytest.raises(UsageError, match="no repository"):
            parse_place(text)
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    for text in ("a/b.c-d_e", "a/_b", "a-b/c1", "a/b..c", "a/b--c", "a/b.", "a/b-", "a/b.git"):
        try:
            validate_repo_id(text)
        except HFValidationError:
            with pytest.raises(UsageError):
                parse_place(text)
        else:
            assert parse_place(text).repo_id == text


def test_the_same_from_python(hub: HubServer, tmp_path: Path) -> None:
    result = mtt_convert.convert(SAMPLE, "hf://me/model", private=True)
    assert result.output == f"{hub.url}/me/model"
    assert mtt_convert.convert(SAMPLE, "hf://me/model").unchanged
    mtt_convert.convert(SAMPLE, tmp_path / "out")
    assert mtt_convert.push(tmp_path / "out", "me/model").unchanged
    with pytest.raises(TargetError, match="something else"):
        mtt_convert.convert(SAMPLE, "hf://me/model", dtype="float16")
    hub.token = "another"
    with pytest.raises(HubError, match="cannot be opened"):
        mtt_convert.push(tmp_path / "out", "me/model")
