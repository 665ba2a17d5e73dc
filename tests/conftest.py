"""The models of the tests are so small that a second thread only waits for the first; beside other work it waits long.
"""

import torch

from tests import exercise

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--mine", metavar="FILE", help="run the chapters against your own functions (tests/exercise.py)")


def pytest_configure(config):
    if config.getoption("--mine"):
        exercise.use(config.getoption("--mine"))
