"""relu² MLP and its first half. Wanted: at most 0.75 x torch.compile and at least 65 % of the roof, with backward."""

from golfgpt_kernels.tuning import cases

CASES = cases("relu2_mlp", "linear_relu2")


def test_relu2_mlp(case, column, timed):
    timed(case, column)
