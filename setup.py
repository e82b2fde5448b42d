from setuptools import find_packages, setup

setup(
    name="diffit_jax",
    version="0.1.0",
    packages=find_packages(include=["diffit_jax", "diffit_jax.*"]),
    python_requires=">=3.11",
    install_requires=["jax"],
)
