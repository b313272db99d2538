"""The exceptions of nmflow: each message is one sentence with the name, the value and the mend."""


class NMFlowError(ValueError):
    """Base of every error that nmflow raises on purpose."""


class PatternError(NMFlowError):
    """A pattern that cannot be read, or that does not fit a weight."""


class WeightError(NMFlowError):
    """A weight that has no mask: not finite, of the wrong dtype or of the wrong shape."""


class PlanError(NMFlowError):
    """A choice of weights that matches nothing, or that cannot be cut into groups."""


class RecipeError(NMFlowError):
    """A recipe whose phases, decay or options cannot be carried out."""


class FlowError(NMFlowError):
    """A model, optimizer or moment that a flow cannot be attached to or used at."""


class StateError(FlowError):
    """A saved or loaded state that does not belong to this flow, or weights changed behind it."""


class DistillError(NMFlowError):
    """A teacher that does not fit its student, or weights of a loss that cannot be."""


class CompressError(NMFlowError):
    """A module or a weight that cannot be packed."""


class FileFormatError(NMFlowError):
    """A saved file that is damaged, hostile, or not of this format."""


class ConfigError(NMFlowError):
    """A configuration file with an unknown key, a wrong type or a missing file."""


class DataError(NMFlowError):
    """Data that cannot be read, or that does not fit the task."""


class NMFlowWarning(UserWarning):
    """Something legal that is probably not what was meant."""
