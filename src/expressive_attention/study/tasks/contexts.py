"""The basis of a test: how many predictions, on how many different contexts, and which of them training never saw."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .base import Examples, Task
from .sampled import prefix_identifiers

__all__ = ["Unseen", "facts_of_test", "scored_contexts", "unseen"]


@dataclass(frozen=True)
class Unseen:
    """The part of a test that did not occur in training.

    Attributes:
        seen: Share of the scored predictions whose context did; None where the task does not tell.
        predictions: Number of scored predictions whose context did not.
        contexts: Number of different contexts among those.
    """

    seen: float | None
    predictions: int
    contexts: int


def scored_contexts(task: Task, examples: Examples) -> np.ndarray:
    """An identifier, uint64, of what determines each scored target, ``(targets,)``.

    Where the task does not say, it is all that the model has read, which is the whole example without causality.
    """
    scored, contexts = task.scored(examples), task.contexts(examples)
    if contexts is None and examples.inputs.ndim == 2 and task.is_causal:
        contexts = prefix_identifiers(examples.inputs)
    if contexts is None:
        whole = [_hash(example.tobytes()) for example in examples.inputs]
        contexts = np.broadcast_to(np.array(whole, dtype=np.uint64)[:, None], scored.shape)
    return contexts[scored[:, scored.shape[1] - contexts.shape[1] :]]


def unseen(task: Task, training: Iterable[Examples], test: Examples) -> Unseen:
    """The part of a test that is new, given the examples of the training."""
    contexts = scored_contexts(task, test)
    if task.contexts(test[:1]) is None:
        return Unseen(None, len(contexts), len(np.unique(contexts)))
    known = [np.unique(found) for part in training if (found := task.contexts(part)) is not None]
    new = contexts[~np.isin(contexts, np.concatenate(known))]
    return Unseen(1 - len(new) / len(contexts), len(new), len(np.unique(new)))


def facts_of_test(task: Task, test_sequences: int) -> dict[str, Any]:
    """The facts that an accuracy on so many test examples rests on; keys as in `study.config.condition.Condition`."""
    test = task.held_out_examples(test_sequences, "test")
    contexts = scored_contexts(task, test)
    return {
        "test_sequences": len(test),
        "predictions": len(contexts),
        "contexts": len(np.unique(contexts)),
        "fixed_data": task.fixed_data,
    }


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
