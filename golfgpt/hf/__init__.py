"""Export to Hugging Face transformers: a folder that loads where golfgpt is not installed.

export                    writes the folder
source                    this package's own definitions as files that stand alone
configuration_golfgpt     the three Python files of the export, before `source` adds what they import from golfgpt
modeling_golfgpt
tokenization_golfgpt
"""
