"""Draws docs/flow.svg: python docs/draw_flow.py."""

from __future__ import annotations

from pathlib import Path

TITLE = "Shards of any layout become a folder that transformers loads, and Megatron shards again"
INK, LINE, PAPER = "#1f2937", "#64748b", "#ffffff"
SHARDS, FOLDER, USES = "#fde68a", "#bfdbfe", "#bbf7d0"
FONT = "font-family='ui-monospace, Menlo, Consolas, monospace'"


def box(x: int, y: int, width: int, height: int, fill: str, *lines: str, size: int = 13) -> str:
    """A rounded box with centred lines."""
    shapes = [
        f"<rect x='{x}' y='{y}' width='{width}' height='{height}' rx='6' fill='{fill}' "
        f"stroke='{LINE}'/>"
    ]
    top = y + height / 2 - (len(lines) - 1) * 9 + size / 3
    shapes += [text(x + width / 2, top + 18 * n, line, size) for n, line in enumerate(lines)]
    return "\n".join(shapes)


def text(x: float, y: float, words: str, size: int = 13, anchor: str = "middle") -> str:
    """A line of text."""
    return (
        f"<text x='{x:g}' y='{y:g}' {FONT} font-size='{size}' fill='{INK}' "
        f"text-anchor='{anchor}'>{words}</text>"
    )


def arrow(x1: int, x2: int, y: int, words: str, below: bool = False) -> str:
    """A horizontal arrow with its command."""
    line = (
        f"<line x1='{x1}' y1='{y}' x2='{x2}' y2='{y}' stroke='{LINE}' stroke-width='2' "
        "marker-end='url(#head)'/>"
    )
    return line + "\n" + text((x1 + x2) / 2, y + (18 if below else -9), words, 12)


def draw() -> str:
    """Shards on the left, the folder in the middle, what is done with it on the right."""
    parts = [text(115, 24, "Megatron, any layout", 14), text(505, 24, "Hugging Face folder", 14)]
    parts += [
        box(10 + 108 * (rank % 2), 40 + 62 * (rank // 2), 100, 54, SHARDS, *lines)
        for rank, lines in enumerate(
            (f"tp {rank % 2}  pp {rank // 2}", "*.pt") for rank in range(4)
        )
    ]
    files = ("config.json", "model-*.safetensors", "tokenizer.json", "mtt_manifest.json")
    parts.append(box(400, 40, 210, 116, FOLDER, *files))
    uses = ("AutoModelForCausalLM", "mtt generate", "hf://owner/repo")
    parts += [box(760, 40 + 42 * n, 190, 32, USES, words) for n, words in enumerate(uses)]
    parts.append(arrow(228, 392, 76, "mtt convert CKPT out"))
    parts.append(arrow(392, 228, 124, "--to torch_dist --tp 8", below=True))
    parts.append(arrow(618, 752, 98, "load, push"))
    body = "\n".join(parts)
    return f"""<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 960 172' role='img'>
<title>{TITLE}</title>
<defs><marker id='head' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='7' markerHeight='7'
orient='auto'><path d='M0,0 L8,4 L0,8 z' fill='{LINE}'/></marker></defs>
<rect width='960' height='172' rx='8' fill='{PAPER}'/>
{body}
</svg>
"""


if __name__ == "__main__":
    Path(__file__).with_name("flow.svg").write_text(draw(), encoding="utf-8")
