"""How near two bf16 layers with the same LoRA can be: one with the LoRA's term beside it, one with it merged.

    python branch_rounding.py

One layer of random weights, 1024 wide, 256 rows, rank 20, computed four ways; each against the exact output (float64)
and against the merged layer: the largest difference over the largest number, and the root mean squares' ratio.
"""

from __future__ import annotations

import torch

WIDTH, ROWS, RANK, WEIGHT = 1024, 256, 20, 0.8


def difference(found: torch.Tensor, expected: torch.Tensor) -> str:
    found, expected = found.double(), expected.double()
    error = found - expected
    largest = float(error.abs().max() / expected.abs().max())
    return f"{largest:.1e} (mean {float(error.norm() / expected.norm()):.1e})"


def main() -> None:
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int, scale: float = 0.02) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale).bfloat16()

    layer, down, up = numbers(WIDTH, WIDTH), numbers(RANK, WIDTH), numbers(WIDTH, RANK)
    x = numbers(ROWS, WIDTH, scale=1.0)
    exact = x.double() @ (layer.double() + WEIGHT * up.double() @ down.double()).T
    merged = x @ (layer.float() + WEIGHT * up.float() @ down.float()).bfloat16().T
    output, term = x @ layer.T, WEIGHT * (x.float() @ down.float().T) @ up.float().T
    ways = {
        "the term in bf16, as ours": output.addmm(x @ down.T, up.T, alpha=WEIGHT),
        "the term in fp32": (output.float() + term).bfloat16(),
        "layer and term in fp32, rounded once": (x.float() @ layer.float().T + term).bfloat16(),
        "merged": merged,
    }
    for name, found in ways.items():
        print(f"{name}: from the exact {difference(found, exact)}, from the merged {difference(found, merged)}")


if __name__ == "__main__":
    main()
