"""A second recurrent mixer, as a user would add it: this file and one row of the registry.

Gated linear attention (arXiv 2312.06635, equation 3) with a decay per head and a short convolution over the values.
"""

from torch import nn
from torch.nn import functional as F

from mambaformer.cache_keys_mambaformer import StateSpec
from mambaformer.expert_linear_mambaformer import apply_expert_linear
from mambaformer.mixer_base_mambaformer import RecurrentMixer
from mambaformer.mixer_parts_mambaformer import MambaFormerConv1d
from mambaformer.mixer_registry_mambaformer import RECURRENT_MIXERS
from mambaformer.ops_mambaformer import conv_window, matrix_recurrence


class GatedLinearAttention(RecurrentMixer):
    """Heads of (head_dim, head_dim) matrices that decay by a learned amount at each token."""

    name = "gla"

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        width, hidden = self.heads * self.head_dim, config.hidden_size
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(hidden, width, bias=False) for _ in range(3))
        self.g_proj = nn.Linear(hidden, self.heads)
        self.conv1d = MambaFormerConv1d(width, 3, bias=True)
        self.o_proj = nn.Linear(width, hidden, bias=False)

    def before(self, hidden_states, vectors):
        names = ("q_proj", "k_proj", "v_proj", "g_proj")
        q, k, v, g = (apply_expert_linear(getattr(self, name), hidden_states, vectors.get(name)) for name in names)
        return q, k, v, F.logsigmoid(g)

    def recur(self, states, inputs, vectors, lengths=None, positions=None):
        q, k, v, g = inputs
        u, window = self.conv1d(v, states.get("conv"), lengths, positions)
        q, k, w = (each.unflatten(-1, (self.heads, self.head_dim)) for each in (q, k, u))
        y, state = matrix_recurrence(q, k, w, g, None, states.get("ssm"), lengths, positions)
        return y.flatten(2), {"conv": window, "ssm": state}, {"v": v, "k": k, "w": w, "g": g}

    def advance(self):
        return self.replay

    @staticmethod
    def replay(states, tape, lengths):
        k, w = tape["k"], tape["w"]
        _, state = matrix_recurrence(k, k, w, tape["g"], None, states.get("ssm"), lengths)
        return {"conv": conv_window(tape["v"], 3, states.get("conv"), lengths), "ssm": state}

    def after(self, mixed, inputs, vectors):
        return apply_expert_linear(self.o_proj, mixed, vectors.get("o_proj"))

    def state_specs(self):
        width = self.heads * self.head_dim
        return {
            "conv": StateSpec((2, width)),
            "ssm": StateSpec((self.heads, self.head_dim, self.head_dim), is_wide=True),
        }


RECURRENT_MIXERS["gated_linear_attention"] = GatedLinearAttention
