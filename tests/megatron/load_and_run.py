"""Load checkpoints into Megatron-Core's own GPTModel or T5Model and compute logits with it.

    torchrun --nproc-per-node 4 load_and_run.py CASES RESULTS

CASES is a JSON object: name -> `checkpoint`, `tp`, `pp`, `vpp`, `ep` (expert parallelism, with
whole experts), `logits`, `num_tokens` (logits to compare: the others are of padding) and
`left_over` (what a torch_dist checkpoint may hold beside the model). RESULTS gets, for each name,
`difference` (the largest, over all logits and all ranks that have any) or `error`. Where the file
of logits has some of further tokens, `mtp0_logits` and so on, those are compared too.

The model is built from the checkpoint's own `args`, as `core_transformer_config_from_args` and
`gpt_builder` or pretrain_t5.py do; only the parallel sizes are the case's, and `final_layernorm`:
whether the blocks of a T5 end with a norm, as they do where Transformer Engine is installed.
Every parameter starts as NaN, so one that is not loaded shows in the logits.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Callable
from copy import deepcopy
from datetime import timedelta
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import on_cpu  # noqa: F401
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.activations import squared_relu
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.models.T5 import T5Model
from megatron.core.models.T5.t5_spec import (
    get_t5_decoder_with_local_block_spec,
    get_t5_encoder_with_local_block_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException
from torch.nn.functional import gelu, silu


def iteration_folder(root: Path) -> Path:
    """The folder that the tracker file names, as Megatron finds it."""
    step = (root / "latest_checkpointed_iteration.txt").read_text().strip()
    return root / (step if step == "release" else f"iter_{int(step):07d}")


def transformer_config(args: Namespace, case: dict[str, Any]) -> TransformerConfig:
    """The configuration that Megatron's training script makes of the same arguments."""
    kind = MLATransformerConfig if args.multi_latent_attention else TransformerConfig
    names = {field.name for field in dataclasses.fields(kind)}
    fields = {name: value for name, value in vars(args).items() if name in names}
    if case["pp"] != args.pipeline_model_parallel_size:  # an uneven layout is for one size only
        fields["pipeline_model_parallel_layout"] = None
        args.decoder_first_pipeline_num_layers = args.decoder_last_pipeline_num_layers = None
    fields.update(
        tensor_model_parallel_size=case["tp"],
        pipeline_model_parallel_size=case["pp"],
        virtual_pipeline_model_parallel_size=case["vpp"] if case["vpp"] > 1 else None,
        num_layers_in_first_pipeline_stage=getattr(args, "decoder_first_pipeline_num_layers", None),
        num_layers_in_last_pipeline_stage=getattr(args, "decoder_last_pipeline_num_layers", None),
        num_query_groups=args.num_query_groups if args.group_query_attention else None,
        activation_func=activation(args),
        use_te_activation_func=False,
        gated_linear_unit=args.swiglu,
        bias_activation_fusion=args.bias_gelu_fusion and not args.swiglu,
        # As load_args_from_checkpoint does without experts.
        moe_ffn_hidden_size=args.moe_ffn_hidden_size if args.num_experts else None,
        num_moe_experts=args.num_experts,
        expert_model_parallel_size=case.get("ep", 1),
        expert_tensor_parallel_size=1 if args.num_experts else None,
        # How it is computed, not what:
        attention_backend=AttnBackend.unfused,
        pipeline_dtype=torch.float32,
        params_dtype=torch.float32,
        bf16=False,
        fp16=False,
        use_cpu_initialization=True,
        perform_initialization=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        moe_token_dispatcher_type="allgather",
        moe_grouped_gemm=False,
        moe_permute_fusion=False,
        moe_router_fusion=False,
    )
    return kind(**fields)


def activation(args: Namespace) -> Callable[[torch.Tensor], torch.Tensor]:
    """What the arguments name; Transformer Engine's GELU, which is not here, is the one by tanh."""
    if args.swiglu:
        return silu
    if args.squared_relu:
        return squared_relu
    return (
        partial(gelu, approximate="tanh")
        if getattr(args, "use_te_activation_func", False)
        else gelu
    )


def build_chunks(args: Namespace, case: dict[str, Any]) -> list[GPTModel | T5Model]:
    """This rank's part of the model, one GPTModel per virtual pipeline stage, or a T5Model."""
    config = transformer_config(args, case)
    if args.decoder_num_layers is not None:
        return [build_t5(args, config, case)]
    spec: Any = get_gpt_layer_local_spec(
        qk_layernorm=config.qk_layernorm, normalization=config.normalization
    )
    chunks = []
    for stage in range(case["vpp"]):
        virtual = {"ignore_virtual": False, "vp_stage": stage} if case["vpp"] > 1 else {}
        numbered = {"vp_stage": stage} if case["vpp"] > 1 else {}
        if args.num_experts or args.multi_latent_attention:
            spec = get_gpt_decoder_block_spec(
                config, False, normalization=config.normalization, **numbered
            )
        further = get_gpt_mtp_block_spec(config, spec, False, **numbered)
        chunk = GPTModel(
            config=config,
            transformer_layer_spec=spec,
            vocab_size=args.padded_vocab_size,
            max_sequence_length=args.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(**virtual),
            post_process=parallel_state.is_pipeline_last_stage(**virtual),
            parallel_output=True,
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
            position_embedding_type=args.position_embedding_type,
            rotary_percent=args.rotary_percent,
            rotary_base=args.rotary_base,
            rope_scaling=args.use_rope_scaling,
            # gpt_builder passes neither; trainers that do are meant.
            rope_scaling_factor=args.rope_scaling_factor,
            seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
            vp_stage=stage if case["vpp"] > 1 else None,
            mtp_block_spec=further if args.mtp_num_layers else None,
        )
        for parameter in chunk.parameters():
            torch.nn.init.constant_(parameter, float("nan"))
        chunks.append(chunk.eval())
    return chunks


def build_t5(args: Namespace, config: TransformerConfig, case: dict[str, Any]) -> T5Model:
    """This rank's part of a T5."""
    encoder_config = deepcopy(config)
    encoder_config.num_layers = args.encoder_num_layers
    config.num_layers = args.decoder_num_layers
    specs = (
        get_t5_encoder_with_local_block_spec(encoder_config.num_layers),
        get_t5_decoder_with_local_block_spec(config.num_layers),
    )
    for spec in specs:
        spec.layer_norm = WrappedTorchNorm if case["final_layernorm"] else None
    model = T5Model(
        config=config,
        encoder_config=encoder_config,
        transformer_encoder_layer_spec=specs[0],
        transformer_decoder_layer_spec=specs[1],
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
    )
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    return model.eval()


def chunk_keys(chunks: list[GPTModel]) -> list[str]:
    """`model`, or `model0`, `model1`, ... with a virtual pipeline."""
    return ["model"] if len(chunks) == 1 else [f"model{stage}" for stage in range(len(chunks))]


def load_torch(folder: Path, case: dict[str, Any]) -> tuple[Namespace, list[GPTModel]]:
    """The rank's file, read and loaded as `load_checkpoint` does, but never leniently."""
    name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
    if case["pp"] > 1:
        name += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}"
    if case.get("ep", 1) > 1:
        name += f"_{parallel_state.get_expert_model_parallel_rank():03d}"
    content = torch.load(folder / name / "model_optim_rng.pt", map_location="cpu")
    args = content["args"]
    chunks = build_chunks(args, case)
    expected = {key for key in content if key.startswith("model")}
    assert expected == set(chunk_keys(chunks)), expected
    for key, chunk in zip(chunk_keys(chunks), chunks, strict=True):
        chunk.load_state_dict(content[key], strict=True)
    return args, chunks


def load_torch_dist(folder: Path, case: dict[str, Any]) -> tuple[Namespace, list[GPTModel]]:
    """The whole checkpoint through `dist_checkpointing.load`, with nothing missing or left."""
    common = dist_checkpointing.load_common_state_dict(str(folder))
    metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=common)
    args = common["args"]
    chunks = build_chunks(args, case)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    metadata = {**metadata, "dp_cp_group": group}
    wanted = {
        key: chunk.sharded_state_dict(metadata=metadata)
        for key, chunk in zip(chunk_keys(chunks), chunks, strict=True)
    }
    loaded, left_over, absent = dist_checkpointing.load(
        wanted, str(folder), strict=case.get("strict") or "return_all"
    )
    assert not absent, f"not in the checkpoint: {sorted(absent)}"
    left_over -= set(case["left_over"])
    assert not left_over, f"not in the model: {sorted(left_over)}"
    for key, chunk in zip(chunk_keys(chunks), chunks, strict=True):
        chunk.load_state_dict(loaded[key], strict=True)
    return args, chunks


@torch.no_grad()
def logits(
    args: Namespace, chunks: list[GPTModel | T5Model], reference: dict[str, np.ndarray]
) -> torch.Tensor | None:
    """[batch, sequence, vocabulary] on the last pipeline stage; None on the others.

    With layers for further tokens, the logits of each follow those of the model along the sequence.
    """
    input_ids = torch.from_numpy(reference["input_ids"]).long()
    batch, length = input_ids.shape
    if isinstance(chunks[0], T5Model):
        decoder_ids = torch.from_numpy(reference["decoder_input_ids"]).long()
        size = decoder_ids.shape[1]
        seen = torch.ones(batch, length, dtype=torch.bool)
        if "encoder_attention_mask" in reference:
            seen = torch.from_numpy(reference["encoder_attention_mask"]).bool()
        hidden = ~(seen[:, None, :, None] & seen[:, None, None, :])
        causal = torch.ones(size, size, dtype=torch.bool).triu(1).expand(batch, 1, size, size)
        nothing = torch.zeros(batch, 1, size, length, dtype=torch.bool)
        return gathered(chunks[0](input_ids, decoder_ids, hidden, causal, nothing))
    positions = torch.arange(length).expand(batch, length)
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    hidden = torch.empty(length, batch, args.hidden_size)
    before = parallel_state.get_pipeline_model_parallel_prev_rank()
    after = parallel_state.get_pipeline_model_parallel_next_rank()
    output = None
    for chunk in chunks:
        chunk.config.mtp_num_layers = None  # it would compute a loss of what they predict
        if not chunk.pre_process:
            dist.recv(hidden, before)
            chunk.set_input_tensor(hidden)
        output = chunk(input_ids, positions, mask)
        if not chunk.post_process:
            dist.send(output.contiguous(), after)
    if not chunks[-1].post_process:
        return None
    return gathered(output)


def gathered(output: torch.Tensor) -> torch.Tensor:
    """The logits of all tensor-parallel ranks."""
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(output) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, output.contiguous(), group=group)
    return torch.cat(parts, dim=-1)


def run(case: dict[str, Any]) -> dict[str, Any]:
    """One case on all ranks; the result is the same on each."""
    folder = iteration_folder(Path(case["checkpoint"]))
    load = load_torch_dist if (folder / "metadata.json").exists() else load_torch
    mine: dict[str, Any] = {}
    try:
        args, chunks = load(folder, case)
    except (Exception, CheckpointException):
        mine["error"] = traceback.format_exc()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if not any("error" in one for one in everyone):
        reference = np.load(case["logits"])
        name = "logits_fp32" if "logits_fp32" in reference else "logits"
        ours = logits(args, chunks, dict(reference))
        if ours is not None:
            parts = ours.split(reference["input_ids"].shape[1], dim=1)
            found = [difference(parts[0], reference[name], case["num_tokens"])]
            for number, part in enumerate(parts[1:]):
                if f"mtp{number}_logits" in reference:  # the last tokens have none after them
                    length = part.shape[1] - number - 1
                    theirs = reference[f"mtp{number}_logits"][:, :length]
                    found.append(difference(part[:, :length], theirs, case["num_tokens"]))
            mine["difference"] = max(found)
        dist.all_gather_object(everyone, mine)
    if errors := [one["error"] for one in everyone if "error" in one]:
        return {"error": errors[0]}
    return {"difference": max(one["difference"] for one in everyone if "difference" in one)}


def difference(ours: torch.Tensor, theirs: np.ndarray, num_tokens: int) -> float:
    """The largest between two arrays of logits; NaN is infinitely far from everything."""
    ours, other = ours[..., :num_tokens], torch.from_numpy(theirs)[..., :num_tokens]
    return float((ours - other).abs().nan_to_num(nan=float("inf")).max())


def layout_of(item: tuple[str, dict[str, Any]]) -> tuple[int, int, int | None, int]:
    """Sizes as Megatron takes them."""
    case = item[1]
    return case["tp"], case["pp"], case["vpp"] if case["vpp"] > 1 else None, case.get("ep", 1)


def main() -> None:
    start = time.monotonic()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    cases = json.loads(Path(sys.argv[1]).read_text())
    results = {}
    for layout, named in groupby(
        sorted(cases.items(), key=lambda item: str(layout_of(item))), layout_of
    ):
        tp, pp, vpp, ep = layout
        # Megatron never closes a process group, so there is one set of them for each layout.
        parallel_state.initialize_model_parallel(
            tp,
            pp,
            vpp,
            expert_model_parallel_size=ep,
            expert_tensor_parallel_size=1 if ep > 1 else None,
            create_gloo_process_groups=False,
        )
        for name, case in named:
            if dist.get_rank() == 0:
                print(f"{time.monotonic() - start:.1f} s: {name}", flush=True)
            results[name] = run(case)
        parallel_state.destroy_model_parallel()
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
