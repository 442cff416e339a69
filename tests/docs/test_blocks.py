"""Every shell and Python block of README, docs/ and examples/ runs, or says why not and parses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.blocks import PYTHON, ROOT, SHELL, Block, blocks_of, check, furnish, run

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "examples" / "README.md"]
BLOCKS = [block for page in PAGES for block in blocks_of(page)]
RUNNABLE = [block for block in BLOCKS if block.language in (*SHELL, *PYTHON)]
RUN_PAGES = sorted({block.page for block in RUNNABLE if not block.reason})

pytestmark = pytest.mark.filterwarnings(
    # Trainer on a machine without an accelerator:
    "ignore:'pin_memory' argument is set as true:UserWarning",
    # Renamed in transformers 5.23; PEFT knows the old name only.
    "ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning",
)


@pytest.mark.parametrize("block", RUNNABLE, ids=lambda block: block.where)
def test_it_is_shell_or_python(block: Block) -> None:
    check(block)


@pytest.fixture
def folder(hub: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "work"
    place.mkdir()
    furnish(place)
    monkeypatch.chdir(place)
    return place


@pytest.mark.parametrize("page", [page for page in RUN_PAGES if not page.startswith("examples/")])
def test_the_blocks_of_a_page_run_in_order(page: str, folder: Path) -> None:
    names: dict[str, object] = {}
    for block in RUNNABLE:
        if block.page == page and not block.reason:
            run(block, folder, names)


def test_the_examples_run(folder: Path, capfd: pytest.CaptureFixture) -> None:
    from safetensors.numpy import load_file

    for block in RUNNABLE:
        if block.page == "examples/README.md" and not block.reason:
            run(block, folder, {})
    captured = capfd.readouterr().out
    assert "Once upon a time a small model learned twelve paragraphs by heart." in captured
    # The shorter prompt of the two is filled up, and continued as if it were alone.
    assert "Tensor parallelism cuts each layer in width; pipeline parallelism" in captured
    losses = [float(loss) for loss in re.findall(r"'loss': '?([0-9.e-]+)", captured)]
    assert len(losses) == 10
    assert losses[-1] < losses[0]
    assert load_file(folder / "adapter" / "adapter_model.safetensors")
    before = load_file(folder / "out" / "model.safetensors")
    after = load_file(folder / "trained" / "model.safetensors")
    assert before.keys() == after.keys()
    assert any((before[name] != after[name]).any() for name in before)


def test_every_example_is_run() -> None:
    block_text = "".join(b.text for b in BLOCKS if b.page == "examples/README.md" and not b.reason)
    for script in (ROOT / "examples").glob("*.py"):
        assert f"examples/{script.name} " in block_text


def test_prompts_ask_for_what_they_should() -> None:
    import runpy

    examples = ROOT / "examples"
    translate = runpy.run_path(str(examples / "translate.py"))["prompt"]
    assert translate("Thank you.", "German").endswith("English: Thank you.\nGerman:")
    assert translate("Thank you.", "French").count("French:") == 3
    summarize = runpy.run_path(str(examples / "summarize.py"))["prompt"]
    assert summarize("A long text.") == "A long text.\n\nTL;DR:"


def test_the_settings_of_fsdp_are_those_of_the_script() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ROOT / "examples" / "fsdp.yaml"))
    settings = config.fsdp_config
    script = (ROOT / "examples" / "train_fsdp.py").read_text()
    assert settings["fsdp_version"] == 2
    assert f'["{settings["fsdp_transformer_layer_cls_to_wrap"]}"]' in script
    assert settings["fsdp_auto_wrap_policy"].lower() in script


def test_a_block_with_commands_says_its_language() -> None:
    for block in BLOCKS:
        if block.language not in (*SHELL, *PYTHON):
            assert not re.search(r"^\$ ", block.text, re.MULTILINE), block.where
            assert not block.reason, f"{block.where} is no block that could run"


def test_messages_of_troubleshooting_are_those_of_the_code() -> None:
    """What stands between the dots of each message is in the sources."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    source = "".join(path.read_text() for path in sorted((ROOT / "convert").rglob("*.py")))
    source = re.sub(r'"\n\s+f?"', "", source)
    assert len(messages) > 15
    for message in messages:
        for part in filter(None, (part.strip() for part in message.split("…"))):
            assert part in source, message


def test_the_picture_is_what_its_script_draws() -> None:
    import runpy

    draw = runpy.run_path(str(ROOT / "docs" / "draw_flow.py"))["draw"]
    assert (ROOT / "docs" / "flow.svg").read_text(encoding="utf-8") == draw()


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_no_page_has_two_sides_of_a_merge() -> None:
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"^(<<<<<<<|>>>>>>>) ", text, re.MULTILINE), page.name
