"""Errors a person can act on.

Every message names the thing that is wrong (file, key, site) and the fix, in one line. The command line prints it
without a traceback and exits with 2; anything that is not a `FedsamError` is a bug and keeps its traceback.
"""


class FedsamError(Exception):
    """Base of all errors that are the input's or the environment's, not the program's."""


class ConfigError(FedsamError):
    """A configuration key or value is wrong."""


class DataError(FedsamError):
    """A scan, a mask, a cohort or a split is unusable."""


class UnreadableScan(DataError):
    """A file or a DICOM series that cannot be opened or decoded."""


class UnfitScan(DataError):
    """A scan that was read but cannot be used: not 3D, NaN, empty, no affine."""


class UnfitMask(DataError):
    """A label map that does not fit its scan or the classes."""


class SelectionError(FedsamError):
    """A layer selection does not fit the model."""


class CheckpointError(FedsamError):
    """Weights do not fit the model, or the file is not a checkpoint."""


class TrainingError(FedsamError):
    """Training at a site cannot go on (NaN loss, no training slice)."""


class SecureSumError(FedsamError):
    """The secure sum refused a message, a state or a value."""


class RoundError(FedsamError):
    """A round could not be completed with enough sites."""


class ClusterError(FedsamError):
    """The Ray cluster lacks something that the run needs."""


class StoreError(FedsamError):
    """An object store or tracking server cannot be used."""


class TrialError(FedsamError):
    """Trials of a study failed; the others have been run."""
