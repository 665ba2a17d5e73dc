"""The models of the tests are so small that a second thread only waits for the first; beside other work it waits long.
"""

import torch

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--fuzz", type=int, default=0, help="chapter 29: damaged files to try (default: about 40)")
    parser.addoption("--kills", type=int, default=0, help="chapter 28: times to kill a run (default: a few)")
