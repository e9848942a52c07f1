import torch

torch.set_num_threads(1)  # models this small lose more time between threads than in them
