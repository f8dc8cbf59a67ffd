"""Everything static is in pyproject.toml; here only what it cannot say: where the packages lie, and the C++ extension.

The extension is built ahead of time where torch can be imported: ``pip install --no-build-isolation .``. Without
torch the package installs pure Python, and the extension is built on first use. See kernels/build.py.
"""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
spec = importlib.util.spec_from_file_location("build_native", ROOT / "kernels" / "build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)


def native() -> dict:
    """The arguments of setup() that build the extension; none where it is not to be built."""
    required = build.setting() == "1"
    if build.setting() == "0":
        return {}
    try:
        import torch  # noqa: F401
    except ImportError as error:
        if required:
            sys.exit(f"SRPKD_BUILD=1, and torch cannot be imported ({error}): install it, use --no-build-isolation")
        return {}
    cuda = build.cuda_unavailable_reason() is None
    os.environ.update(build.environment(cuda))
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    def extension(cuda: bool):
        return (CUDAExtension if cuda else CppExtension)(
            f"srpkd.kernels.{build.NAME}",
            [str(source.relative_to(ROOT)) for source in build.sources(cuda)],
            extra_compile_args={"cxx": build.flags(cuda), "nvcc": [*build.NVCC_FLAGS]},
        )

    class BuildWherePossible(BuildExtension):
        """With the GPU part, else without it, else not at all: installing succeeds, unless SRPKD_BUILD=1."""

        def run(self) -> None:
            for part in [True, False] if cuda else [False]:
                vars(self.extensions[0]).update(
                    {key: value for key, value in vars(extension(part)).items() if not key.startswith("_")}
                )
                try:
                    return super().run()
                except Exception as error:
                    if required:
                        raise
                    print(f"srpkd: building the extension {'with' if part else 'without'} CUDA failed: {error}")
            print("srpkd: installing without the native backend; SRPKD_BUILD=1 makes this an error")
            self.extensions = []

    return {"ext_modules": [extension(cuda)], "cmdclass": {"build_ext": BuildWherePossible}}


setup(
    # kernels/ and csrc/ stand at the top level, and are srpkd.kernels and srpkd.csrc where installed
    package_dir={"srpkd": "srpkd", "srpkd.kernels": "kernels", "srpkd.csrc": "csrc"},
    packages=[
        *find_packages(include=["srpkd", "srpkd.*"], exclude=["srpkd.kernels*"]),
        *("srpkd.kernels", *(f"srpkd.kernels.{name}" for name in find_packages("kernels"))),
        "srpkd.csrc",
    ],
    include_package_data=False,  # what package_data lists, and no folder taken for a package for its sake
    package_data={
        "srpkd": ["py.typed", "presets/*.yaml"],
        "srpkd.reporting": ["templates/*"],
        "srpkd.csrc": ["*.cpp", "*/*.h", "*/*.cpp", "*/*.cu", "*/*.cuh"],
    },
    **native(),
)
