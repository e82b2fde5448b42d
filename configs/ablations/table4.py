"""Table 4 (CIFAR-10): from a ViT with SETR's decoder to DiffiT.

The paper does not state sizes of A to D. Here A is a ViT of 12 layers, 768 wide, on patches of 4×4;
B its four stages at 32 to 4 pixels; C, D and E the network of the paper, where only `time_in`
differs. Where a half has no TMSA, W x_t is added to the tokens of every block (the paper: once in a
stage, "adaptively scaled").
"""


def get_ablation() -> dict:
    """Return the ablation."""
    no_tmsa = {"model.time_in": "add"}
    return dict(
        title="Table 4, CIFAR-10: architecture",
        config="../cifar10.py",
        rows={
            "A ViT, SETR-MLA": {
                **no_tmsa,
                "model.encoder": "single",
                "model.decoder": "mla",
                "model.channels": (768, 768, 768, 768),
                "model.num_blocks": (3, 3, 3, 3),
                "model.window": 8,
            },
            "B + encoder of several resolutions": {
                **no_tmsa,
                "model.decoder": "mla",
                "model.channels": (128, 256, 256, 256),
                "model.num_blocks": (2, 2, 2, 2),
            },
            "C + decoder of several resolutions": no_tmsa,
            "D + TMSA in the encoder": {"model.tmsa_half": "encoder"},
            "E + TMSA in the decoder": {},
        },
        paper={
            "A ViT, SETR-MLA": 5.34,
            "B + encoder of several resolutions": 4.64,
            "C + decoder of several resolutions": 3.71,
            "D + TMSA in the encoder": 2.27,
            "E + TMSA in the decoder": 1.95,
        },
    )
