"""The command line as a user and as a script meet it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import mtt_convert
from mtt_convert import cli
from mtt_convert.cli import build_parser, main, printable
from mtt_convert.commands import console
from mtt_convert.commands import convert as convert_command
from mtt_convert.version import __version__
from tests.convert.surgery import edited

SAMPLE = str(Path(__file__).parents[2] / "convert" / "sample")
COMMANDS = ("demo", "inspect", "convert", "diff", "verify", "generate", "estimate", "push")
SHARED = {
    "schema", "command", "status", "source", "output", "tensors", "bytes", "dropped", "warnings",
    "hashes", "seconds", "peak_rss",
}  # fmt: skip


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "out"
    mtt_convert.convert(SAMPLE, folder)
    return folder


def run_json(capsys: pytest.CaptureFixture, *words: str) -> tuple[int, dict]:
    code = main([*words, "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert f"examples:\n  mtt {command}" in text


def test_examples_in_help_parse() -> None:
    import shlex

    parser = build_parser()
    commands = parser._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    for command in commands.values():
        for line in command.epilog.splitlines()[1:]:
            parser.parse_args(shlex.split(line.strip().split("     ")[0])[1:])


def test_version_and_module(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"mtt {__version__}\n"
    module = subprocess.run(
        [sys.executable, "-m", "mtt_convert", "--version"], capture_output=True, text=True
    )
    assert module.stdout == f"mtt {__version__}\n"


def test_inspect_tells_layout_and_architecture(golden, capsys: pytest.CaptureFixture) -> None:
    code, body = run_json(capsys, "inspect", str(golden("mcore/llama/tp2pp2vpp2/torch")))
    assert code == 0
    assert (body["schema"], body["command"], body["status"]) == (1, "inspect", "ok")
    assert (body["format"], body["dialect"], body["iteration"]) == ("torch", "core_local", 10)
    assert body["layout"] == {"tp": 2, "pp": 2, "vpp": 2, "ep": 1}
    assert body["architecture"]["num_query_groups"] == 2
    assert (body["tensors"], body["parameters"], body["files"]) == (27, 229952, 4)


def test_inspect_for_people(capsys: pytest.CaptureFixture) -> None:
    assert main(["inspect", SAMPLE]) == 0
    text = capsys.readouterr().out
    for fact in ("TP2 x PP2", "241,024", "gelu_tanh", "learned_absolute", "tied to the embedding"):
        assert fact in text


def test_convert_reports_to_scripts(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    code, body = run_json(capsys, "convert", SAMPLE, str(tmp_path / "out"))
    assert code == 0
    assert set(body) == SHARED | {"model_type", "exact_model_types"}
    assert body["tensors"] == len(body["hashes"]["model.safetensors"]) == 68
    assert body["dropped"]["tied copy"] == ["output_layer.weight"]
    assert all(len(digest) == 32 for digest in body["hashes"]["model.safetensors"].values())


def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["convert", SAMPLE, str(tmp_path / "out"), "--dry-run"]) == 0
    text = capsys.readouterr().out
    sources = "mp_rank_00_000/model_optim_rng.pt, mp_rank_01_000/model_optim_rng.pt"
    assert f"model.embed_tokens.weight  float32  [505 x 64]  2 pieces of {sources}\n" in text
    assert "of memory for the windows of" in text
    assert "would be written" in text
    assert list(tmp_path.iterdir()) == []


def test_diff_finds_what_differs(golden, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    llama = str(golden("mcore/llama/tp2pp2vpp2/torch"))
    code, body = run_json(capsys, "diff", llama, str(golden("mcore/llama/tp1pp2/torch")))
    assert (code, body["status"], body["differences"]) == (0, "equal", [])
    assert main(["convert", llama, str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    capsys.readouterr()
    code, body = run_json(capsys, "diff", llama, str(tmp_path / "out"))
    assert (code, body["status"], body["tensors"]) == (1, "different", 0)
    assert {item["kind"] for item in body["differences"]} == {"dtype"}
    code = main(["diff", llama, str(golden("mcore/qwen/tp2pp2/torch"))])
    assert code == 1
    assert "only in" in capsys.readouterr().out


def test_diff_reads_both_as_they_were_converted(
    golden, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Rows in another order than the stamp says, and arguments that are not in the checkpoint."""
    source = str(golden("legacy/v2.0-RELABEL-v0-order-stamped-3.0-gpt2-tp1pp1"))
    options = ["--qkv-order", "block", "--set", "vocab_size=497"]
    out = str(tmp_path / "out")
    assert main(["convert", source, out, "--tokenizer", "none", *options]) == 0
    capsys.readouterr()
    code, body = run_json(capsys, "diff", source, out, *options)
    assert (code, body["status"], body["differences"]) == (0, "equal", [])
    code, body = run_json(capsys, "diff", out, source)
    assert (code, body["status"]) == (1, "different")
    assert {item["name"].split(".")[4] for item in body["differences"]} <= {
        "q_proj",
        "k_proj",
        "v_proj",
    }
    assert main(["diff", out, out, *options]) == 2
    assert "--set or --config, --qkv-order: only for a Megatron checkpoint" in (
        capsys.readouterr().err
    )


def test_generate_from_a_folder_and_from_shards(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    example = json.loads((Path(SAMPLE) / "prompts.json").read_text())[0]
    main(["convert", SAMPLE, str(tmp_path / "out")])
    capsys.readouterr()
    for source in (SAMPLE, str(tmp_path / "out")):
        assert main(["generate", source, "--prompt", example["prompt"]]) == 0
        assert capsys.readouterr().out == example["text"] + "\n"


def test_generate_takes_copies_as_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = tmp_path / "root"
    shutil.copytree(SAMPLE, root)
    with edited(root / "iter_0001000" / "mp_rank_01_000" / "model_optim_rng.pt") as content:
        content["model"]["decoder.layers.0.input_layernorm.weight"] += 1
    command = ["generate", str(root), "--prompt", "Once upon a time", "--max-new-tokens", "4"]
    assert main(command) == 3
    name = "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"
    assert f"copies of {name} differ\n" in capsys.readouterr().err
    assert main(["generate", SAMPLE, *command[2:]]) == 0
    expected = capsys.readouterr().out
    assert main([*command, "--replicated", "first"]) == 0
    assert capsys.readouterr().out == expected


def test_set_and_config_complete_a_checkpoint(
    golden, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    legacy = str(golden("legacy/v2.6-ckptver3-gpt2-tp2pp2"))
    settings = tmp_path / "settings.json"
    settings.write_text('{"vocab_size": 400}')
    words = ["inspect", legacy, "--config", str(settings)]
    assert run_json(capsys, *words)[1]["architecture"]["vocab_size"] == 400
    words += ["--set", "vocab-size=497"]
    assert run_json(capsys, *words)[1]["architecture"]["vocab_size"] == 497


def test_demo_ends_well() -> None:
    """And nothing that it imports has a word to say, here or in the processes it starts."""
    command = [sys.executable, "-m", "mtt_convert", "demo"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stderr) == (0, "")
    assert "12 of 12 texts" in result.stdout
    assert "Two processes, each with half of every layer: the same text." in result.stdout


def test_demo_replaces_its_folder_only_when_told(
    converted: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["demo", "--output", str(converted)]) == 4
    assert "--overwrite" in capsys.readouterr().err
    assert main(["demo", "--output", str(converted), "--overwrite"]) == 0


@pytest.mark.parametrize("command", ["inspect", "diff", "verify", "generate"])
def test_all_json_has_the_same_frame(
    command: str, converted: Path, capsys: pytest.CaptureFixture
) -> None:
    out = str(converted)
    words = {
        "inspect": [SAMPLE],
        "diff": [SAMPLE, out],
        "verify": [out],
        "generate": [out, "--prompt", "A"],
    }[command]
    code, body = run_json(capsys, command, *words)
    assert code == 0
    assert set(body) >= SHARED
    assert body["seconds"] > 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["generate", "OUT", "--prompt", ""], "there is no text"),
        (["generate", "OUT", "--prompt", "\udce9"], "there is no text"),
        (["generate", "OUT", "--prompt", "word " * 200], "at most 128"),
        (["generate", "OUT", "--prompt", "a", "--temperature", "nan"], "nothing to generate"),
        (["generate", "OUT", "--prompt", "a", "--iteration", "3"], "--iteration: only for"),
        (["generate", "OUT", "--prompt", "a", "--set", "x=1"], "--set: only for"),
        (["generate", "OUT", "--prompt", "a", "--config", "x"], "--config: only for"),
        (["generate", "OUT", "--prompt", "a", "--skip-key", "x"], "--skip-key: only for"),
        (["convert", SAMPLE, "hf://owner"], "no repository on the Hub"),
        (["convert", SAMPLE, "NEW", "--tp", "2"], "--tp: a layout is only"),
        (["convert", SAMPLE, "NEW", "--tensor-model-parallel-size", "2"], "--tp: a layout"),
        (["convert", SAMPLE, "NEW", "--workers", "0", "--dry-run"], "leave out --workers"),
        (["convert", SAMPLE, "NEW", "--max-shard-size", "0.1B"], "no size"),
        (["convert", SAMPLE, f"{SAMPLE}/new", "--dry-run"], "inside the checkpoint"),
        (["convert", "", "NEW"], "CKPT is empty"),
        (["convert", SAMPLE, ""], "OUT is empty"),
        (["inspect", ""], "CKPT is empty"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else None,
)
def test_mistakes_are_usage_errors(
    words: list[str], says: str, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    places = {"OUT": str(converted), "NEW": str(tmp_path / "new")}
    assert main([places.get(word, word) for word in words]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_generation_ends_with_the_table_of_positions(
    converted: Path, capsys: pytest.CaptureFixture
) -> None:
    """`--max-new-tokens` is a limit: a smaller one is named, not crashed into."""
    prompt = "." * 126
    words = ["generate", str(converted), "--prompt", prompt, "--max-new-tokens", "999"]
    assert main(words) == 0
    text, warning = capsys.readouterr()
    assert text.startswith(prompt)
    assert warning.startswith("warning: the model has positions for ")


@pytest.mark.parametrize(
    ("ids", "logits", "says"),
    [
        (np.full((1, 4), 505), np.zeros((1, 4, 505), "f4"), "0 to 504"),
        (np.full((1, 4), -1), np.zeros((1, 4, 505), "f4"), "0 to 504"),
        (np.zeros(4, int), np.zeros((4, 505), "f4"), "[batch, sequence]"),
        (np.zeros((1, 0), int), np.zeros((1, 0, 505), "f4"), "[batch, sequence]"),
        (np.zeros((1, 129), int), np.zeros((1, 129, 505), "f4"), "at most 128"),
        (np.zeros((1, 4)), np.zeros((1, 4, 505), "f4"), "integers and floats"),
        (np.zeros((1, 4), int), np.zeros((1, 4, 505), int), "integers and floats"),
        (np.zeros((1, 4), int), np.zeros((1, 3, 505), "f4"), "[1, 4, vocabulary]"),
    ],
)
def test_a_reference_that_does_not_fit(
    ids: np.ndarray,
    logits: np.ndarray,
    says: str,
    converted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    np.savez(tmp_path / "x.npz", input_ids=ids, logits=logits)
    assert main(["verify", str(converted), "--logits", str(tmp_path / "x.npz")]) == 3
    err = capsys.readouterr().err
    assert "does not fit" in err and f"expected: {says}" in err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file"),
        (b"", "another kind of file"),
        (b"some text", "another kind of file"),
        (b"\x80\x04N.", "another kind of file"),
        ({"logits": np.zeros(1)}, "input_ids"),
    ],
    ids=["missing", "empty", "text", "pickle", "without tokens"],
)
def test_a_file_that_is_no_reference(
    content: bytes | dict[str, np.ndarray] | None,
    says: str,
    converted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    path = tmp_path / "x.npz"
    if isinstance(content, dict):
        np.savez(path, **content)
    elif content is not None:
        path.write_bytes(content)
    assert main(["verify", str(converted), "--logits", str(path)]) == 3
    _, found, expected, fix = capsys.readouterr().err.splitlines()[-4:]
    assert found.startswith("  found: ") and says in found and "allow_pickle" not in found
    assert expected == "  expected: an .npz with input_ids and logits"
    assert fix == "  fix:      give the .npz that the original model's logits were saved in"


@pytest.mark.parametrize("options", [[], ["--tokenizer", "none"]], ids=["absent", "none"])
def test_a_text_needs_a_tokenizer(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    mtt_convert.convert(SAMPLE, tmp_path / "out", tokenizer="none")
    assert main(["generate", str(tmp_path / "out"), "--prompt", "a", *options]) == 2
    given = "--tokenizer none" if options else "without one"
    assert capsys.readouterr().err == (
        "error: there is no tokenizer to read the prompt with\n"
        f"  found:    {tmp_path / 'out'}, {given}\n"
        "  expected: the tokenizer the model was trained with\n"
        "  fix:      give it with --tokenizer PATH\n"
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "{"),
        ("config.json", "[1]"),
        ("config.json", '{"model_type": "mtt", "hidden_size": "x"}'),
        ("tokenizer_config.json", '{"tokenizer_class": [1]}'),
        ("vocab.json", "[" * 100_000),
    ],
)
def test_a_damaged_folder_cannot_generate(
    name: str, content: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    mtt_convert.convert(SAMPLE, tmp_path / "out")
    (tmp_path / "out" / name).write_text(content)
    assert main(["generate", str(tmp_path / "out"), "--prompt", "a"]) == 3
    assert capsys.readouterr().err.startswith("error: ")


def test_inspecting_a_converted_folder(converted: Path, capsys: pytest.CaptureFixture) -> None:
    code, body = run_json(capsys, "inspect", str(converted))
    assert (code, body["format"], body["dialect"], body["iteration"]) == (0, "hf", "mtt", None)
    assert body["parameters"] == run_json(capsys, "inspect", SAMPLE)[1]["parameters"] - 7 * 64


def test_config_spells_names_as_set_does(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "x.json").write_text('{"--vocab-size": 500}')
    _, body = run_json(capsys, "inspect", SAMPLE, "--config", str(tmp_path / "x.json"))
    assert body["architecture"]["vocab_size"] == 500


@pytest.mark.parametrize("text", ["[]", "[" * 100_000])
def test_config_of_another_kind(text: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "x.json").write_text(text)
    code, body = run_json(capsys, "inspect", SAMPLE, "--config", str(tmp_path / "x.json"))
    assert (code, body["code"]) == (2, "usage")


@pytest.mark.parametrize("words", [["frob"], ["convert"], ["inspect", "a", "--no-such"]])
def test_errors_of_the_parser_are_json_too(words: list[str], capsys: pytest.CaptureFixture) -> None:
    code, body = run_json(capsys, *words)
    assert (code, body["status"], body["code"]) == (2, "error", "usage")
    assert body["command"] == (words[0] if words[0] in COMMANDS else None)


def test_the_commands_are_those_of_the_parser() -> None:
    actions = build_parser()._subparsers._group_actions  # type: ignore[union-attr]
    assert tuple(actions[0].choices) == cli._COMMANDS == COMMANDS  # type: ignore[arg-type]


def test_an_interruption_is_json_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(convert_command, "convert", stop)
    code, body = run_json(capsys, "convert", SAMPLE, str(tmp_path / "out"))
    assert (code, body["code"]) == (130, "interrupted")
    assert body["fix"].startswith("again: mtt convert ")


def test_sigterm_cleans_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    real = convert_command.convert

    def convert(*args: object, **kwargs: object) -> object:
        def progress(done: int, total: int) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)

        return real(*args, **{**kwargs, "progress": progress, "num_workers": 1})  # type: ignore

    monkeypatch.setattr(convert_command, "convert", convert)
    assert main(["convert", SAMPLE, str(tmp_path / "out")]) == 143
    assert "interrupted; " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_main_runs_in_any_thread() -> None:
    """Where signals cannot be handled, they are left alone."""
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(main(["inspect", SAMPLE])))
    thread.start()
    thread.join()
    assert codes == [0]


def test_printable() -> None:
    assert printable("schön ☃ \x1b[2J\n\udce9\u202e") == "schön ☃ \\x1b[2J\\n\\udce9\\u202e"
    assert printable("a\nb\t", keep="\n\t") == "a\nb\t"


def test_other_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS has no affinity, and counts memory in bytes."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert convert_command.default_workers() == 3
    kilobytes = console.peak_rss()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert console.peak_rss() < kilobytes


@pytest.mark.skipif(sys.platform != "linux", reason="getrusage counts otherwise there")
def test_peak_memory_is_that_of_the_process_alone() -> None:
    large = b"x" * 300_000_000
    code = "from mtt_convert.commands import console; print(console.peak_rss())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert 5_000_000 < int(result.stdout) < len(large)


def test_from_megatron_refuses_what_it_does_not_know() -> None:
    with pytest.raises(TypeError, match="hidden_sise, tp_sise"):
        mtt_convert.from_megatron(SAMPLE, tp_sise=1, hidden_sise=3)
    with pytest.raises(mtt_convert.UsageError, match="no workers"):
        mtt_convert.from_megatron(SAMPLE, num_workers=0)
    with pytest.raises(mtt_convert.UsageError, match="replicated"):
        mtt_convert.from_megatron(SAMPLE, replicated="any")
    model = mtt_convert.from_megatron(
        SAMPLE, replicated="first", attn_implementation="eager", use_cache=False
    )
    assert model.config.use_cache is False
