"""A small decoder-only transformer, for expressive and softmax attention alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import SelfAttention, check_choice
from .cache import Cache
from .near_far import NearFarAttention
from .positions import LearnedPositions, SinusoidalPositions, position_codes

__all__ = ["NORMS", "Transformer", "TransformerBlock"]

NORMS = ("pre", "post", "none")

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


class TransformerBlock(nn.Module):
    """Attention and MLP, each on a residual: ``x + A(norm(x))`` (pre), ``norm(x + A(x))`` (post).

    Args:
        embed_dim: Width D.
        num_heads: Heads of the attention.
        mechanism: One of `MECHANISMS`.
        norm: LayerNorm ``"pre"``, ``"post"`` or ``"none"``.
        norm_affine: Whether the LayerNorms learn a scale and a shift.
        mlp_ratio: Width of the MLP over D.
        activation: ``"relu"`` or ``"gelu"``.
        bias: Bias of all projections but query, key and value.
        window: The attention is a `NearFarAttention` of so many near keys, whose mechanism is ``"expressive"``; None:
            a `SelfAttention`.
        **attention: Further arguments of either.

    Raises:
        ValueError: A number or name does not fit.

    Example:
        >>> TransformerBlock(16, 2, mechanism="expressive", position="rope")(torch.randn(3, 7, 16)).shape
        torch.Size([3, 7, 16])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        mechanism: str = "expressive",
        *,
        norm: str = "pre",
        norm_affine: bool = True,
        mlp_ratio: int = 4,
        activation: str = "gelu",
        bias: bool = True,
        window: int | None = None,
        **attention: object,
    ) -> None:
        super().__init__()
        check_choice("norm", norm, NORMS)
        check_choice("activation", activation, tuple(_ACTIVATIONS))
        self.norm = norm
        if window is None:
            self.attention = SelfAttention(embed_dim, num_heads, mechanism, bias=bias, **attention)  # pyright: ignore[reportArgumentType]
        else:
            check_choice("mechanism", mechanism, ("expressive",))
            attention.pop("max_length", None)  # of tables, which near and far keys have none of
            self.attention = NearFarAttention(embed_dim, num_heads, window, bias=bias, **attention)  # pyright: ignore[reportArgumentType]
        self.up = nn.Linear(embed_dim, mlp_ratio * embed_dim, bias=bias)
        self.down = nn.Linear(mlp_ratio * embed_dim, embed_dim, bias=bias)
        self.activation = _ACTIVATIONS[activation]
        self.norms = nn.ModuleList(make_norm(embed_dim, norm, norm_affine) for _ in range(2))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """X ``(..., L, D)`` to ``(..., L, D)``; `attn_mask` and `cache` as in `SelfAttention`."""
        first, second = self.norms
        if self.norm == "pre":
            x = x + self.attention(first(x), attn_mask, cache)
            return x + self._mlp(second(x))
        x = first(x + self.attention(x, attn_mask, cache))
        return second(x + self._mlp(x))

    def _mlp(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class Transformer(nn.Module):
    """Decoder-only transformer: tokens, or vectors, to logits.

    Args:
        vocab_size: Number of tokens V.
        max_length: Longest sequence with learned or relative positions, which have a table of it. Other positions
            take any length.
        embed_dim: Width D.
        num_layers: Number of blocks.
        num_heads: Heads per block.
        mechanism: One of `MECHANISMS`.
        position: One of `POSITIONS`, or several joined by a plus, such as ``"rope+relative"``.
        norm: ``"pre"`` (with a final LayerNorm), ``"post"`` or ``"none"``.
        norm_affine: Whether the LayerNorms learn a scale and a shift.
        mlp_ratio: Width of the MLP over D.
        activation: ``"relu"`` or ``"gelu"``.
        bias: Bias of all projections but query, key and value.
        embedding_std: Standard deviation of the token embeddings at the start; other weights start with
            ``1 / sqrt(fan_in)``, biases with 0.
        embedding_shift: Added to the first coordinate of all embeddings at the start: a direction that they share.
        input_dim: The model reads vectors of this width, through a linear map, instead of tokens.
        window: Blocks have `NearFarAttention` of so many near keys, and the mechanism is ``"expressive"``.
        **attention: Further arguments of `SelfAttention`: ``gain``, ``qkv_bias``, ``rope_base``, ``is_causal``, ...; or
            of `NearFarAttention`.

    Raises:
        ValueError: A number or name does not fit.

    Example:
        >>> model = Transformer(vocab_size=10, max_length=8, embed_dim=16, num_layers=1, num_heads=1)
        >>> model(torch.randint(10, (3, 8))).shape
        torch.Size([3, 8, 10])
    """

    def __init__(
        self,
        vocab_size: int,
        max_length: int,
        embed_dim: int = 64,
        num_layers: int = 2,
        num_heads: int = 4,
        mechanism: str = "expressive",
        *,
        position: str = "rope",
        norm: str = "pre",
        norm_affine: bool = True,
        mlp_ratio: int = 4,
        activation: str = "gelu",
        bias: bool = True,
        embedding_std: float = 0.5,
        embedding_shift: float = 0.0,
        input_dim: int | None = None,
        window: int | None = None,
        **attention: object,
    ) -> None:
        super().__init__()
        codes = position_codes(position)
        for name, size in {
            "vocab_size": vocab_size,
            "max_length": max_length,
            "num_layers": num_layers,
            "input_dim": 1 if input_dim is None else input_dim,
        }.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.max_length = max_length
        self._has_table = not {"learned", "relative"}.isdisjoint(codes)
        self.reads_tokens = input_dim is None
        self.embedding = (
            nn.Embedding(vocab_size, embed_dim) if input_dim is None else nn.Linear(input_dim, embed_dim, bias=bias)
        )
        added: list[nn.Module] = []
        if "learned" in codes:
            added.append(LearnedPositions(max_length, embed_dim))
        if "sinusoidal" in codes:
            added.append(SinusoidalPositions(embed_dim))
        self.positions = nn.Sequential(*added) if len(added) > 1 else added[0] if added else None
        self.blocks = nn.ModuleList(
            TransformerBlock(
                embed_dim,
                num_heads,
                mechanism,
                norm=norm,
                norm_affine=norm_affine,
                mlp_ratio=mlp_ratio,
                activation=activation,
                bias=bias,
                window=window,
                position=position,
                max_length=max_length,
                **attention,
            )
            for _ in range(num_layers)
        )
        self.final_norm = make_norm(embed_dim, norm if norm == "pre" else "none", norm_affine)
        self.head = nn.Linear(embed_dim, vocab_size, bias=bias)
        self.embedding_std = embedding_std
        self.embedding_shift = embedding_shift
        self.initialize()

    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Draw all parameters anew, in the order of the modules."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=1.0 / math.sqrt(module.in_features), generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=self.embedding_std, generator=generator)
        if isinstance(self.embedding, nn.Embedding):
            with torch.no_grad():
                self.embedding.weight[:, 0] += self.embedding_shift

    def forward(self, inputs: Tensor, caches: Sequence[Cache] | None = None) -> Tensor:
        """Tokens ``(..., L)``, integers in [0, V), or vectors ``(..., L, input_dim)``, to logits ``(..., L, V)``.

        Args:
            inputs: The tokens or vectors.
            caches: Keys and values of the positions before `inputs`, one cache for each block; those of `inputs` are
                added to them.

        Raises:
            ValueError: For more than `max_length` positions, where learned or relative ones are among the codes; or
                for as many caches as there are not blocks.
        """
        if caches is not None and len(caches) != len(self.blocks):
            raise ValueError(f"caches must have one for each of {len(self.blocks)} blocks, got {len(caches)}")
        start = caches[0].length if caches else 0
        self._check_length(start + inputs.shape[-1 if self.reads_tokens else -2])
        x = self.embedding(inputs)
        for added in self.positions if isinstance(self.positions, nn.Sequential) else (self.positions,):
            if added is not None:
                x = added(x, start)
        for i, block in enumerate(self.blocks):
            x = block(x) if caches is None else block(x, cache=caches[i])
        return self.head(self.final_norm(x))

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        steps: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue tokens ``(..., L)`` to ``(..., L + steps)``. Each step computes its own position alone.

        Blocks keep the caches that `SelfAttention.new_cache` makes. With the mechanism ``"squared"`` or a window, and
        many positions, the time and the memory of a step do not grow with their number.

        Args:
            tokens: Integers in [0, V), at least one.
            steps: How many to add.
            temperature: Divides the logits; 0 takes the most likely token.
            top_k: Draw among the k most likely tokens.
            generator: Source of the random numbers; None: torch's own.

        Raises:
            ValueError: An argument does not fit, the result would have more than `max_length` positions (as in
                ``forward``), the model reads vectors or is not causal, or drops weights because it is in training mode.

        Example:
            >>> model = Transformer(vocab_size=10, max_length=8, embed_dim=16, num_layers=1, num_heads=1).eval()
            >>> model.generate(torch.tensor([[1, 2, 3]]), 4).shape
            torch.Size([1, 7])
        """
        if not self.reads_tokens:
            raise ValueError("the model must read tokens to generate them, but reads vectors")
        if tokens.ndim < 1 or tokens.shape[-1] < 1:
            raise ValueError(f"tokens must have at least one position, got shape {tuple(tokens.shape)}")
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        if temperature < 0:
            raise ValueError(f"temperature must be at least 0, got {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        if self.training and any(module.dropout_p for module in self.modules() if isinstance(module, SelfAttention)):
            raise ValueError("the model must be in evaluation mode, got one that drops weights; call eval() first")
        capacity = tokens.shape[-1] + steps - 1  # the last token is never read
        self._check_length(capacity)
        caches = [block.attention.new_cache(capacity) for block in self._blocks()]
        parts = [tokens]
        for _ in range(steps):
            logits = self(parts[-1], caches)[..., -1, :]
            parts.append(_draw(logits, temperature, top_k, generator).unsqueeze(-1))
        return torch.cat(parts, -1)

    def _blocks(self) -> Iterator[TransformerBlock]:
        for block in self.blocks:
            assert isinstance(block, TransformerBlock)
            yield block

    def _check_length(self, length: int) -> None:
        if self._has_table and length > self.max_length:
            raise ValueError(f"inputs must have at most {self.max_length} positions, got {length}")


def _draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """Tokens ``(...)`` of logits ``(..., V)``."""
    if temperature == 0:
        return logits.argmax(-1)
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, -1).values[..., -1:], -torch.inf)
    shares = (logits / temperature).softmax(-1)
    return torch.multinomial(shares.view(-1, shares.shape[-1]), 1, generator=generator).view(shares.shape[:-1])


def make_norm(embed_dim: int, norm: str, affine: bool) -> nn.Module:
    """LayerNorm, or nothing where `norm` is ``"none"``."""
    return nn.Identity() if norm == "none" else nn.LayerNorm(embed_dim, elementwise_affine=affine)
