"""The two architectures that are compared, with equal numbers of parameters."""

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from mambaformer import MambaFormerConfig, MambaFormerForCausalLM

ARCHITECTURES = ("hybrid", "llama")
# Mamba first, as in the paper (arXiv 2402.04248); then the others, but for windows.
PATTERN = ("linear_attention", "hybrid", "linear_attention", "full_attention", "linear_attention", "hybrid")
LAYERS_OF_LLAMA = 8
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def hybrid(vocab_size: int, hidden_size: int, eos_token_id: int) -> MambaFormerForCausalLM:
    shared = _shared(vocab_size, hidden_size, eos_token_id)
    pattern = list(PATTERN)
    config = MambaFormerConfig(
        **shared, num_hidden_layers=len(pattern), layer_types=pattern, intermediate_size=hidden_size * 3 // 2
    )
    return MambaFormerForCausalLM(config)


def llama(vocab_size: int, hidden_size: int, eos_token_id: int) -> LlamaForCausalLM:
    """A Llama as wide as the hybrid, with an MLP sized so that the numbers of parameters are equal."""
    wanted = hybrid(vocab_size, hidden_size, eos_token_id).num_parameters()
    shared = _shared(vocab_size, hidden_size, eos_token_id)
    # Per layer 4 attention matrices, 3 of the MLP and 2 norms; and the embedding and the last norm.
    rest = vocab_size * hidden_size + hidden_size + LAYERS_OF_LLAMA * (4 * hidden_size + 2) * hidden_size
    width = round((wanted - rest) / (3 * hidden_size * LAYERS_OF_LLAMA) / 8) * 8
    config = LlamaConfig(**shared, num_hidden_layers=LAYERS_OF_LLAMA, intermediate_size=width)
    return LlamaForCausalLM(config)


def build(arch: str, vocab_size: int, hidden_size: int, eos_token_id: int) -> PreTrainedModel:
    """A model with random weights.

    Raises:
        ValueError: `hidden_size` cannot be cut into heads of 64, or of 16 below that.
    """
    return {"hybrid": hybrid, "llama": llama}[arch](vocab_size, hidden_size, eos_token_id)


def _shared(vocab_size: int, hidden_size: int, eos_token_id: int) -> dict:
    """Arguments of both. No pad token: it would be the end of text, whose embedding would then stay zero."""
    head_dim = 64 if hidden_size >= 128 else 16
    if hidden_size % head_dim:
        raise ValueError(f"the hidden size must be a multiple of {head_dim}, the size of a head, got {hidden_size}")
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_attention_heads": hidden_size // head_dim,
        "max_position_embeddings": 2048,
        "rope_parameters": dict(ROPE),
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
    }
