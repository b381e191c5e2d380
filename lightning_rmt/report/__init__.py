"""A `Reading` to TensorBoard, to any other logger, to figures and files. Computes nothing: it formats what is there."""
