"""What mtt writes is what Megatron-Core writes, but for a list of differences with reasons.

Each golden is converted to its own layout, format and spelling, and compared with itself.
"""

from __future__ import annotations

import argparse
import io
import pickle
import re
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from mtt_convert import convert
from tests.convert.megatron_differences import (
    Difference,
    differences,
    iteration_folder,
    load,
    stored_bytes,
)
from tests.convert.surgery import Golden, copy_of, edited, edited_metadata

LAYOUTS: dict[str, dict[str, Any]] = {
    "mcore/gpt/ref/torch": {},
    "mcore/gpt/tp2pp2/torch": {"tp": 2, "pp": 2},
    "mcore/gpt/tp2pp2/torch_dist": {"tp": 2, "pp": 2},
    "mcore/gpt/tp2pp2vpp2/torch": {"tp": 2, "pp": 2, "vpp": 2},
    "mcore/gpt/distopt_tp2pp1/torch": {"tp": 2},
    "mcore/gpt_bf16/tp2pp2/torch": {"tp": 2, "pp": 2},
    "mcore/gpt_bf16/tp2pp2/torch_dist": {"tp": 2, "pp": 2},
    "mcore/llama/tp1pp2/torch": {"pp": 2},
    "mcore/llama/tp2pp1/torch_dist": {"tp": 2},
    "mcore/llama/tp2pp2vpp2/torch": {"tp": 2, "pp": 2, "vpp": 2},
    "mcore/llama/tp2pp2vpp2/torch_dist": {"tp": 2, "pp": 2, "vpp": 2},
    "mcore/llama_6l/pp2_layout/torch": {
        "pp": 2,
        "pipeline_model_parallel_layout": "Et*2|t|t*2|tL",
    },
    "mcore/nemotron/tp2pp1/torch": {"tp": 2},
    "mcore/nemotron/tp2pp1/torch_dist": {"tp": 2},
    "mcore/qwen/tp2pp2/torch": {"tp": 2, "pp": 2},
    "mcore/qwen/tp2pp2/torch_dist": {"tp": 2, "pp": 2},
    "mcore-te/gpt/tp2pp2/torch": {"tp": 2, "pp": 2},
    "mcore-te/llama/tp2pp2/torch": {"tp": 2, "pp": 2},
    "mcore-te/llama/tp2pp2/torch_dist": {"tp": 2, "pp": 2},
    "mcore/t5/tp2/torch": {"tp": 2},
    "mcore-te/t5_te/tp2/torch_dist": {"tp": 2},
    "mcore/mixtral/ep2/torch": {"ep": 2},
    "mcore/mixtral/tp2ep2/torch": {"tp": 2, "ep": 2},
    "mcore/mixtral/tp2ep2/torch_dist": {"tp": 2, "ep": 2},
    "mcore/mixtral_bf16/grouped_ep2/torch": {"ep": 2},
    "mcore/moe_mixed/ep2/torch": {"ep": 2},
    "mcore/moe_mixed/ep2/torch_dist": {"ep": 2},
    "mcore/mla/tp2pp1/torch": {"tp": 2},
    "mcore/mla/tp2pp1/torch_dist": {"tp": 2},
    "mcore/mtp/tp2pp2/torch": {"tp": 2, "pp": 2},
    "mcore-te/mixtral/grouped_ep2/torch": {"ep": 2},
    "mcore-te/mixtral/grouped_ep2/torch_dist": {"ep": 2},
    "mcore-te/moe_mixed/ep2/torch_dist": {"ep": 2},
    "mcore-te/mla/ep2/torch": {"ep": 2},
}

# Where a difference may be, and why. Every line is needed: see the last test.
ALLOWED = {
    # a model without the state of its training
    r".*\[(optimizer|opt_param_scheduler|rng_state)\] absent": "training state is not carried",
    r"\.metadata\.(storage_data|state_dict_metadata)\[rng_state/.*\] absent": "nor random state",
    r"files": "distrib_optim.pt is the distributed optimizer's",
    r".*\[num_floating_point_operations_so_far\] absent": "a counter of the training run",
    r"args\.(no_save_optim|no_save_rng)": "True: Megatron then does not look for those states",
    # arguments
    r"args\.(model_type|attention_backend) absent": "objects of Megatron's classes: they say "
    "nothing about the model, and the file would need Megatron to be read",
    r"args\.exit_signal absent": "an object of the class signal.Signals, about the training run",
    r"args\.mtt added": "what Megatron has no argument for, the true vocabulary size above all",
    r"args\.(tokenizer_type|vocab_size) absent": "megatron_args.sh names the tokenizer",
    r"args\.(norm_epsilon|apply_layernorm_1p) added": "what releases before 0.16 read",
    r"args\.num_query_groups": "the heads, where without groups Megatron stores an unused 1",
    r"args\.onnx_safe": "False, which is the same as None",
    # files
    r".*\]\.storage_offset": "the distributed optimizer keeps parameters in one flat buffer",
    r".*_extra_state(\]|/shard_[\d.]+_[\d.]+, None, None\] bytes\[0\])": "None, where "
    "Transformer Engine 2 has an empty tensor and 1 has bytes: every release takes None for no FP8 "
    "scales",
    r"\.metadata\.storage_data.*\[transform_descriptors\] added": "None, which torch leaves out",
    r"\.metadata\.state_dict_metadata order": "each rank's objects come before its tensors",
    r"\.metadata\.storage_meta": "the absolute path and the run that saved it",
    r"\.metadata(\.all_local_plans absent| attributes)": "a cache that only saving uses",
}


# Megatron shares what data-parallel ranks have alike out among them, and ranks with other experts
# are such ranks. The chunks are the same, each written by another rank: see the test of their set.
_SHARED_OUT = r"\.metadata\.state_dict_metadata\[.*\]\.\[chunks\]\[\d+\]"


def reason_for(difference: Difference) -> str | None:
    """Which line of ALLOWED has a difference in it."""
    return next((line for line in ALLOWED if re.fullmatch(line, difference.where)), None)


def is_allowed(name: str, difference: Difference) -> bool:
    """Whether a golden's difference is one with a reason."""
    is_shared_out = "ep" in LAYOUTS[name] and re.fullmatch(_SHARED_OUT, difference.where)
    return bool(is_shared_out or reason_for(difference))


@pytest.fixture(scope="module")
def written(golden: Golden, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Each golden converted to what it is already, once."""

    @cache
    def run(name: str) -> Path:
        folder = tmp_path_factory.mktemp("written") / "out"
        convert(golden(name), folder, to=name.rsplit("/", 1)[1], **LAYOUTS[name])
        return folder

    return run


@pytest.mark.parametrize("name", LAYOUTS)
def test_only_allowed_differences(name: str, golden: Golden, written: Callable) -> None:
    found = differences(written(name), golden(name))
    assert [one for one in found if not is_allowed(name, one)] == []


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name.endswith("torch_dist")])
def test_tensors_are_cut_into_the_same_chunks(name: str, golden: Golden, written: Callable) -> None:
    def chunks(root: Path) -> dict[str, list[Any]]:
        metadata = pickle.loads((iteration_folder(root) / ".metadata").read_bytes())
        return {
            fqn: sorted((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks)
            for fqn, entry in metadata.state_dict_metadata.items()
            if hasattr(entry, "chunks")
        }

    assert chunks(written(name)) == chunks(golden(name))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_golden_does_not_differ_from_itself(name: str, golden: Golden) -> None:
    assert differences(golden(name), golden(name)) == []


def _first_rank(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        with edited(iteration_folder(root) / "mp_rank_00" / "model_optim_rng.pt") as content:
            change(content)

    return apply


def _metadata(change: Callable[[Any], object]) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        with edited_metadata(root) as metadata:
            change(metadata)

    return apply


def _common(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        with edited(iteration_folder(root) / "common.pt") as content:
            change(content)

    return apply


def _swap_places(metadata: Any) -> None:
    """Two chunks of one shape."""
    storage = metadata.storage_data
    first, second = [i for i in storage if i.fqn.endswith("linear_fc2.weight")][:2]
    storage[first], storage[second] = storage[second], storage[first]


_NORM, _PROJ = (
    "decoder.final_layernorm.weight",
    "decoder.layers.0.self_attention.linear_proj.weight",
)
_STACKED = "decoder.layers.mlp.linear_fc2.weight"
_TORCH, _TORCH_DIST = "mcore/nemotron/tp2pp1/torch", "mcore/nemotron/tp2pp1/torch_dist"
CHANGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "a bit": (
        _TORCH,
        _first_rank(lambda c: c["model"][_NORM].view(torch.int32)[3].bitwise_xor_(1)),
        rf".*\[model\]\[{_NORM}\] bits",
    ),
    "order of keys": (
        _TORCH,
        _first_rank(lambda c: c["model"].move_to_end(_PROJ)),
        r".*\[model\] order",
    ),
    "strides": (
        _TORCH,
        _first_rank(lambda c: c["model"].update({_PROJ: c["model"][_PROJ].t().contiguous().t()})),
        r".*linear_proj\.weight\]\.(stride\[\d\]|is_contiguous)",
    ),
    "dtype": (
        _TORCH,
        _first_rank(lambda c: c["model"].update({_NORM: c["model"][_NORM].double()})),
        rf".*\[{_NORM}\].*",
    ),
    "an extra state": (
        _TORCH,
        _first_rank(lambda c: c["model"].pop("output_layer._extra_state")),
        r".*output_layer\._extra_state\] absent",
    ),
    "type of a number": (
        _TORCH,
        _first_rank(lambda c: c.update(checkpoint_version=3)),
        r".*\[checkpoint_version\]",
    ),
    "an argument": (
        _TORCH_DIST,
        _common(lambda c: setattr(c["args"], "rotary_percent", 1.0)),
        r"args\.rotary_percent",
    ),
    "two chunks' places": (_TORCH_DIST, _metadata(_swap_places), rf".*{_STACKED}.* bits"),
    "order of chunks": (
        _TORCH_DIST,
        _metadata(lambda m: m.state_dict_metadata[_STACKED].chunks.reverse()),
        rf".*{_STACKED}\].*chunks.*",
    ),
    "dtype in the metadata": (
        _TORCH_DIST,
        _metadata(
            lambda m: setattr(m.state_dict_metadata[_NORM].properties, "dtype", torch.float16)
        ),
        rf".*{_NORM}\].*properties.*",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_differences_show(
    change: str, golden: Golden, written: Callable, tmp_path: Path
) -> None:
    name, apply, where = CHANGES[change]
    copy = copy_of(lambda _: written(name), name, tmp_path)
    apply(copy)
    found = [one for one in differences(copy, golden(name)) if not reason_for(one)]
    assert found
    assert [one.where for one in found if not re.fullmatch(where, one.where)] == []


@pytest.mark.parametrize("name", LAYOUTS)
def test_torch_reads_the_files_without_megatron(name: str, written: Callable) -> None:
    """As data, mapped into memory or not, and any zip tool finds the checksums right."""
    files = sorted(iteration_folder(written(name)).rglob("*.pt"))
    assert files
    for path in files:
        with torch.serialization.safe_globals([argparse.Namespace]):
            mapped = torch.load(path, weights_only=True, mmap=True)
            assert repr(torch.load(path, weights_only=True)) == repr(mapped)
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name.endswith("torch_dist")])
def test_chunks_fill_their_files(name: str, written: Callable) -> None:
    """Every stored object is a whole file of torch.save, and nothing lies between two of them."""
    folder = iteration_folder(written(name))
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    places = sorted(
        (info.relative_path, info.offset, info.length) for info in metadata.storage_data.values()
    )
    ends: dict[str, int] = {}
    for path, offset, length in places:
        assert offset == ends.get(path, 0), path
        ends[path] = offset + length
    assert ends == {path.name: path.stat().st_size for path in folder.glob("*.distcp")}
    for index in metadata.storage_data:
        data = io.BytesIO(stored_bytes(folder, metadata, index))
        value = torch.load(data, weights_only=True)
        if index.offset is None:
            assert value == [None]
        else:
            assert value.untyped_storage().nbytes() == value.numel() * value.element_size()


def test_every_allowance_is_needed(golden: Golden, written: Callable) -> None:
    found = [
        one
        for name in LAYOUTS
        for one in differences(written(name), golden(name))
        if reason_for(one) or not is_allowed(name, one)
    ]
    assert {reason_for(one) for one in found} == set(ALLOWED)


def test_arguments_are_plain(written: Callable) -> None:
    """Any Python reads them: no class of Megatron, nor of signal or enum."""
    folder = iteration_folder(written("mcore/gpt/tp2pp2/torch_dist"))
    kinds = {type(value).__name__ for value in vars(load(folder / "common.pt")["args"]).values()}
    assert kinds <= {"NoneType", "bool", "int", "float", "str", "list", "tuple", "dict", "dtype"}
