"""The optimizer's parts over all matrices of a 9-layer model: momentum, Newton-Schulz, update."""

from golfgpt_kernels.tuning import cases

CASES = cases("newton_schulz", "muon_momentum_", "muon_update_", "muon_update_rows_")


def test_muon(case, column, timed):
    timed(case, column)
