"""The models of the tests are so small that a second thread only waits for the first; beside other work it waits long.
"""

import torch

torch.set_num_threads(1)
