"""Starting a run: Flower's processes on this machine or others, and the guard that ends them."""
