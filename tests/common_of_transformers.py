"""The common tests of `transformers`, which its source distribution carries, on our models: `make test-transformers`.

They are read from the folder that the variable TRANSFORMERS_TESTS names. What they import from beside them, and the
distribution does not carry, is stood in for: the mixins for export and for generation by nothing (our own tests have these).

What does not apply, beside what they leave out by themselves (attention, quantised kernels, several GPUs):

- `has_attentions=False`: no attention weights are returned, as with Mamba-2;
- of sharding (FSDP2), which takes processes and minutes, there is `test_loaded_in_shards` of our own;
- of the configuration, `num_attention_heads` is not looked for: the heads are those of `attention`, where there is some.
"""

from __future__ import annotations

import importlib
import os
import sys
import unittest
from types import ModuleType
from typing import Any, ClassVar

import torch
from transformers.models.auto import modeling_auto

from factorization_memory.models.huggingface import (
    FactorizationMemoryConfig,
    FactorizationMemoryForCausalLM,
    FactorizationMemoryForSequenceClassification,
    FactorizationMemoryModel,
)

PACKAGE = "tests_of_transformers"


def stand_in(name: str, **attributes: Any) -> None:
    """A module of the tests, with these names."""
    module = ModuleType(f"{PACKAGE}.{name}")
    vars(module).update(attributes)
    sys.modules[module.__name__] = module


package = ModuleType(PACKAGE)
package.__path__ = [os.environ["TRANSFORMERS_TESTS"]]
sys.modules[PACKAGE] = package
stand_in("exporters")
stand_in("exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
stand_in("generation")
stand_in("generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
stand_in("utils")
stand_in(
    "utils.test_configuration_utils", config_common_kwargs={"output_hidden_states": True, "num_labels": 5, "pad_token_id": 7}
)
# They know by these lists which class takes which labels.
for names, kind in (
    (modeling_auto.MODEL_MAPPING_NAMES, FactorizationMemoryModel),
    (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, FactorizationMemoryForCausalLM),
    (modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, FactorizationMemoryForSequenceClassification),
):
    names[FactorizationMemoryConfig.model_type] = kind.__name__
ModelTesterMixin: Any = importlib.import_module(f"{PACKAGE}.test_modeling_common").ModelTesterMixin
TrainingTesterMixin: Any = importlib.import_module(f"{PACKAGE}.test_training_mixin").TrainingTesterMixin
ConfigTester: Any = importlib.import_module(f"{PACKAGE}.test_configuration_common").ConfigTester


class Tester:
    """Makes the models and inputs that the common tests ask for."""

    base_model_class = FactorizationMemoryModel
    causal_lm_class = FactorizationMemoryForCausalLM
    sequence_classification_class = FactorizationMemoryForSequenceClassification
    batch_size, seq_length, hidden_size, vocab_size = 3, 7, 32, 99
    is_training = True

    def __init__(self, parent: Any, **form: Any) -> None:
        self.parent, self.form = parent, {"num_hidden_layers": 2, **form}
        self.num_hidden_layers = self.form["num_hidden_layers"]

    def get_config(self) -> FactorizationMemoryConfig:
        return FactorizationMemoryConfig(
            **{
                "vocab_size": self.vocab_size, "hidden_size": self.hidden_size,
                "num_states": 8, "intermediate_size": 37, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **self.form,
            }
        )  # fmt: skip

    def prepare_config_and_inputs_for_common(self) -> tuple[FactorizationMemoryConfig, dict[str, Any]]:
        tokens = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


class Common(ModelTesterMixin, TrainingTesterMixin, sys.modules[f"{PACKAGE}.generation.test_utils"].GenerationTesterMixin):
    form: ClassVar[dict[str, Any]]
    all_model_classes = (FactorizationMemoryModel, FactorizationMemoryForCausalLM, FactorizationMemoryForSequenceClassification)
    has_attentions = False

    def setUp(self) -> None:
        self.model_tester = Tester(self, **self.form)
        self.config_tester = ConfigTester(
            self, config_class=FactorizationMemoryConfig, common_properties=["hidden_size", "num_hidden_layers", "vocab_size"]
        )

    def test_config(self) -> None:
        self.config_tester.run_common_tests()


class Pure(Common, unittest.TestCase):
    form: ClassVar[dict[str, Any]] = {"top_k": 3, "embedding_multiplier": 10.0}


class Associative(Common, unittest.TestCase):
    form: ClassVar[dict[str, Any]] = {
        "top_k": 3,
        "update_lag": 1,
        "rates": "head",
        "conv_size": 4,
        "value_skip": True,
        "output_gate": True,
    }


class Untied(Common, unittest.TestCase):
    form: ClassVar[dict[str, Any]] = {"num_heads": 2, "conv_size": 4, "tie_word_embeddings": False}


# They take two layers at most.
class WithAttention(Common, unittest.TestCase):
    form: ClassVar[dict[str, Any]] = {
        "mixers": ["memory", "attention"], "attention": {"num_heads": 4, "num_key_value_heads": 2, "sliding_window": 6},
    }  # fmt: skip


class OtherMixers(Common, unittest.TestCase):
    form: ClassVar[dict[str, Any]] = {
        "mixers": ["mamba2", "gated_deltanet"],
        "mamba2": {"state_size": 8, "head_size": 8, "chunk_size": 4}, "gated_deltanet": {"num_heads": 2, "head_size": 8},
    }  # fmt: skip
