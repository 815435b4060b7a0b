"""The models that are compared, ours and Transformers' at equal weights, and one way to feed them all."""

import copy
import functools
import importlib.util
import inspect
from collections.abc import Iterable

import torch
from tqdm.auto import tqdm
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)
from transformers.modeling_utils import PreTrainedModel

from mambaformer import MambaFormerConfig, MambaFormerForCausalLM, convert
from mambaformer.convert import find_smollm2

GROUP_SIZE = 32  # weights that share a scale; llama.cpp's Q4_1 has as many
# Of the logits' scale. Random weights make 4e-4 of float32's rounding within 1,024 tokens of Mamba; errors make more.
TOLERANCE = 5e-3


class Size:
    """Chooses between what a real run measures and the toy that shows that a case runs."""

    def __init__(self, is_quick: bool = False):
        self.is_quick = is_quick

    def __call__(self, full, quick):
        return quick if self.is_quick else full


def mamba(size: Size) -> MambaForCausalLM:
    """Transformers' Mamba in the shape of Mamba-130M, with random weights."""
    torch.manual_seed(0)
    wide, deep, vocab = size((768, 24, 50280), (32, 2, 128))
    return MambaForCausalLM(MambaConfig(hidden_size=wide, num_hidden_layers=deep, vocab_size=vocab)).eval()


def jamba(size: Size) -> JambaForCausalLM:
    """Transformers' Jamba without experts, 150M weights: every fourth of 12 layers is attention."""
    torch.manual_seed(0)
    wide, deep, vocab, heads = size((768, 12, 50280, 12), (32, 4, 128, 4))
    config = JambaConfig(
        vocab_size=vocab,
        tie_word_embeddings=True,
        hidden_size=wide,
        intermediate_size=size(2560, 96),
        num_hidden_layers=deep,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        num_experts=1,
        num_experts_per_tok=1,
        attn_layer_period=4,
        attn_layer_offset=2,
        max_position_embeddings=65536,
    )
    return JambaForCausalLM(config).eval()


def smollm2(size: Size) -> LlamaForCausalLM:
    """SmolLM2-135M as Transformers' Llama in float32: real weights, or a toy of random ones.

    Raises:
        FileNotFoundError: the package with the weights is not installed.
    """
    return _toy_llama() if size.is_quick else _load_smollm2()


@functools.lru_cache(maxsize=1)
def _load_smollm2() -> LlamaForCausalLM:
    source = find_smollm2()
    return AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32).eval()


def _toy_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=128, tie_word_embeddings=True, **sizes)).eval()


FAMILIES = {"Mamba": mamba, "Jamba": jamba, "Llama": smollm2}


def pair(family: str, size: Size, dtype: torch.dtype = torch.float32) -> dict[str, PreTrainedModel]:
    """Ours and Transformers' model of one family, with the same weights."""
    peer = FAMILIES[family](size)
    if dtype != peer.dtype:
        peer = copy.deepcopy(peer).to(dtype)
    return {"ours": convert(peer), "transformers": peer}


def windowed(size: Size) -> MambaFormerForCausalLM:
    """SmolLM2's layers with a window and Mamba in each; the vocabulary is small, so that the head hides nothing."""
    torch.manual_seed(0)
    wide, deep, heads, window = size((576, 30, 9, 256), (32, 2, 2, 8))
    config = MambaFormerConfig(
        vocab_size=1024,
        hidden_size=wide,
        intermediate_size=size(1536, 64),
        num_hidden_layers=deep,
        layer_types=["hybrid_sliding"] * deep,
        num_attention_heads=heads,
        num_key_value_heads=size(3, 1),
        sliding_window=window,
        num_sink_tokens=4,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )
    return MambaFormerForCausalLM(config).eval()


def load_int4(size: Size) -> MambaFormerForCausalLM:
    """Ours with the weights of SmolLM2 in 4 bits, by torchao: all projections and the head, bfloat16 between them.

    Raises:
        ImportError: torchao, or its kernel for processors, is not installed.
    """
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import quantize_

    model = convert(smollm2(size), dtype=torch.bfloat16)
    # This unties the head from the embedding, which is read one row at a time and stays as it is.
    quantize_(model, PrototypeInt4WeightOnlyConfig(group_size=GROUP_SIZE))
    return model


def load_llama_cpp(num_tokens: int):
    """SmolLM2's 4-bit file in llama.cpp, with as many threads as PyTorch has.

    Raises:
        ImportError, FileNotFoundError: llama-cpp-python or the weights are not installed.
    """
    from llama_cpp import Llama

    threads = torch.get_num_threads()
    path = str(find_smollm2())
    return Llama(path, n_ctx=num_tokens, n_threads=threads, n_threads_batch=threads, logits_all=False, verbose=False)


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


# ---- feeding


def random_ids(model, rows: int, num_tokens: int) -> torch.Tensor:
    return torch.randint(3, model.config.vocab_size, (rows, num_tokens))


@functools.cache
def cache_argument(model_class: type) -> str:
    """Versions of Transformers and its models name it differently; the last name is known to all others."""
    arguments = inspect.signature(model_class.forward).parameters
    return next(name for name in ("cache", "cache_params", "past_key_values") if name in arguments)


def feed(model, ids: torch.Tensor, cache=None):
    """Feeds tokens behind those of `cache`; logits of the last one, (rows, vocab_size), and the cache."""
    name = cache_argument(type(model))
    outputs = model(ids, **{name: cache}, use_cache=True, logits_to_keep=1)
    return outputs.logits[:, -1], getattr(outputs, name)


def feed_in_pieces(model, ids: torch.Tensor, cache=None, piece: int = 512):
    """The same in pieces, so that memory stays small; returns the cache."""
    for part in tqdm(ids.split(piece, dim=1), "filling a cache", unit="piece", delay=5, leave=False):
        _, cache = feed(model, part, cache)
    return cache


def fill(model, ids: torch.Tensor, cache=None, piece: int = 512):
    """`feed_in_pieces` without attention's products: a cache of the right size, with keys that mean nothing.

    What decoding costs does not depend on what the keys are, and long texts are filled in a time that is linear. Nor
    does it matter that Transformers' Mamba and Jamba start each piece from an empty state.
    """
    if "full_attention" not in (getattr(model.config, "layer_types", None) or ["full_attention"]):
        return feed_in_pieces(model, ids, cache, piece)
    implementation = model.config._attn_implementation
    AttentionInterface.register("nothing", _attend_to_nothing)
    model.set_attn_implementation("nothing")
    try:
        return feed_in_pieces(model, ids, cache, piece)
    finally:
        model.set_attn_implementation(implementation)


def _attend_to_nothing(module, query, key, value, attention_mask, **kwargs):
    return query.transpose(1, 2).contiguous(), None


def step(model, cache, rows: int = 1):
    """A function that decodes one token behind `cache`; the cache grows with each call."""
    ids = random_ids(model, rows, 1)
    return lambda: feed(model, ids, cache)


def check_same(names: Iterable[str], logits: dict[str, torch.Tensor], tolerance: float = TOLERANCE) -> None:
    """Refuses to compare the speed of models that compute different things.

    Raises:
        ValueError: their logits differ by more than `tolerance` of their scale.
    """
    first, *others = (logits[name].float() for name in names)
    for other in others:
        difference = ((first - other).abs().max() / first.abs().max()).item()
        if not difference <= tolerance:
            raise ValueError(f"{' and '.join(names)} differ by {difference:.1e} of the scale of their logits.")


def weight_bytes(model) -> int:
    """Bytes of all weights that a token reads; an embedding that is not the head as well is read by a single row."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    found = {id(weight): _held_bytes(weight) for weight in model.parameters()}
    if head is None or embedding.weight is not head.weight:
        found.pop(id(embedding.weight), None)
    return sum(found.values())


def _held_bytes(weight: torch.Tensor) -> int:
    """A quantized weight holds tensors of its own; its `nbytes` is that of what it stands for."""
    if not hasattr(weight, "__tensor_flatten__"):
        return weight.nbytes
    names, _ = weight.__tensor_flatten__()
    return sum(getattr(weight, name).nbytes for name in names)


def key_value_bytes(model, num_tokens: int) -> int:
    """Bytes of keys and values that one more token reads, in a model of attention layers; no spare room counts."""
    config = model.config
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return numbers * num_tokens * model.dtype.itemsize


def cache_bytes(cache) -> int:
    """Bytes of a cache, ours or Transformers'."""
    if hasattr(cache, "nbytes"):
        return cache.nbytes
    return sum(tensor.nbytes for layer in cache.layers for tensor in _tensors_of(layer))


def _tensors_of(layer) -> list[torch.Tensor]:
    held = [getattr(layer, name, None) for name in ("keys", "values")]
    for name in ("conv_states", "recurrent_states"):
        states = getattr(layer, name, None)
        held += list(states.values()) if isinstance(states, dict) else [states]
    return [tensor for tensor in held if isinstance(tensor, torch.Tensor)]
