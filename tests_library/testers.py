"""What the library's common tests ask of a model: small configurations and inputs, and which classes to test."""

import torch
from transformers.models.auto import modeling_auto

from library import load

common = load("test_modeling_common")
ConfigTester = load("test_configuration_common").ConfigTester
TrainingTesterMixin = load("test_training_mixin").TrainingTesterMixin


class Tester:
    """A model tester as the library's tests expect it."""

    batch_size, seq_length, is_training = 13, 7, True
    vocab_size, hidden_size, num_attention_heads, num_labels = 99, 32, 4, 3
    pad_token_id = 0

    def __init__(self, config_class, model_classes, fields):
        self.config_class, self.fields = config_class, fields
        self.base_model_class, self.causal_lm_class, *rest = model_classes
        self.sequence_classification_class = rest[0] if rest else None
        self.num_hidden_layers = self.get_config().num_hidden_layers

    def get_config(self):
        names = ("vocab_size", "hidden_size", "num_attention_heads", "pad_token_id")
        return self.config_class(**{name: getattr(self, name) for name in names}, **self.fields)

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, self.seq_length]
        input_ids = common.ids_tensor(shape, self.vocab_size - 1) + 1  # no pad among the tokens
        return self.get_config(), {"input_ids": input_ids, "attention_mask": common.random_attention_mask(shape)}


class CommonTests(
    common.ModelTesterMixin,
    common.GenerationTesterMixin,
    TrainingTesterMixin,
):
    """All common tests for one configuration of one model."""

    config_class = None
    model_classes = ()
    fields = {}
    not_applicable = {}
    model_tester_class = Tester
    model_tester = None

    @property
    def all_model_classes(self):
        return self.model_classes

    @property
    def _torch_compile_train_cls(self):
        return self.model_classes[1]

    def setUp(self):
        reason = self.not_applicable.get(self._testMethodName)
        if reason is not None:
            self.skipTest(f"not applicable: {reason}")
        self.model_tester = self.model_tester_class(self.config_class, self.model_classes, self.fields)
        torch.manual_seed(0)

    def test_config(self):
        ConfigTester(self, self.config_class, hidden_size=self.model_tester.hidden_size).run_common_tests()

    def test_attention_outputs(self):
        """Layers without attention have no weights to return."""
        self.model_tester.num_hidden_layers = self.num_attention_layers()
        super().test_attention_outputs()

    def num_attention_layers(self) -> int:
        return self.model_tester.num_hidden_layers


def register(model_type: str, classes) -> None:
    """The library's tests tell from these tables which labels a class takes, and which class is the bare model."""
    tables = (
        modeling_auto.MODEL_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    )
    for table, model_class in zip(tables, classes, strict=True):
        table[model_type] = model_class.__name__
