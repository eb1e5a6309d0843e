"""What pyproject.toml cannot say: configs/ is installed as memoryformer/configs."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["memoryformer*"]), "memoryformer.configs"],
    package_dir={"memoryformer.configs": "configs"},
)
