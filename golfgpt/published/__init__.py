"""Names and files of the published models (openai/parameter-golf).

`names` maps banks to upstream's tensors and reads a model's shape off them; `reading` reads upstream's files.
"""

from golfgpt.published.files import MAX_PTZ_BYTES, Export, read_export, read_ptz
from golfgpt.published.names import (
    assumed_fields,
    canonical_name,
    check_state,
    from_published,
    infer_config,
    is_layered,
    published_names,
    published_shapes,
    to_published,
)

__all__ = [
    "MAX_PTZ_BYTES",
    "Export",
    "assumed_fields",
    "canonical_name",
    "check_state",
    "from_published",
    "infer_config",
    "is_layered",
    "published_names",
    "published_shapes",
    "read_export",
    "read_ptz",
    "to_published",
]
