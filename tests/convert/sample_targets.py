"""The sample's conversions to every target format, by one machine and in parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mtt_convert

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "convert" / "sample"
MANIFEST, NOTES, TRACKER = "mtt_manifest.json", ".mtt.parts", "latest_checkpointed_iteration.txt"
TARGETS: dict[str, dict[str, Any]] = {
    "hf": {"max_shard_size": "100KB"},
    "torch": {"to": "torch", "tp": 2, "pp": 2},
    "torch_dist": {"to": "torch_dist", "tp": 2, "pp": 2, "max_shard_size": "100KB"},
}
HF = TARGETS["hf"]
WORDS = ("--max-shard-size", "100KB")
SHARED = {
    "hf": {"config.json", "model.safetensors.index.json", "README.md"},
    "torch": {TRACKER, "megatron_args.sh"},
    "torch_dist": {TRACKER, "iter_0001000/.metadata", "iter_0001000/common.pt"},
}


def convert(out: Path, part: str, **options: Any) -> mtt_convert.Result:
    """One part of the sample's conversion to a Hugging Face folder."""
    return mtt_convert.convert(SAMPLE, out, part=part, **{**HF, **options})
