"""Published models of the Megatron family, one line each: sizes, where they come from, weights.

    NAME  ->  Preset  ->  config.json, generation_config.json, README.md, megatron_args.sh

The table is all there is: `preset_files.py` writes the folders of `hub_configs/` from it, and
`mtt estimate NAME` and `--config NAME` read it where only the wheel is installed. To add a model,
add an entry and run `python hub_configs/generate.py`.

All of these are GPT-2's architecture, with LayerNorm before each block, biases everywhere, an MLP
of four times the hidden size, GELU by tanh and a tied head. BLOOM has ALiBi in place of learned
positions, and a norm after the embedding.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field

from .architecture import Architecture
from .checkpoint import Layout
from .errors import UsageError

GPT2_TOKENS, BLOOM_TOKENS, BLOOM_ROWS = 50257, 250680, 250880


@dataclass(frozen=True, slots=True)
class Source:
    """Where a fact can be read, and which fact.

    Attributes:
        where: a paper, or a page, with its address.
        says: what it says about the model.
        seen: whether the sentence was held against the source's own text, or a stored copy of it.
    """

    where: str
    says: str
    seen: bool = True


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One published model.

    Attributes:
        title: what its makers call it.
        published: the number of parameters as published: digits, and M, B for millions, billions.
        num_layers, hidden_size, num_attention_heads, seq_length: as in Megatron.
        vocab_size: rows of the embedding that `config.json` has: tokens without padding, unless
            the model was published with it.
        tp, pp: the layout it was trained or published in; 1 where none was published.
        vpp: virtual stages of each pipeline stage.
        dtype: of the weights.
        weights: whether they were published, and where.
        sources: what was checked, and where.
        difference: why the parameters do not round to the published figure.
        notes: further sentences of the card.
        bloom: ALiBi and a norm after the embedding.
        license: of the published weights, as the Hub writes it.
    """

    title: str
    published: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    seq_length: int
    weights: str
    sources: tuple[Source, ...]
    vocab_size: int = GPT2_TOKENS
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    dtype: str = "float16"
    difference: str = ""
    notes: tuple[str, ...] = ()
    init_method_std: float = 0.02
    bloom: bool = False
    license: str | None = None
    tokens: Mapping[str, int | None] = field(
        default_factory=lambda: {
            "bos_token_id": GPT2_TOKENS - 1,
            "eos_token_id": GPT2_TOKENS - 1,
            "pad_token_id": None,
        }
    )

    @property
    def architecture(self) -> Architecture:
        """What the model computes."""
        dropout = 0.0 if self.bloom else 0.1
        return Architecture(
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            ffn_hidden_size=4 * self.hidden_size,
            num_attention_heads=self.num_attention_heads,
            num_query_groups=self.num_attention_heads,
            kv_channels=self.hidden_size // self.num_attention_heads,
            padded_vocab_size=self.vocab_size,
            vocab_size=self.vocab_size,
            max_position_embeddings=self.seq_length,
            position_embedding_type="alibi" if self.bloom else "learned_absolute",
            embedding_norm=self.bloom,
            layernorm_epsilon=1e-5,
            activation="gelu_tanh",
            add_qkv_bias=True,
            attention_dropout=dropout,
            hidden_dropout=dropout,
            init_method_std=self.init_method_std,
            params_dtype=self.dtype,
        )


def find_preset(name: str) -> Preset:
    """The preset of this name.

    Raises:
        UsageError: there is none.
    """
    if name not in PRESETS:
        raise UsageError(
            f"{name} is neither a path nor a preset",
            expected=f"a folder, or one of {', '.join(PRESETS)}",
            fix=nearest_preset(name),
        )
    return PRESETS[name]


def nearest_preset(name: str) -> str | None:
    """The name of the preset that a misspelt one may mean."""
    return next(iter(difflib.get_close_matches(name.lower(), PRESETS, 1, 0.8)), None)


_MEGATRON = "Megatron-LM paper, https://arxiv.org/abs/1909.08053"
_NEVER = "The weights were never published."
_GELU = Source(
    "Megatron-LM of 2019, mpu/transformer.py, GPT2ParallelMLP", "GELU is computed by tanh"
)


def _megatron_gpt2(
    published: str, layers: int, hidden: int, heads: int, tp: int, *notes: str, table: str
) -> Preset:
    return Preset(
        title=f"Megatron-LM GPT-2 {published}",
        published=published,
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        seq_length=1024,
        tp=tp,
        weights=_NEVER,
        sources=(
            Source(_MEGATRON, f"{table}: {layers} layers, hidden size {hidden}, {heads} heads"),
            Source(_MEGATRON, "section 5.1: 50,257 tokens padded to 51,200; section 4: 1024 long"),
            _GELU,
        ),
        notes=notes,
    )


_SCALING = "Megatron scaling paper, https://arxiv.org/abs/2104.04473"
_TABLE_SCRIPT = (
    "Megatron-LM, examples/sc21/run_table_1.sh, https://github.com/NVIDIA/Megatron-LM/tree/v3.0.2"
)


def _scaling(
    published: str, layers: int, hidden: int, heads: int, tp: int, pp: int, vpp: int = 1
) -> Preset:
    return Preset(
        title=f"Megatron-LM GPT {published} of the scaling study",
        published=published,
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        seq_length=2048,
        vocab_size=51200,
        tp=tp,
        pp=pp,
        vpp=vpp,
        weights="There are none: these runs measured speed, and no model was trained to the end.",
        sources=(
            Source(
                f"{_SCALING}, run by {_TABLE_SCRIPT}",
                f"{layers} layers, hidden size {hidden}, {heads} heads, {Layout(tp, pp, vpp)}",
            ),
            Source(
                "README of Megatron-LM, https://github.com/NVIDIA/Megatron-LM/tree/v2.5",
                "a vocabulary of 51,200, sequences of 2048, runs not to convergence",
            ),
        ),
        notes=(
            "The vocabulary is the padded one, which the paper counts with; the end-of-text token "
            "is that of GPT-2's tokenizer.",
        ),
    )


_NEMO_LAUNCHER = (
    "NeMo-Framework-Launcher, conf/training/gpt3, https://github.com/NVIDIA/NeMo-Framework-Launcher"
)


def _nemo(
    published: str,
    layers: int,
    hidden: int,
    heads: int,
    tp: int,
    std: float,
    *more: Source,
    dtype: str = "float16",
) -> Preset:
    repo = f"nvidia/nemo-megatron-gpt-{published}"
    return Preset(
        title=f"NeMo Megatron-GPT {published}",
        published=published,
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        seq_length=2048,
        tp=tp,
        dtype=dtype,
        init_method_std=std,
        weights=f"Published as .nemo files only: https://huggingface.co/{repo}",
        sources=more,
        license="cc-by-4.0",
        notes=("Trained on the Pile.",),
    )


def _nemo_card(published: str, says: str) -> Source:
    return Source(f"card, https://huggingface.co/nvidia/nemo-megatron-gpt-{published}", says)


_BIGSCIENCE = "https://github.com/bigscience-workshop/bigscience/tree/master/train/tr11-176B-ml"


def _bloom(
    repo: str,
    published: str,
    layers: int,
    hidden: int,
    heads: int,
    parameters: str,
    script: str,
    tp: int,
    pp: int,
    dtype: str = "float16",
    difference: str = "",
) -> Preset:
    return Preset(
        title=repo.upper().replace("BLOOM-", "BLOOM "),
        published=published,
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        seq_length=2048,
        vocab_size=BLOOM_ROWS,
        tp=tp,
        pp=pp,
        dtype=dtype,
        init_method_std=0.0048,
        bloom=True,
        difference=difference,
        license="bigscience-bloom-rail-1.0",
        weights=f"Published: https://huggingface.co/bigscience/{repo}",
        sources=(
            Source(
                f"BigScience's script, {_BIGSCIENCE}/{script}.slurm",
                f"{layers} layers, hidden size {hidden}, {heads} heads, {Layout(tp, pp)}, ALiBi, a "
                "norm after the embedding, tables of 250,880 rows",
            ),
            Source(
                f"card, https://huggingface.co/bigscience/{repo}",
                f"{parameters} parameters, 250,680 tokens",
            ),
        ),
        notes=(
            f"The tables have {BLOOM_ROWS:,} rows for {BLOOM_TOKENS:,} tokens: the published model "
            "has its padding.",
        ),
        tokens={"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3},
    )


_TABLE_1 = "table 1, scaling study"
_MT_NLG = "MT-NLG paper, https://arxiv.org/abs/2201.11990"
_FASTER = (
    "FasterTransformer, docs/megatron-530b-model.md, https://github.com/NVIDIA/FasterTransformer"
)

PRESETS: Mapping[str, Preset] = {
    "megatron-gpt2-345m": Preset(
        title="Megatron-LM GPT-2 345M",
        published="345M",
        num_layers=24,
        hidden_size=1024,
        num_attention_heads=16,
        seq_length=1024,
        weights="Published: megatron_lm_345m on NGC, and "
        "https://huggingface.co/nvidia/megatron-gpt2-345m",
        sources=(
            Source(_MEGATRON, "table 2: 24 layers, hidden size 1024, 16 heads, called 355M there"),
            Source("card, https://huggingface.co/nvidia/megatron-gpt2-345m", "the weights", False),
            _GELU,
            Source(
                "transformers' former convert_megatron_gpt2_checkpoint.py",
                "a checkpoint without arguments has GELU by tanh (gelu_new)",
            ),
        ),
        difference="345M is what GPT-2 of this size was called in 2019; the same network has 355M "
        "parameters when counted, and Megatron-LM's paper calls it 355M.",
        notes=(
            "The published checkpoint has neither arguments nor a version: "
            "`mtt convert CKPT OUT --config megatron-gpt2-345m` says what it lacks.",
        ),
    ),
    "megatron-gpt2-1.2b": _megatron_gpt2("1.2B", 40, 1536, 16, 1, table=_TABLE_1),
    "megatron-gpt2-2.5b": _megatron_gpt2("2.5B", 54, 1920, 20, 2, table="tables 1 and 2"),
    "megatron-gpt2-4.2b": _megatron_gpt2("4.2B", 64, 2304, 24, 4, table=_TABLE_1),
    "megatron-gpt2-8.3b": _megatron_gpt2(
        "8.3B",
        72,
        3072,
        24,
        8,
        "The scaling study of the same paper (table 1) has 32 heads of 96 at this size; the model "
        "that was trained has 24 of 128 (table 2). Both have the same parameters.",
        table="table 2",
    ),
    "turing-nlg-17b": Preset(
        title="Turing-NLG 17.2B",
        published="17.2B",
        num_layers=78,
        hidden_size=4256,
        num_attention_heads=28,
        seq_length=1024,
        tp=4,
        weights=_NEVER,
        sources=(
            Source(
                "Microsoft Research blog, February 2020, https://www.microsoft.com/en-us/research/"
                "blog/turing-nlg-a-17-billion-parameter-language-model-by-microsoft/",
                "17 billion parameters; 78 layers, hidden size 4256, 28 heads",
            ),
            Source("the same", "hyperparameters and data as Megatron-LM's, so 1024 long", False),
        ),
        notes=("Tensor parallelism of 4 with ZeRO, on 256 V100.",),
    ),
    "mt-nlg-530b": Preset(
        title="Megatron-Turing NLG 530B",
        published="530B",
        num_layers=105,
        hidden_size=20480,
        num_attention_heads=128,
        seq_length=2048,
        tp=8,
        pp=35,
        dtype="bfloat16",
        init_method_std=0.00403,
        weights=_NEVER,
        sources=(
            Source(
                _MT_NLG,
                "section 3.2: 105 layers, hidden size 20480, 128 heads, 2048 long, TP8 x PP35, "
                "deviation about sqrt(1 / (3 hidden size))",
            ),
            Source(_MT_NLG, "the weights are bfloat16", False),
            Source(_FASTER, "shapes of the tensors: 51,200 rows of the embedding", False),
        ),
        notes=("Trained on 270 billion of 339 billion tokens.",),
    ),
    "megatron-scaling-1.7b": _scaling("1.7B", 24, 2304, 24, 1, 1),
    "megatron-scaling-3.6b": _scaling("3.6B", 30, 3072, 32, 2, 1),
    "megatron-scaling-7.5b": _scaling("7.5B", 36, 4096, 32, 4, 1),
    "megatron-scaling-18.4b": _scaling("18.4B", 40, 6144, 48, 8, 1),
    "megatron-scaling-39.1b": _scaling("39.1B", 48, 8192, 64, 8, 2),
    "megatron-scaling-76.1b": _scaling("76.1B", 60, 10240, 80, 8, 4, 3),
    "megatron-scaling-145.6b": _scaling("145.6B", 80, 12288, 96, 8, 8, 2),
    "megatron-scaling-310.1b": _scaling("310.1B", 96, 16384, 128, 8, 16, 2),
    "megatron-scaling-529.6b": _scaling("529.6B", 105, 20480, 128, 8, 35, 3),
    "megatron-scaling-1008b": _scaling("1008B", 128, 25600, 160, 8, 64),
    "nemo-megatron-gpt-1.3b": _nemo(
        "1.3B",
        24,
        2048,
        16,
        1,
        0.02,
        _nemo_card("1.3B", "1.3 billion parameters, TP1 x PP1, float16, the Pile"),
        Source(
            "GPT-3 paper, table 2.1, https://arxiv.org/abs/2005.14165",
            "a GPT of 1.3 billion parameters has 24 layers of hidden size 2048; 16 heads",
            False,
        ),
    ),
    "nemo-megatron-gpt-5b": _nemo(
        "5B",
        24,
        4096,
        32,
        2,
        0.01,
        _nemo_card("5B", "5 billion parameters, files for TP1 and TP2, float16 and bfloat16"),
        Source(_NEMO_LAUNCHER, "5b.yaml: 24 layers, hidden size 4096, 32 heads, 2048 long"),
    ),
    "nemo-megatron-gpt-20b": _nemo(
        "20B",
        44,
        6144,
        48,
        4,
        0.008165,
        _nemo_card("20B", "20 billion parameters, a file for TP4, bfloat16"),
        Source(_NEMO_LAUNCHER, "20b.yaml: 44 layers, hidden size 6144, 48 heads, 2048 long"),
        dtype="bfloat16",
    ),
    "bloom-560m": _bloom(
        "bloom-560m",
        "560M",
        24,
        1024,
        16,
        "559,214,592",
        "smaller_models/tr11e-350M-ml",
        1,
        1,
        difference="559,214,592 parameters, which its makers round to 560 million.",
    ),
    "bloom-1b1": _bloom(
        "bloom-1b1", "1.1B", 24, 1536, 16, "1,065,314,304", "smaller_models/tr11d-760M-ml", 1, 2
    ),
    "bloom-1b7": _bloom(
        "bloom-1b7", "1.7B", 24, 2048, 16, "1,722,408,960", "smaller_models/tr11b-1B3-ml", 1, 2
    ),
    "bloom-3b": _bloom(
        "bloom-3b", "3B", 30, 2560, 32, "3,002,557,440", "smaller_models/tr11c-2B5-ml", 4, 4
    ),
    "bloom-7b1": _bloom(
        "bloom-7b1", "7.1B", 30, 4096, 32, "7,069,016,064", "smaller_models/tr11f-6B3-ml", 4, 4
    ),
    "bloom": _bloom(
        "bloom", "176B", 70, 14336, 112, "176,247,271,424", "tr11-176B-ml", 4, 12, "bfloat16"
    ),
}
"""Name -> model; names are folders of `hub_configs/`."""
