"""The image network and the latent one in float64 numpy, written from the formulas, switches and
all: one window, one token and one pair of tokens at a time where that is clear."""

import numpy as np


def linear(p, x):
    return x @ p["kernel"] + p["bias"]


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def layer_norm(p, x):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * p["scale"] + p["bias"] if p else x


def group_norm(p, x):
    """(H, W, C): groups of at least four channels, at most 32."""
    groups = x.reshape(*x.shape[:2], min(32, x.shape[-1] // 4), -1)
    mean, var = groups.mean((0, 1, 3), keepdims=True), groups.var((0, 1, 3), keepdims=True)
    return ((groups - mean) / np.sqrt(var + 1e-6)).reshape(x.shape) * p["scale"] + p["bias"]


def conv(p, x, stride=1, padding=1):
    kernel = p["kernel"]
    side = kernel.shape[0]
    x = np.pad(x, ((padding, padding), (padding, padding), (0, 0)))
    ends = [length - side + 1 for length in x.shape[:2]]
    taps = [
        x[i : i + ends[0] : stride, j : j + ends[1] : stride] @ kernel[i, j]
        for i in range(side)
        for j in range(side)
    ]
    return sum(taps) + p["bias"]


def attention(p, x, time, window, heads, time_in, extra=0):
    """Tokens (L + E, C) of one window."""
    width = x.shape[1] // heads
    q, k, v = (np.einsum("lc,chd->hld", x, p["qkv_kernel"][:, i]) for i in range(3))
    shift = p["qkv_bias"]
    if time_in == "tmsa":  # Eq. 3-5
        shift = shift + np.einsum("t,tihd->ihd", time, p["time_qkv_kernel"]) + p["time_qkv_bias"]
    q, k, v = q + shift[0][:, None], k + shift[1][:, None], v + shift[2][:, None]
    table = p["relative_position_bias"]
    if time_in == "bias":
        table = table + np.einsum("t,toh->oh", time, p["time_bias_kernel"])
    bias = np.zeros((heads, len(x), len(x)))
    for i in range(len(x) - extra):
        for j in range(len(x) - extra):
            rows, columns = i // window - j // window, i % window - j % window
            bias[:, i, j] = table[(rows + window - 1) * (2 * window - 1) + columns + window - 1]
    logits = q @ k.transpose(0, 2, 1) / np.sqrt(width) + bias
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hld,hdc->lc", weights @ v, p["out_kernel"]) + p["out_bias"]


def block(p, x, time, window, heads, time_in, extra=0):
    """Eq. 7-8 on tokens (L + E, C) of one window, and what the paper compares with them."""
    shift = scale = gate = shift_mlp = scale_mlp = gate_mlp = None
    if time_in == "adaln":
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = np.split(
            linear(p["time_modulation"], time), 6
        )
    if time_in == "add":
        x = x + linear(p["time_add"], time)
    hidden = layer_norm(p.get("norm_attention"), x)
    if time_in == "adaln":
        hidden = hidden * (1 + scale) + shift
    hidden = attention(p["attention"], hidden, time, window, heads, time_in, extra)
    x = x + (hidden * gate if time_in == "adaln" else hidden)
    hidden = layer_norm(p.get("norm_mlp"), x)
    if time_in == "mlp":
        hidden = hidden + linear(p["time_mlp"], time)
    if time_in == "adaln":
        hidden = hidden * (1 + scale_mlp) + shift_mlp
    hidden = linear(p["mlp_out"], gelu(linear(p["mlp_in"], hidden)))
    return x + (hidden * gate_mlp if time_in == "adaln" else hidden)


def time_token(p, level, label, frequencies=None):
    if frequencies is None:
        angles = level * 10_000.0 ** (-np.arange(128) / 128)
    else:
        angles = 2 * np.pi * level * frequencies
    hidden = np.concatenate([np.cos(angles), np.sin(angles)])
    return linear(p["out"], silu(linear(p["in"], hidden))) + p["label"]["embedding"][label]


def layer(tree, number):
    return {
        name: layer(node, number) if isinstance(node, dict) else node[number]
        for name, node in tree.items()
    }


def stage(p, x, time, model, number, count, time_in, token):
    """A stack of Eq. 9-10 on an image (H, W, C)."""
    window, side = model.windows[number], len(x)
    heads = x.shape[-1] // model.head_width
    corners = [(i, j) for i in range(0, side, window) for j in range(0, side, window)]
    extras = {at: linear(token, time)[None] for at in corners} if time_in == "token" else {}
    for index in range(count):
        one = layer(p, index)
        hidden = silu(group_norm(one["norm"], x))
        hidden = conv(one["conv"], hidden) if model.resblock_conv else hidden
        new = np.empty_like(hidden)
        for i, j in corners:
            place = slice(i, i + window), slice(j, j + window)
            tokens = hidden[place].reshape(window * window, -1)
            if extras:
                tokens = np.concatenate([tokens, extras[i, j]])
            tokens = block(
                one["transformer"], tokens, time, window, heads, time_in, len(extras) and 1
            )
            if extras:
                extras[i, j] = tokens[-1:]
            new[place] = tokens[: window * window].reshape(window, window, -1)
        x = x + new
    return x


def bilinear(x, side):
    """Enlarge (h, h, C), pixels' centres at half numbers, the edge repeated."""
    places = np.clip((np.arange(side) + 0.5) * len(x) / side - 0.5, 0, len(x) - 1)
    low = np.minimum(places.astype(int), len(x) - 1)
    high, part = np.minimum(low + 1, len(x) - 1), places - low
    x = x[low] * (1 - part)[:, None, None] + x[high] * part[:, None, None]
    return x[:, low] * (1 - part)[None, :, None] + x[:, high] * part[None, :, None]


def image_network(model, variables, x, level, label):
    """`ImageDiffiT` on one image (H, W, C)."""
    p = variables["params"]
    frequencies = variables["constants"]["time"]["frequencies"] if variables["constants"] else None
    time = silu(time_token(p["time"], level, label, frequencies))

    def run(x, name, number):
        has_tmsa = model.tmsa_half in ("both", name)
        time_in = model.time_in if has_tmsa else "add"
        full = f"{name}_{number}"
        token = p.get(f"{full}_token")
        return stage(p[full], x, time, model, number, model.num_blocks[number], time_in, token)

    single = model.encoder == "single"
    x = conv(p["tokenizer"], x, stride=4, padding=0) if single else conv(p["tokenizer"], x)
    results = []
    for number in range(len(model.channels)):
        if number and not single:
            x = conv(p[f"down_{number}"], x, stride=2)
        x = run(x, "encoder", number)
        results.append(x)
    if model.decoder == "mla":
        total, branches = 0, []
        for number in reversed(range(len(results))):
            name = f"mla_{number}"
            hidden = linear(p[name], layer_norm(p[f"{name}_norm"], results[number]))
            hidden = np.maximum(group_norm(p[f"{name}_relu_norm"], hidden), 0)
            total = bilinear(total, len(hidden)) + hidden if branches else hidden
            hidden = total
            for index in range(3):
                hidden = conv(p[f"{name}_conv_{index}"], hidden)
                hidden = np.maximum(group_norm(p[f"{name}_conv_{index}_norm"], hidden), 0)
            branches.append(bilinear(hidden, model.image_size))
        x = np.concatenate(branches, -1)
    else:
        for number in reversed(range(len(results) - 1)):
            four = linear(p[f"up_{number}"]["project"], x).reshape(*x.shape[:2], 2, 2, -1)
            x = four.transpose(0, 2, 1, 3, 4).reshape(2 * len(x), 2 * len(x), -1)
            x = linear(p[f"merge_{number}"], np.concatenate([x, results[number]], -1))
            x = run(x, "decoder", number)
    return conv(p["head"], silu(group_norm(p["head_norm"], x)))


def latent_network(model, variables, x, level, label):
    """`LatentDiffiT` on one latent (H, W, C)."""
    p, grid, patch = variables["params"], model.grid, model.patch_size
    time = time_token(
        p["time"], level, label, variables["constants"].get("time", {}).get("frequencies")
    )
    time = silu(time) if model.time_in == "adaln" else time
    tokens = x.reshape(grid, patch, grid, patch, -1).transpose(0, 2, 1, 3, 4)
    x = linear(p["patch_embed"], tokens.reshape(grid * grid, -1))
    x = x + variables["constants"]["pos_embed"]
    extra = int(model.time_in == "token")
    if extra:
        x = np.concatenate([x, linear(p["time_token"], time)[None]])
    for index in range(model.depth):
        one = layer(p["blocks"], index)
        x = block(one, x, time, grid, model.num_heads, model.time_in, extra)
    x = linear(p["final"], silu(layer_norm(None, x[: grid * grid])))
    x = x.reshape(grid, grid, patch, patch, -1).transpose(0, 2, 1, 3, 4)
    return x.reshape(grid * patch, grid * patch, -1)


def filter_weights(taps):
    taps = np.array(taps, float)
    return np.outer(taps, taps) / taps.sum() ** 2


def halved(x, taps, border):
    """y[i, j] = Σ F[a, b] x[2i + a - p, 2j + b - p], zeros outside, of an image (H, W, C)."""
    n, weights = len(taps), filter_weights(taps)
    x = np.pad(x, ((border, border), (border, border), (0, 0)))
    side = (len(x) - n) // 2 + 1
    out = np.zeros((side, side, x.shape[-1]))
    for i in range(side):
        for j in range(side):
            for a in range(n):
                for b in range(n):
                    out[i, j] += weights[a, b] * x[2 * i + a, 2 * j + b]
    return out


def doubled(x, taps):
    """y[i, j] = Σ 4 F[i + p - 2u, j + p - 2v] x[u, v]."""
    n, weights, side = len(taps), 4 * filter_weights(taps), len(x)
    p = (n - 1) // 2
    out = np.zeros((2 * side, 2 * side, x.shape[-1]))
    for u in range(side):
        for v in range(side):
            for a in range(n):
                for b in range(n):
                    i, j = 2 * u + a - p, 2 * v + b - p
                    if 0 <= i < 2 * side and 0 <= j < 2 * side:
                        out[i, j] += weights[a, b] * x[u, v]
    return out


def song_block(p, x, e, taps, resample="", attends="", tmsa=False):
    p_taps = (len(taps) - 1) // 2

    def sampled(x):
        if resample == "down":
            return halved(x, taps, p_taps)
        return doubled(x, taps) if resample == "up" else x

    hidden = conv(p["conv0"], sampled(silu(group_norm(p["norm0"], x))))
    hidden = silu(group_norm(p["norm1"], hidden + linear(p["affine"], e)))
    hidden = conv(p["conv1"], hidden)
    skip = linear(p["skip"], sampled(x)) if "skip" in p else x
    x = np.sqrt(0.5) * (hidden + skip)
    if not attends:
        return x
    side, tokens = len(x), group_norm(p["norm2"], x).reshape(-1, x.shape[-1])
    own = dict(p["attention"])
    if not tmsa:
        own["relative_position_bias"] = np.zeros(((2 * side - 1) ** 2, 1))
    attended = attention(own, tokens, e, side, 1, "tmsa" if tmsa else "")
    return np.sqrt(0.5) * (x + attended.reshape(x.shape))


def song_unet(model, variables, image, level, label):
    """`SongUNet` on one image (H, W, C), without augmentation."""
    p, ncsn = variables["params"], model.family == "ncsnpp"
    taps, mult = ((1, 3, 3, 1), 2) if ncsn else ((1, 1), 1)
    half = model.channels * mult // 2
    if ncsn:
        angles = 2 * np.pi * level * variables["constants"]["frequencies"]
    else:
        angles = level * 10_000.0 ** (-np.arange(half) / (half - 1))
    v = np.concatenate([np.sin(angles), np.cos(angles)])
    y = np.eye(model.num_classes + 1)[label, : model.num_classes]
    v = v + linear(p["map_label"], np.sqrt(model.num_classes) * y)
    e = silu(linear(p["map_layer1"], silu(linear(p["map_layer0"], v))))

    def tmsa(side):
        return model.tmsa == "all" or (model.tmsa == "listed" and side in model.attention_sizes)

    def run(name, x, side, resample="", attends=False):
        return song_block(p[name], x, e, taps, resample, attends, tmsa(side))

    top = image.shape[0]
    sides = [top >> number for number in range(len(model.channel_mults))]
    skips, aux = [conv(p[f"enc_{top}x{top}_conv"], image)], image
    for side in sides:
        at = f"enc_{side}x{side}"
        if side != top:
            x = run(f"{at}_down", skips[-1], side, "down")
            if ncsn:
                full = conv(p[f"{at}_aux_residual"], aux, padding=2)
                x = aux = np.sqrt(0.5) * (x + halved(full, taps, 0))
            skips.append(x)
        for index in range(model.num_blocks):
            attends = side in model.attention_sizes
            skips.append(run(f"{at}_block{index}", skips[-1], side, attends=attends))
    x = skips[-1]
    for side in reversed(sides):
        at = f"dec_{side}x{side}"
        if side == sides[-1]:
            x = run(f"{at}_in1", run(f"{at}_in0", x, side, attends=True), side)
        else:
            x = run(f"{at}_up", x, side, "up")
        for index in range(model.num_blocks + 1):
            attends = index == model.num_blocks and side in model.attention_sizes
            joined = np.concatenate([x, skips.pop()], -1)
            x = run(f"{at}_block{index}", joined, side, attends=attends)
    assert not skips
    at = f"dec_{top}x{top}_aux"
    return conv(p[f"{at}_conv"], silu(group_norm(p[f"{at}_norm"], x)))
