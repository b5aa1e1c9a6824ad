"""What pyproject.toml cannot say: the folder `search_spaces` goes into the package, so that a wheel has its files."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[*find_namespace_packages(include=["bilora_ray*"]), "bilora_ray.search_spaces"],
    package_dir={"bilora_ray.search_spaces": "search_spaces"},
)
