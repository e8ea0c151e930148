import numpy as np
import pytest
import torch
from torch import Tensor, nn

from expressive_attention.study.tasks import Examples
from expressive_attention.study.tasks.contexts import unseen
from expressive_attention.study.tasks.recurrences.nt import NTTask
from expressive_attention.study.tasks.rng import stream
from expressive_attention.study.training.evaluation import Prepared, rollouts, score

TASK = NTTask(basis=4, delay=2, context=5)


class Oracle(nn.Module):
    """Knows the recurrence; member 1 is wrong after a 0, member 2 once in 5 positions, member 3 gives NaN."""

    def forward(self, tokens: Tensor) -> Tensor:
        assert tokens.min() >= 0  # an embedding has no row for an answer that is not finite
        before = tokens.roll(TASK.delay - 1, -1)
        answer = (tokens + before) % TASK.basis
        answer[1] += tokens[1] == 0
        answer[2, :, -1] += 1
        logits = nn.functional.one_hot(answer % TASK.basis, TASK.basis).float()
        logits[3, ..., 0] = torch.nan
        return logits


class Table(nn.Module):
    """Each member's answer is a random function of the last `delay` digits, which it errs on at times."""

    def __init__(self, members: int, errors: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        first, last = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
        table = ((first + last) % 4).expand(members, 4, 4)
        wrong = torch.rand(table.shape, generator=generator) < errors
        self.table = torch.where(wrong, (table + 1) % 4, table)

    def forward(self, tokens: Tensor) -> Tensor:
        assert tokens.shape[-1] <= TASK.length
        answer = torch.stack([table[t.roll(1, -1), t] for table, t in zip(self.table, tokens, strict=True)])
        return nn.functional.one_hot(answer, 4).float()


def make_examples(count: int) -> Examples:
    return TASK.training_examples(stream(0, "training"), count)


def test_accuracy_counts_the_scored_positions_alone():
    examples = make_examples(50)
    found = score(Oracle(), Prepared.of(TASK, examples), 4, batch=16)
    read = examples.inputs[:, 1:]  # the position before has no answer yet
    assert found.accuracy.dtype == torch.float64
    assert found.accuracy.tolist() == pytest.approx([1, (read != 0).mean(), 3 / 4, 0])
    assert found.right[:, :, 1:].double().mean((1, 2)).tolist() == pytest.approx(found.accuracy.tolist())
    right, wrong = np.log(np.exp(np.eye(4)[0]).sum()) - np.array([1, 0])  # of logits 1 for the answer and 0 else
    assert found.cross_entropy[[0, 2]].tolist() == pytest.approx([right, right * 3 / 4 + wrong / 4])


def test_logits_that_are_not_finite_are_wrong_in_rollouts_too():
    found = rollouts(Oracle(), TASK, make_examples(20), 6, 4)
    assert found is not None
    digits, exact = found
    assert digits[[0, 3]].tolist() == [1, 0]
    assert exact[[0, 3]].tolist() == [1, 0]


@pytest.mark.parametrize("errors", [0.0, 0.1, 0.5])
def test_rollouts_go_on_from_their_own_answers(errors):
    model, examples, digits = Table(3, errors), make_examples(40), 9
    shares, exact = [], []
    for table in model.table.tolist():
        right = []
        for prompt in examples.inputs[:, :2].tolist():
            mine, truth = list(prompt), list(prompt)
            for _ in range(digits):
                mine.append(table[mine[-2]][mine[-1]])
                truth.append((truth[-2] + truth[-1]) % 4)
            right.append([a == b for a, b in zip(mine[2:], truth[2:], strict=True)])
        shares.append(np.mean(right))
        exact.append(np.mean([all(row) for row in right]))
    found = rollouts(model, TASK, examples, digits, 3)
    assert found[0].tolist() == pytest.approx(shares)
    assert found[1].tolist() == pytest.approx(exact)
    assert (found[0] == 1).all() == (errors == 0)


@pytest.mark.parametrize("count", [1, 5, 12])
def test_contexts_seen_are_those_that_training_had(count):
    task = NTTask(basis=3, delay=4, context=6)
    parts = [task.training_examples(stream(seed, "training"), count) for seed in (0, 1)]
    test = task.held_out_examples(5, "test")

    def windows(examples: Examples) -> list[tuple[int, ...]]:
        return [tuple(x[t : t + 4]) for x in examples.inputs.tolist() for t in range(3)]

    seen = {window for part in parts for window in windows(part)}
    expected = np.mean([window in seen for window in windows(test)])
    new = [window for window in windows(test) if window not in seen]
    found = unseen(task, parts, test)
    assert (found.seen, found.predictions, found.contexts) == (pytest.approx(expected), len(new), len(set(new)))
    assert 0 <= expected < 1
