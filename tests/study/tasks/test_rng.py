import numpy as np

from expressive_attention.study.tasks.rng import stream


def test_the_numbers_are_these_on_every_machine():
    assert stream(0, "training").random_raw(3).tolist() == GOLDEN
    assert stream(7, "parameters").random_raw(1).tolist() == OTHER


def test_seeds_and_purposes_have_streams_of_their_own():
    drawn = [stream(seed, purpose).random_raw(64) for seed in range(4) for purpose in ("training", "parameters")]
    assert len(np.unique(np.concatenate(drawn))) == 8 * 64


GOLDEN = [16145895611297852489, 17602817368531927070, 958987050687567598]
OTHER = [16038777236697395100]
