"""Packaging of ldm."""

import re
import sys
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
VERSION = re.search(
    r'__version__ = "(.+?)"', (HERE / "ldm" / "support" / "version.py").read_text(encoding="utf-8")
).group(1)

sys.path.insert(0, str(HERE))
from ldm.speed.kernels.prebuilt import can_prebuild, prebuild  # noqa: E402  (needs no other package)


class Build(build_py):
    """Compile the kernels into the package where there is a C++ compiler; they are optional."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            prebuild(Path(self.build_lib) / "ldm" / "speed" / "kernels" / "prebuilt")


class PlatformDistribution(Distribution):
    """A package for this platform where it contains compiled kernels."""

    def has_ext_modules(self) -> bool:
        return can_prebuild()


class Wheel(bdist_wheel):
    """A wheel for every Python 3, as the kernels do not use Python's headers."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


# starlette 1.0.1 mends CVE-2026-48710 (Host headers), later ones up to 1.6 CVE-2026-48818, 54282 and 54283;
# python-multipart 0.0.27 mends CVE-2026-42561 (headers of parts), 0.0.30 CVE-2026-53539; h11 0.16 mends
# CVE-2025-43859 (chunked bodies)
SERVE = [
    "starlette>=1.6",
    "uvicorn>=0.30",
    "h11>=0.16",
    "httptools>=0.6.3",
    "uvloop>=0.21; sys_platform != 'win32'",
    "python-multipart>=0.0.30",
]

setup(
    name="ldm",
    distclass=PlatformDistribution,
    cmdclass={"build_py": Build, "bdist_wheel": Wheel},
    version=VERSION,
    description=(
        "Latent diffusion and unCLIP from scratch in PyTorch, with small models that work after pip install"
    ),
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["ldm", "ldm.*"]),
    # the sheets of the cards are for readers of the repository
    exclude_package_data={"ldm": ["assets/**/*.png"]},
    package_data={"ldm": ["assets/**/*", "speed/kernels/*.cpp", "speed/kernels/*.h", "serving/page/*"]},
    install_requires=[
        # The lower bounds are the first releases without a published advisory that concerns this library:
        # torch 2.10 mends CVE-2026-24747 (reader of weights), 2.11 CVE-2026-4538 (reader of programs);
        # pillow 12.3 mends CVE-2026-55798 and CVE-2026-59197 to 59200; distributors list more for 12.3, which
        # 13.0 mends, for Python 3.11 and later; tqdm 4.66.3 mends CVE-2024-34062
        "torch>=2.11",
        "torchvision>=0.26",  # open_clip imports it
        "einops>=0.7",
        "numpy>=1.26",
        "open_clip_torch>=2.24",
        "safetensors>=0.4",
        "tqdm>=4.66.3",
        "pillow>=12.3; python_version < '3.11'",
        "pillow>=13; python_version >= '3.11'",
        "PyYAML>=6",
        "huggingface_hub>=0.23",
        "ftfy>=6",  # these two come with open_clip; the tokenizer imports them for text that is not ASCII
        "regex>=2023.3.22",
    ],
    extras_require={
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "diffusers>=0.31",
            "transformers>=4.45",
            "accelerate>=0.30",
            "k-diffusion>=0.1.1",
            "peft>=0.17",
            "lycoris-lora>=3.2",
            "min-dalle>=0.4.11",
            "DALL-E>=0.1",
            "msgpack>=1.0",
            "webdataset>=1.0",
            "scikit-image>=0.22",
            "torchmetrics>=1.6",
            "torch-fidelity>=0.4",
            "nbclient>=0.10",
            "ipykernel>=6",
            "matplotlib>=3.8",
            "torchmetrics>=1.6",
            "torch-fidelity>=0.4",
            "clean-fid>=0.1.35",
            "httpx>=0.27",
            "openai>=1.60",
            "playwright>=1.49",
            "axe-core-python>=0.1",
            *SERVE,
            "ruff>=0.17",
            "mypy>=2.4",
            "types-PyYAML>=6",
            "types-tqdm>=4.65",
        ],
        "control": ["scikit-image>=0.22"],
        "data": ["resvg-py>=0.1"],
        "metrics": ["torchmetrics>=1.6", "torch-fidelity>=0.4", "matplotlib>=3.8"],
        "notebooks": ["jupyter", "matplotlib>=3.8", "nbclient>=0.10"],
        "bench": ["openvino"],
        "train": ["webdataset>=1.0"],
        # 5.0.1 mends PYSEC-2026-3716: rows that name files outside the data set
        "datasets": ["datasets>=5.0.1"],
        "serve": SERVE,
    },
    entry_points={"console_scripts": ["ldm = ldm.cli.commands:run_command_line"]},
)
