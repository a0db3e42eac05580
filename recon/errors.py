"""Errors a user can act on: each message names the value, the rule and the remedy."""


class ReconError(Exception):
    """Base of every error that recon raises on purpose."""


class ConfigError(ReconError):
    """A configuration value breaks a rule; nothing was started."""


class CapabilityMissing(ReconError):
    """A method needs something of the model family that its adapter does not offer."""


class WeightsError(ReconError):
    """Weights are missing, cut short or do not fit the network."""


class CalibrationError(ReconError):
    """A calibration set is foreign, too small or damaged."""


class CheckpointMismatch(ReconError):
    """A checkpoint or a run folder belongs to another configuration, or is damaged."""


class BudgetError(ReconError):
    """A memory or disk budget is too small for what the run must keep."""


class NumericsError(ReconError):
    """A tensor that must be finite holds NaN or Inf."""


class ExportError(ReconError):
    """A result cannot be written in a format, or what was written does not load as it should."""
