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

# The same method for five steps with a safety factor of 1.02 and a cushion of 2, as modded-nanogpt and the records of
# parameter-golf from 2026-04-23 on have them. A sixth step and later ones repeat the fifth.
POLAR_EXPRESS_5_COEFFICIENTS: tuple[Triple, ...] = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)

_NAMED: dict[str, tuple[Triple, ...]] = {
    "quintic": (QUINTIC_COEFFICIENTS,),
    "polar_express": POLAR_EXPRESS_COEFFICIENTS,
    "polar_express_5": POLAR_EXPRESS_5_COEFFICIENTS,
}

Coefficients = Literal["quintic", "polar_express", "polar_express_5"] | Triple | Sequence[Triple]


def per_step(coefficients: Coefficients, steps: int) -> list[Triple]:
    if isinstance(coefficients, str):
        if coefficients not in _NAMED:
            raise ValueError(f"newton_schulz: coefficients={coefficients!r}; expected {', '.join(_NAMED)} or tuples")
        named = _NAMED[coefficients]
        return [named[min(i, len(named) - 1)] for i in range(steps)]
    if all(isinstance(value, int | float) for value in coefficients):
        coefficients = [coefficients] * steps
    if len(coefficients) != steps or any(len(triple) != 3 for triple in coefficients):
        raise ValueError(
            f"newton_schulz: coefficients={coefficients!r}; expected one (a, b, c), or steps={steps} of them"
        )
    return list(coefficients)
