"""What the author of a scheme imports; needs neither torch nor Flower."""
