"""Problems on which the operator is timed, and their goals."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peak import Peaks


@dataclass(frozen=True)
class Goal:
    """Smallest acceptable values: a rival's time over ours, and share of the peak; None means no goal."""

    sdpa: float | None = None
    formula: float | None = None
    share: float | None = None
    flash: float | None = None
    cudnn: float | None = None
    flex: float | None = None
    twin: float | None = None


@dataclass(frozen=True)
class Problem:
    """Query ``(B, H, L, E)``, key and value ``(B, H, S, E)`` of random numbers; S = L unless `keys` says otherwise.

    With `backward`, gradients are also computed; with `backward_alone`, only they are timed.
    """

    label: str
    shape: tuple[int, int, int, int]
    goal: Goal = Goal()
    keys: int | None = None
    causal: bool = False
    backward: bool = False
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    backward_alone: bool = False

    def __str__(self) -> str:
        b, h, length, e = self.shape
        return f"{self.label}, ({b}, {h}, {length if self.keys is None else f'{length} x {self.keys}'}, {e})"

    def inputs(self) -> list[Tensor]:
        """Query, key and value, the same at every call."""
        b, h, length, e = self.shape
        generator = torch.Generator().manual_seed(0)
        sizes = [(b, h, rows, e) for rows in (length, self.keys or length, self.keys or length)]
        drawn = [torch.randn(size, generator=generator).to(self.device, self.dtype) for size in sizes]
        return [x.requires_grad_(self.backward) for x in drawn]

    def upstream(self) -> Tensor | None:
        """Gradient of the output if there is a backward pass, else None; the same at every call."""
        generator = torch.Generator().manual_seed(1)
        return torch.randn(self.shape, generator=generator).to(self.device, self.dtype) if self.backward else None

    def wait(self) -> None:
        """Wait until the device has finished its work."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    @property
    def flops(self) -> int:
        """Floating point operations of the matrix products on visible pairs: two forward, five more backward."""
        b, h, length, e = self.shape
        keys = self.keys or length
        pairs = sum(min(row + 1, keys) for row in range(length)) if self.causal else length * keys
        products = 5 if self.backward_alone else 7 if self.backward else 2
        return products * 2 * b * h * pairs * e

    @property
    def bytes_read(self) -> int:
        """Bytes of key and value."""
        b, h, length, e = self.shape
        return 2 * b * h * (self.keys or length) * e * self.dtype.itemsize

    def share(self, seconds: float, peaks: Peaks) -> float | None:
        """Share of the peak: of reading memory for a single query, else of multiply-adds; None if there is no peak."""
        work, peak = (self.bytes_read, peaks.bandwidth) if self.shape[2] == 1 else (self.flops, peaks.flops)
        return None if peak is None else work / seconds / peak


_SHAPES = (
    (1, 8, 512, 64),
    (1, 8, 1024, 64),
    (1, 8, 2048, 64),
    (1, 8, 4096, 64),
    (4, 8, 1024, 64),
    (1, 4, 4096, 128),
)
_TINY = ((32, 4, 16, 16), (256, 2, 16, 16))


def problems(bfloat16_products: bool) -> list[Problem]:
    """All problems for the CPU; `bfloat16_products` says whether it multiplies bfloat16 (AVX512-BF16)."""
    found = []
    for shape in _SHAPES:
        narrow = shape[3] == 64
        found.append(Problem("forward, full", shape, Goal(sdpa=1.3 if narrow else 1.2, share=0.85)))
    for shape in _SHAPES:
        narrow = shape[3] == 64
        found.append(Problem("forward, causal", shape, Goal(sdpa=1.6 if narrow else 1.4), causal=True))
    found += [Problem("forward + backward, full", shape, Goal(sdpa=1.4), backward=True) for shape in _SHAPES]
    for shape in _SHAPES:
        short = shape[2] <= 1024
        goal = Goal(sdpa=1.8 if short else 1.5)
        found.append(Problem("forward + backward, causal", shape, goal, causal=True, backward=True))
    for shape in ((1, 8, 1024, 64), (1, 8, 1024, 128)):
        goal = Goal(sdpa=1.5 if bfloat16_products else 1.2)
        found.append(Problem("bfloat16 forward, full", shape, goal, dtype=torch.bfloat16))
    for dtype in (torch.bfloat16, torch.float16):
        for causal in (False, True):
            label = f"{str(dtype).removeprefix('torch.')} forward + backward, {'causal' if causal else 'full'}"
            fast = dtype == torch.bfloat16 and bfloat16_products
            goal = Goal(sdpa=(3.0 if causal else 2.0) if fast else None)
            found.append(Problem(label, (1, 8, 1024, 64), goal, causal=causal, backward=True, dtype=dtype))
    for shape, keys in (((8, 8, 1, 64), 2048), ((1, 32, 1, 128), 8192)):
        found.append(Problem("decode, float32", shape, Goal(sdpa=2.0, share=0.8), keys))
        found.append(Problem("decode, bfloat16", shape, Goal(sdpa=6.0), keys, dtype=torch.bfloat16))
    for shape in _TINY:
        found.append(Problem("tiny, forward", shape, Goal(sdpa=1.2, formula=1.2)))
        found.append(Problem("tiny, forward + backward", shape, Goal(sdpa=1.2, formula=1.2), backward=True))
    return found


def gpu_problems() -> list[Problem]:
    """All problems for a GPU, in bfloat16: 16384 tokens of 2048 numbers, and decoding from 64k keys."""
    found = []
    for causal in (False, True):
        label = "causal" if causal else "full"
        for width in (64, 128):
            for length in (1024, 2048, 4096, 8192, 16384):
                shape = (16384 // length, 2048 // width, length, width)
                common = {"causal": causal, "dtype": torch.bfloat16, "device": "cuda"}
                goal = Goal(flash=1.17, cudnn=1.0 if width == 128 else None, flex=1.3, twin=1.0)
                found.append(Problem(f"forward, {label}", shape, goal, **common))
                goal = Goal(flash=1.05, flex=1.5, twin=1 / 1.05)
                found.append(Problem(f"backward, {label}", shape, goal, backward=True, backward_alone=True, **common))
    for batch in (1, 16):
        shape = (batch, 16, 1, 128)
        found.append(Problem("decode", shape, Goal(share=0.85), 65536, dtype=torch.bfloat16, device="cuda"))
    return found
