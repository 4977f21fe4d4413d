"""Names of tasks, and of types of quantised weights."""

CAUSAL = "causal-lm"
SEQUENCES = "sequence-classification"
IMAGES = "image-classification"
INT8 = "int8"
NF4 = "nf4"
QUANTISED = (INT8, NF4)
CLASSIFIERS = (SEQUENCES, IMAGES)
