"""Triton, or the reason why it is not here.

Triton has no wheels for macOS, so nothing in this package imports it at the top of a module. It is
imported when a Triton implementation is asked for, and where that fails the reason is a sentence for the
error message.
"""


def triton_missing() -> str | None:
    """Why triton cannot be imported, or None where it can. Imports it without starting its driver."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton is not installed ({error})"
    return None
