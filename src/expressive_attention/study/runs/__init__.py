"""Runs: the cells on disk, their scheduler, the engines that train them, progress and loggers."""
