"""Coefficients (a, b, c) of the steps of Newton-Schulz (newton_schulz.py).

Sources: K. Jordan et al., Muon (kellerjordan.github.io/posts/muon), 2024; Amsel, Persson, Musco, Gower,
"The Polar Express", arXiv:2505.16932, appendix A.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Triple = tuple[float, float, float]

QUINTIC_COEFFICIENTS: Triple = (3.4445, -4.7750, 2.0315)

# Optimal for singular values in [1e-3, 1]. The paper's safety factor 1.01 (it lets rounding carry σ past 1) is
# folded into all but the last, the fixed point that further steps repeat.
POLAR_EXPRESS_COEFFICIENTS: tuple[Triple, ...] = (
    *(
        (a / 1.01, b / 1.01**3, c / 1.01**5)
        for a, b, c in (
            (8.28721201814563, -23.595886519098837, 17.300387312530933),
            (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
            (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
            (3.3184196573706015, -2.488488024314874, 0.51004894012372),
            (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
            (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
            (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
        )
    ),
    (1.875, -1.25, 0.375),
)

Coefficients = Literal["quintic", "polar_express"] | Triple | Sequence[Triple]


def per_step(coefficients: Coefficients, steps: int) -> list[Triple]:
    if coefficients == "quintic":
        return [QUINTIC_COEFFICIENTS] * steps
    if coefficients == "polar_express":
        last = len(POLAR_EXPRESS_COEFFICIENTS) - 1
        return [POLAR_EXPRESS_COEFFICIENTS[min(i, last)] for i in range(steps)]
    if isinstance(coefficients, str):
        raise ValueError(f"newton_schulz: coefficients={coefficients!r}; expected 'quintic', 'polar_express' or tuples")
    if all(isinstance(value, int | float) for value in coefficients):
        coefficients = [coefficients] * steps
    if len(coefficients) != steps or any(len(triple) != 3 for triple in coefficients):
        raise ValueError(
            f"newton_schulz: coefficients={coefficients!r}; expected one (a, b, c), or steps={steps} of them"
        )
    return list(coefficients)
