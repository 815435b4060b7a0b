"""Models of the library with the same features, under the same tests: what they pass is what ours have to pass."""

import unittest

import transformers

from testers import CommonTests


class Llama(CommonTests, unittest.TestCase):
    config_class = transformers.LlamaConfig
    model_classes = (
        transformers.LlamaModel,
        transformers.LlamaForCausalLM,
        transformers.LlamaForSequenceClassification,
    )
    fields = {
        "num_hidden_layers": 2,
        "max_position_embeddings": 512,
        "num_key_value_heads": 2,
        "intermediate_size": 37,
    }


class Jamba(CommonTests, unittest.TestCase):
    config_class = transformers.JambaConfig
    model_classes = (
        transformers.JambaModel,
        transformers.JambaForCausalLM,
        transformers.JambaForSequenceClassification,
    )
    fields = {
        "num_hidden_layers": 2,
        "max_position_embeddings": 512,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "num_experts": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "use_mamba_kernels": False,
    }

    def num_attention_layers(self):
        return 1


class Bamba(CommonTests, unittest.TestCase):
    config_class = transformers.BambaConfig
    model_classes = (transformers.BambaModel, transformers.BambaForCausalLM)
    fields = {
        "num_hidden_layers": 2,
        "max_position_embeddings": 512,
        "attn_layer_indices": [1],
        "num_key_value_heads": 2,
        "intermediate_size": 37,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_chunk_size": 16,
    }

    def num_attention_layers(self):
        return 1
