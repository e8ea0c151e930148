import numpy as np

from expressive_attention.study.streams import stream


def test_the_numbers_are_these_on_every_machine():
    assert stream(0, "training").random_raw(3).tolist() == GOLDEN
    assert stream(7, "parameters").random_raw(1).tolist() == OTHER


def test_seeds_and_purposes_have_streams_of_their_own():
    drawn = [stream(seed, purpose).random_raw(64) for seed in range(4) for purpose in ("training", "parameters")]
    assert len(np.unique(np.concatenate(drawn))) == 8 * 64


GOLDEN = [5458441790032951445, 7637177617529884442, 118814558862466719]
OTHER = [2198050741950873917]
