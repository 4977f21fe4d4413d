"""Names of tasks."""

CAUSAL = "causal-lm"
SEQUENCES = "sequence-classification"
IMAGES = "image-classification"
CLASSIFIERS = (SEQUENCES, IMAGES)
