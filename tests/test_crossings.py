"""How thick the seam between our trainer and TRL's is."""

from crossings import measure


def test_a_training_step_goes_between_ours_and_trl_a_few_times(tmp_path):
    crossed, _ = measure(str(tmp_path))
    assert 10 <= crossed.total() <= 24, crossed.most_common()
