"""What this machine is, how fast it runs, and what keeps a run from starting or from being fast."""

from golfgpt.doctor.checks import Row, diagnose, exit_code, text

__all__ = ["Row", "diagnose", "exit_code", "text"]
