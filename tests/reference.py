"""The slow, obvious oracle: MambaFormer in float64, one row at a time, one token at a time.

It reads like the papers, imports nothing but torch and Python's library, knows neither batches nor pads nor caches,
and judges everything that does. All of it is differentiable, so it judges gradients too.

Sources: Mamba (arXiv 2312.00752, algorithm 2), Mamba-2 (2405.21060), Gated DeltaNet (2412.06464), MambaFormer
(2402.04248), attention sinks (2309.17453), RoPE (2104.09864), RMSNorm (1910.07467), SVF experts (2501.06252, section
3.1), KeyDiff (2504.15364), TOVA (2401.06104), SnapKV (2404.14469), key norm (2406.11430), expected
attention (2510.00636). Letters: D channels, N state size, K taps of the convolution.
"""

import functools
import math

import torch

SLIDING = ("sliding_attention", "hybrid_sliding")
WITH_ATTENTION = ("full_attention", "sliding_attention", "hybrid", "hybrid_sliding")
RECURRENT = ("linear_attention", "hybrid", "hybrid_sliding")


def reference_logits(state_dict, config_dict, token_rows, experts=None):
    """Logits of every token of every row, each row by itself: a list of (tokens in the row, vocabulary) tensors.

    Args:
        state_dict: of a `MambaFormerForCausalLM`; converted to float64.
        config_dict: `config.to_dict()`.
        token_rows: a list of lists of token ids.
        experts: `None`, or one entry a row: `None` (base), a dict from module name to z, or a list of
            `(start, None or dict)` segments: tokens from `start` on are processed by that expert's weights, while the
            states and keys of earlier tokens stay as the earlier expert left them.
    """
    experts = [None] * len(token_rows) if experts is None else experts
    built = {}  # an expert's weights are the same in every row
    return [_row(state_dict, config_dict, row, expert, built) for row, expert in zip(token_rows, experts, strict=True)]


def _row(state_dict, config, tokens, expert, built):
    segments = expert if isinstance(expert, list) else [(0, expert)]
    reader, logits = ReferenceRow(config), []
    for position, token in enumerate(tokens):
        in_force = [z for start, z in segments if start <= position][-1]
        if id(in_force) not in built:
            built[id(in_force)] = tuned_weights(state_dict, in_force)
        logits.append(reader.read(token, built[id(in_force)]))
    return torch.stack(logits) if logits else torch.zeros(0, config["vocab_size"], dtype=torch.float64)


def tuned_weights(state_dict, vectors=None, decomposed=None):
    """Float64 copies of the weights under an expert: W' = U diag(s * z) V^T; what z leaves out is 1.

    `decomposed` keeps U, s, V^T by module, for further calls with the same weights.
    """
    decomposed = {} if decomposed is None else decomposed
    weights = {name: tensor.to(torch.float64) for name, tensor in state_dict.items()}
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])  # tied; an expert tunes the head alone
    for module, short_z in (vectors or {}).items():
        if module not in decomposed:
            decomposed[module] = torch.linalg.svd(weights[module + ".weight"], full_matrices=False)
        weights[module + ".weight"] = tuned(*decomposed[module], short_z)
    return weights


def tuned(U, s, Vh, short_z):
    """U diag(s * z) V^T; what z leaves out is 1."""
    z = torch.ones_like(s)
    z[: len(short_z)] = short_z.to(s.dtype)
    return U @ torch.diag(s * z) @ Vh


def tuned_weight(weight, short_z):
    """One weight under an expert vector, decomposed by a plain SVD."""
    return tuned(*torch.linalg.svd(weight.detach(), full_matrices=False), short_z)


def rounded(vector, bits):
    """A key or value as a quantized cache keeps it: rotated, rounded in groups of at most 64, rotated back."""
    size = len(vector)
    signs = torch.tensor([1.0 if (n + 1) * 0x9E3779B1 & 1 << 15 else -1.0 for n in range(size)], dtype=vector.dtype)
    block = max(width for width in (128, 64, 32, 16, 8, 4, 2, 1) if size % width == 0)
    parities = torch.tensor([[bin(i & j).count("1") % 2 for j in range(block)] for i in range(block)])
    hadamard = (1.0 - 2.0 * parities).to(vector.dtype) / block**0.5
    rotation = torch.block_diag(*[hadamard] * (size // block)) @ torch.diag(signs)
    levels, pieces = 2**bits, []
    for group in (rotation @ vector).view(-(-size // 64), -1):
        low = -group.abs().max() if bits >= 6 else group.min().bfloat16().to(group.dtype)
        if bits >= 6:
            step = (-low / ((levels - 1) / 2)).bfloat16().to(group.dtype)
            low = -step * (levels - 1) / 2
        else:
            step = ((group.max() - low).clamp(min=0) / (levels - 1)).bfloat16().to(group.dtype)
        pieces += [low + step * ((x - low) / (step or 1)).round().clamp(0, levels - 1) for x in group]
    return rotation.T @ torch.stack(pieces)


def rounded_score(score):
    """A score with half of its digits: equal tokens have equal scores, whatever the errors of rounding are."""
    mantissa, exponent = math.frexp(score)
    return math.ldexp(round(mantissa * 2**24), exponent - 24)


def rounded_state(state, position):
    """A state (..., numbers) as a cache of 8-bit states keeps it after the token at `position`."""
    numbers = state.shape[-1]
    groups = []
    for index, group in enumerate(state.reshape(-1, numbers).tolist()):
        step = 2.0**-126
        while 127 * step < max(map(abs, group)):
            step *= 2
        kept = []
        for n, number in enumerate(group):
            low = math.floor(number / step)
            is_up = number / step - low > threshold(position, index * numbers + n)
            kept.append((low + is_up) * step)
        groups.append(kept)
    return torch.tensor(groups, dtype=state.dtype).view(state.shape)


@functools.lru_cache(maxsize=2**18)
def threshold(position, index):
    """From 0 to 1, as a hash of 32 bits."""
    mixed = (position * 0x9E3779B1 % 2**32) ^ ((index * 0x85EBCA77 + 0x165667B1) % 2**32)
    mixed = (mixed ^ mixed >> 16) * 0x7FEB352D % 2**32
    mixed = (mixed ^ mixed >> 15) * 0x846CA68B % 2**32
    return ((mixed ^ mixed >> 16) >> 8) / 2**24


class ReferenceRow:
    """Reads one text token by token. All that it remembers is in plain sight: keys, values, conv inputs, h."""

    def __init__(self, config):
        self.config = config
        self.position = 0
        layers = range(config["num_hidden_layers"])
        self.keys = [[] for _ in layers]  # per token (key/value heads, head size)
        self.values = [[] for _ in layers]
        self.conv_inputs = [[] for _ in layers]  # per token (D,)
        self.h = [0.0 for _ in layers]
        self.queries = [[] for _ in layers]  # per token (heads, head size), for policies that read them
        # Per key/value head the positions whose keys a policy has left.
        self.left = [[[] for _ in range(config["num_key_value_heads"])] for _ in layers]

    def copy(self):
        """Another reader that remembers the same text and goes on by itself."""
        other = ReferenceRow(self.config)
        other.position, other.h = self.position, list(self.h)
        for name in ("keys", "values", "conv_inputs"):
            setattr(other, name, [list(of_layer) for of_layer in getattr(self, name)])
        other.queries = [list(of_layer) for of_layer in self.queries]
        other.left = [[list(of_head) for of_head in of_layer] for of_layer in self.left]
        return other

    def read(self, token, weights):
        """Logits (vocabulary,) after one more token, under these weights."""
        config = self.config
        x = weights["model.embed_tokens.weight"][token]
        for layer, kind in enumerate(config["layer_types"]):
            at = Names(weights, f"model.layers.{layer}.", config["rms_norm_eps"])
            if kind in WITH_ATTENTION:
                x = x + self.attention(layer, kind, at, at.norm("self_attn_layernorm", x))
            if kind in RECURRENT and config["recurrent_mixer"] == "mamba":
                x = x + self.mamba(layer, at, at.norm("mamba_layernorm", x))
            if kind in RECURRENT and config["recurrent_mixer"] == "gated_linear_attention":
                x = x + self.gated_linear_attention(layer, at, at.norm("gla_layernorm", x))
            if kind in RECURRENT and config["recurrent_mixer"] == "mamba2":
                x = x + self.mamba2(layer, at, at.norm("mamba2_layernorm", x))
            if kind in RECURRENT and config["recurrent_mixer"] == "gated_delta":
                x = x + self.gated_delta(layer, at, at.norm("gated_delta_layernorm", x))
            if kind == "conv":
                x = x + self.short_conv(layer, at, at.norm("short_conv_layernorm", x))
            if config["intermediate_size"] is not None:
                x = x + mlp(at, at.norm("mlp_layernorm", x))
        self.position += 1
        top = Names(weights, "", config["rms_norm_eps"])
        return top.linear("lm_head", top.norm("model.norm", x))

    def attention(self, layer, kind, at, x):
        config = self.config
        heads, kv_heads, size = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
        queries = at.linear("self_attn.q_proj", x).view(heads, size)
        keys = at.linear("self_attn.k_proj", x).view(kv_heads, size)
        values = at.linear("self_attn.v_proj", x).view(kv_heads, size)
        if config["rope_parameters"] is not None:
            theta = config["rope_parameters"]["rope_theta"]
            queries, keys = rotate(queries, self.position, theta), rotate(keys, self.position, theta)
        bits = config.get("kv_bits")
        if bits is not None:
            keys = torch.stack([rounded(key, bits["keys"]) for key in keys])
            values = torch.stack([rounded(value, bits["values"]) for value in values])
        self.keys[layer].append(keys)
        self.values[layer].append(values)
        self.queries[layer].append(queries)
        for positions in self.left[layer]:
            positions.append(self.position)
        outputs = []
        for head in range(heads):
            kv_head = head // (heads // kv_heads)
            seen = [p for p in self.left[layer][kv_head] if self.visible(kind, p)]
            query, keys = self.at_places_in_the_cache(
                kind, queries[head], [self.keys[layer][p][kv_head] for p in seen], seen
            )
            scores = torch.stack([query @ key for key in keys]) / size**0.5
            shares = torch.exp(scores - scores.max())
            shares = shares / shares.sum()
            outputs.append(sum(share * self.values[layer][p][kv_head] for share, p in zip(shares, seen, strict=True)))
        if config.get("policy") is not None and kind not in SLIDING:
            self.evict(layer, config["policy"])
        return at.linear("self_attn.o_proj", torch.cat(outputs))

    def at_places_in_the_cache(self, kind, query, keys, positions):
        """StreamingLLM: all that a query sees, itself at the end, gets the positions 0, 1, 2, ... within the cache."""
        config = self.config
        if kind not in SLIDING or config["rope_parameters"] is None or config["window_positions"] == "absolute":
            return query, keys
        theta = config["rope_parameters"]["rope_theta"]
        places = zip(keys, positions, strict=True)
        moved = [rotate(key, n - position, theta) for n, (key, position) in enumerate(places)]
        return rotate(query, len(positions) - 1 - self.position, theta), moved

    def evict(self, layer, policy):
        """Drops keys after every `interval` tokens: all but the best of each head."""
        seen, budget = self.position + 1, policy["budget"]
        budget = budget[layer] if isinstance(budget, list) else budget
        if isinstance(budget, dict):
            budget = budget.get(layer)
        if seen % policy["interval"] or budget is None:
            return
        number = budget if isinstance(budget, int) else math.ceil(budget * seen)
        number = max(number, policy["sinks"] + policy["recent"])
        for kv_head, positions in enumerate(self.left[layer]):
            scores = self.scores(layer, kv_head, positions, policy)
            always = [p for p in positions if p < policy["sinks"] or p >= seen - policy["recent"]]
            rest = [p for p in positions if p not in always]
            rest = sorted(rest, key=lambda p: (-rounded_score(scores[p]), p))[: max(number - len(always), 0)]
            self.left[layer][kv_head] = sorted(always + rest)

    def scores(self, layer, kv_head, positions, policy):
        """A score for each of these positions; the higher ones stay."""
        keys = {p: self.keys[layer][p][kv_head] for p in positions}
        if policy["name"] == "key_norm":
            return {p: -float((key @ key).sqrt()) for p, key in keys.items()}
        if policy["name"] == "key_diff":
            mean = sum(key / (key @ key).sqrt() for key in keys.values()) / len(keys)
            return {p: -float(key @ mean / ((key @ key) * (mean @ mean)).sqrt()) for p, key in keys.items()}
        if policy["name"] == "sinks_and_window":
            return {p: p for p in positions}
        if policy["name"] == "expected_attention":
            return self.expected_attention(layer, kv_head, keys, policy)
        window = {"tova": 1}.get(policy["name"]) or policy["window"]
        votes = dict.fromkeys(positions, 0.0)
        group = self.config["num_attention_heads"] // self.config["num_key_value_heads"]
        for at in range(self.position + 1 - window, self.position + 1):
            for head in range(kv_head * group, (kv_head + 1) * group):
                query = self.queries[layer][at][head] / self.config["head_dim"] ** 0.5
                shares = {p: float(torch.exp(query @ key)) for p, key in keys.items() if p <= at}
                for p, share in shares.items():
                    votes[p] += share / sum(shares.values())
        if policy["name"] == "tova":
            return votes
        reach = policy["kernel_size"] // 2
        near = {p: positions[max(n - reach, 0) : n + reach + 1] for n, p in enumerate(positions)}
        return {p: max(votes[q] for q in near[p]) for p in positions}

    def expected_attention(self, layer, kv_head, keys, policy):
        """With the mean and the covariance matrix of the newest queries, head by head."""
        group, size = self.config["num_attention_heads"] // self.config["num_key_value_heads"], self.config["head_dim"]
        shares = dict.fromkeys(keys, 0.0)
        for head in range(kv_head * group, (kv_head + 1) * group):
            newest = range(self.position + 1 - policy["window"], self.position + 1)
            queries = torch.stack([self.queries[layer][at][head] for at in newest])
            mean, covariance = queries.mean(0), torch.cov(queries.T, correction=0).reshape(size, size)
            logits = {
                p: float(mean @ key / size**0.5 + key @ covariance @ key / (2 * size)) for p, key in keys.items()
            }
            highest = max(logits.values())
            total = sum(math.exp(logit - highest) for logit in logits.values())
            for p, logit in logits.items():
                shares[p] += math.exp(logit - highest) / total / group
        norms = {p: float(self.values[layer][p][kv_head].norm()) for p in keys}
        return {p: (share + policy["epsilon"]) * norms[p] for p, share in shares.items()}

    def visible(self, kind, key_position):
        """Whether the newest token sees this earlier (or own) position."""
        if kind not in SLIDING:
            return True
        near = self.position - key_position < self.config["sliding_window"]
        return near or key_position < self.config["num_sink_tokens"]

    def mamba(self, layer, at, x):
        config = self.config
        D, N, K = config["mamba_expand"] * config["hidden_size"], config["mamba_d_state"], config["mamba_d_conv"]
        hidden, gate = at.linear("mamba.in_proj", x).split([D, D])
        self.conv_inputs[layer].append(hidden)
        taps = at["mamba.conv1d.weight"][:, 0]  # (D, K); the last tap meets the newest token
        u = at.get("mamba.conv1d.bias", torch.zeros_like(hidden))
        for back, old in enumerate(reversed(self.conv_inputs[layer][-K:])):
            u = u + taps[:, K - 1 - back] * old
        u = u * torch.sigmoid(u)
        dt, B, C = at.linear("mamba.x_proj", u).split([config["mamba_dt_rank"], N, N])
        if config["mamba_inner_norms"]:
            dt, B, C = (
                at.norm("mamba.dt_layernorm", dt),
                at.norm("mamba.b_layernorm", B),
                at.norm("mamba.c_layernorm", C),
            )
        dt = torch.log1p(torch.exp(at.linear("mamba.dt_proj", dt)))
        A = -torch.exp(at["mamba.A_log"])
        self.h[layer] = torch.exp(dt[:, None] * A) * self.h[layer] + (dt * u)[:, None] * B[None, :]
        y = self.h[layer] @ C + at["mamba.D"] * u
        self.round_state(layer)
        return at.linear("mamba.out_proj", y * gate * torch.sigmoid(gate))

    def convolved(self, layer, at, name, x, K):
        """The sum over the last K inputs, of which x is the newest."""
        self.conv_inputs[layer].append(x)
        total = at.get(f"{name}.bias", torch.zeros_like(x))
        for back, old in enumerate(reversed(self.conv_inputs[layer][-K:])):
            total = total + at[f"{name}.weight"][:, 0, K - 1 - back] * old
        return total

    def mamba2(self, layer, at, x):
        config = self.config
        H, P, G, N = (config[f"mamba_{name}"] for name in ("num_heads", "head_dim", "num_groups", "d_state"))
        gate, packed, dt = at.linear("mamba2.in_proj", x).split([H * P, H * P + 2 * G * N, H])
        u = silu(self.convolved(layer, at, "mamba2.conv1d", packed, config["mamba_d_conv"]))
        u, B, C = u[: H * P].view(H, P), u[H * P : H * P + G * N].view(G, N), u[H * P + G * N :].view(G, N)
        dt = torch.log1p(torch.exp(dt + at["mamba2.dt_bias"]))
        low, high = config["time_step_limit"] or (None, None)
        dt = dt if low is None else torch.maximum(dt, torch.tensor(low, dtype=dt.dtype))
        dt = dt if high is None else torch.minimum(dt, torch.tensor(high, dtype=dt.dtype))
        A, outputs, states = -torch.exp(at["mamba2.A_log"]), [], []
        for head in range(H):
            group, old = head // (H // G), 0.0 if isinstance(self.h[layer], float) else self.h[layer][head]
            states.append(torch.exp(dt[head] * A[head]) * old + dt[head] * torch.outer(B[group], u[head]))
            outputs.append(states[-1].T @ C[group] + at["mamba2.D"][head] * u[head])
        self.h[layer] = torch.stack(states)
        y = torch.cat(outputs)
        self.round_state(layer)
        y = y * silu(gate) if config["mamba_gated_norm"] in ("none", "after_gate") else y
        if config["mamba_gated_norm"] != "none":
            groups = [part / torch.sqrt((part * part).mean() + config["rms_norm_eps"]) for part in y.chunk(G)]
            y = torch.cat(groups) * at["mamba2.norm.weight"]
        y = y * silu(gate) if config["mamba_gated_norm"] == "before_gate" else y
        return at.linear("mamba2.out_proj", y)

    def gated_delta(self, layer, at, x):
        config = self.config
        key_heads, H = config["linear_num_key_heads"], config["linear_num_value_heads"]
        K, V = config["linear_key_head_dim"], config["linear_value_head_dim"]
        packed = at.linear("gated_delta.qkv_proj", x)
        u = silu(self.convolved(layer, at, "gated_delta.conv1d", packed, config["linear_conv_kernel_dim"]))
        queries, keys, values = u.split([key_heads * K, key_heads * K, H * V])
        queries, keys, values = queries.view(key_heads, K), keys.view(key_heads, K), values.view(H, V)
        betas = torch.sigmoid(at.linear("gated_delta.b_proj", x))
        betas = 2 * betas if config["linear_allow_neg_eigval"] else betas
        steps = torch.log1p(torch.exp(at.linear("gated_delta.a_proj", x) + at["gated_delta.dt_bias"]))
        decays = torch.exp(-torch.exp(at["gated_delta.A_log"]) * steps)
        gate = at.linear("gated_delta.z_proj", x).view(H, V)
        outputs, states = [], []
        for head in range(H):
            query, key = (each[head // (H // key_heads)] for each in (queries, keys))
            query, key = (each / torch.sqrt((each * each).sum() + 1e-6) for each in (query, key))
            old = torch.zeros(K, V, dtype=x.dtype) if isinstance(self.h[layer], float) else self.h[layer][head]
            state = decays[head] * old
            state = state + torch.outer(key, betas[head] * (values[head] - state.T @ key))
            read = state.T @ query / K**0.5
            read = read / torch.sqrt((read * read).mean() + config["rms_norm_eps"]) * at["gated_delta.norm.weight"]
            states.append(state)
            outputs.append(read * silu(gate[head]))
        self.h[layer] = torch.stack(states)
        self.round_state(layer)
        return at.linear("gated_delta.out_proj", torch.cat(outputs))

    def short_conv(self, layer, at, x):
        B, C, u = at.linear("short_conv.in_proj", x).chunk(3)
        y = C * self.convolved(layer, at, "short_conv.conv1d", B * u, self.config["conv_L_cache"])
        return at.linear("short_conv.out_proj", y)

    def gated_linear_attention(self, layer, at, x):
        heads, size, K = self.config["num_attention_heads"], self.config["head_dim"], 3
        queries, keys = (at.linear(f"gla.{name}", x).view(heads, size) for name in ("q_proj", "k_proj"))
        self.conv_inputs[layer].append(at.linear("gla.v_proj", x))
        values = at["gla.conv1d.bias"]
        for back, old in enumerate(reversed(self.conv_inputs[layer][-K:])):
            values = values + at["gla.conv1d.weight"][:, 0, K - 1 - back] * old
        values = (values * torch.sigmoid(values)).view(heads, size)
        decays = torch.sigmoid(at.linear("gla.g_proj", x))
        self.h[layer] = decays[:, None, None] * self.h[layer] + keys[:, :, None] * values[:, None, :]
        read = (self.h[layer] * queries[:, :, None]).sum(1).flatten()
        self.round_state(layer)
        return at.linear("gla.o_proj", read)

    def round_state(self, layer):
        if self.config.get("state_bits") == 8:
            self.h[layer] = rounded_state(self.h[layer], self.position)


class Names:
    """Weights under one prefix, and the two things that are done with them."""

    def __init__(self, weights, prefix, eps):
        self.weights, self.prefix, self.eps = weights, prefix, eps

    def __getitem__(self, name):
        return self.weights[self.prefix + name]

    def get(self, name, default):
        return self.weights.get(self.prefix + name, default)

    def linear(self, name, x):
        return self[name + ".weight"] @ x + self.get(name + ".bias", 0.0)

    def norm(self, name, x):
        return x / torch.sqrt((x * x).mean() + self.eps) * self[name + ".weight"]


def mlp(at, x):
    return at.linear("mlp.down_proj", silu(at.linear("mlp.gate_proj", x)) * at.linear("mlp.up_proj", x))


def silu(x):
    return x * torch.sigmoid(x)


def rotate(vectors, position, theta):
    """RoPE in Llama's layout: entry i of the first half turns together with entry i of the second half."""
    half = vectors.shape[-1] // 2
    angles = position * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    first, second = vectors[..., :half], vectors[..., half:]
    cos, sin = torch.cos(angles), torch.sin(angles)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
