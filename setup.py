"""Everything static is in pyproject.toml; here only what it cannot say: where the packages lie."""

from setuptools import setup

setup(
    # kernels/ stands at the top level beside csrc/, and is imported as srpkd.kernels
    package_dir={"srpkd": "srpkd", "srpkd.kernels": "kernels"},
    packages=["srpkd", "srpkd.data", "srpkd.presets", "srpkd.kernels"],
    package_data={"srpkd": ["py.typed", "presets/*.yaml", "templates/*"]},
)
