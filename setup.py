"""golfgpt: two packages in one distribution, `golfgpt_kernels` (folder kernels/) and `golfgpt`."""

from pathlib import Path

from setuptools import find_packages, setup

train = [
    "brotli>=1.1",
    "filelock>=3.13",
    "huggingface_hub>=1.0",
    "numpy>=1.26",
    "rich>=13",
    "safetensors>=0.5",
    "sentencepiece>=0.2.3",  # offset_mapping
    "tyro>=1.0",
    "zstandard>=0.23",
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
    package_data={"golfgpt_kernels": ["measured.json"], "golfgpt.doctor": ["steps.json"]},
    install_requires=[
        "torch>=2.10",
        "triton; platform_system == 'Linux'",  # the release is torch's to say: each CUDA build pins its own
    ],
    extras_require={
        "train": train,
        "test": [
            *train,
            "hypothesis>=6.100",
            "matplotlib>=3.9",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "setuptools>=77",
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
