"""MambaFormer for Transformers: hybrid Mamba + attention language models, expert vectors, an exact cache."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .cache_mambaformer import MambaFormerCache
from .cache_policies_mambaformer import (
    TOVA,
    ExpectedAttention,
    KeyDiff,
    KeyNorm,
    PruningPolicy,
    SinksAndWindow,
    SnapKV,
    split_budget,
)
from .cache_prefix_mambaformer import PrefixCache
from .configuration_mambaformer import MambaFormerConfig
from .convert import convert, save_mamba_delta  # from here on `convert` is the function, not the package
from .expert_fitting_mambaformer import FitProgress, fit_expert_vector
from .expert_laplace_mambaformer import fit_isotropic, fit_laplace
from .expert_posterior_mambaformer import ExpertPosterior
from .expert_prior_mambaformer import DirichletPrior
from .expert_vectors_mambaformer import ExpertVector, ExpertVectorLibrary
from .generation_schedule_mambaformer import ExpertSwitchLogitsProcessor
from .modeling_mambaformer import (
    MambaFormerForCausalLM,
    MambaFormerForSequenceClassification,
    MambaFormerModel,
    MambaFormerPreTrainedModel,
)

__version__ = "0.2.0"

AutoConfig.register(MambaFormerConfig.model_type, MambaFormerConfig, exist_ok=True)
AutoModel.register(MambaFormerConfig, MambaFormerModel, exist_ok=True)
AutoModelForCausalLM.register(MambaFormerConfig, MambaFormerForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(MambaFormerConfig, MambaFormerForSequenceClassification, exist_ok=True)

__all__ = [
    "TOVA",
    "DirichletPrior",
    "ExpectedAttention",
    "ExpertPosterior",
    "ExpertSwitchLogitsProcessor",
    "ExpertVector",
    "ExpertVectorLibrary",
    "FitProgress",
    "KeyDiff",
    "KeyNorm",
    "MambaFormerCache",
    "MambaFormerConfig",
    "MambaFormerForCausalLM",
    "MambaFormerForSequenceClassification",
    "MambaFormerModel",
    "MambaFormerPreTrainedModel",
    "PrefixCache",
    "PruningPolicy",
    "SinksAndWindow",
    "SnapKV",
    "convert",
    "fit_expert_vector",
    "fit_isotropic",
    "fit_laplace",
    "save_mamba_delta",
    "split_budget",
]
