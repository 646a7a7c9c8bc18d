"""Names and files of the published models (openai/parameter-golf), and what their scripts do otherwise than golfgpt.

`names` maps parameters to the published tensors and reads a model's shape off them; `containers` reads the bytes of the
published files, `files` what they hold; `quirks` and `windows` have what the scripts do that costs bits, and how some
of them score.
"""
