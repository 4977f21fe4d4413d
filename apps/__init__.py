"""The Flower apps and the command line; the only part that knows Hydra."""

from .launch.surroundings import append_users_modules

append_users_modules()
