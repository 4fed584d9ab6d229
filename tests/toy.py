"""A task small enough for tests of the loop: regression with dropout, its batches a function of (seed, step)."""

import torch
from torch import Tensor, nn


class Layer(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.dropout(self.norm(self.linear(x)).tanh(), 0.2, self.training)


class Net(nn.Module):
    def __init__(self, width: int = 8, depth: int = 3):
        super().__init__()
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class ToyTask:
    name = "toy"
    headline = "error"
    higher_is_better = False

    def __init__(self, batch_size: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32):
        self.batch_size, self.seed, self.dtype = batch_size, seed, dtype
        self.evaluations = 0

    def build_model(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return Net()

    def batch(self, step: int) -> dict[str, Tensor]:
        """Examples number `step * batch_size` and on of one endless stream."""
        numbers = range(step * self.batch_size, (step + 1) * self.batch_size)
        x = torch.stack([torch.randn(8, generator=torch.Generator().manual_seed(number)) for number in numbers])
        x = x.to(self.dtype)
        return {"x": x, "y": x.sum(1, keepdim=True), "attention_mask": torch.ones(self.batch_size, 3, dtype=torch.long)}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.mse_loss(model(batch["x"]), batch["y"])

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        self.evaluations += 1
        torch.rand(7)  # a task may use the global generator
        model.eval()
        with torch.no_grad():
            return {"error": float(self.loss(model, self.batch(10_000)))}
