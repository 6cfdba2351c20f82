"""The science and the protocol of fedsam: models, data, learning, secure sums.

Imports neither ray, nor mlflow, nor s3fs: a whole federation runs in one process without them.
"""

__version__ = "0.1.0"
