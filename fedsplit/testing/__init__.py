"""For the tests of schemes: situations to plan for, and a whole federation in one process.

`fedsplit.testing.scenes` needs neither torch nor Flower.
"""
