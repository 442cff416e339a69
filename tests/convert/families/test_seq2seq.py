"""T5 of Megatron and encoder-decoders of ours: there and back, by bytes and by logits."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import mtt_convert
from modeling_mtt import MTTForConditionalGeneration, MTTSeq2SeqConfig
from mtt_convert import LayoutError, MTTError, UnsupportedError, UsageError, convert, from_megatron
from mtt_convert.cli import main
from mtt_convert.families import FAMILIES, mtt_seq2seq
from mtt_convert.logits import compare_logits
from mtt_convert.mapping import RuleTable
from mtt_convert.ops import SplitKV
from mtt_convert.reading import FileReader, stream
from tests.convert import derived
from tests.convert.families.seq2seq_models import MODELS, Model
from tests.convert.surgery import Golden, run_apart

CORE, TE, LEGACY = (
    "mcore/t5/tp2/torch",
    "mcore-te/t5_te/tp2/torch_dist",
    "legacy/core_v0.12.0-t5-tp1pp1",
)
LOGITS = {
    CORE: "mcore/t5/logits.npz",
    TE: "mcore-te/t5_te/logits.npz",
    LEGACY: "legacy/reference/t5.npz",
}
# A T5 without norms at its ends has logits of about 40; Megatron's own differ by 4e-5 over layouts.
TOLERANCE = 4e-4


def options(name: str) -> dict[str, Any]:
    """The true vocabulary is not in the legacy one's arguments."""
    return {"tokenizer": "none", "overrides": {"vocab_size": 497} if name == LEGACY else None}


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def folders(golden: Golden, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Each golden converted to a Hugging Face folder once."""
    done: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in done:
            done[name] = tmp_path_factory.mktemp("t5") / "hf"
            convert(golden(name), done[name], **options(name))
        return done[name]

    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Model], Path]:
    """Each random model saved once."""
    done: dict[str, Path] = {}

    def folder(model: Model) -> Path:
        if model.name not in done:
            done[model.name] = tmp_path_factory.mktemp("ours") / "hf"
            model.save(done[model.name])
        return done[model.name]

    return folder


# ---- goldens


@pytest.mark.parametrize("name", LOGITS)
def test_logits_are_those_of_megatron(
    name: str, golden: Golden, folders: Callable, record_property: Callable
) -> None:
    difference = compare_logits(folders(name), golden(LOGITS[name]))
    record_property("summary", f"{name}: largest difference {difference:.2g}")
    assert difference < TOLERANCE


@pytest.mark.parametrize("name", LOGITS)
def test_from_megatron_is_the_same_model(name: str, golden: Golden, folders: Callable) -> None:
    direct = from_megatron(golden(name), **options(name))
    stored = AutoModelForSeq2SeqLM.from_pretrained(folders(name))
    assert type(direct) is type(stored) is MTTForConditionalGeneration
    left, right = direct.state_dict(), stored.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)
    assert direct.config.final_norm is (name != CORE)


@pytest.mark.parametrize(("name", "model"), [(CORE, "mcore/t5"), (TE, "mcore-te/t5_te")])
def test_the_reference_tensors_are_reached(name: str, model: str, golden: Golden) -> None:
    reference = load_file(golden(f"{model}/reference_megatron.safetensors"))
    checkpoint = mtt_convert.open_checkpoint(golden(name))
    fused = {
        "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
        "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    }
    twice = {"position_embeddings.weight", "lm_head.output_layer.bias"}
    found = set()
    with FileReader() as reader:
        for key, tensor in reference.items():
            if key in twice:
                continue
            for separate, together in fused.items():
                key = key.replace(separate, together)
            ours = b"".join(bytes(part) for part in stream(checkpoint.tensors[key], reader))
            assert ours == tensor.contiguous().view(torch.uint8).numpy().tobytes(), key
            found.add(key)
    assert found == set(checkpoint.tensors)
    assert (
        checkpoint.dropped["second name"]
        == (
            "lm_head.output_layer.bias",
            "position_embeddings.weight",
        )
        or set(checkpoint.dropped["second name"]) == twice
    )


@pytest.mark.parametrize("name", LOGITS)
@pytest.mark.parametrize(("to", "tp"), [("torch", 1), ("torch", 4), ("torch_dist", 2)])
def test_every_format_and_layout_gives_the_same_file(
    name: str, to: str, tp: int, golden: Golden, folders: Callable, tmp_path: Path
) -> None:
    convert(golden(name), tmp_path / "megatron", to=to, tp=tp, **options(name))
    convert(tmp_path / "megatron", tmp_path / "hf", tokenizer="none")
    assert digest(tmp_path / "hf") == digest(folders(name))
    assert mtt_convert.diff(golden(name), tmp_path / "megatron").differences == ()
    assert mtt_convert.diff(tmp_path / "megatron", folders(name)).differences == ()


@pytest.mark.parametrize("name", [CORE, TE])
def test_a_key_taken_for_a_value_shows_in_the_logits(
    name: str, golden: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have the same shape, so that nothing but logits can tell."""
    swapped = [
        replace(rule, target=rule.target.replace("{k_proj,v_proj}", "{v_proj,k_proj}"))
        for rule in mtt_seq2seq._TABLES[False].rules
    ]
    assert sum(isinstance(rule.op, SplitKV) for rule in swapped) == 1
    family = replace(mtt_seq2seq.FAMILY, rules=lambda a: RuleTable(*swapped))
    monkeypatch.setitem(FAMILIES, "mtt_seq2seq", family)
    convert(golden(name), tmp_path / "hf", tokenizer="none")
    assert compare_logits(tmp_path / "hf", golden(LOGITS[name])) > 100 * TOLERANCE


@pytest.mark.parametrize("order", ["block", "element"])
def test_rows_of_another_order_show_in_the_logits(
    order: str, golden: Golden, tmp_path: Path
) -> None:
    convert(golden(LEGACY), tmp_path / "hf", qkv_order=order, **options(LEGACY))
    assert compare_logits(tmp_path / "hf", golden(LOGITS[LEGACY])) > 100 * TOLERANCE


# ---- checkpoints that no golden has, cut from one


def old_rows(tensor: torch.Tensor, splits: int, version: float) -> torch.Tensor:
    """Rows as `checkpoint_version` 0 or 1 had them: fix_query_key_value_ordering, undone."""
    rows = tensor.view(4, splits, 16, *tensor.shape[1:])
    order = (1, 0, 2) if version == 0 else (0, 2, 1)
    return rows.permute(*order, *range(3, rows.dim())).reshape(tensor.shape).contiguous()


@pytest.mark.parametrize("version", [0, 1.0])
def test_rows_of_old_checkpoint_versions(
    version: float, golden: Golden, folders: Callable, tmp_path: Path
) -> None:
    root = derived.copied(golden(LEGACY), tmp_path / "old")
    with derived.edited(root / "iter_0000100/mp_rank_00/model_optim_rng.pt") as content:
        content["checkpoint_version"] = version
        for stack in ("encoder", "decoder"):
            state = content["model"]["language_model"][stack]
            for key, tensor in list(state.items()):
                for part, splits in ((".query_key_value.", 3), (".key_value.", 2)):
                    if part in key and tensor is not None:
                        state[key] = old_rows(tensor, splits, version)
    convert(root, tmp_path / "hf", **options(LEGACY))
    assert digest(tmp_path / "hf") == digest(folders(LEGACY))


def flattened(state: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one of dotted names."""
    flat: dict[str, Any] = {}
    for key, value in state.items():
        flat |= (
            flattened(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else {f"{prefix}{key}": value}
        )
    return flat


def pipeline(root: Path, *, split: int, legacy: bool) -> None:
    """A checkpoint of one rank as two stages of an encoder and one of a decoder would save it.

    (pre_process and post_process of get_model, megatron/training/training.py at core_v0.11.0.)
    """
    source = next(root.glob("iter_*/mp_rank_00"))
    content = derived.read(source / "model_optim_rng.pt")
    flat = {
        key: value
        for key, value in flattened(content["model"]).items()
        if not key.endswith("_extra_state")
    }
    start = "language_model." if legacy else ""
    stages: list[dict[str, Any]] = [{}, {}, {}]
    for key, value in flat.items():
        name = key.removeprefix(start)
        if name.startswith("encoder.layers."):
            _, _, number, rest = name.split(".", 3)
            stage, local = (0, int(number)) if int(number) < split else (1, int(number) - split)
            stages[stage][f"{start}encoder.layers.{local}.{rest}"] = value
        elif name.startswith("encoder."):
            stages[1][key] = value
        else:
            stages[2][key] = value
            if name.startswith(("embedding.", "position_embeddings.")):
                stages[0][key] = value
    tied = flat[f"{start}embedding.word_embeddings.weight"]
    if legacy:
        stages[2]["word_embeddings_for_head.weight"] = tied
    else:
        # No loss reaches the head at the end of the encoder.
        for key in ("lm_head.output_layer.bias", "output_layer.bias"):
            stages[1][key] = torch.zeros_like(flat[key])
        stages[1]["lm_head.output_layer.weight"] = stages[1]["output_layer.weight"] = tied + 1
    args = content["args"]
    args.pipeline_model_parallel_size = 3 if legacy else 1
    args.pipeline_model_parallel_split_rank = 2 if legacy else None
    args.encoder_pipeline_model_parallel_size = 0 if legacy else 2
    for number, state in enumerate(stages):
        path = source.parent / f"mp_rank_00_{number:03d}" / "model_optim_rng.pt"
        derived.write({**content, "model": state}, path)
    shutil.rmtree(source)


@pytest.mark.parametrize("legacy", [True, False])
def test_an_encoder_and_a_decoder_on_stages_of_their_own(
    legacy: bool, golden: Golden, folders: Callable, tmp_path: Path
) -> None:
    name = LEGACY if legacy else CORE
    root = tmp_path / "old"
    if legacy:
        derived.copied(golden(LEGACY), root)
    else:
        convert(golden(CORE), root, to="torch", **options(CORE))
    pipeline(root, split=1, legacy=legacy)
    checkpoint = mtt_convert.open_checkpoint(root)
    assert checkpoint.layout.pp == 3
    assert ("idle head" in checkpoint.dropped) is not legacy
    convert(root, tmp_path / "hf", **options(name))
    assert digest(tmp_path / "hf") == digest(folders(name))


def rank_file(root: Path, tp: int = 0) -> Path:
    return next(root.glob("iter_*")) / f"mp_rank_{tp:02d}" / "model_optim_rng.pt"


@pytest.mark.parametrize("second", ["lm_head.output_layer.bias", "position_embeddings.weight"])
def test_what_is_stored_twice_must_be_equal(second: str, golden: Golden, tmp_path: Path) -> None:
    root = derived.copied(golden(CORE), tmp_path / "t5")
    for tp in (0, 1):
        with derived.edited(rank_file(root, tp)) as content:
            content["model"][second] = content["model"][second] + 1
    with pytest.raises(MTTError) as caught:
        convert(root, tmp_path / "hf", tokenizer="none")
    assert second.replace("lm_head.", "").split(".")[0] in str(caught.value)
    assert not (tmp_path / "hf" / "config.json").exists()


def test_one_of_the_two_names_will_do(golden: Golden, folders: Callable, tmp_path: Path) -> None:
    """Releases before core_v0.14 and other trainers may store only one."""
    root = derived.copied(golden(CORE), tmp_path / "t5")
    for tp in (0, 1):
        with derived.edited(rank_file(root, tp)) as content:
            del content["model"]["output_layer.bias"]
            del content["model"]["position_embeddings.weight"]
    convert(root, tmp_path / "hf", tokenizer="none")
    assert digest(tmp_path / "hf") == digest(folders(CORE))


def test_norms_are_there_if_their_tensors_are(
    golden: Golden, folders: Callable, tmp_path: Path
) -> None:
    """Local layers have norms after them where Transformer Engine is installed."""
    convert(golden(TE), tmp_path / "t5", to="torch", transformer_impl="local", tokenizer="none")
    convert(tmp_path / "t5", tmp_path / "hf", tokenizer="none")
    assert digest(tmp_path / "hf") == digest(folders(TE))
    names = set(derived.read(tmp_path / "t5/iter_0000010/mp_rank_00/model_optim_rng.pt")["model"])
    assert "encoder.layers.0.input_layernorm.weight" in names
    assert "encoder.final_layernorm.weight" in names


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.pop("decoder.layers.2.cross_attention.linear_kv.weight"), "linear_kv.weight"),
        (lambda m: m.pop("encoder.layers.0.mlp.linear_fc1.bias"), "encoder.layers.0"),
        (lambda m: m.update({"encoder.final_layernorm.weight": torch.ones(64)}), "final_layernorm"),
        (lambda m: m.pop("lm_head.output_layer.bias") + m.pop("output_layer.bias"), "output_layer"),
        (
            lambda m: [m.pop(key) for key in list(m) if key.startswith("encoder.layers.2.")],
            "layers of the encoder are missing",
        ),
        (
            lambda m: [m.pop(key) for key in list(m) if key.startswith("decoder.layers.2.")],
            "layers of the decoder are missing",
        ),
    ],
)
def test_missing_and_surplus_tensors(
    change: Callable, said: str, golden: Golden, tmp_path: Path
) -> None:
    root = derived.copied(golden(CORE), tmp_path / "t5")
    for tp in (0, 1):
        with derived.edited(rank_file(root, tp)) as content:
            change(content["model"])
    with pytest.raises(MTTError) as caught:
        convert(root, tmp_path / "hf", tokenizer="none")
    assert said in str(caught.value)


def test_the_trainers_of_megatron_core_give_the_decoder_the_encoders_layers(
    golden: Golden, folders: Callable, tmp_path: Path
) -> None:
    """pretrain_t5.py builds num_layers of them, whatever decoder_num_layers says."""
    root = derived.copied(golden(CORE), tmp_path / "t5")
    for tp in (0, 1):
        with derived.edited(rank_file(root, tp)) as content:
            content["args"].decoder_num_layers = 7
    convert(root, tmp_path / "hf", tokenizer="none")
    assert digest(tmp_path / "hf") == digest(folders(CORE))


def test_arguments_from_before_there_were_two_numbers_of_layers(
    golden: Golden, folders: Callable, tmp_path: Path
) -> None:
    root = derived.copied(golden(CORE), tmp_path / "t5")
    for tp in (0, 1):
        with derived.edited(rank_file(root, tp)) as content:
            del content["args"].decoder_num_layers, content["args"].encoder_num_layers
    convert(root, tmp_path / "hf", tokenizer="none")
    assert digest(tmp_path / "hf") == digest(folders(CORE))


# ---- random models of ours


@pytest.mark.parametrize("model", MODELS, ids=str)
@pytest.mark.parametrize("to", ["torch", "torch_dist"])
def test_megatron_and_back_gives_the_same_file(
    model: Model, to: str, saved: Callable, tmp_path: Path
) -> None:
    source = saved(model)
    convert(source, tmp_path / "megatron", to=to, tp=2)
    convert(tmp_path / "megatron", tmp_path / "hf")
    assert sorted(load_file(source / "model.safetensors")) == sorted(
        load_file(tmp_path / "hf" / "model.safetensors")
    )
    before, after = (
        load_file(folder / "model.safetensors") for folder in (source, tmp_path / "hf")
    )
    assert all(torch.equal(before[key], after[key]) for key in before)
    fields = [MTTSeq2SeqConfig.from_pretrained(f).to_dict() for f in (source, tmp_path / "hf")]
    for config in fields:
        config.pop("_name_or_path", None)
    assert fields[0] == fields[1]
    assert compare_logits(tmp_path / "hf", source / "logits.npz") < 1e-6
    # Once written by mtt, not a byte changes.
    convert(tmp_path / "hf", tmp_path / "again", to=to, tp=4)
    convert(tmp_path / "again", tmp_path / "last")
    assert digest(tmp_path / "last") == digest(tmp_path / "hf")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_key_value_heads": 2}, "num_query_groups = 2"),
        ({"use_qk_norm": True}, "qk_layernorm = True"),
        (
            {
                "position_embedding_type": "rope",
                "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
            },
            "rotary_base = 500000.0",
        ),
        (
            {"position_embedding_type": "relative", "final_norm": False},
            "relative positions, and no norms",
        ),
    ],
)
def test_what_megatrons_t5_does_not_compute_is_refused(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    Model("odd", change).save(tmp_path / "source")
    with pytest.raises(UnsupportedError) as caught:
        convert(tmp_path / "source", tmp_path / "out", to="torch")
    assert said in str(caught.value.found)
    assert not (tmp_path / "out").exists()
    convert(tmp_path / "source", tmp_path / "hf")
    assert compare_logits(tmp_path / "hf", tmp_path / "source" / "logits.npz") == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"attention_multiplier": 1.0}, "attention_multiplier"),
        ({"lm_head_bias": False}, "lm_head_bias"),
        ({"attention_out_bias": False}, "attention_out_bias"),
        ({"num_encoder_layers": 0}, "encoder_num_layers"),
    ],
)
def test_configurations_that_no_architecture_holds(
    change: dict[str, Any], said: str, saved: Callable, tmp_path: Path
) -> None:
    source = saved(MODELS[0])
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    with pytest.raises(UnsupportedError) as caught:
        mtt_convert.open_checkpoint(tmp_path)
    assert said in str(caught.value.found)


@pytest.mark.parametrize(
    ("model", "impl"), [(MODELS[0], "transformer_engine"), (MODELS[-1], "local")], ids=str
)
def test_layers_that_do_not_compute_the_model_are_refused(
    model: Model, impl: str, saved: Callable, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as caught:
        convert(saved(model), tmp_path / "out", to="torch", transformer_impl=impl)
    other = {"local": "transformer_engine", "transformer_engine": "local"}[impl]
    assert other in str(caught.value.fix)
    convert(saved(model), tmp_path / "out", to="torch")
    args = vars(derived.read(tmp_path / "out/release/mp_rank_00/model_optim_rng.pt")["args"])
    assert args["transformer_impl"] == other


@pytest.mark.parametrize(
    "layout", [{"pp": 2}, {"pp": 2, "vpp": 1}, {"pipeline_model_parallel_layout": "EttL"}]
)
def test_pipelines_are_refused(layout: dict[str, Any], golden: Golden, tmp_path: Path) -> None:
    with pytest.raises(LayoutError) as caught:
        convert(golden(CORE), tmp_path / "out", to="torch", tokenizer="none", **layout)
    assert "pretrain_t5.py" in str(caught.value)


def test_other_numbers_of_layers_are_told(golden: Golden, tmp_path: Path) -> None:
    result = convert(golden(LEGACY), tmp_path / "out", to="torch", **options(LEGACY))
    assert any("as many layers as the encoder (3)" in text for text in result.conversion.warnings)
    script = (tmp_path / "out" / "megatron_args.sh").read_text()
    assert "pretrain_t5.py" in script
    assert "--encoder-num-layers 3\n    --decoder-num-layers 2\n" in script
    assert "--num-layers" not in script and "--seq-length" not in script.replace("r-seq", "")


# ---- a tokenizer, generation, and the command line

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] once upon a time the end of story .".split()


@pytest.fixture
def with_words(tmp_path: Path, saved: Callable) -> Path:
    """A Megatron checkpoint that names BERT's vocabulary, as T5 do."""
    convert(saved(MODELS[0]), tmp_path / "t5", to="torch", tp=2, tokenizer="none")
    for tp in (0, 1):
        path = tmp_path / f"t5/release/mp_rank_{tp:02d}/model_optim_rng.pt"
        with derived.edited(path) as content:
            args = content["args"]
            args.tokenizer_type, args.vocab_file = "BertWordPieceLowerCase", "vocab.txt"
            args.tokenizer_model, args.vocab_extra_ids = None, 5
            args.mtt["special_tokens"] = {}
    (tmp_path / "t5" / "vocab.txt").write_text("".join(f"{word}\n" for word in WORDS))
    return tmp_path / "t5"


def test_the_tokenizer_of_a_t5_and_what_its_decoder_starts_with(
    with_words: Path, tmp_path: Path
) -> None:
    convert(with_words, tmp_path / "hf", overrides={"vocab_size": 89})
    start = len(WORDS)
    for name in ("config.json", "generation_config.json"):
        tokens = json.loads((tmp_path / "hf" / name).read_text())
        assert tokens["decoder_start_token_id"] == tokens["bos_token_id"] == start
        assert (tokens["eos_token_id"], tokens["pad_token_id"]) == (start + 1, 0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "hf")
    inputs = tokenizer("Once upon a <extra_id_0>.", return_tensors="pt")
    assert inputs.input_ids.tolist() == [[5, 6, 7, start + 2, 13]]
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert ids[0, 0] == start
    convert(tmp_path / "hf", tmp_path / "back", to="torch")
    script = (tmp_path / "back" / "megatron_args.sh").read_text()
    assert (
        '--tokenizer-type BertWordPieceLowerCase --vocab-file "$HERE/tokenizer/vocab.txt" '
        "--vocab-extra-ids 5" in script
    )
    convert(tmp_path / "back", tmp_path / "again")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()


def test_generate(with_words: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["generate", str(with_words), "--set", "vocab_size=89", "--prompt", "once upon a"]
    assert main([*command, "--max-new-tokens", "40", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["warnings"] == ["the model has positions for 24 tokens of an answer, not more"]
    assert not printed["text"].startswith("once upon a")


def test_generate_is_given_one_limit() -> None:
    """The folder has another, its longest text, and transformers warns about two."""
    script = """
        import sys
        from mtt_convert.cli import main
        main(["generate", "convert/sample_seq2seq", "--prompt", "Hello, how are you?"])
    """
    result = run_apart(script)
    assert result.stdout.startswith("I am fine") and "max_length" not in result.stderr


def test_generate_needs_a_token_to_start_with(
    golden: Golden, with_words: Path, capsys: pytest.CaptureFixture
) -> None:
    vocabulary = with_words / "vocab.txt"
    command = ["generate", str(golden(CORE)), "--tokenizer", str(vocabulary), "--prompt", "once"]
    assert main(command) == 2
    assert "which token the decoder begins with" in capsys.readouterr().err


def test_verify_with_logits(
    golden: Golden, folders: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["verify", str(folders(TE)), "--logits", str(golden(LOGITS[TE]))]) == 0
    assert main(["verify", str(folders(TE)), "--logits", str(golden(LOGITS[CORE]))]) == 1
    capsys.readouterr()
    arrays = dict(np.load(golden(LOGITS[TE])))
    for change, said in (
        ({"decoder_input_ids": None}, "logits of shape"),
        ({"decoder_input_ids": arrays["decoder_input_ids"][:1]}, "logits of shape"),
        ({"attention_mask": np.ones((2, 3))}, "attention_mask of shape"),
        ({"decoder_input_ids": arrays["decoder_input_ids"] + 600}, "expected: 0 to 499"),
    ):
        changed = {k: v for k, v in {**arrays, **change}.items() if v is not None}
        np.savez(tmp_path / "changed.npz", **changed)
        assert main(["verify", str(folders(TE)), "--logits", str(tmp_path / "changed.npz")]) == 3
        assert said in capsys.readouterr().err


def test_padding_is_hidden_by_an_attention_mask(folders: Callable, tmp_path: Path) -> None:
    model = AutoModelForSeq2SeqLM.from_pretrained(folders(TE)).eval()
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 5:] = 0
    ids = {
        "input_ids": torch.randint(500, (2, 9)),
        "decoder_input_ids": torch.randint(500, (2, 4)),
    }
    with torch.no_grad():
        logits = model(**ids, attention_mask=mask).logits
    np.savez(tmp_path / "with.npz", logits=logits, attention_mask=mask, **ids)
    np.savez(tmp_path / "without.npz", logits=logits, **ids)
    assert compare_logits(folders(TE), tmp_path / "with.npz") < 1e-5
    assert compare_logits(folders(TE), tmp_path / "without.npz") > 1e-2


def test_inspect_and_dry_run(golden: Golden, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert main(["inspect", str(golden(CORE))]) == 0
    text = capsys.readouterr().out
    assert "3 in the encoder, 3 in the decoder: a T5" in text
    assert "none after the last layers" in text
    assert main(["inspect", str(golden(TE)), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["architecture"]["kind"], facts["exact_model_types"]) == ("t5", [])
    assert main(["convert", str(golden(CORE)), str(tmp_path / "out"), "--dry-run"]) == 0
    assert "model.decoder.layers.0.cross_attn.k_proj.weight" in capsys.readouterr().out


def test_estimate_refuses_a_t5(
    golden: Golden, folders: Callable, capsys: pytest.CaptureFixture
) -> None:
    for source in (golden(CORE), folders(CORE)):
        assert main(["estimate", str(source), "--gpus", "1", "--gpu-memory", "8GB"]) == 3
        assert "a T5" in capsys.readouterr().err


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_no_class_of_transformers_is_a_t5(model_type: str, golden: Golden, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        convert(golden(CORE), tmp_path / "out", model_type=model_type, tokenizer="none")
    assert "mtt_seq2seq" in str(caught.value.fix)


def test_a_gpt_is_no_encoder_decoder(golden: Golden, tmp_path: Path) -> None:
    with pytest.raises(MTTError):
        convert(
            golden("mcore/llama/tp2pp2vpp2/torch"),
            tmp_path / "out",
            model_type="mtt_seq2seq",
            tokenizer="none",
        )


def test_the_card_says_how_to_use_it(folders: Callable) -> None:
    card = (folders(CORE) / "README.md").read_text()
    assert "pipeline_tag: text2text-generation" in card
    assert "| Encoder layers | 3 |\n| Decoder layers | 3 |" in card
    assert "| Norm after the last layers | none |" in card
    assert "AutoModelForSeq2SeqLM.from_pretrained" in card
    assert "vllm" not in card


@pytest.mark.parametrize(
    ("name", "asked", "kind"),
    [
        ("mcore/llama/tp1pp2/torch", "mtt_seq2seq", "gpt"),
        ("mcore/t5/tp2/torch", "llama", "t5"),
        ("legacy/core_v0.12.0-bert-tp2pp1", "mtt_seq2seq", "bert"),
    ],
)
def test_a_class_of_another_kind_of_model(
    name: str, asked: str, kind: str, golden: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=f"not exactly a {asked}") as raised:
        convert(golden(name), tmp_path / "out", model_type=asked, tokenizer="none")
    assert raised.value.found == f"kind = {kind}"
