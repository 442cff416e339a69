"""The sample: a written folder is a model for everyone, with the package and without it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mtt_convert import convert
from mtt_convert.logits import compare_logits

SAMPLE = Path(__file__).parents[2] / "convert" / "sample"
EXAMPLES = json.loads((SAMPLE / "prompts.json").read_text())
STRANGER = """
import sys
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
folder, prompt = sys.argv[1:]
assert not any(name.startswith(("modeling_mtt", "mtt_convert")) for name in sys.modules)
options = {"trust_remote_code": True, "local_files_only": True}
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, **options)
assert AutoModel.from_pretrained(folder, **options).config.model_type == "mtt"
assert AutoConfig.from_pretrained(folder, **options).auto_map
output = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=64)
print("TEXT", tokenizer.decode(output[0], skip_special_tokens=True))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("sample") / "hf"
    convert(SAMPLE, target)
    return target


def test_the_sample_is_small() -> None:
    assert sum(f.stat().st_size for f in SAMPLE.rglob("*") if f.is_file()) < 2_000_000


def test_logits_are_those_of_megatron(folder: Path) -> None:
    assert compare_logits(folder, SAMPLE / "reference.npz") < 1e-4
    assert compare_logits(SAMPLE, SAMPLE / "reference.npz") < 1e-4


def test_auto_classes_and_generate(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import modeling_mtt  # noqa: F401

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer([e["prompt"] for e in EXAMPLES], return_tensors="pt", padding=True)
    output = model.generate(**inputs, max_new_tokens=64)
    texts = tokenizer.batch_decode(output, skip_special_tokens=True)
    assert texts == [example["text"] for example in EXAMPLES]


def test_the_folder_loads_where_the_package_is_not_installed(folder: Path, tmp_path: Path) -> None:
    """A stranger's Python: transformers and torch, but none of our packages."""
    blocker = tmp_path / "sitecustomize.py"
    blocker.write_text(
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('modeling_mtt', 'mtt_convert'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
    )
    model = shutil.copytree(folder, tmp_path / "model")
    example = EXAMPLES[1]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", STRANGER, str(model), example["prompt"]],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.partition("TEXT ")[2].strip() == example["text"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_casting_rounds_as_torch_does(dtype: str, folder: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    convert(SAMPLE, tmp_path / "cast", dtype=dtype)
    assert json.loads((tmp_path / "cast" / "config.json").read_text())["dtype"] == dtype
    exact, cast = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "cast"))
    assert exact.keys() == cast.keys()
    for name, values in exact.items():
        assert torch.equal(cast[name], values.to(getattr(torch, dtype))), name


def test_several_files_hold_the_same_tensors(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    result = convert(SAMPLE, tmp_path / "many", max_shard_size="200KB", num_workers=3)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(result.hashes) > 3
    merged: dict = {}
    for name in sorted(result.hashes):
        assert (tmp_path / "many" / name).stat().st_size < 250_000
        merged |= load_file(tmp_path / "many" / name)
    single = load_file(folder / "model.safetensors")
    assert merged.keys() == single.keys() == index["weight_map"].keys()
    assert all(bool((merged[name] == single[name]).all()) for name in single)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in single.values())
    assert compare_logits(tmp_path / "many", SAMPLE / "reference.npz") < 1e-4


def test_same_input_same_bytes(folder: Path, tmp_path: Path) -> None:
    convert(SAMPLE, tmp_path / "again", num_workers=2)
    for path in sorted(folder.iterdir()):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name
