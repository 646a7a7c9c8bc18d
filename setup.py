"""golfgpt: two packages in one distribution, `golfgpt_kernels` (folder kernels/) and `golfgpt`."""

from pathlib import Path

from setuptools import find_packages, setup

train = [
    "brotli>=1.1",
    "docstring_parser>=0.15",  # what tyro reads help texts with
    "filelock>=3.13",
    "huggingface_hub>=1.0",
    "numpy>=1.26",
    "python-minifier>=3.0",  # the counted train_gpt.py
    "rich>=13",
    "safetensors>=0.5",
    "sentencepiece>=0.2.3",  # offset_mapping
    "tyro>=1.0",
    "zstandard>=0.23",
]
tools = [
    "jinja2>=3.1",  # report
    "jsonschema>=4.20",  # submit
    "matplotlib>=3.9",  # report
    "optuna>=5.0",  # sweep
    "scipy>=1.13",  # compare, sweep
    "tomli>=2.0; python_version < '3.11'",  # sweep
]

setup(
    name="golfgpt",
    version="0.1.0",
    description="Train the best language model that fits a byte budget, and prove the score.",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=[*find_packages(include=["golfgpt", "golfgpt.*"]), "golfgpt_kernels"],
    package_dir={"golfgpt_kernels": "kernels/golfgpt_kernels"},
    package_data={
        "golfgpt_kernels": ["measured.json"],
        "golfgpt.doctor": ["steps.json"],
        "golfgpt.report": ["page.html"],
        "golfgpt.submit": ["submission.schema.json"],
    },
    install_requires=[
        "torch>=2.10",
        "triton; platform_system == 'Linux'",  # the release is torch's to say: each CUDA build pins its own
    ],
    extras_require={
        "train": train,
        "tools": [*train, *tools],
        "hf": [*train, "transformers>=5.0"],
        "tensorboard": [*train, "tensorboard>=2.18"],
        "trackio": [*train, "trackio>=0.20"],
        "wandb": [*train, "wandb>=0.20"],
        "test": [
            *train,
            *tools,
            "hypothesis>=6.100",
            "pytest>=8",
            "pytest-xdist>=3.8",
            "ruff>=0.9",
            "setuptools>=77",
            "tensorboard>=2.18",
            "transformers>=5.0",
        ],
        "bench": [
            *train,
            "cut-cross-entropy>=25.1; platform_system == 'Linux'",
            "liger-kernel>=0.5; platform_system == 'Linux'",
            "matplotlib>=3.9",
            "pytest>=8",
        ],
    },
    entry_points={"console_scripts": ["golfgpt = golfgpt.__main__:main"]},
)
