"""The network to train: the origin of its parameters, files of weights and their layouts."""
