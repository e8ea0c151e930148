"""Problems on which the operator is timed, and their goals."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from peak import Peaks


@dataclass(frozen=True)
class Goal:
    """Smallest acceptable values: a rival's time over ours, and share of the peak; None means no goal."""

    sdpa: float | None = None
    formula: float | None = None
    padded: float | None = None
    share: float | None = None
    flash: float | None = None
    cudnn: float | None = None
    flex: float | None = None
    twin: float | None = None
    onnx: float | None = None
    plain: float | None = None
    float32: float | None = None


@dataclass(frozen=True)
class Problem:
    """Query ``(B, H, L, E)``, key and value ``(B, H, S, E)`` of random numbers; S = L unless `keys` says otherwise.

    With `backward`, gradients are also computed; with `backward_alone`, only they are timed. Key and value have
    `kv_heads` heads, if it is given. `bias` is "mask", a float mask ``(1, H, L, S)``, or "alibi". With `lengths`, B
    is 1 and L the sum of these: packed sequences.
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
    dropout_p: float = 0.0
    bias: str = ""
    kv_heads: int | None = None
    lengths: tuple[int, ...] = ()

    def __str__(self) -> str:
        b, h, length, e = self.shape
        return f"{self.label}, ({b}, {h}, {length if self.keys is None else f'{length} x {self.keys}'}, {e})"

    def inputs(self) -> list[Tensor]:
        """Query, key and value, the same at every call."""
        b, h, length, e = self.shape
        generator = self._generator(0)
        kv_heads, keys = self.kv_heads or h, self.keys or length
        sizes = [(b, h, length, e), (b, kv_heads, keys, e), (b, kv_heads, keys, e)]
        drawn = [torch.randn(size, generator=generator, device=self.device).to(self.dtype) for size in sizes]
        return [x.requires_grad_(self.backward) for x in drawn]

    def _generator(self, seed: int) -> torch.Generator:
        """A generator on the device: a CPU would take longer to draw than a GPU to compute."""
        return torch.Generator(self.device).manual_seed(seed)

    @property
    def is_plain(self) -> bool:
        """Whether it has neither dropout nor a bias, nor heads in groups, nor packed sequences."""
        return not self.dropout_p and not self.bias and self.kv_heads is None and not self.lengths

    def plain(self) -> Problem:
        """The problem without what makes it another one than a plain problem."""
        return replace(self, dropout_p=0.0, bias="")

    def mask(self) -> Tensor | None:
        """The float mask, the same at every call; None: there is none."""
        if self.bias != "mask":
            return None
        _, h, length, _ = self.shape
        size = (1, h, length, self.keys or length)
        return torch.randn(size, generator=self._generator(2), device=self.device).to(self.dtype)

    def slopes(self) -> Tensor | None:
        """The slopes of ALiBi for each head; None: there are none."""
        h = self.shape[1]
        return 2.0 ** (-8 * torch.arange(1, h + 1, device=self.device) / h) if self.bias == "alibi" else None

    def settings(self) -> dict[str, Any]:
        """Arguments of `expressive_attention` beside query, key and value."""
        found = {"attn_mask": self.mask(), "alibi_slopes": self.slopes(), "dropout_p": self.dropout_p}
        return {"is_causal": self.causal, "enable_gqa": True, **{name: x for name, x in found.items() if x is not None}}

    def upstream(self) -> Tensor | None:
        """Gradient of the output if there is a backward pass, else None; the same at every call."""
        if not self.backward:
            return None
        return torch.randn(self.shape, generator=self._generator(1), device=self.device).to(self.dtype)

    def wait(self) -> None:
        """Wait until the device has finished its work."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    @property
    def flops(self) -> int:
        """Floating point operations of the matrix products on visible pairs: two forward, five more backward."""
        b, h, length, e = self.shape
        keys = self.keys or length
        sizes = [(n, n) for n in self.lengths] or [(length, keys)]
        pairs = sum(sum(min(row + 1, s) for row in range(n)) if self.causal else n * s for n, s in sizes)
        products = 5 if self.backward_alone else 7 if self.backward else 2
        return products * 2 * b * h * pairs * e

    @property
    def bytes_read(self) -> int:
        """Bytes of key and value."""
        b, h, length, e = self.shape
        return 2 * b * (self.kv_heads or h) * (self.keys or length) * e * self.dtype.itemsize

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
        onnx = {(1, 8, 2048, 64): 1.2, (1, 4, 4096, 128): 1.15}.get(shape)
        found.append(Problem("forward, full", shape, Goal(sdpa=1.3 if narrow else 1.2, share=0.85, onnx=onnx)))
    for shape in _SHAPES:
        narrow = shape[3] == 64
        share = 0.82 if shape[2] == 1024 else None
        onnx = 3.3 if shape in ((1, 8, 2048, 64), (1, 4, 4096, 128)) else None
        goal = Goal(sdpa=1.6 if narrow else 1.4, share=share, onnx=onnx)
        found.append(Problem("forward, causal", shape, goal, causal=True))
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
            float32 = 1.0 if dtype == torch.float16 else None
            goal = Goal(sdpa=(3.0 if causal else 2.0) if fast else None, float32=float32)
            found.append(Problem(label, (1, 8, 1024, 64), goal, causal=causal, backward=True, dtype=dtype))
    for shape, keys in (((8, 8, 1, 64), 2048), ((1, 32, 1, 128), 8192)):
        found.append(Problem("decode, float32", shape, Goal(sdpa=2.0, share=0.9), keys))
        found.append(Problem("decode, bfloat16", shape, Goal(sdpa=6.0, share=0.8), keys, dtype=torch.bfloat16))
    grouped = Problem("decode, grouped, bfloat16", (1, 32, 1, 128), Goal(share=0.6), 4096, dtype=torch.bfloat16)
    found.append(replace(grouped, kv_heads=8))
    shape, extra = (1, 8, 1024, 64), 1 / 1.15
    goal = Goal(sdpa=1.8, plain=extra)
    found.append(Problem("dropout, forward + backward", shape, goal, backward=True, dropout_p=0.1))
    found.append(Problem("ALiBi, forward, causal", shape, Goal(plain=extra), causal=True, bias="alibi"))
    found.append(Problem("float mask of heads, forward", shape, Goal(sdpa=2.0), bias="mask"))
    lengths = tuple(range(16, 144, 4)) * 2
    for backward in (False, True):
        label = f"packed, {'forward + backward' if backward else 'forward'}, causal, 16 to 140 tokens"
        goal = Goal(sdpa=2.0, padded=2.0)
        shape = (1, 8, sum(lengths), 64)
        found.append(Problem(label, shape, goal, causal=True, backward=backward, lengths=lengths))
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
