"""The command line as a user and as a script meet it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mtt_convert.cli import build_parser, main
from mtt_convert.version import __version__

SAMPLE = str(Path(__file__).parents[2] / "convert" / "sample")
COMMANDS = ("demo", "inspect", "convert", "diff", "verify", "generate")


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
    assert {
        "schema",
        "command",
        "status",
        "source",
        "output",
        "tensors",
        "bytes",
        "dropped",
        "warnings",
        "hashes",
        "seconds",
        "peak_rss",
    } <= set(body)
    assert body["tensors"] == len(body["hashes"]["model.safetensors"]) == 68
    assert body["dropped"]["tied copy"] == ["output_layer.weight"]
    assert all(len(digest) == 32 for digest in body["hashes"]["model.safetensors"].values())


def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["convert", SAMPLE, str(tmp_path / "out"), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "model.embed_tokens.weight  float32  [505 x 64]  2 pieces of 2 files" in text
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


def test_generate_from_a_folder_and_from_shards(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    example = json.loads((Path(SAMPLE) / "prompts.json").read_text())[0]
    main(["convert", SAMPLE, str(tmp_path / "out")])
    capsys.readouterr()
    for source in (SAMPLE, str(tmp_path / "out")):
        assert main(["generate", source, "--prompt", example["prompt"]]) == 0
        assert capsys.readouterr().out == example["text"] + "\n"


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


def test_demo_ends_well(capsys: pytest.CaptureFixture) -> None:
    assert main(["demo"]) == 0
    assert "12 of 12 texts" in capsys.readouterr().out
