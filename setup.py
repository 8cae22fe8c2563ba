"""Where the packages lie; everything else about them is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["fastgpt", "fastgpt.*"]), *find_packages("kernels")],
    package_dir={"fastgpt": "fastgpt", "fastgpt_kernels": "kernels/fastgpt_kernels"},
)
