"""NeMo archives, NeMo 2 folders and Megatron-Bridge folders: names, YAML, and nothing unpacked.

The weights are those of real checkpoints of Megatron-Core, repacked as these programs do.
"""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
import torch
import yaml

from mtt_convert import (
    CorruptError,
    IncompleteError,
    UnsafePickleError,
    UnsupportedError,
    UsageError,
    convert,
    open_checkpoint,
)
from tests.convert.surgery import TORCH, edited, edited_metadata, megatron_modules, run

Golden = Callable[[str], Path]
TINY = "mcore/tiny/core_0.16/singleton"

CONFIG_1 = {
    "mcore_gpt": True,
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 2,
    "encoder_seq_length": 32,
    "max_position_embeddings": 64,
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 160,
    "num_attention_heads": 8,
    "num_query_groups": 2,
    "kv_channels": None,
    "normalization": "rmsnorm",
    "layernorm_epsilon": 1e-6,
    "bias": False,
    "activation": "fast-swiglu",
    "position_embedding_type": "rope",
    "rotary_percentage": 1.0,
    "share_embeddings_and_output_weights": False,
    "transformer_block_type": "pre_ln",
    "precision": "bf16",
    "tokenizer": {"library": "megatron", "type": "GPT2BPETokenizer"},
}
PROVIDER = {
    "_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider",
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 4,
    "ffn_hidden_size": 24,
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-6,
    "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
    "gated_linear_unit": True,
    "bias_activation_fusion": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "share_embeddings_and_output_weights": False,
    "seq_length": 16,
    "vocab_size": 99,
    "tensor_model_parallel_size": 2,
    "params_dtype": {"_target_": "torch.float32", "_call_": False},
}


def archive(
    golden: Golden, path: Path, config: dict, prefix: str = "model.", mode: str = "w:"
) -> Path:
    """A .nemo of the llama golden: TP 2 x PP 2, the ranks' files as NeMo names them."""
    root = golden("mcore-te/llama/tp2pp2/torch") / "iter_0000010"
    with tarfile.open(path, mode) as tar:

        def add(name: str, data: bytes) -> None:
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

        add("model_config.yaml", yaml.safe_dump(config).encode())
        add("0a1b_vocab.json", b"{}")
        for tp in (0, 1):
            for pp in (0, 1):
                with megatron_modules():
                    file = root / f"mp_rank_{tp:02d}_{pp:03d}" / "model_optim_rng.pt"
                    content = torch.load(file, weights_only=False)
                buffer = io.BytesIO()
                torch.save({prefix + k: v for k, v in content["model"].items()}, buffer)
                name = f"tp_rank_{tp:02d}_pp_rank_{pp:03d}/model_weights.ckpt"
                add(name, buffer.getvalue())
    return path


def weights(source: object, folder: Path, **options: object) -> bytes:
    convert(source, folder, tokenizer="none", vocab_padding="keep", **options)
    return (folder / "model.safetensors").read_bytes()


class TestArchives:
    """`.nemo`, a tar read where it stands."""

    @pytest.mark.parametrize("prefix", ["model.", "model.module.", ""])
    def test_it_gives_what_the_files_in_it_give(
        self, prefix: str, golden: Golden, tmp_path: Path
    ) -> None:
        path = archive(golden, tmp_path / "llama.nemo", CONFIG_1, prefix)
        assert weights(path, tmp_path / "a") == weights(golden(TORCH), tmp_path / "b")
        ours, theirs = (open_checkpoint(p).architecture for p in (path, golden(TORCH)))
        differing = [n for n in ours.__dataclass_fields__ if getattr(ours, n) != getattr(theirs, n)]
        # What NeMo's file says nothing about, or says of training.
        assert set(differing) <= {
            "vocab_size",
            "attention_dropout",
            "hidden_dropout",
            "params_dtype",
        }

    def test_the_only_archive_of_a_folder_is_meant(self, golden: Golden, tmp_path: Path) -> None:
        archive(golden, tmp_path / "llama.nemo", CONFIG_1)
        code, out, _ = run("inspect", tmp_path)
        assert code == 0
        assert "format       nemo" in out
        assert "a tar of model_config.yaml and 4 model_weights.ckpt" in out
        assert "layout       TP2 x PP2" in out

    def test_only_options_nobody_knows_are_warned_of(self, golden: Golden, tmp_path: Path) -> None:
        said = {"megatron_amp_O2": True, "target": "x.MegatronGPTModel", "new_attention": True}
        path = archive(golden, tmp_path / "llama.nemo", {**CONFIG_1, **said})
        (warning,) = open_checkpoint(path).warnings
        assert "does not know: new_attention;" in warning

    def test_from_a_url(self, golden: Golden, tmp_path: Path) -> None:
        archive(golden, tmp_path / "llama.nemo", CONFIG_1)
        memory = fsspec.filesystem("memory")
        memory.put(str(tmp_path / "llama.nemo"), "/models/llama.nemo")
        remote = weights("memory://models/llama.nemo", tmp_path / "a")
        memory.rm("/models", recursive=True)
        assert remote == weights(golden(TORCH), tmp_path / "b")

    def test_a_compressed_one_is_refused(self, golden: Golden, tmp_path: Path) -> None:
        path = archive(golden, tmp_path / "llama.nemo", CONFIG_1, mode="w:gz")
        with pytest.raises(UnsupportedError, match="gunzip"):
            open_checkpoint(path)

    def test_a_rank_missing(self, golden: Golden, tmp_path: Path) -> None:
        whole = archive(golden, tmp_path / "whole.nemo", CONFIG_1)
        with tarfile.open(whole) as old, tarfile.open(tmp_path / "part.nemo", "w:") as new:
            for member in old:
                if "tp_rank_01_pp_rank_000" not in member.name:
                    new.addfile(member, old.extractfile(member))
        with pytest.raises(IncompleteError, match="weights of 3 ranks"):
            open_checkpoint(tmp_path / "part.nemo")

    @pytest.mark.parametrize("kept", [0.5, 0.001])
    def test_one_cut_off(self, kept: float, golden: Golden, tmp_path: Path) -> None:
        path = archive(golden, tmp_path / "llama.nemo", CONFIG_1)
        data = path.read_bytes()
        path.write_bytes(data[: int(kept * len(data))])
        with pytest.raises((CorruptError, IncompleteError)):
            open_checkpoint(path)

    @pytest.mark.parametrize(
        "odd",
        [
            {"activation": "geglu"},
            {"transformer_block_type": "post_ln"},
            {"normalize_attention_scores": False},
            {"position_embedding_type": "alibi"},
            {"softmax_type": "learnable"},
        ],
        ids=str,
    )
    def test_what_it_may_say_that_mtt_cannot(
        self, odd: dict, golden: Golden, tmp_path: Path
    ) -> None:
        path = archive(golden, tmp_path / "llama.nemo", {**CONFIG_1, **odd})
        with pytest.raises(UnsupportedError, match=str(next(iter(odd.values())))):
            open_checkpoint(path)

    def test_a_distributed_checkpoint_in_it_is_named(self, tmp_path: Path) -> None:
        with tarfile.open(tmp_path / "a.nemo", "w:") as tar:
            for name, data in (
                ("model_config.yaml", yaml.safe_dump(CONFIG_1).encode()),
                ("model_weights/metadata.json", b"{}"),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        code, _, err = run("inspect", tmp_path / "a.nemo")
        assert code == 3
        assert "tar -xf a.nemo" in err


class TestFolders:
    """Distributed checkpoints whose arguments are in a YAML file."""

    @pytest.fixture
    def bridge(self, golden: Golden, tmp_path: Path) -> Path:
        root = Path(shutil.copytree(golden(TINY), tmp_path / "bridge"))
        with edited(root / "iter_0000010" / "common.pt") as common:
            del common["args"]
        self.say(root, PROVIDER)
        return root

    def say(self, root: Path, config: dict) -> None:
        text = yaml.safe_dump({"model": config, "train": {"train_iters": 5}})
        (root / "iter_0000010" / "run_config.yaml").write_text(text)

    def test_megatron_bridge(self, bridge: Path, golden: Golden, tmp_path: Path) -> None:
        assert weights(bridge, tmp_path / "a") == weights(golden(TINY), tmp_path / "b")
        code, out, _ = run("inspect", bridge)
        assert code == 0
        assert "run_config.yaml of Megatron-Bridge says what the model is" in out
        assert "mlp          24, gated silu" in out

    def test_nemo_2(self, bridge: Path, golden: Golden, tmp_path: Path) -> None:
        root = tmp_path / "nemo2"
        shutil.move(bridge / "iter_0000010", root / "weights")
        (root / "weights" / "run_config.yaml").unlink()
        (root / "context").mkdir()
        tagged = yaml.safe_dump({"config": PROVIDER}).replace(
            "config:", "_target_: !!python/name:os.system ''\nconfig:"
        )
        (root / "context" / "model.yaml").write_text(tagged)
        (root / "iter_0000010").mkdir()
        shutil.move(root / "weights" / ".metadata", root / "iter_0000010" / ".metadata")
        with edited_metadata(root) as metadata:
            entries = metadata.state_dict_metadata
            metadata.state_dict_metadata = {f"module.{n}": e for n, e in entries.items()}
            stored = metadata.storage_data
            metadata.storage_data = {
                type(i)(f"module.{i.fqn}", i.offset, i.index): place for i, place in stored.items()
            }
        shutil.move(root / "iter_0000010" / ".metadata", root / "weights" / ".metadata")
        (root / "iter_0000010").rmdir()
        assert weights(root, tmp_path / "a") == weights(golden(TINY), tmp_path / "b")
        assert weights(root / "weights", tmp_path / "c") == weights(golden(TINY), tmp_path / "d")
        assert "model.yaml of NeMo 2" in "; ".join(open_checkpoint(root).evidence)

    def test_what_a_file_leaves_to_a_class_is_asked_for(self, bridge: Path) -> None:
        less = {k: v for k, v in PROVIDER.items() if k not in ("activation_func", "normalization")}
        self.say(bridge, less)
        with pytest.raises(UsageError, match="--set"):
            open_checkpoint(bridge)

    @pytest.mark.parametrize(
        ("activation", "gated", "found"),
        [("torch.nn.functional.silu", False, "silu"), ("torch.nn.functional.gelu", True, "gelu")],
    )
    def test_other_activations(
        self, activation: str, gated: bool, found: str, bridge: Path
    ) -> None:
        function = {"_target_": activation, "_call_": False}
        self.say(bridge, {**PROVIDER, "activation_func": function, "gated_linear_unit": gated})
        with pytest.raises(UnsupportedError, match=f"activation_func = {found}"):
            open_checkpoint(bridge)

    def test_what_it_may_say_that_mtt_cannot(self, bridge: Path) -> None:
        self.say(bridge, {**PROVIDER, "num_moe_experts": 8, "moe_expert_capacity_factor": 1.0})
        with pytest.raises(UnsupportedError, match="drop tokens beyond a capacity"):
            open_checkpoint(bridge)


def test_a_pickle_in_an_archive_is_read_as_data(tmp_path: Path) -> None:
    class Bad:
        def __reduce__(self) -> tuple:
            import os

            return os.system, ("exit 1",)

    buffer = io.BytesIO()
    torch.save({"model.x": Bad()}, buffer)
    with tarfile.open(tmp_path / "a.nemo", "w:") as tar:
        for name, data in (
            ("model_config.yaml", yaml.safe_dump(CONFIG_1).encode()),
            ("model_weights.ckpt", buffer.getvalue()),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with pytest.raises(UnsafePickleError):
        open_checkpoint(tmp_path / "a.nemo")
