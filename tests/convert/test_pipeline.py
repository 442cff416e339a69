"""Checkpoints that leave something to the user, opened and converted as a whole."""

from pathlib import Path

import pytest
import torch

from mtt_convert import UsageError, convert, open_checkpoint
from mtt_convert.logits import compare_logits
from tests.convert.surgery import TORCH, Golden, copy_of, edited, shards

# What no shape tells about the golden llama.
WORDS = {
    "num_attention_heads": 8,
    "layernorm_epsilon": 1e-6,
    "layernorm_zero_centered_gamma": False,
    "swiglu": True,
    "position_embedding_type": "rope",
    "max_position_embeddings": 64,
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "use_rope_scaling": False,
    "vocab_size": 500,
}


@pytest.fixture
def without_args(golden: Golden, tmp_path: Path) -> Path:
    root = copy_of(golden, TORCH, tmp_path)
    for path in shards(root):
        with edited(path) as content:
            del content["args"]
    return root


def test_what_shapes_do_not_tell_is_asked_for_by_name(without_args: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        convert(without_args, tmp_path / "out")
    text = str(error.value)
    for name in ("num_attention_heads", "layernorm_epsilon", "--set"):
        assert name in text
    assert not (tmp_path / "out").exists()


def test_with_the_answers_it_is_the_same_model(
    without_args: Path, golden: Golden, tmp_path: Path
) -> None:
    convert(without_args, tmp_path / "out", overrides=WORDS)
    convert(golden(TORCH), tmp_path / "direct")
    names = ["out/model.safetensors", "direct/model.safetensors"]
    assert (tmp_path / names[0]).read_bytes() == (tmp_path / names[1]).read_bytes()
    assert compare_logits(tmp_path / "out", golden("mcore/llama/logits.npz")) < 1e-4


def test_an_hf_name_gets_a_suggestion(golden: Golden) -> None:
    with pytest.raises(UsageError, match="num_query_groups"):
        open_checkpoint(golden(TORCH), overrides={"num_key_value_heads": 2})


def test_one_iteration_of_several(golden: Golden, tmp_path: Path) -> None:
    root = copy_of(golden, TORCH, tmp_path)
    later = root / "iter_0000020"
    (root / "iter_0000010").rename(later)
    for path in later.glob("*/model_optim_rng.pt"):
        with edited(path) as content:
            content["iteration"] = 20
            name = "decoder.final_layernorm.weight"
            for model in (content["model0"], content["model1"]):
                if name in model:
                    model[name] = torch.zeros_like(model[name])
    copy_of(golden, TORCH, tmp_path / "more")
    (tmp_path / "more" / "checkpoint" / "iter_0000010").rename(root / "iter_0000010")
    assert open_checkpoint(root).iteration == 10
    assert open_checkpoint(root).iterations == (10, 20)
    assert open_checkpoint(root, iteration=20).iteration == 20
    assert open_checkpoint(later).iteration == 20
    (root / "latest_checkpointed_iteration.txt").unlink()
    with pytest.raises(UsageError, match="2 iterations"):
        open_checkpoint(root)


def test_a_release_has_no_iteration(golden: Golden, tmp_path: Path) -> None:
    root = copy_of(golden, TORCH, tmp_path)
    (root / "iter_0000010").rename(root / "release")
    (root / "latest_checkpointed_iteration.txt").write_text("release")
    for path in (root / "release").glob("*/model_optim_rng.pt"):
        with edited(path) as content:
            content["iteration"] = "release"
    checkpoint = open_checkpoint(root)
    assert (checkpoint.iteration, Path(checkpoint.folder).name) == (None, "release")
