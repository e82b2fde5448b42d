"""The latent network in PyTorch, and one training step of it, to be timed beside ours: a program
that is told on its standard input what to do, and answers with seconds.

    python tests/support/torch_network.py '{"hidden_size": 384, "depth": 12, "num_heads": 6, …}'

Written from the equations of the paper (DiffiT, Eq. 3-8), as a user of PyTorch would write it:
`scaled_dot_product_attention` with the position bias as its mask, `torch.compile` where it pays
(GPUs), automatic mixed precision for bfloat16, and Adam. The loss is the mean squared error.
"""

import json
import sys
import time

import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    def __init__(self, width: int, heads: int, grid: int, mlp_ratio: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.time_qkv = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.table = nn.Parameter(0.02 * torch.randn((2 * grid - 1) ** 2, heads))
        row, column = torch.arange(grid).repeat_interleave(grid), torch.arange(grid).repeat(grid)
        rows = row[:, None] - row + grid - 1
        columns = column[:, None] - column + grid - 1
        self.register_buffer("index", rows * (2 * grid - 1) + columns)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp_ratio * width),
            nn.GELU(approximate="tanh"),
            nn.Linear(mlp_ratio * width, width),
        )

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        normed = functional.layer_norm(x, (width,), eps=1e-6)
        qkv = self.qkv(normed) + self.time_qkv(time)[:, None]
        q, k, v = qkv.view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index].permute(2, 0, 1)[None].to(q.dtype)
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = x + self.out(out.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.mlp(functional.layer_norm(x, (width,), eps=1e-6))


class Network(nn.Module):
    def __init__(self, sizes: dict):
        super().__init__()
        width, self.patch = sizes["hidden_size"], sizes["patch_size"]
        self.grid = sizes["input_size"] // self.patch
        channels = sizes["input_channels"] * self.patch**2
        self.embed, self.position = nn.Linear(channels, width), torch.randn(self.grid**2, width)
        self.position = nn.Parameter(self.position, requires_grad=False)
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(sizes["num_classes"] + 1, width)
        blocks = [
            Block(width, sizes["num_heads"], self.grid, sizes["mlp_ratio"])
            for _ in range(sizes["depth"])
        ]
        self.blocks = nn.ModuleList(blocks)
        self.last = nn.Linear(width, channels * (2 if sizes["learn_sigma"] else 1))

    def forward(self, x: torch.Tensor, level: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        batch, p, g = len(x), self.patch, self.grid
        x = x.view(batch, g, p, g, p, -1).transpose(2, 3).reshape(batch, g * g, -1)
        frequencies = 10_000.0 ** (-torch.arange(128, device=x.device) / 128)
        angles = level[:, None] * frequencies
        time = self.time(torch.cat([angles.cos(), angles.sin()], 1)) + self.label(label)
        x = self.embed(x) + self.position
        for block in self.blocks:
            x = block(x, time)
        x = self.last(functional.silu(functional.layer_norm(x, x.shape[-1:], eps=1e-6)))
        return x.view(batch, g, g, p, p, -1).transpose(2, 3).reshape(batch, g * p, g * p, -1)


def main(settings: dict) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    network = Network(settings).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
    forward = torch.compile(network) if device == "cuda" else network
    batch, side = settings["batch_size"], settings["input_size"]
    x = torch.randn(batch, side, side, settings["input_channels"], device=device)
    level = torch.linspace(0, 999, batch, device=device)
    label = torch.arange(batch, device=device) % settings["num_classes"]
    low = settings["dtype"] == "bfloat16"

    def evaluate() -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=low):
            return forward(x, level, label)

    def train() -> None:
        optimizer.zero_grad()
        loss = ((evaluate()[..., : x.shape[-1]].float() - x) ** 2).mean()
        loss.backward()
        optimizer.step()

    def sample() -> None:
        with torch.no_grad():
            evaluate()

    print(f"PyTorch {torch.__version__} on {device}", flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        {"train": train, "forward": sample}[line.strip()]()
        if device == "cuda":
            torch.cuda.synchronize()
        print(time.perf_counter() - started, flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
