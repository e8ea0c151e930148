"""Several NT tasks in one stream: which of them a sequence follows has to be inferred from the sequence."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from ..base import IGNORED, Examples, Task, one_in, same_as
from ..sampled import prefix_identifiers
from .nt import NTTask, Operation, written

__all__ = ["MultiTask"]


class MultiTask(Task):
    """Each sequence follows one NT task, drawn from all combinations of `operations` and `delays`.

    Nothing says which. The posterior is exact: a rule k that the t tokens of the context x follow has the
    probability

        P(k | x) ~ choices_k^-min(t, delay_k)

    since its first delay_k digits are random and the others follow; a rule that they do not follow has none. The
    best predictor says the digit that is most probable under the sum over rules, a digit being uniform under a rule
    whose delay is not yet over. Scored are the positions at which all rules that the context follows agree.

    Attributes:
        operations: One or several of ``"sum"``, ``"difference"``, ``"product"``.
        basis: Number of digits; with products, a prime of at least 3.
        delays: One or several.
        context: Tokens that the model reads, at least the longest delay; None: twice the longest delay.
        test_delays: Delays of the sequences for validation and test; None: `delays`. Others than `delays`: whether
            the rule is learned for delays never trained on.
    """

    kind: Literal["multi"] = "multi"  # pyright: ignore[reportIncompatibleVariableOverride]
    operations: Annotated[tuple[Operation, ...], Field(min_length=1)] = ("sum",)
    basis: int = Field(ge=2, le=1 << 16)
    delays: Annotated[tuple[Annotated[int, Field(ge=1, le=1 << 10)], ...], Field(min_length=1)]
    context: int | None = None
    test_delays: Annotated[tuple[Annotated[int, Field(ge=1, le=1 << 10)], ...], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _fits(self) -> MultiTask:
        longest = max(*self.delays, *self.delays_tested)
        if self.context is not None and self.context < longest:
            raise ValueError(f"context must be at least the longest delay, {longest}, got {self.context}")
        for name in ("operations", "delays", "test_delays"):
            values = getattr(self, name) or ()
            if len(set(values)) < len(values):
                raise ValueError(f"{name} must differ, got {list(values)}")
        if len(self.rules) < 2:
            raise ValueError("operations and delays must make at least two tasks; a single one is of kind 'nt'")
        return self

    @property
    def delays_tested(self) -> tuple[int, ...]:
        """The delays of validation and test."""
        return self.delays if self.test_delays is None else self.test_delays

    @cached_property
    def rules(self) -> tuple[NTTask, ...]:
        """The tasks that are mixed, those tested last where they are others."""
        delays = list(dict.fromkeys([*self.delays, *self.delays_tested]))
        return tuple(
            NTTask(operation=operation, basis=self.basis, delay=delay)
            for operation in self.operations
            for delay in delays
        )

    @property
    def label(self) -> str:
        delays = " ".join(str(delay) for delay in self.delays)
        tested = "" if self.test_delays is None else f" tested on {' '.join(str(d) for d in self.test_delays)}"
        context = "" if self.context is None else f", context {self.context}"
        return f"mixed {' '.join(self.operations)}, basis {self.basis}, delays {delays}{tested}{context}"

    @property
    def formula(self) -> str:
        if len(self.delays) == 1:
            return written(self.operations, self.delays[0], self.basis)
        return f"{written(self.operations, 'd', self.basis)}; d is one of {', '.join(map(str, self.delays))}"

    vocab_size = same_as("basis")

    @property
    def length(self) -> int:
        return 2 * max(*self.delays, *self.delays_tested) if self.context is None else self.context

    @property
    def complexity(self) -> float:
        """log2 of the number of pairs of a trained rule and its state."""
        return math.log2(sum(rule.state_space for rule in self.rules if rule.delay in self.delays))

    chance = one_in("basis")

    # ---- sequences ----

    def training_examples(self, bits: np.random.Philox, count: int) -> Examples:
        trained = [i for i, rule in enumerate(self.rules) if rule.delay in self.delays]
        drawn = np.array(trained)[(bits.random_raw(count) % np.uint64(len(trained))).astype(np.int64)]
        sequences = np.empty((count, self.length + 1), dtype=np.int64)
        for index in trained:
            rows = np.flatnonzero(drawn == index)
            rule = self.rules[index]
            sequences[rows] = rule.sequences(rule.training_starts(bits, len(rows)), self.length + 1)
        return self._examples(sequences, drawn)

    def held_out_examples(self, count: int, purpose: str) -> Examples:
        tested = [i for i, rule in enumerate(self.rules) if rule.delay in self.delays_tested]
        parts, groups = [], []
        for index, share in zip(tested, np.array_split(np.arange(count), len(tested)), strict=True):
            rule = self.rules[index]
            starts = rule.held_out_starts(max(1, len(share)), purpose)
            starts = starts[np.arange(len(share)) % len(starts)]  # a small space is gone through again and again
            parts.append(rule.sequences(starts, self.length + 1))
            groups.append(np.full(len(share), index))
        return self._examples(np.concatenate(parts), np.concatenate(groups))

    def _examples(self, sequences: np.ndarray, groups: np.ndarray) -> Examples:
        targets = sequences[:, 1:].copy()
        targets[:, : min(rule.delay for rule in self.rules) - 1] = IGNORED
        return Examples(sequences[:, :-1], targets, groups)

    # ---- what the context tells ----

    def posterior(self, inputs: np.ndarray) -> np.ndarray:
        """P(rule | the tokens up to this position), ``(rules, n, L)``."""
        logs = np.stack([self._log_likelihood(rule, inputs) for rule in self.rules])
        likelihood = np.exp(logs - logs.max(0))
        return likelihood / likelihood.sum(0)

    def _log_likelihood(self, rule: NTTask, inputs: np.ndarray) -> np.ndarray:
        """Log-probability ``(n, L)`` of the tokens up to each position under a rule."""
        follows = inputs >= rule.lowest
        follows[:, rule.delay :] &= rule.solve(inputs)[:, rule.delay - 1 : -1] == inputs[:, rule.delay :]
        tokens = np.minimum(np.arange(1, inputs.shape[1] + 1), rule.delay)
        return np.where(np.logical_and.accumulate(follows, axis=1), -tokens * math.log(rule.choices), -np.inf)

    def probabilities(self, inputs: np.ndarray) -> np.ndarray:
        """Probabilities of each next digit under the best predictor, ``(n, L, basis)``."""
        found = np.zeros((*inputs.shape, self.basis))
        for rule, weight in zip(self.rules, self.posterior(inputs), strict=True):
            known = np.arange(1, inputs.shape[1] + 1) >= rule.delay
            certain = np.eye(self.basis)[np.where(known, rule.solve(inputs), 0)]
            uniform = np.full(self.basis, 1.0 / rule.choices) * (np.arange(self.basis) >= rule.lowest)
            found += weight[..., None] * np.where(known[:, None], certain, uniform)
        return found

    def solve(self, inputs: np.ndarray) -> np.ndarray:
        return self.probabilities(inputs).argmax(-1)

    def ceiling(self, examples: Examples) -> np.ndarray:
        return self.probabilities(examples.inputs).max(-1)

    def scored(self, examples: Examples) -> np.ndarray:
        certain = self.ceiling(examples) > 1 - 1e-9
        return certain & (examples.targets != IGNORED)

    def contexts(self, examples: Examples) -> np.ndarray:
        """The tokens up to each position: which rules they follow, and the state of each."""
        return prefix_identifiers(examples.inputs)

    def splits(self, examples: Examples) -> dict[str, np.ndarray]:
        possible = (self.posterior(examples.inputs) > 0).sum(0)
        groups = np.zeros(len(examples), dtype=np.int64) if examples.groups is None else examples.groups
        return super().splits(examples) | {
            "rule": np.broadcast_to(groups[:, None], possible.shape),
            "rule identified": (possible == 1).astype(np.int64),
            "rules possible": possible,
        }

    def group_name(self, split: str, group: int) -> str:
        if split == "rule":
            return f"{self.rules[group].operation}, delay {self.rules[group].delay}"
        if split == "rule identified":
            return "rule identified" if group else "rule not identified"
        return super().group_name(split, group)

    def facts(self) -> dict[str, Any]:
        test = self.held_out_examples(2048, "test")
        targets = test.targets != IGNORED
        return super().facts() | {
            "state_space": sum(rule.state_space for rule in self.rules if rule.delay in self.delays),
            "ceiling_of_all": float(self.ceiling(test)[targets].mean()),
            "scored": float(self.scored(test)[targets].mean()),
        }
