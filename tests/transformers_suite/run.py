"""Run transformers' common tests on MTT, and hold their counts to docs/transformers-tests.md.

    python tests/transformers_suite/run.py            all of them
    python tests/transformers_suite/run.py --fast     without those that start processes or train
    python tests/transformers_suite/run.py --record   write the counts down

The tests are in the source distribution of the installed transformers: pip brings it into `build/`,
once. Nothing of it is part of this project.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DOCUMENT = ROOT / "docs" / "transformers-tests.md"
VERSION = importlib.metadata.version("transformers")

# Shapes of MTT, and the model of transformers beside each.
YARDSTICKS = {
    "GPT": "Llama",
    "LlamaLike": "Llama",
    "NemotronLike": "Llama",
    "MoELike": "Qwen3Moe",
    "T5": "Bart",
    "T5Local": "Bart",
    "T5Rotary": "Bart",
}
NAMES = tuple(
    name
    for yardstick in dict.fromkeys(YARDSTICKS.values())
    for name in (*(each for each in YARDSTICKS if YARDSTICKS[each] == yardstick), yardstick)
)
SLOW = ("fsdp2", "hsdp", "tp_forward", "tp_backward", "tp_generation", "overfit")

# What a shape may skip though its yardstick does not: the start of the test's name.
OWN_SKIPS = {
    "GPT": ("test_model_rope_scaling",),
    # Asks the file of the model for experts, which have a file of their own; and for a field that
    # turns a window off.
    "MoELike": ("test_moe_models_record_router_logits", "test_sliding_window_mask"),
}


@dataclasses.dataclass
class Counts:
    """Results of one shape."""

    passed: int = 0
    failed: int = 0
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)  # test to reason


def fetch_tests() -> Path:
    """Return the folder of transformers' source distribution, completed with our stand-ins."""
    build = ROOT / "build"
    folder = build / f"transformers-{VERSION}"
    archive = folder.with_name(f"{folder.name}.tar.gz")
    if not archive.is_file():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary", ":all:", "--no-build-isolation", "--dest", str(build)]
        if (
            subprocess.run([*command, f"transformers=={VERSION}"]).returncode
            or not archive.exists()
        ):
            sys.exit(
                f"error: transformers' source distribution is not here\n"
                f"  expected: {archive.relative_to(ROOT)}\n"
                f"  fix:      let pip reach its package index, or put the file there"
            )
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=build) as temporary:
            with tarfile.open(archive) as tar:
                tar.extractall(temporary, filter="data")
            (Path(temporary) / folder.name).rename(folder)
    shutil.copytree(HERE / "stand_ins", folder / "tests", dirs_exist_ok=True)
    return folder


def run_pytest(folder: Path, fast: bool, jobs: str, arguments: list[str]) -> dict[str, Counts]:
    with tempfile.TemporaryDirectory(prefix="mtt-transformers-") as temporary:
        report = Path(temporary) / "report.xml"
        environment = {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HOME": temporary,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(folder),
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = [sys.executable, "-m", "pytest", "-c", str(HERE / "pytest.ini"), "--quiet"]
        command += ["-n", jobs, f"--junitxml={report}", str(HERE / "suite.py"), *arguments]
        if fast:
            command += ["-k", " and ".join(f"not {name}" for name in SLOW)]
        subprocess.run(command, env=environment, cwd=ROOT)
        if not report.is_file():
            sys.exit("error: pytest ended without a report")
        return read_report(report)


def read_report(report: Path) -> dict[str, Counts]:
    counts = {name: Counts() for name in NAMES}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        kinds = {child.tag: child for child in case}
        shape = case.get("classname", "").rpartition(".Test")[2]
        if shape not in counts:  # a file that could not be imported
            sys.exit(f"error: pytest reports {case.get('classname')} {case.get('name')}: {kinds}")
        if "failure" in kinds or "error" in kinds:
            counts[shape].failed += 1
        elif "skipped" in kinds:
            reason = kinds["skipped"].get("message", "")
            counts[shape].skipped[case.get("name", "")] = re.sub(r"^Skipped: ", "", reason)
        else:
            counts[shape].passed += 1
    return counts


def find_problems(counts: dict[str, Counts], recorded: dict[str, int]) -> list[str]:
    """Say where MTT does less than the record, or than its yardstick."""
    problems = []
    for shape in NAMES:
        found = counts[shape]
        if found.failed:
            problems.append(f"{shape}: {found.failed} tests failed")
        if found.passed < recorded.get(shape, 1):
            problems.append(f"{shape}: {found.passed} tests passed, recorded {recorded[shape]}")
    for shape, yardstick in YARDSTICKS.items():
        for test, reason in sorted(counts[shape].skipped.items()):
            if test in counts[yardstick].skipped or test.startswith(OWN_SKIPS.get(shape, ("\0",))):
                continue
            problems.append(f"{shape}: {test} is skipped, and not for {yardstick}: {reason}")
    return problems


def heading(fast: bool) -> str:
    return "## The fast part" if fast else "## All"


def section(text: str, fast: bool) -> tuple[int, int]:
    """Where in the document one of the two tables is, with its heading."""
    start = text.index(heading(fast) + "\n")
    end = text.find("\n## ", start)
    return start, len(text) if end < 0 else end + 1


def read_record(fast: bool) -> dict[str, int]:
    text = DOCUMENT.read_text()
    start, end = section(text, fast)
    rows = re.findall(r"^\| (\w+) +\| +(\d+) \|", text[start:end], re.MULTILINE)
    found = {name: int(passed) for name, passed in rows}
    if set(found) != set(NAMES):
        sys.exit(f"error: {DOCUMENT.name} has no counts under '{heading(fast)}': --record them")
    return found


def write_record(counts: dict[str, Counts], fast: bool, minutes: float) -> None:
    text = DOCUMENT.read_text()
    start, end = section(text, fast)
    torch = importlib.metadata.version("torch").partition("+")[0]
    lines = [
        heading(fast),
        "",
        f"`make test-transformers{' FAST=1' if fast else ''}`, transformers {VERSION}, "
        f"torch {torch}, {minutes:.0f} minutes on two cores.",
        "",
        "| shape        | passed | failed | skipped |",
        "|--------------|-------:|-------:|--------:|",
    ]
    for name, found in counts.items():
        row = (found.passed, found.failed, len(found.skipped))
        lines.append("| {:12} | {:6} | {:6} | {:7} |".format(name, *row))
    lines += ["", "Skipped:", ""]
    for name in NAMES:
        yardstick = YARDSTICKS.get(name)
        others = counts[yardstick].skipped if yardstick else {}
        reasons = Counter(
            clean(reason) for test, reason in counts[name].skipped.items() if test not in others
        )
        if reasons:
            only = f", and not {yardstick}" if yardstick else ""
            lines.append(f"- {name}{only}:")
            lines += [f"  - {number} × {reason}" for reason, number in reasons.most_common()]
    tail = text[end:]
    DOCUMENT.write_text(text[:start] + "\n".join(lines) + "\n" + (f"\n{tail}" if tail else ""))


def clean(reason: str) -> str:
    """A reason on one line, with class names for classes."""
    return re.sub(r"<class '[\w.]+\.(\w+)'>", r"\1", " ".join(reason.split()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="no processes, no training")
    parser.add_argument("--record", action="store_true", help="write the counts down")
    parser.add_argument("--jobs", default="2", help="processes of pytest")
    parser.add_argument("pytest", nargs="*", help="arguments of pytest; nothing is compared then")
    options = parser.parse_args()

    started = time.monotonic()
    counts = run_pytest(fetch_tests(), options.fast, options.jobs, options.pytest)
    minutes = (time.monotonic() - started) / 60
    for name, found in counts.items():
        row = f"{found.passed:4} passed {found.failed:3} failed {len(found.skipped):4} skipped"
        print(f"{name:12} {row}")
    if options.pytest:
        sys.exit(any(found.failed for found in counts.values()))

    recorded = {} if options.record else read_record(options.fast)
    problems = find_problems(counts, recorded)
    print("\n".join(f"error: {problem}" for problem in problems), file=sys.stderr)
    if options.record and not problems:
        write_record(counts, options.fast, minutes)
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
