"""The Flower apps and the command line; the only part that knows Hydra."""
