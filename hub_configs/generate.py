"""Write the folders of `hub_configs/` from the table in `convert/presets.py`.

python hub_configs/generate.py            write them
python hub_configs/generate.py --check    say which are not as the table has them
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mtt_convert.preset_files import index_table, preset_files
from mtt_convert.presets import PRESETS

FOLDER = Path(__file__).resolve().parent
BEFORE_TABLE = "<!-- presets: written by generate.py -->\n"


def wanted() -> dict[Path, bytes]:
    """Path -> content of all that is generated, the table of README.md included."""
    files = {
        FOLDER / name / file: data for name in PRESETS for file, data in preset_files(name).items()
    }
    readme = FOLDER / "README.md"
    head, marker, _ = readme.read_text(encoding="utf-8").partition(BEFORE_TABLE)
    files[readme] = f"{head}{marker}\n{index_table()}".encode()
    return files


def differences() -> list[str]:
    """What is missing, different, or here without an entry in the table."""
    files = wanted()
    found = [str(p.relative_to(FOLDER)) for p, d in files.items() if _read(p) != d]
    folders = {path.parent for path in files}
    for folder in FOLDER.iterdir():
        if folder.is_dir() and folder.name != "__pycache__" and folder not in folders:
            found.append(f"{folder.name}/")
    return sorted(found)


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def main() -> int:
    """Write, or compare with `--check`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if anything differs"
    )
    if parser.parse_args().check:
        for name in (different := differences()):
            print(f"not as the table has it: {name}")
        return int(bool(different))
    for path, data in wanted().items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
