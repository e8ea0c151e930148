import itertools
import math
import platform
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from expressive_attention.study.config.load import parse_config
from expressive_attention.study.errors import ConfigError
from expressive_attention.study.tasks.base import Examples
from expressive_attention.study.tasks.language import (
    LanguageTask,
    Text,
    bigram_bits,
    part_of,
    source_files,
    unigram_bits,
)
from expressive_attention.study.tasks.rng import stream
from expressive_attention.study.training.loop import train_cell
from tests.budget import threads_of_torch
from tests.study.tiny import cell

PARTS = ("training", "validation", "test")
FILES = source_files(Path(sysconfig.get_paths()["stdlib"]))
SMALL = [b"abracadabra", b"", b"banana", b"a", b"cab"]


def some_examples(task, purpose, count=300):
    if purpose == "training":
        return task.training_examples(stream(0, "training"), count)
    return task.held_out_examples(count, purpose)


def test_every_file_is_in_one_part_by_its_path_alone():
    parts = Counter(part_of(f"package/module_{i}.py") for i in range(10_000))
    assert {part: parts[part] / 10_000 for part in PARTS} == pytest.approx(
        {"training": 0.8, "validation": 0.1, "test": 0.1}, abs=0.02
    )
    # The same on every machine.
    assert [part_of(path) for path in ("abc.py", "os.py", "types.py")] == GOLDEN_PARTS


def test_only_sources_of_the_library_itself_are_read(tmp_path):
    kept = {"b.py": b"1", "a/__init__.py": b"", "a/c.py": b"2"}
    left_out = ["d.txt", "test/e.py", "a/tests/f.py", "site-packages/g.py", "encodings/h.py", "_sysconfigdata_x.py"]
    for path, content in (kept | dict.fromkeys(left_out, b"no")).items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    assert list(source_files(tmp_path).items()) == sorted(kept.items())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no Python sources of the standard library in .*empty"):
        source_files(tmp_path / "empty")


@pytest.mark.parametrize("purpose", PARTS)
def test_windows_are_in_the_files_of_their_part_and_targets_are_the_next_bytes(purpose):
    task = LanguageTask(context=80)
    examples = some_examples(task, purpose)
    assert (examples.inputs[:, 1:] == examples.targets[:, :-1]).all()
    own = [content for path, content in FILES.items() if part_of(path) == purpose]
    sequences = np.concatenate([examples.inputs, examples.targets[:, -1:]], axis=1).astype(np.uint8)
    assert len(sequences) == 300
    for row in sequences:
        assert any(row.tobytes() in content for content in own)


def test_windows_of_a_small_text_against_slices():
    text = Text.of(SMALL)
    for length in (1, 3, 6, 11):
        expected = [file[i : i + length] for file in SMALL for i in range(len(file) - length + 1)]
        assert text.windows(length) == len(expected)
        assert [row.tobytes() for row in text.window(np.arange(len(expected)), length)] == expected
    assert text.windows(12) == 0


def test_a_stream_gives_the_same_windows_and_goes_on():
    task = LanguageTask(context=16)
    whole = task.training_examples(stream(5, "training"), 12)
    bits = stream(5, "training")
    parts = [task.training_examples(bits, count) for count in (5, 7)]
    assert (np.concatenate([part.inputs for part in parts]) == whole.inputs).all()
    assert (task.training_examples(stream(6, "training"), 12).inputs != whole.inputs).any()
    # Each raw number modulo the number of windows is the number of a window.
    raw = [int(x) for x in stream(5, "training").random_raw(12)]
    training = [content for path, content in FILES.items() if part_of(path) == "training"]
    total = sum(max(0, len(content) - 16) for content in training)
    for row, number in zip(whole.inputs.astype(np.uint8), raw, strict=True):
        place = number % total
        for content in training:
            if place < max(0, len(content) - 16):
                break
            place -= max(0, len(content) - 16)
        assert row.tobytes() == content[place : place + 16]


def test_held_out_windows_are_spread_over_the_files():
    task = LanguageTask(context=32)
    test = [content for path, content in FILES.items() if part_of(path) == "test" and len(content) > 32]
    total = sum(len(content) - 32 for content in test)
    starts = [content[i : i + 32] for content in test for i in range(len(content) - 32)]
    found = [row.tobytes() for row in task.held_out_examples(200, "test").inputs.astype(np.uint8)]
    assert found == [starts[i * total // 200] for i in range(200)]
    assert (task.held_out_examples(200, "test").inputs == task.held_out_examples(200, "test").inputs).all()


def entropy_by_counting(training, pairs):
    """Bits per byte of both baselines, counted with dictionaries."""
    one = Counter(itertools.chain(*training))
    two = Counter(pair for file in training for pair in itertools.pairwise(file))
    before = Counter(a for file in training for a in file[:-1])
    total = sum(one.values())

    def unigram(b):
        return (one[b] + 1) / (total + 256)

    def bigram(a, b):
        return (two[a, b] + unigram(b)) / (before[a] + 1)

    unigram_sum = math.fsum(-math.log2(unigram(b)) for _, b in pairs)
    bigram_sum = math.fsum(-math.log2(bigram(a, b)) for a, b in pairs)
    return unigram_sum / len(pairs), bigram_sum / len(pairs)


def test_the_baselines_of_a_small_text_against_counting():
    read, following = b"abzbracad", b"bracadabz"
    examples = Examples(*(np.array(list(x), dtype=np.int64).reshape(3, 3) for x in (read, following)))
    expected = entropy_by_counting(SMALL, list(zip(read, following, strict=True)))
    text = Text.of(SMALL)
    assert (unigram_bits(text, examples), bigram_bits(text, examples)) == pytest.approx(expected, abs=1e-12)


def test_the_facts_are_those_of_the_text():
    task = LanguageTask(context=64)
    facts, test = task.facts(), task.held_out_examples(2048, "test")
    training = [content for path, content in FILES.items() if part_of(path) == "training"]
    assert facts["unigram_bits"] == unigram_bits(Text.of(training), test)
    assert facts["bigram_bits"] == bigram_bits(Text.of(training), test)
    assert facts["bigram_bits"] < facts["unigram_bits"] < 8
    assert facts["training_bytes"] == sum(map(len, training))
    assert facts["complexity"] == math.log2(facts["training_bytes"])
    assert facts["majority"] == max(Counter(test.targets.ravel().tolist()).values()) / test.targets.size
    assert "ceiling" not in facts


def test_positions_are_grouped_by_powers_of_two():
    task = LanguageTask(context=10)
    groups = task.splits(task.held_out_examples(3, "test"))["bytes read"]
    assert groups.tolist() == [[0, 1, 1, 2, 2, 2, 2, 3, 3, 3]] * 3
    names = [task.group_name("bytes read", group) for group in range(4)]
    assert names == ["bytes read 1", "bytes read 2 to 3", "bytes read 4 to 7", "bytes read 8 to 10"]


def test_the_text_is_part_of_the_identity():
    task = LanguageTask(context=8)
    assert task.python == platform.python_version()
    assert LanguageTask.model_validate_json(task.model_dump_json()) == task
    identities = {cell(task=task.model_copy(update=update)).identity for update in ({}, {"python": "3"}, {"text": "0"})}
    assert len(identities) == 3


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"python": "2.7.18"}, f"must be the running version, '{platform.python_version()}', got '2.7.18'"),
        ({"text": "0123"}, "must be the hash of this Python's standard library, '[0-9a-f]{16}', got '0123'"),
        ({"context": 0}, "greater than or equal to 1"),
        ({"vocab": 128}, "vocab"),
    ],
)
def test_wrong_values_are_refused(wrong, words):
    with pytest.raises(ValidationError, match=words):
        LanguageTask(**wrong)


def test_another_version_is_refused_in_one_line():
    text = 'name = "x"\n[[grid]]\ntask = { kind = "language", python = "2.7.18" }'
    with pytest.raises(ConfigError, match=r"^x: .*python: must be the running version, .*, got '2\.7\.18'$"):
        parse_config(text, "x")


def test_a_model_learns_more_than_frequencies_of_bytes_at_once():
    task = LanguageTask(context=16)
    with threads_of_torch(1):
        found = train_cell(cell(task=task, model={"embed_dim": 16}, steps=60, batch_size=16, evaluate_every=60))
    bits = found.seeds["cross_entropy"] / math.log(2)
    assert (bits < task.facts()["unigram_bits"]).all()
    assert found.seeds["rollout_exact"].null_count() == found.seeds["contexts_seen"].null_count() == 2
    assert found.splits["ceiling"].null_count() == len(found.splits)


GOLDEN_PARTS = ["training", "test", "validation"]
