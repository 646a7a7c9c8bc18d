"""Loss and scores from hidden states: softcapped cross entropy in training, token log probabilities in scoring."""

from golfgpt_kernels.tuning import cases

CASES = cases("softcap_cross_entropy", "token_logprobs")


def test_heads(case, column, timed):
    timed(case, column)
