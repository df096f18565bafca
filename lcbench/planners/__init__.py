"""Planners: which ranks share which document of a batch, micro-batch by micro-batch. One file each."""
