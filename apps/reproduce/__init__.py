"""``fedsplit reproduce``: the six papers' comparisons."""
