"""What pyproject.toml cannot say: the folder `search_spaces` goes into the package, so that a wheel has its files."""

from setuptools import find_namespace_packages, setup

FOLDERS = {
    "bilora_ray.search_spaces": "search_spaces",
    "bilora_ray.search_spaces.comparisons": "search_spaces/comparisons",
}

setup(
    packages=[*find_namespace_packages(include=["bilora_ray*"]), *FOLDERS],
    package_dir=FOLDERS,
)
