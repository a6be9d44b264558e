"""Which packages there are: the search spaces lie beside the package in the checkout, and inside it once installed."""

from setuptools import find_packages
from setuptools import setup

setup(
    packages=[*find_packages(include=["tune_topkd*"]), "tune_topkd.search_spaces"],
    package_dir={"tune_topkd.search_spaces": "search_spaces"},
    package_data={
        "tune_topkd": ["py.typed", "export/*.json", "report/page/templates/*"],
        "tune_topkd.search_spaces": ["*.yaml", "bases/*.yaml"],
    },
)
