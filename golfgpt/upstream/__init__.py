"""Names and files of the published models (openai/parameter-golf).

`names` maps banks to upstream's tensors and reads a model's shape off them; `reading` reads upstream's files.
"""

from golfgpt.upstream.names import (
    assumed_fields,
    canonical_name,
    check_state,
    from_upstream,
    infer_config,
    is_layered,
    to_upstream,
    upstream_names,
    upstream_shapes,
)
from golfgpt.upstream.reading import MAX_PTZ_BYTES, Export, read_export, read_ptz

__all__ = [
    "MAX_PTZ_BYTES",
    "Export",
    "assumed_fields",
    "canonical_name",
    "check_state",
    "from_upstream",
    "infer_config",
    "is_layered",
    "read_export",
    "read_ptz",
    "to_upstream",
    "upstream_names",
    "upstream_shapes",
]
