"""Our classes under the library's common tests."""

import unittest

from library import is_complete
from mambaformer import (
    MambaFormerConfig,
    MambaFormerForCausalLM,
    MambaFormerForSequenceClassification,
    MambaFormerModel,
)
from testers import CommonTests, Tester, register

CLASSES = (MambaFormerModel, MambaFormerForCausalLM, MambaFormerForSequenceClassification)
register("mambaformer", CLASSES)

ONE_MODEL = "there are no models inside the model that have configurations of their own"
NO_EXPERT_LAYERS = "there is no mixture of experts"
OWN_NAMES = "the weights of a checkpoint are named as the modules are; loading renames nothing"
NO_POSITIONS = "this configuration encodes no positions"
NOT_CAUSAL = "angles that depend on the length of the text are refused: the logits would depend on how it is cut"
NOTHING_WIDE = "no weights are kept in float32: the scan widens its arithmetic instead"
NOT_SHIPPED = "the source distribution has no generation tests to inherit from"

NOT_APPLICABLE = {
    "test_attn_implementation_composite_models": ONE_MODEL,
    "test_can_set_attention_dynamically_composite_model": ONE_MODEL,
    "test_internal_model_config_and_subconfig_are_same": ONE_MODEL,
    "test_sdpa_can_dispatch_composite_models": ONE_MODEL,
    "test_eager_matches_batched_and_grouped_inference_0_fp16": NO_EXPERT_LAYERS,
    "test_eager_matches_batched_and_grouped_inference_1_fp32": NO_EXPERT_LAYERS,
    "test_eager_matches_batched_and_grouped_inference_2_bf16": NO_EXPERT_LAYERS,
    "test_moe_models_record_router_logits": NO_EXPERT_LAYERS,
    "test_output_router_logits_from_config": NO_EXPERT_LAYERS,
    "test_can_load_from_already_mapped_keys": OWN_NAMES,
    "test_reverse_loading_mapping": OWN_NAMES,
    "test_keep_in_fp32_modules": NOTHING_WIDE,
    "test_keep_in_fp32_modules_exist": NOTHING_WIDE,
    "test_keep_in_fp32_modules_strict_also_hardcode_fp32": NOTHING_WIDE,
    "test_bc_cache_name_forward": "the cache is a class of its own, which goes by both names without a warning",
    "test_encoder_decoder_loss_no_double_shift": "there is no encoder",
    "test_resize_position_vector_embeddings": "positions are not learned",
    "test_sliding_window_mask": "the layer types say which layers slide; there is no switch `use_sliding_window`",
    "test_vision_axial_rope": "there are no images",
    "test_model_rope_with_partial_rotation": "all of a head is rotated",
    "test_model_rope_scaling_from_config_1_dynamic": NOT_CAUSAL,
    "test_model_rope_scaling_frequencies": f"its last but one part is of the type 'dynamic': {NOT_CAUSAL}",
}
if not is_complete():
    NOT_APPLICABLE["test_generation_tester_mixin_inheritance"] = NOT_SHIPPED


class MambaFormerTests(CommonTests):
    config_class = MambaFormerConfig
    model_classes = CLASSES
    model_tester_class = Tester
    not_applicable = NOT_APPLICABLE

    def num_attention_layers(self):
        config = self.model_tester.get_config()
        return sum("attention" in config.mixers(idx) for idx in range(config.num_hidden_layers))


class PaperPattern(MambaFormerTests, unittest.TestCase):
    not_applicable = NOT_APPLICABLE | {
        "test_model_rope_scaling_from_config_0_linear": NO_POSITIONS,
        "test_model_rope_scaling_from_config_1_dynamic": NO_POSITIONS,
        "test_model_rope_scaling_from_config_2_yarn": NO_POSITIONS,
        "test_model_rope_scaling_frequencies": NO_POSITIONS,
    }
    fields = {"num_hidden_layers": 2, "max_position_embeddings": 512}


class AllLayerTypes(MambaFormerTests, unittest.TestCase):
    not_applicable = NOT_APPLICABLE | {"test_num_layers_is_small": "there is one layer of each of the five types"}
    fields = {
        "num_hidden_layers": 5,
        "max_position_embeddings": 512,
        "layer_types": ["linear_attention", "hybrid", "full_attention", "hybrid_sliding", "sliding_attention"],
        "sliding_window": 4,
        "num_sink_tokens": 1,
        "num_key_value_heads": 2,
        "intermediate_size": 37,
        "mamba_inner_norms": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
    }


class LlamaLike(MambaFormerTests, unittest.TestCase):
    fields = {
        "num_hidden_layers": 2,
        "max_position_embeddings": 512,
        "layer_types": ["full_attention"] * 2,
        "num_key_value_heads": 2,
        "intermediate_size": 37,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
