"""What the paper's equations cost, counted as they are written."""


def multiply_adds(model):
    """Multiply-adds of the matrix products of one evaluation of a `LatentDiffiT` for one latent, by
    part (the paper's Table 9 counts these): the released parametrisation includes the key's time
    projection, which is never computed."""
    tokens, width, depth = model.grid**2, model.hidden_size, model.depth
    patch = model.patch_size**2
    return {
        "embeddings": tokens * patch * model.input_channels * width + 256 * width + width * width,
        "qkv": depth * tokens * 3 * width * width,
        "time_qkv": depth * (2 if model.slim_tmsa else 3) * width * width,
        "attention": depth * 2 * tokens * tokens * width,
        "attention_out": depth * tokens * width * width,
        "mlp": depth * tokens * 2 * model.mlp_ratio * width * width,
        "final": tokens * width * patch * model.output_channels,
    }
