"""Checkpoints behind URLs: the same result as from files, by range, and errors that say why."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

import mtt_convert
from mtt_convert import HubError, UnsupportedError, UsageError, remote, sources
from mtt_convert.tensors import LazyTensor
from tests.convert.servers import Site, serving
from tests.convert.surgery import TORCH, TORCH_DIST, run

Golden = Callable[[str], Path]
NAMES = {
    "torch": TORCH,
    "torch_dist": TORCH_DIST,
    "zarr": "mcore/tiny/core_0.15/zarr",
    "torch_dcp": "mcore/llama/fsdp2_dp2/torch_dcp",
    "fsdp_dtensor": "mcore/llama_bf16/mfsdp_dp2/fsdp_dtensor",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A Hub of our own, with nothing in it yet."""
    import huggingface_hub
    from huggingface_hub import HfFileSystem

    with serving(Site(tmp_path / "hub", hub=True)) as site:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", site.url)
        resolve = site.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", resolve)
        HfFileSystem.clear_instance_cache()
        remote._systems.pop("hf", None)
        yield site
    HfFileSystem.clear_instance_cache()
    remote._systems.pop("hf", None)


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    """fsspec's memory file system, empty."""
    fs = fsspec.filesystem("memory")
    yield fs
    fs.rm("/", recursive=True)


def weights(source: object, folder: Path, **options: object) -> bytes:
    """The converted weights."""
    mtt_convert.convert(source, folder, tokenizer="none", **options)
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", NAMES)
def test_memory_gives_what_files_give(
    kind: str, golden: Golden, memory: fsspec.AbstractFileSystem, tmp_path: Path
) -> None:
    memory.put(f"{golden(NAMES[kind])}/", "/here/ckpt", recursive=True)
    local = weights(golden(NAMES[kind]), tmp_path / "local")
    assert weights("memory://here/ckpt", tmp_path / "remote", num_workers=2) == local
    code, out, _ = run("inspect", "memory://here/ckpt/iter_0000010")
    assert code == 0
    assert out.splitlines()[0] == "memory://here/ckpt/iter_0000010"
    assert mtt_convert.diff("memory://here/ckpt", golden(NAMES[kind])).differences == ()


def test_a_plan_names_files_as_seen_from_the_folder(
    golden: Golden, memory: fsspec.AbstractFileSystem, tmp_path: Path
) -> None:
    memory.put(f"{golden(TORCH)}/", "/ckpt", recursive=True)
    code, out, _ = run("convert", "memory://ckpt", tmp_path / "out", "--dry-run")
    assert code == 0
    assert "mp_rank_00_000/model_optim_rng.pt" in out
    assert "://" not in out.replace("memory://ckpt/iter_0000010", "", 1)


def test_a_change_is_seen_when_it_is_opened_again(
    golden: Golden, memory: fsspec.AbstractFileSystem
) -> None:
    memory.put(f"{golden(TORCH)}/", "/ckpt", recursive=True)
    assert mtt_convert.open_checkpoint("memory://ckpt").iteration == 10
    memory.mv("/ckpt/iter_0000010", "/ckpt/iter_0000020", recursive=True)
    with pytest.raises(mtt_convert.IncompleteError, match="iter_0000010 is not there"):
        mtt_convert.open_checkpoint("memory://ckpt")


def test_a_hugging_face_folder_behind_a_url(
    golden: Golden, memory: fsspec.AbstractFileSystem, tmp_path: Path
) -> None:
    weights(golden(TORCH), tmp_path / "hf")
    memory.put(f"{tmp_path}/hf/", "/hf", recursive=True)
    mtt_convert.convert("memory://hf", tmp_path / "new", to="torch", tp=2)
    assert mtt_convert.diff(tmp_path / "new", tmp_path / "hf").differences == ()
    assert mtt_convert.diff("memory://hf", tmp_path / "hf").differences == ()


@pytest.mark.parametrize("kind", ["torch", "torch_dist"])
def test_a_web_server_gives_what_files_give(kind: str, golden: Golden, tmp_path: Path) -> None:
    local = weights(golden(NAMES[kind]), tmp_path / "local")
    with serving(Site(golden(NAMES[kind]))) as site:
        assert weights(site.url, tmp_path / "remote") == local
        assert weights(f"{site.url}/iter_0000010/", tmp_path / "one") == local


def test_inspecting_behind_a_url_reads_a_fraction(tmp_path: Path) -> None:
    """A checkpoint of 1 GB, of which less than a hundredth is sent."""
    from tests.convert.sparse import llama, write_torch

    num_bytes = write_torch(tmp_path, llama(num_layers=8, hidden_size=2048), tp=2, pp=2)
    assert num_bytes > 1 << 30
    with serving(Site(tmp_path)) as site:
        checkpoint = mtt_convert.open_checkpoint(site.url)
        assert checkpoint.num_bytes > 1 << 30
        assert site.num_bytes < num_bytes / 100


REMOTE = {
    "torch": TORCH,
    "layers": "legacy/megatron-deepspeed-6acc370a-gpt2-tp2pp2",
    "module": "legacy/megatron-deepspeed-6acc370a-NOPIPE-gpt2-tp2pp1",
    "universal": "legacy/universal-6acc370a-gpt2-from-ZERO1bf16-tp2dp2",
}


@pytest.mark.parametrize("kind", REMOTE)
def test_ranks_are_opened_several_at_a_time(kind: str, golden: Golden) -> None:
    with serving(Site(golden(REMOTE[kind]), delay=0.005)) as site:
        remote = mtt_convert.open_checkpoint(site.url)
        assert site.most_files_at_once > 1
    local = mtt_convert.open_checkpoint(golden(REMOTE[kind]))
    assert list(remote.tensors) == list(local.tensors)
    assert [t.shape for t in remote.tensors.values()] == [t.shape for t in local.tensors.values()]


def test_converting_reads_each_byte_about_once(golden: Golden, tmp_path: Path) -> None:
    root = golden(TORCH)
    total = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    with serving(Site(root)) as site:
        mtt_convert.open_checkpoint(site.url)
        opening = site.num_bytes
        assert opening < total  # parts of the files only, though these are small
        weights(site.url, tmp_path / "out", num_workers=2)
        assert site.num_bytes - 2 * opening < 1.1 * total


def test_a_server_without_ranges_is_refused_and_not_downloaded(
    golden: Golden, tmp_path: Path
) -> None:
    with (
        serving(Site(golden(TORCH), ranges=False)) as site,
        pytest.raises(HubError, match="cannot be read by range") as caught,
    ):
        mtt_convert.open_checkpoint(site.url)
    assert caught.value.exit_code == 5
    assert "copy the checkpoint" in (caught.value.fix or "")


def test_a_connection_that_breaks_once_is_tried_again(golden: Golden, tmp_path: Path) -> None:
    path = "/iter_0000010/mp_rank_01_000/model_optim_rng.pt"
    with serving(Site(golden(TORCH), fail_once={path})) as site:
        assert mtt_convert.open_checkpoint(site.url).iteration == 10
        assert not site.fail_once


@pytest.mark.parametrize(
    ("code", "message"), [(401, "may not be read"), (403, "may not be read"), (500, "be reached")]
)
def test_answers_that_are_no_files(code: int, message: str, golden: Golden) -> None:
    with serving(Site(golden(TORCH), status={code: "mp_rank_01_000/model"})) as site:
        exit_code, _, err = run("inspect", site.url)
    assert exit_code == 5
    assert err.startswith("error: http://127.0.0.1")
    assert message in err.splitlines()[0]
    assert "fix:" in err


def test_a_place_that_is_not_there(golden: Golden, memory: fsspec.AbstractFileSystem) -> None:
    with serving(Site(golden(TORCH))) as site:
        for url in (f"{site.url}/nothing", "memory://nothing"):
            code, _, err = run("inspect", url)
            assert code == 5
            assert f"error: {url} was not found" in err


def test_nobody_answers() -> None:
    code, _, err = run("inspect", "http://127.0.0.1:9/ckpt")
    assert code == 5
    assert "error: http://127.0.0.1:9/ckpt cannot be reached" in err
    assert "check the network" in err


class TestHub:
    """`hf://owner/repo[@revision][/folder]`."""

    @pytest.fixture
    def repo(self, hub: Site, golden: Golden) -> str:
        shutil.copytree(golden(TORCH), hub.root / "owner" / "name")
        shutil.copytree(golden(TORCH_DIST), hub.root / "owner" / "name" / "other")
        return "hf://owner/name"

    @pytest.mark.parametrize(
        ("suffix", "format"),
        [("", "torch"), ("@v2", "torch"), ("/other", "torch_dist"), ("@v2/other", "torch_dist")],
    )
    def test_a_repository_gives_what_files_give(
        self, suffix: str, format: str, repo: str, golden: Golden, tmp_path: Path
    ) -> None:
        code, out, err = run("convert", repo + suffix, tmp_path / "out", "--tokenizer", "none")
        assert (code, err) == (0, "")
        assert f"from         {format}, TP2 x PP2" in out
        name = TORCH if format == "torch" else TORCH_DIST
        local = weights(golden(name), tmp_path / "local")
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == local

    def test_another_revision(self, repo: str) -> None:
        code, _, err = run("inspect", f"{repo}@gone")
        assert code == 5
        assert f"error: {repo}@gone was not found" in err

    def test_a_private_or_missing_repository(self, hub: Site) -> None:
        code, _, err = run("inspect", "hf://owner/private")
        assert code == 5
        assert "error: hf://owner/private was not found" in err
        assert "hf auth login" in err

    @pytest.mark.parametrize("url", ["hf://", "hf://owner", "hf://owner/", "hf://owner@main"])
    def test_a_url_without_a_repository(self, url: str, hub: Site) -> None:
        code, _, err = run("inspect", url)
        assert code == 2
        assert "names no repository" in err and "hf://owner/repo" in err

    def test_a_gated_repository(self, hub: Site, repo: str) -> None:
        hub.status = {403: "/resolve/"}
        code, _, err = run("inspect", repo)
        assert code == 5
        assert "may not be read" in err
        assert "hf auth login" in err

    def test_offline(self, hub: Site, repo: str, monkeypatch: pytest.MonkeyPatch) -> None:
        import huggingface_hub

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        code, _, err = run("inspect", repo)
        assert code == 5
        assert "cannot be reached" in err
        assert "unset HF_HUB_OFFLINE" in err


@pytest.mark.parametrize(
    ("url", "module", "package"),
    [("s3://b/c", "s3fs", "s3fs"), ("gs://b/c", "gcsfs", "gcsfs"), ("az://b/c", "adlfs", "adlfs")],
)
def test_a_missing_package_is_named_with_the_command(
    url: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    code, _, err = run("inspect", url)
    assert code == 3
    assert f"fix:      pip install {package}\n" in err
    with pytest.raises(UnsupportedError):
        mtt_convert.open_checkpoint(url)


def test_an_unknown_kind_of_url() -> None:
    with pytest.raises(UsageError, match="no place mtt can read from"):
        mtt_convert.open_checkpoint("nowhere://b/c")


def test_a_checkpoint_cannot_send_mtt_anywhere(golden: Golden, tmp_path: Path) -> None:
    """A tokenizer that a checkpoint names by URL is not asked for."""
    from tests.convert.surgery import copy_of, set_arguments

    root = copy_of(golden, TORCH, tmp_path)
    with serving(Site(tmp_path)) as site:
        set_arguments(root, tokenizer_model=f"{site.url}/tokenizer.json", vocab_file=site.url)
        mtt_convert.convert(root, tmp_path / "out")
        assert site.num_bytes == 0


def test_paths_of_this_machine_stay_local(golden: Golden, tmp_path: Path) -> None:
    root = golden(TORCH)
    assert mtt_convert.open_checkpoint(f"file://{root}").folder == str(root / "iter_0000010")
    assert sources.absolute(f"file://{root}") == str(root)
    assert not sources.is_remote(f"file://{root}")
    assert not sources.is_remote("a:b")
    assert sources.relative(os.path.join(root, "x"), str(root)) == "x"


def test_a_tensor_is_read_ahead_in_order(memory: fsspec.AbstractFileSystem) -> None:
    """Windows of a long file come from few requests, and hold its bytes."""
    from mtt_convert.dtypes import DTYPES
    from mtt_convert.reading import FileReader, stream

    data = os.urandom(5 << 20)
    memory.pipe_file("/long", data)
    tensor = LazyTensor.in_file(DTYPES["uint8"], (len(data) - 3,), "memory://long", 3)
    with FileReader() as reader:
        windows = [bytes(window) for window in stream(tensor, reader, 1 << 18)]
    assert b"".join(windows) == data[3:]
