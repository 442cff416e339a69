"""transformers' common tests, on MTT's decoder and on Llama, its encoder-decoder and on Bart.

`run.py` calls pytest on this file, with the `tests` folder of transformers' source distribution and
then `stand_ins` on the path: the modules it imports from `tests` are theirs.
"""

from __future__ import annotations

import unittest
from typing import Any, ClassVar
from unittest import mock

import torch
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, ids_tensor
from tests.test_training_mixin import TrainingTesterMixin
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3MoeForQuestionAnswering,
    Qwen3MoeForSequenceClassification,
    Qwen3MoeForTokenClassification,
    Qwen3MoeModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping

from modeling_mtt import (
    MTTConfig,
    MTTForCausalLM,
    MTTForConditionalGeneration,
    MTTForQuestionAnswering,
    MTTForSequenceClassification,
    MTTForTokenClassification,
    MTTModel,
    MTTSeq2SeqConfig,
    MTTSeq2SeqModel,
)
from tests import test_fsdp_mixin, test_modeling_common, test_tensor_parallel_mixin

# The processes of these tests are for the few model types named here; `None` is for all.
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None


class ModelTester:
    """A tiny configuration and inputs for it, under the names that the mixins ask for."""

    config_class: type[PreTrainedConfig] = MTTConfig
    base_model_class: type[PreTrainedModel] = MTTModel
    causal_lm_class: type[PreTrainedModel] = MTTForCausalLM
    all_model_classes: tuple[type[PreTrainedModel], ...] = (
        MTTModel,
        MTTForCausalLM,
        MTTForQuestionAnswering,
        MTTForSequenceClassification,
        MTTForTokenClassification,
    )
    options: ClassVar[dict[str, Any]] = {}
    config_options: ClassVar[dict[str, Any]] = {"hidden_size": 32}

    # The sizes of transformers' own testers, but for the number of heads. With others the greedy
    # texts that test_tp_generation_quantized compares may part early, Llama's as well: those of
    # random weights, quantised whole and quantised in parts.
    batch_size = 13
    seq_length = 7
    is_training = True
    vocab_size = 99
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    num_labels = 3

    def get_config(self) -> PreTrainedConfig:
        options: dict[str, Any] = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": 32,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "max_position_embeddings": 512,
            "num_labels": self.num_labels,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        return self.config_class(**{**options, **self.options})

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, Any]]:
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        # Rows of 1 to 7 tokens, the rest of each being padding.
        lengths = torch.arange(self.batch_size).remainder(self.seq_length).add(1)
        mask = (torch.arange(self.seq_length) < lengths[:, None]).long()
        return self.get_config(), {"input_ids": input_ids, "attention_mask": mask}


class GPT(ModelTester):
    """Megatron-Turing NLG: learned positions, LayerNorm, biases, a tied head."""


class LlamaLike(ModelTester):
    """RoPE, RMSNorm, a gated MLP, grouped heads, no biases, a head of its own."""

    options: ClassVar = {
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "gated_mlp": True,
        "norm_type": "rmsnorm",
        "position_embedding_type": "rope",
        "attention_bias": False,
        "attention_out_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    }


class NemotronLike(ModelTester):
    """RoPE on half a head, zero-centred LayerNorm, squared ReLU, normalised queries and keys."""

    options: ClassVar = {
        "num_key_value_heads": 2,
        "head_dim": 12,
        "hidden_act": "relu2",
        "zero_centered_norm": True,
        "use_qk_norm": True,
        "position_embedding_type": "rope",
        "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        "attention_bias": False,
        "attention_out_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    }


class MoELike(ModelTester):
    """LlamaLike with experts, as Qwen3-MoE has them, and one that every token goes through."""

    options: ClassVar = {
        **LlamaLike.options,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "mlp_layer_types": ["dense", "sparse"],
    }


class Qwen3Moe(ModelTester):
    config_class = Qwen3MoeConfig
    base_model_class = Qwen3MoeModel
    causal_lm_class = Qwen3MoeForCausalLM
    all_model_classes = (
        Qwen3MoeModel,
        Qwen3MoeForCausalLM,
        Qwen3MoeForQuestionAnswering,
        Qwen3MoeForSequenceClassification,
        Qwen3MoeForTokenClassification,
    )
    options: ClassVar = {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "mlp_only_layers": [0],
    }


class Llama(ModelTester):
    config_class = LlamaConfig
    base_model_class = LlamaModel
    causal_lm_class = LlamaForCausalLM
    all_model_classes = (
        LlamaModel,
        LlamaForCausalLM,
        LlamaForQuestionAnswering,
        LlamaForSequenceClassification,
        LlamaForTokenClassification,
    )
    options: ClassVar = {"num_key_value_heads": 2}


class Seq2SeqTester(ModelTester):
    """An encoder-decoder's configuration, and two texts: one to read and one to write."""

    config_class = MTTSeq2SeqConfig
    base_model_class = MTTSeq2SeqModel
    causal_lm_class = MTTForConditionalGeneration
    all_model_classes = (MTTSeq2SeqModel, MTTForConditionalGeneration)
    config_options: ClassVar = {"hidden_size": 48}
    sizes: ClassVar[dict[str, Any]] = {
        "intermediate_size": 32,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }

    def get_config(self) -> PreTrainedConfig:
        return self.config_class(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            **{**self.sizes, **self.options},
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, Any]]:
        config, inputs = super().prepare_config_and_inputs_for_common()
        decoder_input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        mask = torch.ones_like(decoder_input_ids)
        return config, {
            **inputs,
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": mask,
        }


class T5(Seq2SeqTester):
    """Megatron's T5: learned positions, LayerNorm, biases, a tied head with a bias."""


class T5Local(Seq2SeqTester):
    """Relative positions, no norms after the last layers, RMSNorm, a gated MLP, an own head."""

    options: ClassVar = {
        "position_embedding_type": "relative",
        "final_norm": False,
        "hidden_act": "silu",
        "gated_mlp": True,
        "norm_type": "rmsnorm",
        "attention_bias": False,
        "attention_out_bias": False,
        "mlp_bias": False,
        "lm_head_bias": False,
        "tie_word_embeddings": False,
    }


class T5Rotary(Seq2SeqTester):
    """RoPE, grouped heads, zero-centred LayerNorm, normalised queries and keys."""

    options: ClassVar = {
        "position_embedding_type": "rope",
        "num_key_value_heads": 2,
        "head_dim": 12,
        "hidden_act": "relu2",
        "zero_centered_norm": True,
        "use_qk_norm": True,
    }


class Bart(Seq2SeqTester):
    config_class = BartConfig
    base_model_class = BartModel
    causal_lm_class = BartForConditionalGeneration
    all_model_classes = (BartModel, BartForConditionalGeneration)
    config_options: ClassVar = {}
    sizes: ClassVar = {
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "max_position_embeddings": 512,
        "dropout": 0.0,
    }


class Common(ModelTesterMixin):
    """What the source distribution has for any model."""

    tester_class: type[ModelTester]
    model_tester: Any = None
    # With less than 80% of so small a model on the first device no layer is.
    model_split_percents = (0.5, 0.7, 0.8)

    # Asks whether this class inherits tests that are not in the source distribution.
    test_generation_tester_mixin_inheritance = None

    def setUp(self) -> None:
        self.model_tester = self.tester_class()
        self.all_model_classes = self.tester_class.all_model_classes
        self._torch_compile_train_cls = self.tester_class.causal_lm_class

    def test_config(self) -> None:
        tester = self.tester_class
        ConfigTester(
            self, config_class=tester.config_class, **tester.config_options
        ).run_common_tests()


class Decoder(
    Common,
    TrainingTesterMixin,
    test_tensor_parallel_mixin.TensorParallelTesterMixin,
    test_fsdp_mixin.FSDPTesterMixin,
):
    """And for a decoder: these give it one text, and an encoder-decoder needs two."""

    def setUp(self) -> None:
        super().setUp()
        # One class of ours has experts or has none, and these tests ask the class.
        about_experts = ("test_eager_matches_batched_and_grouped", "test_output_router_logits")
        has_experts = "num_experts" in self.tester_class.options
        if not has_experts and self._testMethodName.startswith(about_experts):
            self.skipTest("This model has no experts.")

    def test_reverse_loading_mapping(self, *args: Any, **kwargs: Any) -> None:
        """Ask of each model what is there for its kind of experts, or of none if it has none.

        Other model types have one kind, and the test wants every pattern of the mapping to match.
        """

        def for_this_model(model: PreTrainedModel, **options: Any) -> list[Any]:
            names = list(model.state_dict())
            conversions: list[Any] = get_model_conversion_mapping(model, **options)
            return [
                conversion
                for conversion in conversions
                if any(conversion.reverse_transform()._scoped_match(name) for name in names)
            ]

        with mock.patch.object(
            test_modeling_common, "get_model_conversion_mapping", for_this_model
        ):
            super().test_reverse_loading_mapping(*args, **kwargs)


class TestGPT(Decoder, unittest.TestCase):
    tester_class = GPT


class TestLlamaLike(Decoder, unittest.TestCase):
    tester_class = LlamaLike


class TestNemotronLike(Decoder, unittest.TestCase):
    tester_class = NemotronLike


class TestMoELike(Decoder, unittest.TestCase):
    tester_class = MoELike


class TestQwen3Moe(Decoder, unittest.TestCase):
    tester_class = Qwen3Moe


class TestLlama(Decoder, unittest.TestCase):
    tester_class = Llama


class Seq2Seq(Common):
    """transformers has no other common tests for an encoder-decoder."""

    is_encoder_decoder = True


class TestT5(Seq2Seq, unittest.TestCase):
    tester_class = T5


class TestT5Local(Seq2Seq, unittest.TestCase):
    tester_class = T5Local


class TestT5Rotary(Seq2Seq, unittest.TestCase):
    tester_class = T5Rotary


class TestBart(Seq2Seq, unittest.TestCase):
    tester_class = Bart
