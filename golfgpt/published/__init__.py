"""Names and files of the published models (openai/parameter-golf), and what their scripts do otherwise than golfgpt.

`names` maps banks to the published tensors and reads a model's shape off them; `files` reads the published files;
`quirks` and `windows` have what the scripts do that costs bits, and how some of them score.
"""

from golfgpt.published.files import Export, read_export
from golfgpt.published.names import (
    assumed_fields,
    canonical_name,
    check_state,
    from_published,
    infer_config,
    to_published,
)

__all__ = [
    "Export",
    "assumed_fields",
    "canonical_name",
    "check_state",
    "from_published",
    "infer_config",
    "read_export",
    "to_published",
]
