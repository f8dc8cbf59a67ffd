"""The parts of the build that pyproject.toml cannot express: the locations of the packages, and the C++ extension.

The extension is built ahead of time if torch can be imported: ``pip install --no-build-isolation .``. Without torch the
package is installed as pure Python, and the extension is built on first use. See kernels/build.py.
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


def extension_arguments() -> dict:
    """Return the arguments of setup() that build the extension, or {} if it is not built."""
    required = build.setting() == "1"
    if build.setting() == "0":
        return {}
    if reason := build.unsupported_platform():
        if required:
            sys.exit(f"SRPKD_BUILD=1, but the extension cannot be built here: {reason}")
        print(f"srpkd: installing without the native backend: {reason}")
        return {}
    try:
        import torch  # noqa: F401
    except ImportError as error:
        if required:
            sys.exit(
                f"SRPKD_BUILD=1, but torch cannot be imported ({error}): install torch and use --no-build-isolation"
            )
        return {}
    reason = build.cuda_unavailable_reason()
    if reason is None and (reason := build.nvcc_problem()) and required:
        sys.exit(f"SRPKD_BUILD=1: {reason}; or set SRPKD_BUILD_CUDA=0 to build the CPU part alone")
    if reason:
        print(f"srpkd: building the extension without CUDA: {reason}")
    cuda = reason is None
    os.environ.update(build.environment(cuda))
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    def extension(cuda: bool):
        return (CUDAExtension if cuda else CppExtension)(
            f"srpkd.kernels.{build.NAME}",
            [str(source.relative_to(ROOT)) for source in build.sources(cuda)],
            extra_compile_args={"cxx": build.flags(cuda), "nvcc": build.nvcc_flags() if cuda else []},
        )

    class BuildIfPossible(BuildExtension):
        """Build with CUDA, or else without, or else not at all. With SRPKD_BUILD=1 the first failure is an error."""

        def run(self) -> None:
            if self.attempt("with" if cuda else "without"):
                return
            if cuda:
                self.distribution.ext_modules = [extension(cuda=False)]
                inplace, editable_mode = self.inplace, self.editable_mode
                self.distribution.reinitialize_command(self)
                self.inplace, self.editable_mode = inplace, editable_mode
                self.ensure_finalized()
                if self.attempt("without"):
                    return
            print("srpkd: installing without the native backend; SRPKD_BUILD=1 makes this an error")
            self.extensions = []

        def attempt(self, part: str) -> bool:
            try:
                super().run()
            except Exception as error:
                if required:
                    raise
                print(f"srpkd: building the extension {part} CUDA failed: {error}")
                return False
            return True

    return {"ext_modules": [extension(cuda)], "cmdclass": {"build_ext": BuildIfPossible}}


setup(
    # srpkd/kernels and srpkd/csrc are links to kernels/ and csrc/, and text files in a checkout without symbolic links
    package_dir={"srpkd": "srpkd", "srpkd.kernels": "kernels", "srpkd.csrc": "csrc"},
    packages=[
        *find_packages(include=["srpkd", "srpkd.*"], exclude=["srpkd.kernels*"]),
        "srpkd.kernels",
        *(f"srpkd.kernels.{name}" for name in find_packages("kernels")),
        "srpkd.csrc",
    ],
    include_package_data=False,  # package_data lists all data; folders of data are not packages
    package_data={
        "srpkd": ["py.typed", "presets/*.yaml"],
        "srpkd.reporting": ["templates/*"],
        "srpkd.csrc": [f"{folder}*.{end}" for folder in ("", "*/", "cuda/*/") for end in ("h", "cpp", "cu", "cuh")],
    },
    **extension_arguments(),
)
